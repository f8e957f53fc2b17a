"""Every kernel launched as it is in training: bfloat16, Llama's shapes, through the code that launches it on a GPU.

Nothing here looks at a value, so that the tensors may be on the `meta` device, or be memory that nobody has written.

M = 2048 rows of activations, K = 4096 inputs, N = 14336 outputs, ranks 16 and 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_kernels.frozen import Blocks, Frozen, Nested
from lora_kernels.gpu import linear, lora, nf4, nf4_linear, norm, philox, rope, swiglu
from lora_kernels.gpu.cross_entropy import differentiate_logits

M, K, N = 2048, 4096, 14336
C = 256
"""Rows of logits at a time."""
DROPOUT, SEED = 0.1, 1 << 40


@dataclass(frozen=True)
class Launch:
    run: Callable[[], object]
    minimum_bytes: int
    """What the operation must read and write, each tensor once, however it is computed."""
    matrix_rows: int = 0
    """Of the tiles that are multiplied; 0 where nothing is."""
    loads_128: float = 0.85
    """Least share of the bytes loaded that is loaded by 128 bits at a time."""
    stores_128: float = 0.85


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def packed(rows: int, columns: int, nested: bool) -> Frozen:
    """Returns a weight in NF4, with blocks of 64 and groups of 256 of them."""
    blocks = rows * columns // 64
    group = Nested(*(tensor(size, dtype=torch.float32) for size in (blocks // 256, 256)), torch.empty(()), 256)
    absmax = tensor(blocks, dtype=torch.uint8 if nested else torch.float32)
    scales = Blocks(absmax, tensor(16, dtype=torch.float32), 64, group if nested else None)
    return Frozen(tensor(rows * columns // 2, dtype=torch.uint8), (rows, columns), scales)


def float32(*shape: int) -> torch.Tensor:
    return tensor(*shape, dtype=torch.float32)


def rms_norm(rank: int, residual: bool) -> None:
    x_MK, a_RK = tensor(M, K), tensor(rank, K) if rank else None
    h_MK, residual_MK = (tensor(M, K), tensor(M, K)) if residual else (tensor(0, K), None)
    norm.forward_into(tensor(M, K + rank), h_MK, float32(M), x_MK, residual_MK, tensor(K), a_RK, 1e-5)


def rms_norm_backward(rank: int, want_weight: bool) -> None:
    dy_MS, y_MS, a_RK = tensor(M, K + rank), tensor(M, K + rank), tensor(rank, K) if rank else None
    norm.backward(dy_MS, tensor(M, K), y_MS, tensor(M, K), float32(M), tensor(K), a_RK, want_weight)


def swiglu_backward(rank: int) -> None:
    h_MN, a_RN = (tensor(M, N), tensor(rank, N)) if rank else (None, None)
    swiglu.backward_into(tensor(M, N), tensor(M, N), h_MN, tensor(M, N + rank), tensor(M, N), tensor(M, N), a_RN)


def rotate(inverse: bool) -> None:
    """Heads of 128, 32 of them for q and 8 for k, in memory as products of the projections are."""
    q, q_out = (tensor(1, M, 32, 128).transpose(1, 2) for _ in range(2))
    k, k_out = (tensor(1, M, 8, 128).transpose(1, 2) for _ in range(2))
    rope.rotate_into(q_out, k_out, q, k, tensor(1, M, 128), tensor(1, M, 128), inverse)


def cross_entropy(words: int, softcap: float) -> None:
    labels_C = torch.zeros(C, dtype=torch.int64)
    differentiate_logits(tensor(C, -(-words // 16) * 16), words, labels_C, 1.0, softcap, need_gradient=True)


def product(rows: int, rank: int) -> None:
    w_KN, b_RN = tensor(N, K).t(), tensor(N, rank).t()
    linear.adapted_product(tensor(rows, K), w_KN, tensor(rows, rank), b_RN, None, 2.0)


def product_backward(rank: int, dropout: float) -> None:
    w_NK, a_RK, ds_MR = tensor(N, K), tensor(rank, K), tensor(M, rank)
    linear.adapted_product(tensor(M, N), w_NK, ds_MR, a_RK, None, 1.0, dropout=dropout, seed=SEED)


def product_4bit(rows: int, forward: bool) -> None:
    inner, outer = (K, N) if forward else (N, K)
    up = tensor(N, 16).t() if forward else tensor(16, K)
    left, narrow, weight = tensor(rows, inner), tensor(rows, 16), packed(N, K, nested=True)
    nf4_linear.adapted_product(left, weight, narrow, up, None, 2.0, forward=forward)


def narrow(rank: int, wide: int) -> int:
    """Returns the bytes of M rows of the wide and of the narrow side of an adapter, and of its matrix."""
    return 2 * (M * wide + M * rank + rank * wide)


def products(rows: int, rank: int) -> int:
    """Returns the bytes of what a product with the weight and its adapter reads and writes, the weight apart."""
    return 2 * (rows * (K + N) + rank * (rows + K + N))


NF4 = N * K // 2 + N * K // 64
"""Bytes of a weight with nested scales, give or take a thousandth."""

SCALED = 0.4
"""A thread looks up a scale, in up to four narrow loads, for a vector or two of packed weights."""
NARROW = 0.0
"""A block of 32 rows and 16 ranks leaves each thread 64 bits to store."""

LAUNCHES = {
    "nf4": Launch(
        lambda: nf4.dequantize_into(tensor(N, K), packed(N, K, nested=False)),
        N * K // 2 + N * K // 64 * 4 + 2 * N * K,
        loads_128=SCALED,
    ),
    "nf4 nested": Launch(
        lambda: nf4.dequantize_into(tensor(N, K), packed(N, K, nested=True)), NF4 + 2 * N * K, loads_128=SCALED
    ),
    "nf4 rows apart": Launch(
        lambda: nf4.dequantize_into(tensor(N, K + 64)[:, :K], packed(N, K, nested=True)),
        NF4 + 2 * N * K,
        loads_128=SCALED,
    ),
    "lora_down r=16": Launch(
        lambda: lora.down(tensor(M, K), tensor(16, K), 0.0, SEED), narrow(16, K), matrix_rows=32, stores_128=NARROW
    ),
    "lora_down r=16 dropout": Launch(
        lambda: lora.down(tensor(M, K), tensor(16, K), DROPOUT, SEED), narrow(16, K), matrix_rows=32, stores_128=NARROW
    ),
    "lora_down r=64 dropout": Launch(
        lambda: lora.down(tensor(M, N), tensor(64, N), DROPOUT, SEED), narrow(64, N), matrix_rows=32
    ),
    "lora_bwd_up r=16": Launch(
        lambda: lora.up_backward(tensor(M, N), tensor(N, 16), tensor(M, 16), 2.0),
        narrow(16, N) + 2 * M * 16 + 4 * N * 16,
        matrix_rows=128,
    ),
    "lora_bwd_up r=64": Launch(
        lambda: lora.up_backward(tensor(M, N), tensor(N, 64), tensor(M, 64), 2.0),
        narrow(64, N) + 2 * M * 64 + 4 * N * 64,
        matrix_rows=128,
    ),
    "lora_down dA r=16": Launch(
        lambda: lora.down_weight_gradient(tensor(M, 16), tensor(M, K), 0.0, SEED),
        narrow(16, K) + 2 * 16 * K,
        matrix_rows=16,
        loads_128=0.75,  # ds[32, 16] by 4 warps: 64 bits a thread
    ),
    "lora_down dA r=64 dropout": Launch(
        lambda: lora.down_weight_gradient(tensor(M, 64), tensor(M, K), DROPOUT, SEED),
        narrow(64, K) + 2 * 64 * K,
        matrix_rows=64,
    ),
    "lora_down dx r=16 dropout": Launch(
        lambda: lora.down_input_gradient(tensor(M, 16), tensor(16, K), DROPOUT, SEED), narrow(16, K), matrix_rows=64
    ),
    "lora_down dx r=64 dropout": Launch(
        lambda: lora.down_input_gradient(tensor(M, 64), tensor(64, K), DROPOUT, SEED), narrow(64, K), matrix_rows=64
    ),
    "rms_norm_lora": Launch(lambda: rms_norm(rank=0, residual=True), 4 * 2 * M * K),
    "rms_norm_lora r=64": Launch(
        lambda: rms_norm(rank=64, residual=True), 3 * 2 * M * K + narrow(64, K), matrix_rows=16
    ),
    "rms_norm_lora backward r=64": Launch(
        lambda: rms_norm_backward(rank=64, want_weight=False), 3 * 2 * M * K + narrow(64, K), matrix_rows=16
    ),
    "rms_norm_lora backward weight": Launch(lambda: rms_norm_backward(rank=0, want_weight=True), 4 * 2 * M * K),
    "swiglu_lora": Launch(lambda: swiglu.forward_into(tensor(M, N), tensor(M, N), tensor(M, N), None), 3 * 2 * M * N),
    "swiglu_lora r=16": Launch(
        lambda: swiglu.forward_into(tensor(M, N + 16), tensor(M, N), tensor(M, N), tensor(16, N)),
        2 * 2 * M * N + narrow(16, N),
        matrix_rows=16,
    ),
    "swiglu_lora backward": Launch(lambda: swiglu_backward(rank=0), 5 * 2 * M * N),
    "swiglu_lora backward r=64": Launch(
        lambda: swiglu_backward(rank=64), 5 * 2 * M * N + narrow(64, N), matrix_rows=16
    ),
    "rope": Launch(lambda: rotate(inverse=False), 2 * 2 * M * (32 + 8 + 1) * 128),
    "cross_entropy": Launch(lambda: cross_entropy(128256, softcap=0.0), 2 * 2 * C * 128256),
    "cross_entropy softcap odd": Launch(lambda: cross_entropy(50257, softcap=30.0), 2 * 2 * C * 50257),
    "product r=16": Launch(lambda: product(M, rank=16), 2 * N * K + products(M, 16), matrix_rows=128),
    "product r=64 M=64": Launch(lambda: product(64, rank=64), 2 * N * K + products(64, 64), matrix_rows=64),
    "product dx r=64 dropout": Launch(
        lambda: product_backward(rank=64, dropout=DROPOUT), 2 * N * K + products(M, 64), matrix_rows=128
    ),
    "product 4-bit M=16": Launch(
        lambda: product_4bit(16, forward=True), NF4 + products(16, 16), matrix_rows=16, loads_128=SCALED
    ),
    "product 4-bit M=64": Launch(
        lambda: product_4bit(64, forward=True), NF4 + products(64, 16), matrix_rows=64, loads_128=SCALED
    ),
    "product 4-bit dx M=64": Launch(
        lambda: product_4bit(64, forward=False), NF4 + products(64, 16), matrix_rows=64, loads_128=SCALED
    ),
    "keep_mask": Launch(lambda: philox.keep_mask(tensor(M, K), DROPOUT, SEED), M * K),
}

"""Every kernel launched as it is in training: Llama's shapes, through the code that launches it on a GPU.

In bfloat16 with ranks 16 and 64, and where registers are scarcest: float32 and float16, ranks off every tile, the rank
of 256, rows that are not aligned. Nothing here looks at a value, so that the tensors may be on the `meta` device, or be
memory that nobody has written.

M = 2048 rows of activations, K = 4096 inputs, N = 14336 outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch

from lora_kernels import dispatch
from lora_kernels.frozen import Blocks, Frozen, Nested
from lora_kernels.gpu import linear, lora, nf4, nf4_linear, norm, philox, rope, swiglu
from lora_kernels.gpu.cross_entropy import differentiate_logits

M, K, N = 2048, 4096, 14336
C = 256
"""Rows of logits at a time."""
DROPOUT, SEED = 0.1, 1 << 40
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Launch:
    run: Callable[[], object]
    minimum_bytes: int
    """What the operation must read and write, each tensor once, however it is computed."""
    matrix_rows: int = 0
    """Of the tiles that are multiplied; 0 where nothing is, or float32, which matrix instructions would round."""
    loads_128: float = 0.85
    """Least share of the bytes loaded that is loaded by 128 bits at a time."""
    stores_128: float = 0.85


def tensor(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
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


def down(wide: int, rank: int, dropout: float, dtype: torch.dtype = BF16) -> None:
    lora.down(tensor(M, wide, dtype=dtype), tensor(rank, wide, dtype=dtype), dropout, SEED)


def down_weight(rank: int, dropout: float, dtype: torch.dtype = BF16) -> None:
    lora.down_weight_gradient(tensor(M, rank, dtype=dtype), tensor(M, K, dtype=dtype), dropout, SEED)


def down_input(rank: int, dtype: torch.dtype = BF16) -> None:
    lora.down_input_gradient(tensor(M, rank, dtype=dtype), tensor(rank, K, dtype=dtype), DROPOUT, SEED)


def up_backward(rank: int, n: int = N, dtype: torch.dtype = BF16) -> None:
    lora.up_backward(*(tensor(*size, dtype=dtype) for size in ((M, n), (n, rank), (M, rank))), 2.0)


def rms_norm(rank: int, residual: bool, dtype: torch.dtype = BF16) -> None:
    x_MK, weight_K = tensor(M, K, dtype=dtype), tensor(K, dtype=dtype)
    y_MS, a_RK = tensor(M, K + rank, dtype=dtype), tensor(rank, K, dtype=dtype) if rank else None
    h_MK, residual_MK = (torch.empty_like(x_MK), torch.empty_like(x_MK)) if residual else (x_MK[:0], None)
    norm.forward_into(y_MS, h_MK, float32(M), x_MK, residual_MK, weight_K, a_RK, 1e-5)


def rms_norm_of_few() -> None:
    with mock.patch.object(dispatch, "gpu", return_value=dispatch.Gpu("a card", "", multiprocessors=M)):
        rms_norm(rank=64, residual=True)


def rms_norm_backward(rank: int, want_weight: bool, dtype: torch.dtype = BF16) -> None:
    (dy_MS, y_MS), a_RK = (tensor(M, K + rank, dtype=dtype) for _ in range(2)), tensor(rank, K, dtype=dtype)
    dh_MK, h_MK, weight_K = (tensor(*size, dtype=dtype) for size in ((M, K), (M, K), (K,)))
    norm.backward(dy_MS, dh_MK, y_MS, h_MK, float32(M), weight_K, a_RK if rank else None, want_weight)


def activation(rank: int, dtype: torch.dtype = BF16) -> None:
    h_MS, gate_MN, up_MN, a_RN = (tensor(*size, dtype=dtype) for size in ((M, N + rank), (M, N), (M, N), (rank, N)))
    swiglu.forward_into(h_MS, gate_MN, up_MN, a_RN if rank else None)


def swiglu_backward(rank: int, dtype: torch.dtype = BF16) -> None:
    dgate_MN, dup_MN, h_MN, gate_MN, up_MN = (tensor(M, N, dtype=dtype) for _ in range(5))
    dh_MS, a_RN = tensor(M, N + rank, dtype=dtype), tensor(rank, N, dtype=dtype)
    h_MN, a_RN = (h_MN, a_RN) if rank else (None, None)
    swiglu.backward_into(dgate_MN, dup_MN, h_MN, dh_MS, gate_MN, up_MN, a_RN)


def rotate(inverse: bool, dtype: torch.dtype = BF16) -> None:
    """Heads of 128, 32 of them for q and 8 for k, in memory as products of the projections are."""
    q, q_out = (tensor(1, M, 32, 128, dtype=dtype).transpose(1, 2) for _ in range(2))
    k, k_out = (tensor(1, M, 8, 128, dtype=dtype).transpose(1, 2) for _ in range(2))
    rope.rotate_into(q_out, k_out, q, k, tensor(1, M, 128, dtype=dtype), tensor(1, M, 128, dtype=dtype), inverse)


def cross_entropy(words: int, softcap: float, dtype: torch.dtype = BF16) -> None:
    rows_CP, labels_C = tensor(C, -(-words // 16) * 16, dtype=dtype), torch.zeros(C, dtype=torch.int64)
    differentiate_logits(rows_CP, words, labels_C, 1.0, softcap, need_gradient=True)


def product(rows: int, rank: int, bias: bool = False, dtype: torch.dtype = BF16) -> None:
    w_KN, b_RN = tensor(N, K, dtype=dtype).t(), tensor(N, rank, dtype=dtype).t()
    x_MK, xa_MR, bias_N = (tensor(*size, dtype=dtype) for size in ((rows, K), (rows, rank), (N,)))
    linear.adapted_product(x_MK, w_KN, xa_MR, b_RN, bias_N if bias else None, 2.0)


def product_backward(rank: int, dtype: torch.dtype = BF16) -> None:
    dy_MN, w_NK, a_RK, ds_MR = (tensor(*size, dtype=dtype) for size in ((M, N), (N, K), (rank, K), (M, rank)))
    linear.adapted_product(dy_MN, w_NK, ds_MR, a_RK, None, 1.0, dropout=DROPOUT, seed=SEED)


def product_4bit(rows: int, forward: bool, rank: int = 16, nested: bool = True, bias: bool = False) -> None:
    inner, outer = (K, N) if forward else (N, K)
    up = tensor(N, rank).t() if forward else tensor(rank, K)
    left, narrow, weight = tensor(rows, inner), tensor(rows, rank), packed(N, K, nested)
    nf4_linear.adapted_product(left, weight, narrow, up, tensor(outer) if bias else None, 2.0, forward=forward)


def narrow(rank: int, wide: int, element_bytes: int = 2) -> int:
    """Returns the bytes of M rows of the wide and of the narrow side of an adapter, and of its matrix."""
    return element_bytes * (M * wide + M * rank + rank * wide)


def up(rank: int, n: int = N) -> int:
    """Returns the bytes of what `lora_bwd_up` reads and writes."""
    return narrow(rank, n) + 2 * M * rank + 4 * n * rank


def products(rows: int, rank: int) -> int:
    """Returns the bytes of what a product with the weight and its adapter reads and writes, the weight apart."""
    return 2 * (rows * (K + N) + rank * (rows + K + N))


NF4 = N * K // 2 + N * K // 64
"""Bytes of a weight with nested scales, give or take a thousandth."""

SCALED = 0.4
"""A thread looks up a scale, in up to four narrow loads, for a vector or two of packed weights."""
NARROW = 0.0
"""A block of 32 rows and 16 ranks leaves each thread 64 bits to store."""

UNALIGNED = 0.0
"""Rows that do not begin on 16 bytes."""

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
    "nf4 float32": Launch(
        lambda: nf4.dequantize_into(float32(N, K), packed(N, K, nested=True)), NF4 + 4 * N * K, loads_128=SCALED
    ),
    "lora_down r=16": Launch(lambda: down(K, rank=16, dropout=0.0), narrow(16, K), matrix_rows=32, stores_128=NARROW),
    "lora_down r=16 dropout": Launch(
        lambda: down(K, rank=16, dropout=DROPOUT), narrow(16, K), matrix_rows=32, stores_128=NARROW
    ),
    "lora_down r=64 dropout": Launch(lambda: down(N, rank=64, dropout=DROPOUT), narrow(64, N), matrix_rows=32),
    "lora_down r=64 dropout float32": Launch(lambda: down(K, 64, DROPOUT, FP32), narrow(64, K, 4)),
    "lora_bwd_up r=16": Launch(lambda: up_backward(rank=16), up(16), matrix_rows=128),
    "lora_bwd_up r=16 float16": Launch(lambda: up_backward(rank=16, dtype=FP16), up(16), matrix_rows=128),
    "lora_bwd_up r=32": Launch(lambda: up_backward(rank=32), up(32), matrix_rows=128),
    "lora_bwd_up r=8": Launch(
        lambda: up_backward(rank=8), up(8), matrix_rows=128, loads_128=UNALIGNED, stores_128=UNALIGNED
    ),
    "lora_bwd_up r=1 N=4091": Launch(
        lambda: up_backward(rank=1, n=4091), up(1, 4091), matrix_rows=128, loads_128=UNALIGNED, stores_128=UNALIGNED
    ),
    "lora_down dA r=16": Launch(
        lambda: down_weight(rank=16, dropout=0.0),
        narrow(16, K) + 2 * 16 * K,
        matrix_rows=16,
        loads_128=0.75,  # ds[32, 16] by 4 warps: 64 bits a thread
    ),
    "lora_down dA r=64 dropout": Launch(
        lambda: down_weight(rank=64, dropout=DROPOUT), narrow(64, K) + 2 * 64 * K, matrix_rows=64
    ),
    "lora_down dA r=64 dropout float32": Launch(lambda: down_weight(64, DROPOUT, FP32), narrow(64, K, 4)),
    "lora_down dx r=16 dropout": Launch(lambda: down_input(rank=16), narrow(16, K), matrix_rows=64),
    "lora_down dx r=64 dropout": Launch(lambda: down_input(rank=64), narrow(64, K), matrix_rows=64),
    "lora_down dx r=64 dropout float32": Launch(lambda: down_input(64, FP32), narrow(64, K, 4)),
    "rms_norm_lora": Launch(lambda: rms_norm(rank=0, residual=True), 4 * 2 * M * K),
    "rms_norm_lora r=64": Launch(
        lambda: rms_norm(rank=64, residual=True), 3 * 2 * M * K + narrow(64, K), matrix_rows=16
    ),
    "rms_norm_lora r=64 few rows": Launch(rms_norm_of_few, 3 * 2 * M * K + narrow(64, K)),
    "rms_norm_lora r=64 float32": Launch(lambda: rms_norm(64, True, FP32), 3 * 4 * M * K + narrow(64, K, 4)),
    "rms_norm_lora backward r=64": Launch(
        lambda: rms_norm_backward(rank=64, want_weight=False), 3 * 2 * M * K + narrow(64, K), matrix_rows=16
    ),
    "rms_norm_lora backward r=64 float32": Launch(
        lambda: rms_norm_backward(64, False, FP32), 3 * 4 * M * K + narrow(64, K, 4)
    ),
    "rms_norm_lora backward weight": Launch(lambda: rms_norm_backward(rank=0, want_weight=True), 4 * 2 * M * K),
    "swiglu_lora": Launch(lambda: activation(rank=0), 3 * 2 * M * N),
    "swiglu_lora r=16": Launch(lambda: activation(rank=16), 2 * 2 * M * N + narrow(16, N), matrix_rows=16),
    "swiglu_lora r=64 float32": Launch(lambda: activation(64, FP32), 2 * 4 * M * N + narrow(64, N, 4)),
    "swiglu_lora backward": Launch(lambda: swiglu_backward(rank=0), 5 * 2 * M * N),
    "swiglu_lora backward r=64": Launch(
        lambda: swiglu_backward(rank=64), 5 * 2 * M * N + narrow(64, N), matrix_rows=16
    ),
    "swiglu_lora backward r=64 float32": Launch(lambda: swiglu_backward(64, FP32), 5 * 4 * M * N + narrow(64, N, 4)),
    "rope": Launch(lambda: rotate(inverse=False), 2 * 2 * M * (32 + 8 + 1) * 128),
    "rope float32": Launch(lambda: rotate(False, FP32), 2 * 4 * M * (32 + 8 + 1) * 128),
    "cross_entropy": Launch(lambda: cross_entropy(128256, softcap=0.0), 2 * 2 * C * 128256),
    "cross_entropy float32": Launch(lambda: cross_entropy(128256, 0.0, FP32), 2 * 4 * C * 128256),
    "cross_entropy softcap odd": Launch(lambda: cross_entropy(50257, softcap=30.0), 2 * 2 * C * 50257),
    "product r=16": Launch(lambda: product(M, rank=16), 2 * N * K + products(M, 16), matrix_rows=128),
    "product r=64 M=64": Launch(lambda: product(64, rank=64), 2 * N * K + products(64, 64), matrix_rows=64),
    "product r=256 bias": Launch(lambda: product(M, rank=256, bias=True), 2 * N * K + products(M, 256), matrix_rows=64),
    "product dx r=64 dropout": Launch(lambda: product_backward(rank=64), 2 * N * K + products(M, 64), matrix_rows=128),
    "product dx r=256 dropout float16": Launch(
        lambda: product_backward(256, FP16), 2 * N * K + products(M, 256), matrix_rows=64
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
    "product 4-bit M=64 r=40 bias plain scales": Launch(
        lambda: product_4bit(64, True, rank=40, nested=False, bias=True),
        NF4 + 3 * N * K // 64 + products(64, 40),
        matrix_rows=64,
        loads_128=SCALED,
    ),
    "keep_mask": Launch(lambda: philox.keep_mask(tensor(M, K), DROPOUT, SEED), M * K),
}

"""A frozen linear layer and its adapter as one operation.

M rows of activations, N outputs and K inputs of a weight, R the rank of an adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from lora_kernels import backend, dispatch, lora
from lora_kernels.dispatch import Path
from lora_kernels.dropout import new_seed
from lora_kernels.frozen import Frozen
from lora_kernels.nf4 import nf4_dequant
from lora_kernels.operators import Operator
from lora_kernels.slabs import dense_slabs


def lora_linear(
    x: torch.Tensor,
    weight: Frozen,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor:
    """Returns x @ W.T + bias + scaling * dropout(x) @ a.T @ b.T: [..., N] in the dtype of `x`.

    x is [..., K], a [R, K] and b [N, R], each in a float dtype of its own; differentiable in x, bias, a and b. Keeps x
    and the [M, R] product for the backward pass, but no dense weight and no mask: the weight is dequantized again, and
    the mask made again from `seed`, which is drawn here where it is None.
    """
    if dropout and seed is None:
        seed = new_seed()
    x_MK = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    y_MN, _ = _lora_linear(x_MK, *weight.flat(), bias, a, b, scaling, dropout, 0 if seed is None else seed)
    return y_MN if x.ndim == 2 else y_MN.view(*x.shape[:-1], y_MN.shape[1])


def dense(weight: Frozen, dtype: torch.dtype) -> torch.Tensor:
    """Returns the weight as [N, K] in `dtype`: itself if it is that already."""
    return weight.data.to(dtype) if weight.blocks is None else nf4_dequant(weight, dtype)


def _forward(
    x_MK: torch.Tensor,
    weight: Frozen,
    bias_N: torch.Tensor | None,
    a_RK: torch.Tensor,
    b_NR: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    x_MK = x_MK.to(backend.product_dtype(x_MK))
    xa_MR = lora.down(x_MK, a_RK, dropout, seed)
    return product(x_MK, weight, bias_N, xa_MR, b_NR, scaling), xa_MR


def product(
    x_MK: torch.Tensor,
    weight: Frozen,
    bias_N: torch.Tensor | None,
    xa_MR: torch.Tensor,
    b_NR: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Returns x @ W.T + bias + scaling * xa @ b.T, [M, N] in the dtype of `x`; both it and xa's can be multiplied."""
    dtype, b_RN = x_MK.dtype, b_NR.to(xa_MR.dtype).t()
    path = choose_path(x_MK, weight)
    if path == "triton_4bit":
        from lora_kernels.gpu import nf4_linear

        return nf4_linear.adapted_product(x_MK, weight, xa_MR, b_RN, bias_N, scaling, forward=True)
    if path == "triton":
        from lora_kernels.gpu import linear

        return linear.adapted_product(x_MK, dense(weight, dtype).t(), xa_MR, b_RN, bias_N, scaling)
    if path == "gemm_4bit":
        bias_N = None if bias_N is None else bias_N.to(dtype)
        return _gemm_4bit(x_MK, weight, bias_N).addmm_(xa_MR, b_RN, alpha=scaling)
    # The narrow product first: then the wide one reads and rounds it, instead of being read and rounded again itself.
    y_MN = _narrow_product(xa_MR, b_RN, bias_N, scaling).to(dtype)
    x_MK = backend.readable(x_MK)
    for rows, w in parts(weight, dtype, x_MK):
        y_MN[:, rows].addmm_(x_MK, w.t())
    return y_MN


def _narrow_product(
    xa_MR: torch.Tensor, b_RN: torch.Tensor, bias_N: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Returns scaling * xa @ b.T + bias in the dtype of `xa`."""
    xa_MR = backend.readable(xa_MR)
    if bias_N is not None:
        return torch.addmm(bias_N.to(xa_MR.dtype), xa_MR, b_RN, alpha=scaling)
    return xa_MR.new_empty(xa_MR.shape[0], b_RN.shape[1]).addmm_(xa_MR, b_RN, beta=0, alpha=scaling)


def _backward(
    dy_MN: torch.Tensor,
    x_MK: torch.Tensor,
    weight: Frozen,
    a_RK: torch.Tensor,
    b_NR: torch.Tensor,
    xa_MR: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: int,
    need_dx: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    dtype = backend.product_dtype(x_MK)
    dy_MN = dy_MN.to(dtype)
    if dy_MN.stride(1) != 1:
        # The gradient of a sum: one copy here, or one in each of the three products below.
        dy_MN = dy_MN.contiguous()
    ds_MR, db_NR = lora.up_backward(dy_MN, b_NR, xa_MR, scaling)
    path = choose_path(x_MK, weight)
    fused = need_dx and path in ("triton", "triton_4bit")
    dx_MK, da_RK = lora.down_backward(ds_MR, x_MK, a_RK, dropout, seed, need_dx and not fused)
    if fused:
        dx_MK = _fused_dx(path, dy_MN, weight, ds_MR, a_RK.to(dtype), dropout, seed)
    elif dx_MK is not None:
        dx_MK = dx_MK.to(dtype)
        add_input_gradient(dx_MK, dy_MN, weight, beta=1)
    return dx_MK, da_RK, db_NR


def add_input_gradient(dx_MK: torch.Tensor, dy_MN: torch.Tensor, weight: Frozen, beta: int) -> None:
    """Makes `dx_MK` beta * dx + dy @ W, a slab of the weight at a time on a CPU."""
    for rows, w in parts(weight, dx_MK.dtype, dx_MK):
        dx_MK.addmm_(backend.readable(dy_MN[:, rows]), w, beta=beta)
        beta = 1


def _fused_dx(
    path: Path,
    dy_MN: torch.Tensor,
    weight: Frozen,
    ds_MR: torch.Tensor,
    a_RK: torch.Tensor,
    dropout: float,
    seed: int,
) -> torch.Tensor:
    from lora_kernels.gpu import linear, nf4_linear

    if path == "triton_4bit":
        product = functools.partial(nf4_linear.adapted_product, dy_MN, weight, forward=False)
    else:
        product = functools.partial(linear.adapted_product, dy_MN, dense(weight, dy_MN.dtype))
    return product(ds_MR, a_RK, None, 1.0, dropout=dropout, seed=seed)


def parts(weight: Frozen, dtype: torch.dtype, x_MK: torch.Tensor) -> Iterable[tuple[slice, torch.Tensor]]:
    """Returns rows of the weight and what they are in `dtype`: all of them on a GPU, a slab at a time on a CPU."""
    if backend.is_triton(x_MK):
        return [(slice(0, weight.shape[0]), dense(weight, dtype))]
    return dense_slabs(weight, dtype)


def choose_path(x_MK: torch.Tensor, weight: Frozen) -> Path:
    """Returns the way chosen for these rows, or `dequant` where the weight is not one that it takes."""
    if not backend.is_triton(x_MK):
        return "dequant"
    card, packed = dispatch.gpu(x_MK.device), weight.blocks is not None
    path = dispatch.choose(len(x_MK), *weight.shape, card, packed, x_MK.dtype)
    if path == "triton_4bit":
        from lora_kernels.gpu import nf4_linear

        return path if nf4_linear.takes(weight) else "dequant"
    if path == "gemm_4bit":
        return path if _gemm_4bit_takes(weight) else "dequant"
    return path


def _gemm_4bit_takes(weight: Frozen) -> bool:
    """Returns whether the kernel of bitsandbytes takes the weight: whole blocks in a row, scales in groups of 256."""
    blocks = weight.blocks
    if blocks is None or weight.shape[1] % blocks.size:
        return False
    return blocks.nested is None or blocks.nested.size == 256


def _gemm_4bit(x_MK: torch.Tensor, weight: Frozen, bias_N: torch.Tensor | None) -> torch.Tensor:
    blocks = weight.packed()
    nested, packed = blocks.nested, weight.data.reshape(-1, 1)
    # Of nested scales it wants those of the groups first, and the 8-bit ones last.
    absmax = nested.absmax if nested else blocks.absmax
    scales = (blocks.absmax, nested.code, nested.offset) if nested else ()
    gemm_4bit = torch.ops.bitsandbytes.gemm_4bit.default
    return gemm_4bit(x_MK, packed, weight.shape, absmax, blocks.size, blocks.kind, bias_N, *scales)


@Operator
def _lora_linear(
    x_MK: torch.Tensor,
    data: torch.Tensor,
    absmax: torch.Tensor | None,
    code: torch.Tensor | None,
    blocksize: int,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_size: int,
    rows: int,
    columns: int,
    bias: torch.Tensor | None,
    a_RK: torch.Tensor,
    b_NR: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    nested = (nested_absmax, nested_code, offset, nested_size)
    weight = Frozen.back(data, absmax, code, blocksize, *nested, rows, columns)
    y_MN, xa_MR = _forward(x_MK, weight, bias, a_RK, b_NR, scaling, dropout, seed)
    return y_MN.to(x_MK.dtype), xa_MR


@_lora_linear.register_fake
def _(x_MK: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows, a_RK = rest[8], rest[11]
    xa_MR = x_MK.new_empty((x_MK.shape[0], a_RK.shape[0]), dtype=lora.product_dtype(x_MK))
    return x_MK.new_empty((x_MK.shape[0], rows)), xa_MR


@Operator
def _lora_linear_backward(
    dy_MN: torch.Tensor,
    x_MK: torch.Tensor,
    data: torch.Tensor,
    absmax: torch.Tensor | None,
    code: torch.Tensor | None,
    blocksize: int,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_size: int,
    rows: int,
    columns: int,
    a_RK: torch.Tensor,
    b_NR: torch.Tensor,
    xa_MR: torch.Tensor,
    scaling: float,
    dropout: float,
    seed: int,
    need_dx: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    nested = (nested_absmax, nested_code, offset, nested_size)
    weight = Frozen.back(data, absmax, code, blocksize, *nested, rows, columns)
    dx_MK, da_RK, db_NR = _backward(dy_MN, x_MK, weight, a_RK, b_NR, xa_MR, scaling, dropout, seed, need_dx)
    dx_MK = x_MK.new_empty(0) if dx_MK is None else dx_MK.to(x_MK.dtype)
    return dx_MK, da_RK.to(a_RK.dtype), db_NR.to(b_NR.dtype)


@_lora_linear_backward.register_fake
def _(dy_MN: torch.Tensor, x_MK: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a_RK, b_NR, need_dx = rest[10], rest[11], rest[-1]
    return x_MK.new_empty(x_MK.shape if need_dx else 0), a_RK.new_empty(a_RK.shape), b_NR.new_empty(b_NR.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x_MK, data, absmax, code, blocksize, *nested, nested_size, rows, columns, bias, a_RK, b_NR = inputs[:-3]
    ctx.save_for_backward(x_MK, a_RK, b_NR, output[1], data, absmax, code, *nested)
    ctx.sizes, ctx.adapter = (blocksize, nested_size, rows, columns), inputs[-3:]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy_MN: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    x_MK, a_RK, b_NR, xa_MR, data, absmax, code, *nested = ctx.saved_tensors
    blocksize, *sizes = ctx.sizes
    flat = (data, absmax, code, blocksize, *nested, *sizes)
    need_dx, need_dbias = ctx.needs_input_grad[0], ctx.needs_input_grad[11]
    dx_MK, da_RK, db_NR = _lora_linear_backward(dy_MN, x_MK, *flat, a_RK, b_NR, xa_MR, *ctx.adapter, need_dx)
    dbias_N = dy_MN.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if need_dbias else None
    return (dx_MK if need_dx else None, *[None] * 10, dbias_N, da_RK, db_NR, None, None, None)


_lora_linear.register_autograd(_differentiate, setup_context=_keep_for_backward)

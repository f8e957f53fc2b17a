"""The narrow products of an adapter: down to its rank, and up again in the backward pass.

M rows of activations, N outputs and K inputs of a weight, R the rank of an adapter.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels import backend
from lora_kernels.dropout import ones_and_zeros
from lora_kernels.operators import Operator

MANY = 32
"""Rows from which on MKL takes half as long over the transpose of dy.T @ xa, and a copy of it, as over the product."""


FEW = 64
"""Rows of 16 bits that a CPU widens for the products with A and B, rather than narrow those: oneDNN takes as long to
begin a product in 16 bits as MKL to finish one of so few rows."""


def lora_down(x: torch.Tensor, a: torch.Tensor, *, dropout: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Returns dropout(x) @ a.T, [..., R] in the dtype of `x`, for x [..., K] and a [R, K].

    The backward pass makes the mask from `seed` again: neither it nor the masked x is kept.
    """
    xa_MR = _lora_down(x.reshape(-1, x.shape[-1]), a, dropout, seed)
    return xa_MR.view(*x.shape[:-1], a.shape[0])


def lora_bwd_up(
    dy_MN: torch.Tensor, b_NR: torch.Tensor, xa_MR: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of scaling * xa @ b.T in xa and b, from one read of `dy`.

    They are scaling * dy @ b, [M, R] in the dtype of `dy`, and scaling * dy.T @ xa, [N, R] float32.
    """
    return _lora_bwd_up(dy_MN, b_NR, xa_MR, scaling)


def product_dtype(x_MK: torch.Tensor) -> torch.dtype:
    """Returns the dtype to multiply rows by A and B in: `backend`'s, or float32 for few rows on a CPU."""
    few = x_MK.shape[0] <= FEW and x_MK.dtype.itemsize == 2 and not backend.is_triton(x_MK)
    return torch.float32 if few else backend.product_dtype(x_MK)


def down(x_MK: torch.Tensor, a_RK: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """Returns dropout(x) @ a.T, [M, R] in the dtype of products with `x`."""
    if backend.is_triton(x_MK):
        from lora_kernels.gpu import lora

        return lora.down(x_MK, a_RK.to(x_MK.dtype), dropout, seed)
    dtype = product_dtype(x_MK)
    x_MK, a_RK = x_MK.to(dtype), a_RK.to(dtype)
    if not dropout:
        return torch.mm(backend.readable(x_MK), a_RK.t())
    return _scaled_product(ones_and_zeros(x_MK, dropout, seed).mul_(x_MK), a_RK.t(), 1 / (1 - dropout))


def up_backward(
    dy_MN: torch.Tensor, b_NR: torch.Tensor, xa_MR: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scaling * dy @ b, [M, R] in the dtype of products with `dy`, and scaling * dy.T @ xa, [N, R] float32."""
    if backend.is_triton(dy_MN):
        from lora_kernels.gpu import lora

        return lora.up_backward(dy_MN, b_NR.to(dy_MN.dtype), xa_MR, scaling)
    dtype = product_dtype(dy_MN)
    dy_MN, xa_MR = dy_MN.to(dtype), xa_MR.to(dtype)
    ds_MR = _scaled_product(dy_MN, b_NR.to(dtype), scaling)
    if len(dy_MN) < MANY:
        return ds_MR, _scaled_product(dy_MN.t(), xa_MR, scaling).to(torch.float32)
    return ds_MR, _scaled_product(xa_MR.t(), dy_MN, scaling).to(torch.float32).t().contiguous()


def _scaled_product(left_MK: torch.Tensor, right_KN: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns scale * left @ right, rounded once: the product is scaled while it is in the registers yet."""
    out_MN = left_MK.new_empty(left_MK.shape[0], right_KN.shape[1])
    return out_MN.addmm_(backend.readable(left_MK), right_KN, beta=0, alpha=scale)


def down_backward(
    ds_MR: torch.Tensor, x_MK: torch.Tensor, a_RK: torch.Tensor, dropout: float, seed: int, need_dx: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Returns dropout(ds @ a), [M, K] in the dtype of `ds`, and ds.T @ dropout(x), [R, K] float32."""
    a_RK = a_RK.to(ds_MR.dtype)
    if backend.is_triton(x_MK):
        from lora_kernels.gpu import lora

        dx_MK = lora.down_input_gradient(ds_MR, a_RK, dropout, seed) if need_dx else None
        return dx_MK, lora.down_weight_gradient(ds_MR, x_MK, dropout, seed)
    x_MK, mask_MK, scale = x_MK.to(ds_MR.dtype), None, 1 / (1 - dropout)
    if dropout:
        mask_MK = ones_and_zeros(x_MK, dropout, seed)
        x_MK = x_MK * mask_MK
    dx_MK = _scaled_product(ds_MR, a_RK, scale) if need_dx else None
    if dx_MK is not None and mask_MK is not None:
        dx_MK.mul_(mask_MK)
    return dx_MK, _scaled_product(ds_MR.t(), x_MK, scale).to(torch.float32)


@Operator
def _lora_down(x_MK: torch.Tensor, a_RK: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    return down(x_MK, a_RK, dropout, seed).to(x_MK.dtype)


@_lora_down.register_fake
def _(x_MK: torch.Tensor, a_RK: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    return x_MK.new_empty((x_MK.shape[0], a_RK.shape[0]))


@Operator
def _lora_down_backward(
    dxa_MR: torch.Tensor, x_MK: torch.Tensor, a_RK: torch.Tensor, dropout: float, seed: int, need_dx: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    ds_MR = dxa_MR.to(product_dtype(x_MK))
    dx_MK, da_RK = down_backward(ds_MR, x_MK, a_RK, dropout, seed, need_dx)
    return x_MK.new_empty(0) if dx_MK is None else dx_MK.to(x_MK.dtype), da_RK.to(a_RK.dtype)


@_lora_down_backward.register_fake
def _(
    dxa_MR: torch.Tensor, x_MK: torch.Tensor, a_RK: torch.Tensor, dropout: float, seed: int, need_dx: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return x_MK.new_empty(x_MK.shape if need_dx else 0), a_RK.new_empty(a_RK.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x_MK, a_RK, ctx.dropout, ctx.seed = inputs
    ctx.save_for_backward(x_MK, a_RK)


def _differentiate(ctx: Any, dxa_MR: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    need_dx = ctx.needs_input_grad[0]
    dx_MK, da_RK = _lora_down_backward(dxa_MR, *ctx.saved_tensors, ctx.dropout, ctx.seed, need_dx)
    return dx_MK if need_dx else None, da_RK, None, None


_lora_down.register_autograd(_differentiate, setup_context=_keep_for_backward)


@Operator
def _lora_bwd_up(
    dy_MN: torch.Tensor, b_NR: torch.Tensor, xa_MR: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    ds_MR, db_NR = up_backward(dy_MN, b_NR, xa_MR, scaling)
    return ds_MR.to(dy_MN.dtype), db_NR


@_lora_bwd_up.register_fake
def _(
    dy_MN: torch.Tensor, b_NR: torch.Tensor, xa_MR: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return dy_MN.new_empty((dy_MN.shape[0], b_NR.shape[1])), dy_MN.new_empty(b_NR.shape, dtype=torch.float32)

"""The RMS norm of a Llama block, with the sum before it and the down projection of the adapters after it.

M rows, K columns, R the rank of all adapters that share the norm, S = K + R.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels import backend
from lora_kernels.cpu import loops
from lora_kernels.matmul import matmul_float32
from lora_kernels.operators import Operator
from lora_kernels.slabs import row_blocks


def rms_norm_lora(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, a: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ([norm | norm @ a.T], h) where h = x + residual and norm = weight * (h / rms(h)).

    The norm and its low-rank image share rows of one tensor [..., K + R], so that one plain matrix product can follow.
    It rounds where LlamaRMSNorm of Hugging Face does: h / rms(h) to the dtype of `x`, then the product with `weight`.

    Args:
        x: [..., K].
        residual: of the shape and dtype of `x`, or None, where h is `x` itself.
        weight: [K].
        a: [R, K] of any float dtype, read in that of `x`, with a gradient in its own. None where R is 0.
        eps: Added to the mean of squares.

    Raises:
        ValueError: `residual` and `x` differ in dtype or shape, or the weight is not [K].
    """
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        sizes = [list(part.shape) for part in (x, weight, residual) if part is not None]
        raise ValueError(f"rms_norm_lora: x, weight and residual must be [..., K], [K] and as x, got {sizes}.")
    if residual is None:
        x_MK, residual_MK = x.reshape(-1, x.shape[-1]), None
    elif residual.dtype == x.dtype:
        x_MK, residual_MK = x.reshape(-1, x.shape[-1]), residual.reshape(-1, x.shape[-1])
    else:
        raise ValueError(f"rms_norm_lora: x is {x.dtype} and residual {residual.dtype}; cast one to the other.")
    y_MS, h_MK, _ = _rms_norm_lora(x_MK, residual_MK, weight, a, eps)
    return y_MS.view(*x.shape[:-1], y_MS.shape[1]), x if residual is None else h_MK.view(x.shape)


def _empty_outputs(
    x_MK: torch.Tensor, residual_MK: torch.Tensor | None, weight_K: torch.Tensor, a_RK: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y_MS, h_MK and rstd_M; no h where it would be x, as an operator must not give back what it was given."""
    rows, columns = x_MK.shape
    y_MS = x_MK.new_empty((rows, columns + (0 if a_RK is None else a_RK.shape[0])))
    h_MK = x_MK.new_empty((0, columns) if residual_MK is None else (rows, columns))
    return y_MS, h_MK, x_MK.new_empty(rows, dtype=torch.float32)


@Operator
def _rms_norm_lora(
    x_MK: torch.Tensor, residual_MK: torch.Tensor | None, weight_K: torch.Tensor, a_RK: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = _empty_outputs(x_MK, residual_MK, weight_K, a_RK, eps)
    a_RK = None if a_RK is None else a_RK.to(x_MK.dtype)
    if backend.is_triton(x_MK):
        from lora_kernels.gpu import norm

        norm.forward_into(*outputs, x_MK, residual_MK, weight_K, a_RK, eps)
    else:
        _forward_on_cpu(*outputs, x_MK, residual_MK, weight_K, a_RK, eps)
    return outputs


_rms_norm_lora.register_fake(_empty_outputs)


def _forward_on_cpu(
    y_MS: torch.Tensor,
    h_MK: torch.Tensor,
    rstd_M: torch.Tensor,
    x_MK: torch.Tensor,
    residual_MK: torch.Tensor | None,
    weight_K: torch.Tensor,
    a_RK: torch.Tensor | None,
    eps: float,
) -> None:
    columns = x_MK.shape[1]
    if loops.takes(x_MK, residual_MK, weight_K):
        loops.rms_norm_into(y_MS[:, :columns], h_MK, rstd_M, x_MK, residual_MK, weight_K, eps)
    else:
        _forward_in_torch(y_MS[:, :columns], h_MK, rstd_M, x_MK, residual_MK, weight_K, eps)
    if a_RK is not None:
        dtype = backend.product_dtype(y_MS)
        y_MS[:, columns:] = backend.readable(y_MS[:, :columns].to(dtype)) @ a_RK.to(dtype).T


def _forward_in_torch(
    y_MK: torch.Tensor,
    h_MK: torch.Tensor,
    rstd_M: torch.Tensor,
    x_MK: torch.Tensor,
    residual_MK: torch.Tensor | None,
    weight_K: torch.Tensor,
    eps: float,
) -> None:
    h_MK = x_MK if residual_MK is None else h_MK
    for rows in row_blocks(x_MK, torch.float32):
        if residual_MK is not None:
            torch.add(x_MK[rows], residual_MK[rows], out=h_MK[rows])
        # As LlamaRMSNorm computes it, so that not one bit differs.
        wide_BK = h_MK[rows].float()
        rstd_B = torch.rsqrt(wide_BK.pow(2).mean(-1) + eps, out=rstd_M[rows])
        torch.mul((wide_BK * rstd_B[:, None]).to(h_MK.dtype), weight_K, out=y_MK[rows])


def _empty_gradients(
    dy_MS: torch.Tensor,
    dh_MK: torch.Tensor | None,
    y_MS: torch.Tensor,
    h_MK: torch.Tensor,
    rstd_M: torch.Tensor,
    weight_K: torch.Tensor,
    a_RK: torch.Tensor | None,
    want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns dx_MK, da_RK and dweight_K; what nobody asks for is empty."""
    da_RK = rstd_M.new_empty(0) if a_RK is None else torch.empty_like(a_RK, memory_format=torch.contiguous_format)
    return h_MK.new_empty(h_MK.shape), da_RK, weight_K.new_empty(weight_K.shape if want_weight else 0)


@Operator
def _rms_norm_lora_backward(
    dy_MS: torch.Tensor,
    dh_MK: torch.Tensor | None,
    y_MS: torch.Tensor,
    h_MK: torch.Tensor,
    rstd_M: torch.Tensor,
    weight_K: torch.Tensor,
    a_RK: torch.Tensor | None,
    want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    columns = h_MK.shape[1]
    a = None if a_RK is None else a_RK.to(h_MK.dtype)
    if backend.is_triton(dy_MS):
        from lora_kernels.gpu import norm

        dx_MK, dweight_K = norm.backward(dy_MS, dh_MK, y_MS, h_MK, rstd_M, weight_K, a, want_weight)
    else:
        dx_MK, dweight_K = _backward_on_cpu(dy_MS, dh_MK, h_MK, rstd_M, weight_K, a, want_weight)
    if a_RK is None:
        da_RK = rstd_M.new_empty(0)
    else:
        da_RK = matmul_float32(dy_MS[:, columns:].T, y_MS[:, :columns]).to(a_RK.dtype)
    return dx_MK, da_RK, dweight_K.to(weight_K.dtype)


_rms_norm_lora_backward.register_fake(_empty_gradients)


def _backward_on_cpu(
    dy_MS: torch.Tensor,
    dh_MK: torch.Tensor | None,
    h_MK: torch.Tensor,
    rstd_M: torch.Tensor,
    weight_K: torch.Tensor,
    a_RK: torch.Tensor | None,
    want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    columns = h_MK.shape[1]
    a_RK, dx_MK = None if a_RK is None else a_RK.float(), h_MK.new_empty(h_MK.shape)
    dweight_K = rstd_M.new_zeros(columns if want_weight else 0)
    if a_RK is None and not want_weight and loops.takes(dy_MS, dh_MK, h_MK, weight_K):
        loops.differentiate_rms_norm_into(dx_MK, dy_MS, dh_MK, h_MK, rstd_M, weight_K)
        return dx_MK, dweight_K
    for rows in row_blocks(h_MK, torch.float32):
        dy_BK, rstd_B1 = dy_MS[rows, :columns].float(), rstd_M[rows, None]
        if a_RK is not None:
            dy_BK = torch.addmm(dy_BK, dy_MS[rows, columns:].float(), a_RK)
        unit_BK = h_MK[rows].float() * rstd_B1
        if want_weight:
            dweight_K += (dy_BK * unit_BK).sum(0)
        dx_BK = dy_BK * weight_K
        mean_B1 = torch.linalg.vecdot(dx_BK, unit_BK)[:, None] / columns
        dx_BK.addcmul_(unit_BK, mean_B1, value=-1).mul_(rstd_B1)
        if dh_MK is not None:
            dx_BK += dh_MK[rows]
        dx_MK[rows] = dx_BK
    return dx_MK, dweight_K


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x_MK, residual_MK, weight_K, a_RK, _ = inputs
    y_MS, h_MK, rstd_M = output
    ctx.has_residual = residual_MK is not None
    ctx.mark_non_differentiable(rstd_M)
    ctx.set_materialize_grads(False)
    # y is what the product that follows keeps as well, and only the gradient of `a` reads all of it.
    ctx.save_for_backward(y_MS, h_MK if ctx.has_residual else x_MK, rstd_M, weight_K, a_RK)


def _differentiate(
    ctx: Any, dy_MS: torch.Tensor | None, dh_MK: torch.Tensor | None, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if dy_MS is None:
        return dh_MK, dh_MK, None, None, None
    *kept, a_RK = ctx.saved_tensors
    want_weight = ctx.needs_input_grad[2]
    dx_MK, da_RK, dweight_K = _rms_norm_lora_backward(
        dy_MS, dh_MK if ctx.has_residual else None, *kept, a_RK, want_weight
    )
    return (
        dx_MK,
        dx_MK if ctx.has_residual else None,
        dweight_K if want_weight else None,
        None if a_RK is None else da_RK,
        None,
    )


_rms_norm_lora.register_autograd(_differentiate, setup_context=_keep_for_backward)

"""The gated activation of a Llama block, with the down projection of the adapter after it.

M rows, N columns, R the rank of the adapter, S = N + R.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels import backend
from lora_kernels.matmul import matmul_float32
from lora_kernels.operators import Operator


def swiglu_lora(gate: torch.Tensor, up: torch.Tensor, a: torch.Tensor | None) -> torch.Tensor:
    """Returns [h | h @ a.T] with h = silu(gate) * up: [..., N + R], in the dtype of `gate`.

    Only the inputs are kept for the backward pass, which computes h again on its way. The product that follows spares
    the memory of h only if it keeps a copy of the last R columns, not a view.

    Args:
        gate: [..., N]; rows may stand apart, as the halves of one product of gate and up do.
        up: of the shape and dtype of `gate`.
        a: [R, N] of any float dtype, read in that of `gate`, with a gradient in its own. None where R is 0.
    """
    columns = gate.shape[-1]
    h_MS = torch.ops.lora_kernels.swiglu_lora(gate.reshape(-1, columns), up.reshape(-1, columns), a)
    return h_MS.view(*gate.shape[:-1], h_MS.shape[1])


def _empty_output(gate_MN: torch.Tensor, up_MN: torch.Tensor, a_RN: torch.Tensor | None) -> torch.Tensor:
    rows, columns = gate_MN.shape
    return gate_MN.new_empty((rows, columns + (0 if a_RN is None else a_RN.shape[0])))


@Operator
def _swiglu_lora(gate_MN: torch.Tensor, up_MN: torch.Tensor, a_RN: torch.Tensor | None) -> torch.Tensor:
    h_MS = _empty_output(gate_MN, up_MN, a_RN)
    a_RN = None if a_RN is None else a_RN.to(gate_MN.dtype)
    if backend.is_triton(gate_MN):
        from lora_kernels.gpu import swiglu

        swiglu.forward_into(h_MS, gate_MN, up_MN, a_RN)
    else:
        _forward_on_cpu(h_MS, gate_MN, up_MN, a_RN)
    return h_MS


_swiglu_lora.register_fake(_empty_output)


def _forward_on_cpu(h_MS: torch.Tensor, gate_MN: torch.Tensor, up_MN: torch.Tensor, a_RN: torch.Tensor | None) -> None:
    columns = gate_MN.shape[1]
    h_MN = torch.mul(torch.nn.functional.silu(gate_MN.float()), up_MN, out=h_MS[:, :columns])
    if a_RN is not None:
        dtype = backend.product_dtype(h_MN)
        h_MS[:, columns:] = h_MN.to(dtype) @ a_RN.to(dtype).T


def _empty_gradients(
    dh_MS: torch.Tensor, gate_MN: torch.Tensor, up_MN: torch.Tensor, a_RN: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns dgate_MN, dup_MN and da_RN, which is empty where there is no `a`."""
    da_RN = gate_MN.new_empty(0) if a_RN is None else a_RN.new_empty(a_RN.shape)
    return gate_MN.new_empty(gate_MN.shape), up_MN.new_empty(up_MN.shape), da_RN


@Operator
def _swiglu_lora_backward(
    dh_MS: torch.Tensor, gate_MN: torch.Tensor, up_MN: torch.Tensor, a_RN: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a = None if a_RN is None else a_RN.to(gate_MN.dtype)
    if backend.is_triton(dh_MS):
        from lora_kernels.gpu import swiglu

        dgate_MN, dup_MN = gate_MN.new_empty(gate_MN.shape), gate_MN.new_empty(gate_MN.shape)
        h_MN = None if a is None else gate_MN.new_empty(gate_MN.shape)
        swiglu.backward_into(dgate_MN, dup_MN, h_MN, dh_MS, gate_MN, up_MN, a)
    else:
        dgate_MN, dup_MN, h_MN = _backward_on_cpu(dh_MS, gate_MN, up_MN, a)
    if a_RN is None or h_MN is None:
        return dgate_MN, dup_MN, gate_MN.new_empty(0)
    return dgate_MN, dup_MN, matmul_float32(dh_MS[:, gate_MN.shape[1] :].T, h_MN).to(a_RN.dtype)


_swiglu_lora_backward.register_fake(_empty_gradients)


def _backward_on_cpu(
    dh_MS: torch.Tensor, gate_MN: torch.Tensor, up_MN: torch.Tensor, a_RN: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns dgate and dup in the dtype of `gate`, and h in float32 where there is an adapter."""
    columns, dtype = gate_MN.shape[1], gate_MN.dtype
    dh_MN, gate_MN = dh_MS[:, :columns].float(), gate_MN.float()
    if a_RN is not None:
        dh_MN = torch.addmm(dh_MN, dh_MS[:, columns:].float(), a_RN.float())
    silu_MN = torch.nn.functional.silu(gate_MN)
    dup_MN = (dh_MN * silu_MN).to(dtype)
    if a_RN is None:
        return torch.ops.aten.silu_backward(dh_MN * up_MN, gate_MN).to(dtype), dup_MN, None
    dgate_MN = torch.ops.aten.silu_backward(dh_MN.mul_(up_MN), gate_MN).to(dtype)
    return dgate_MN, dup_MN, silu_MN.mul_(up_MN)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dh_MS: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *gate_and_up, a_RN = ctx.saved_tensors
    dgate_MN, dup_MN, da_RN = torch.ops.lora_kernels.swiglu_lora_backward(dh_MS, *gate_and_up, a_RN)
    return dgate_MN, dup_MN, None if a_RN is None else da_RN


_swiglu_lora.register_autograd(_differentiate, setup_context=_keep_for_backward)

"""The gated activation of a Llama block, with the down projection of the adapter after it.

M rows, N columns, R the rank of the adapter, S = N + R.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels import backend, lora
from lora_kernels.cpu import loops
from lora_kernels.matmul import matmul_float32
from lora_kernels.operators import Operator
from lora_kernels.slabs import row_blocks


def swiglu_lora(gate: torch.Tensor, up: torch.Tensor, a: torch.Tensor | None) -> torch.Tensor:
    """Returns [h | h @ a.T] with h = silu(gate) * up: [..., N + R], in the dtype of `gate`.

    Only the inputs are kept for the backward pass, which computes h again on its way. The product that follows spares
    the memory of h only if it keeps a copy of the last R columns, not a view. On a GPU h is rounded once; a CPU rounds
    silu(gate) too, as LlamaMLP of Hugging Face does: its loops then move half the bytes.

    Args:
        gate: [..., N]; rows may stand apart, as the halves of one product of gate and up do.
        up: of the shape and dtype of `gate`.
        a: [R, N] of any float dtype, read in that of `gate`, with a gradient in its own. None where R is 0.

    Raises:
        ValueError: `gate` and `up` differ in shape.
    """
    if gate.shape != up.shape:
        raise ValueError(f"swiglu_lora: gate is {list(gate.shape)} and up {list(up.shape)}; they must be alike.")
    columns = gate.shape[-1]
    h_MS = _swiglu_lora(gate.reshape(-1, columns), up.reshape(-1, columns), a)
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
    """Rounds where LlamaMLP does; in torch not one bit differs."""
    columns = gate_MN.shape[1]
    h_MN = h_MS[:, :columns]
    if loops.takes(h_MN, gate_MN, up_MN):
        loops.swiglu_into(h_MN, gate_MN, up_MN)
    else:
        for rows in row_blocks(gate_MN, gate_MN.dtype):
            torch.mul(torch.nn.functional.silu(gate_MN[rows]), up_MN[rows], out=h_MN[rows])
    if a_RN is not None:
        dtype = backend.product_dtype(h_MN)
        h_MS[:, columns:] = backend.readable(h_MN.to(dtype)) @ a_RN.to(dtype).T


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
    dgate_MN, dup_MN = gate_MN.new_empty(gate_MN.shape), gate_MN.new_empty(gate_MN.shape)
    if not backend.is_triton(dh_MS):
        da_RN = _backward_on_cpu(dgate_MN, dup_MN, dh_MS, gate_MN, up_MN, a)
    else:
        from lora_kernels.gpu import swiglu

        h_MN = None if a is None else gate_MN.new_empty(gate_MN.shape)
        swiglu.backward_into(dgate_MN, dup_MN, h_MN, dh_MS, gate_MN, up_MN, a)
        da_RN = None if h_MN is None else matmul_float32(dh_MS[:, gate_MN.shape[1] :].T, h_MN)
    if a_RN is None or da_RN is None:
        return dgate_MN, dup_MN, gate_MN.new_empty(0)
    return dgate_MN, dup_MN, da_RN.to(a_RN.dtype)


_swiglu_lora_backward.register_fake(_empty_gradients)


def _backward_on_cpu(
    dgate_MN: torch.Tensor,
    dup_MN: torch.Tensor,
    dh_MS: torch.Tensor,
    gate_MN: torch.Tensor,
    up_MN: torch.Tensor,
    a_RN: torch.Tensor | None,
) -> torch.Tensor | None:
    """Writes the gradients of gate and up, and returns that of `a`, None where there is no `a`."""
    columns, dtype = gate_MN.shape[1], lora.product_dtype(dh_MS)
    dh_MN, image_MR = dh_MS[:, :columns], backend.readable(dh_MS[:, columns:].to(dtype))
    h_MN: torch.Tensor | None = None
    if loops.takes(dh_MS, gate_MN, up_MN):
        if a_RN is not None:
            dh_MN = h_MN = _with_image(dh_MN, image_MR, a_RN.to(dtype))
        loops.differentiate_swiglu_into(dgate_MN, dup_MN, h_MN, dh_MN, gate_MN, up_MN)
    else:
        if a_RN is not None:
            h_MN, a_RN = gate_MN.new_empty(gate_MN.shape, dtype=dtype), a_RN.to(dtype)
        for rows in row_blocks(gate_MN, gate_MN.dtype):
            gate_BN, up_BN, dh_BN = gate_MN[rows], up_MN[rows], dh_MN[rows].to(dtype)
            if a_RN is not None:
                dh_BN = torch.addmm(dh_BN, image_MR[rows], a_RN)
            silu_BN = torch.nn.functional.silu(gate_BN)
            torch.mul(dh_BN, silu_BN, out=dup_MN[rows])
            dsilu_BN = (dh_BN * up_BN).to(gate_BN.dtype)
            torch.ops.aten.silu_backward.grad_input(dsilu_BN, gate_BN, grad_input=dgate_MN[rows])
            if h_MN is not None:
                torch.mul(silu_BN, up_BN, out=h_MN[rows])
    # One product over all rows: a sum of those of blocks would be rounded with each.
    return None if h_MN is None else torch.mm(image_MR.t(), h_MN.to(dtype))


def _with_image(dh_MN: torch.Tensor, image_MR: torch.Tensor, a_RN: torch.Tensor) -> torch.Tensor:
    """Returns dh + image @ a in memory of its own and the dtype of `dh`; the others are of that of products."""
    if image_MR.dtype == dh_MN.dtype:
        return torch.addmm(dh_MN, image_MR, a_RN)
    return dh_MN.to(image_MR.dtype).addmm_(image_MR, a_RN).to(dh_MN.dtype)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dh_MS: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *gate_and_up, a_RN = ctx.saved_tensors
    dgate_MN, dup_MN, da_RN = _swiglu_lora_backward(dh_MS, *gate_and_up, a_RN)
    return dgate_MN, dup_MN, None if a_RN is None else da_RN


_swiglu_lora.register_autograd(_differentiate, setup_context=_keep_for_backward)

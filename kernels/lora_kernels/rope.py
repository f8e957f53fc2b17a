"""Rotary position embedding of queries and keys in one launch."""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels import backend
from lora_kernels.cpu import loops
from lora_kernels.operators import Operator


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rotated q and k, in the dtypes and memory layouts that they came in.

    The halves of a head are what is rotated, as `apply_rotary_pos_emb` of Hugging Face's Llama does: the last dimension
    [x1, x2] becomes [x1, x2] * cos + [-x2, x1] * sin. Computed in float32 and rounded once. The angles get no gradient.

    Args:
        q: [B, H, T, D] in any memory layout, D even.
        k: [B, Hk, T, D].
        cos: [B or 1, T, D] of any float dtype.
        sin: like `cos`.

    Raises:
        ValueError: the angles are not as many, or D is odd.
    """
    batch, _, tokens, width = q.shape
    fits = cos.shape[1:] == (tokens, width) and len(cos) in (1, batch) and cos.shape == sin.shape
    if not fits or width % 2 or (k.shape[0], *k.shape[2:]) != (batch, tokens, width):
        sizes = [list(part.shape) for part in (q, k, cos, sin)]
        raise ValueError(
            f"rope: q, k, cos, sin must be [B, H, T, D], [B, Hk, T, D] and twice [B or 1, T, D], D even, got {sizes}."
        )
    return _rope(q, k, cos, sin, False)


def _empty_outputs(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(q), _empty_like(k)


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """Returns room in the memory layout of `x`, such as heads inside tokens, but with the last dimension dense."""
    return torch.empty_like(x, memory_format=torch.preserve_format if x.stride(-1) == 1 else torch.contiguous_format)


@Operator
def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates, or where `inverse` multiplies by the transposed rotation, which is the gradient."""
    outputs = _empty_like(q), _empty_like(k)
    if backend.is_triton(q):
        from lora_kernels.gpu import rope

        rope.rotate_into(*outputs, q, k, cos, sin, inverse)
    else:
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        for out, x in zip(outputs, (q, k), strict=True):
            if loops.takes(out, x):
                loops.rotate_into(out, x, cos, sin, inverse)
            else:
                _rotate_in_torch(out, x, cos[:, None], sin[:, None], inverse)
    return outputs


_rope.register_fake(_empty_outputs)


def _rotate_in_torch(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> None:
    x = x.float()
    wide = torch.mul(x, cos, out=out if out.dtype == torch.float32 else None)
    x_1, x_2 = x.chunk(2, dim=-1)
    sin_1, sin_2 = sin.chunk(2, dim=-1)
    wide_1, wide_2 = wide.chunk(2, dim=-1)
    if inverse:
        wide_1.addcmul_(x_2, sin_2)
        wide_2.addcmul_(x_1, sin_1, value=-1)
    else:
        wide_1.addcmul_(x_2, sin_1, value=-1)
        wide_2.addcmul_(x_1, sin_2)
    if wide is not out:
        out.copy_(wide)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*_rope(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None)


_rope.register_autograd(_differentiate, setup_context=_keep_for_backward)

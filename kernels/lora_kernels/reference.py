"""The naive twin of every operation: what it computes, in plain torch, in any float dtype, slow and differentiable.

M rows of activations, N outputs and K inputs of a weight, R the rank of an adapter, T tokens, V words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_kernels.frozen import Frozen


def nf4_dequant(weight: Frozen, dtype: torch.dtype) -> torch.Tensor:
    """w[i] = code[nibble[i]] * absmax[i // blocksize], each product rounded once to `dtype`."""
    rows, columns = weight.shape
    blocks = weight.blocks
    if blocks is None:
        return weight.data.to(dtype)
    absmax = blocks.absmax
    if blocks.nested:
        group = torch.arange(len(absmax), device=absmax.device) // blocks.nested.size
        absmax = blocks.nested.code[absmax.long()] * blocks.nested.absmax[group] + blocks.nested.offset
    nibbles = torch.stack([weight.data >> 4, weight.data & 15], dim=1).flatten()[: rows * columns].long()
    block = torch.arange(rows * columns, device=absmax.device) // blocks.size
    return (blocks.code[nibbles] * absmax[block]).to(dtype).reshape(rows, columns)


def lora_down(
    x_MK: torch.Tensor, a_RK: torch.Tensor, dropout: float = 0.0, keep_MK: torch.Tensor | None = None
) -> torch.Tensor:
    """xa = (keep * x / (1 - dropout)) @ a.T"""
    if keep_MK is not None:
        x_MK = x_MK * keep_MK / (1 - dropout)
    return x_MK @ a_RK.T


def lora_bwd_up(
    dy_MN: torch.Tensor, b_NR: torch.Tensor, xa_MR: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """ds = scaling * dy @ b, db = scaling * dy.T @ xa"""
    return scaling * dy_MN @ b_NR, scaling * dy_MN.T @ xa_MR


def lora_linear(
    x_MK: torch.Tensor,
    w_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    a_RK: torch.Tensor,
    b_NR: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    keep_MK: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x @ w.T + bias + scaling * (keep * x / (1 - dropout)) @ a.T @ b.T"""
    y_MN = x_MK @ w_NK.T + scaling * lora_down(x_MK, a_RK, dropout, keep_MK) @ b_NR.T
    return y_MN if bias_N is None else y_MN + bias_N


def lora_group(
    x: torch.Tensor,
    a_RK: torch.Tensor | None,
    layers: Sequence[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, float]],
    dropout: float = 0.0,
    keep_MK: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """y = x @ w.T + bias + scaling * xa @ b.T for each w, bias, b and scaling, where xa is its columns of x @ a.T."""
    columns = layers[0][0].shape[1]
    x_MK, xa_MR = x[:, :columns], x[:, columns:]
    if a_RK is not None:
        xa_MR = lora_down(x_MK, a_RK, dropout, keep_MK)
    outputs, first = [], 0
    for w_NK, bias_N, b_NR, scaling in layers:
        rank = b_NR.shape[1]
        y_MN = x_MK @ w_NK.T + scaling * xa_MR[:, first : first + rank] @ b_NR.T
        outputs.append(y_MN if bias_N is None else y_MN + bias_N)
        first += rank
    return outputs


def rms_norm_lora(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, a: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm = weight * (h / rms(h)) with h = x + residual; ([norm | norm @ a.T], h)."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    norm = weight * unit.to(h.dtype)
    return norm if a is None else torch.cat([norm, norm @ a.T], dim=-1), h


def swiglu_lora(gate: torch.Tensor, up: torch.Tensor, a: torch.Tensor | None) -> torch.Tensor:
    """h = silu(gate) * up; [h | h @ a.T]."""
    h = torch.nn.functional.silu(gate) * up
    return h if a is None else torch.cat([h, h @ a.T], dim=-1)


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[x1, x2] * cos + [-x2, x1] * sin of the halves of every head."""

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    return rotated(q), rotated(k)


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """softmax(cap(scale * q k.T)) v, each query among the keys of its example, up to its own and `window` of them."""
    place = torch.arange(q.shape[1], device=q.device)
    example = torch.bucketize(place, torch.tensor(bounds[1:], device=q.device), right=True)
    seen = (example[:, None] == example) & (place <= place[:, None])
    if window:
        seen &= place > place[:, None] - window
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    z = q @ k.mT * scale
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype) @ v


def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    ignore: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z = scale * (h @ weight.T + bias), then softcap * tanh(z / softcap); -log(softmax(z))[label], summed and each."""
    z = torch.nn.functional.linear(h, weight, bias)
    z = scale * z.to(torch.promote_types(z.dtype, torch.float32))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    labelled = labels != ignore
    log_p = z.log_softmax(-1).gather(-1, labels.where(labelled, 0)[..., None]).squeeze(-1)
    nll = -log_p.where(labelled, 0)
    return nll.sum(), nll

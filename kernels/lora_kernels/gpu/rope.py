"""Rotary position embedding: bound by memory, a program for each token reads its angles once for all heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HEADS = 16
"""Heads of a step: with D = 128 each thread has one vector load for each half at 4 warps."""
WARPS = 4


@triton.jit
def rotate(
    p_x,
    p_out,
    heads,
    stride_x,
    stride_out,
    b_cos_1,
    b_cos_2,
    b_sin_1,
    b_sin_2,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Writes all heads of a token, whose angles are [1, columns]."""
    o_1 = tl.arange(0, b_cos_1.shape[1])[None, :]
    o_2 = HALF + o_1
    for first in range(0, heads, HEADS):
        o_head = (first + tl.arange(0, HEADS))[:, None]
        mask = (o_head < heads) & (o_1 < HALF)
        # A head may stand a whole sequence apart from the next.
        p_head = p_x + o_head.to(tl.int64) * stride_x
        b_1 = tl.load(p_head + o_1, mask=mask)
        b_2 = tl.load(p_head + o_2, mask=mask)
        p_head = p_out + o_head.to(tl.int64) * stride_out
        tl.store(p_head + o_1, b_1 * b_cos_1 - b_2 * b_sin_1, mask=mask)
        tl.store(p_head + o_2, b_2 * b_cos_2 + b_1 * b_sin_2, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def rope_kernel(
    p_q,
    p_k,
    p_cos,
    p_sin,
    p_q_out,
    p_k_out,
    tokens,
    heads_q,
    heads_k,
    stride_q_b,
    stride_q_h,
    stride_q_t,
    stride_k_b,
    stride_k_h,
    stride_k_t,
    stride_cos_b,
    stride_cos_t,
    stride_sin_b,
    stride_sin_t,
    stride_q_out_b,
    stride_q_out_h,
    stride_q_out_t,
    stride_k_out_b,
    stride_k_out_h,
    stride_k_out_t,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    token = row - batch * tokens

    o_half = tl.arange(0, COLUMNS)[None, :]
    m_half = o_half < HALF
    p_cos += batch * stride_cos_b + token * stride_cos_t + o_half
    p_sin += batch * stride_sin_b + token * stride_sin_t + o_half
    b_cos_1 = tl.load(p_cos, mask=m_half).to(tl.float32)
    b_cos_2 = tl.load(p_cos + HALF, mask=m_half).to(tl.float32)
    b_sin_1 = tl.load(p_sin, mask=m_half).to(tl.float32)
    b_sin_2 = tl.load(p_sin + HALF, mask=m_half).to(tl.float32)
    if INVERSE:
        b_sin_1, b_sin_2 = -b_sin_2, -b_sin_1

    p_q += batch * stride_q_b + token * stride_q_t
    p_k += batch * stride_k_b + token * stride_k_t
    p_q_out += batch * stride_q_out_b + token * stride_q_out_t
    p_k_out += batch * stride_k_out_b + token * stride_k_out_t
    rotate(p_q, p_q_out, heads_q, stride_q_h, stride_q_out_h, b_cos_1, b_cos_2, b_sin_1, b_sin_2, HALF, HEADS)
    rotate(p_k, p_k_out, heads_k, stride_k_h, stride_k_out_h, b_cos_1, b_cos_2, b_sin_1, b_sin_2, HALF, HEADS)


def rotate_into(
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    inverse: bool,
) -> None:
    """Writes the rotated q [B, H, T, D] and k [B, Hk, T, D]; any strides, but for a dense D in the outputs."""
    batch, heads_q, tokens, size = q.shape
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    cos, sin = cos.expand(batch, tokens, size), sin.expand(batch, tokens, size)
    rope_kernel[(batch * tokens,)](
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        tokens,
        heads_q,
        k.shape[1],
        *q.stride()[:3],
        *k.stride()[:3],
        *cos.stride()[:2],
        *sin.stride()[:2],
        *q_out.stride()[:3],
        *k_out.stride()[:3],
        INVERSE=inverse,
        HALF=size // 2,
        HEADS=HEADS,
        COLUMNS=triton.next_power_of_2(size // 2),
        num_warps=WARPS,
    )

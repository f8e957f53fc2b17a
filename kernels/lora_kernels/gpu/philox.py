"""Dropout from a counter (Salmon et al. 2011, Philox 4x32): what is kept depends on the seed, row and column alone.

So every kernel that meets an element, whatever its tiles, decides the same about it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS, COLUMNS, WARPS = 16, 128, 4


@triton.jit
def keep(o_row, o_quad, seed, threshold):
    """What is kept of rows `o_row` [BM] and columns 4 `o_quad` .. 4 `o_quad` + 3 [BQ]: [BM, 4 BQ] bool.

    A call gives four numbers, so four columns share it: the instructions of Philox are the cost of dropout.
    """
    BM: tl.constexpr = o_row.shape[0]
    BQ: tl.constexpr = o_quad.shape[0]
    b_row = tl.broadcast_to(o_row[:, None], (BM, BQ)).to(tl.int32)
    b_quad = tl.broadcast_to(o_quad[None, :], (BM, BQ))
    b_zero = b_row * 0
    b_0, b_1, b_2, b_3 = tl.philox(seed, b_row, b_quad, b_zero, b_zero)
    # Joined so that the reshape puts them side by side in the order 0, 1, 2, 3.
    b_bits = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), (BM, 4 * BQ))
    return (b_bits >> 1) >= threshold


def threshold(dropout: float) -> int:
    """Returns the 31-bit number below which an element is dropped; 31, so that it is always a 32-bit argument."""
    return int(dropout * 2**31)


@triton.jit(do_not_specialize=["m", "seed"])
def keep_mask_kernel(p_out, m, k, stride_m, seed, threshold, BM: tl.constexpr, BK: tl.constexpr):
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_quad = tl.program_id(1) * (BK // 4) + tl.arange(0, BK // 4)
    o_col = tl.program_id(1) * BK + tl.arange(0, BK)
    b_keep = keep(o_row, o_quad, seed, threshold)
    m_out = (o_row < m)[:, None] & (o_col < k)[None, :]
    tl.store(p_out + o_row.to(tl.int64)[:, None] * stride_m + o_col[None, :], b_keep, mask=m_out)


def keep_mask(like_MK: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """Returns what is kept of a tensor of this shape and device: [M, K] bool."""
    m, k = like_MK.shape
    mask_MK = torch.empty(m, k, dtype=torch.bool, device=like_MK.device)
    if m:
        keep_mask_kernel[(triton.cdiv(m, ROWS), triton.cdiv(k, COLUMNS))](
            mask_MK, m, k, k, seed, threshold(dropout), BM=ROWS, BK=COLUMNS, num_warps=WARPS
        )
    return mask_MK

"""The product of a frozen linear layer and its adapter in one kernel: bound by arithmetic.

The narrow product comes first and its result is where the sum over the wide one begins. Added afterwards it would need
a second accumulator, which on sm_90 spills 520 times a tile and on sm_100 does not compile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lora_kernels.gpu import philox
from lora_kernels.gpu.tile import rank_tile, rows_apart


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program computes at a time, and with what."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def tile_for(m: int, rank: int) -> Tile:
    """Returns the tile for `m` rows where nothing is tuned: the widest that keeps two programs on a multiprocessor.

    With dropout and ranks in more than one tile of them, the registers of 128 rows spill.
    """
    if m <= 16:
        return Tile(16, 128, 64, 4, 3)
    if m <= 64 or rank > rank_tile(rank, torch.bfloat16):
        return Tile(64, 128, 32, 4, 3)
    return Tile(128, 64, 32, 4, 3)


GROUP = 8
"""Blocks of rows that go through the columns together, so that what they share is still in the L2 cache."""


@triton.jit
def block_of(program, m, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The block of rows and the block of columns of a program, in groups of `GROUP` blocks of rows."""
    n_columns = tl.cdiv(n, BN)
    first = program // (GROUP * n_columns) * GROUP
    rows = tl.minimum(tl.cdiv(m, BM) - first, GROUP)
    place = program % (GROUP * n_columns)
    return first + place % rows, place // rows


@triton.jit
def narrow_product(
    p_narrow,
    p_up,
    o_row,
    o_column,
    m_row,
    m_column,
    stride_narrow,
    stride_up_rank,
    stride_up_column,
    RANK: tl.constexpr,
    BR: tl.constexpr,
):
    """narrow[M, R] @ up[R, N] for rows `o_row` and columns `o_column`, both 64-bit: where a sum of float32 begins."""
    b_sum = tl.zeros((o_row.shape[0], o_column.shape[0]), dtype=tl.float32)
    for first in range(0, RANK, BR):
        o_rank = first + tl.arange(0, BR)
        m_rank = o_rank < RANK
        o_narrow = o_row[:, None] * stride_narrow + o_rank[None, :]
        b_narrow = tl.load(p_narrow + o_narrow, mask=m_row[:, None] & m_rank[None, :], other=0.0)
        o_up = o_rank.to(tl.int64)[:, None] * stride_up_rank + o_column[None, :] * stride_up_column
        b_up = tl.load(p_up + o_up, mask=m_rank[:, None] & m_column[None, :], other=0.0)
        b_sum = tl.dot(b_narrow, b_up, b_sum, input_precision="ieee")
    return b_sum


@triton.jit(do_not_specialize=["m", "seed"])
def adapted_product_kernel(
    p_left,
    p_right,
    p_narrow,
    p_up,
    p_bias,
    p_out,
    m,
    n,
    k,
    stride_left,
    stride_right_inner,
    stride_right_column,
    stride_narrow,
    stride_up_rank,
    stride_up_column,
    stride_out,
    scale,
    seed,
    threshold,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[M, N] = left[M, K] @ right[K, N] + scale * dropout(narrow[M, R] @ up[R, N]) + bias[N]."""
    block, column = block_of(tl.program_id(0), m, n, BM, BN, GROUP)
    o_row = (block * BM + tl.arange(0, BM)).to(tl.int64)
    o_column = (column * BN + tl.arange(0, BN)).to(tl.int64)
    o_inner = tl.arange(0, BK)
    m_row, m_column = o_row < m, o_column < n

    b_sum = narrow_product(
        p_narrow,
        p_up,
        o_row,
        o_column,
        m_row,
        m_column,
        stride_narrow,
        stride_up_rank,
        stride_up_column,
        RANK,
        BR,
    )
    b_sum *= scale
    if DROPOUT:
        o_quad = column * (BN // 4) + tl.arange(0, BN // 4)
        b_sum = tl.where(philox.keep(o_row, o_quad, seed, threshold), b_sum, 0.0)
    if BIAS:
        b_sum += tl.load(p_bias + o_column, mask=m_column).to(tl.float32)[None, :]

    # Rows beyond the last read the last, which costs no mask in the loop: nothing of theirs is stored.
    o_left = tl.minimum(o_row, m - 1)[:, None] * stride_left + o_inner[None, :]
    o_right = o_inner.to(tl.int64)[:, None] * stride_right_inner + o_column[None, :] * stride_right_column
    for first in range(0, k, BK):
        m_inner = o_inner < k - first
        b_left = tl.load(p_left + o_left, mask=m_inner[None, :], other=0.0)
        b_right = tl.load(p_right + o_right, mask=m_inner[:, None] & m_column[None, :], other=0.0)
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision="ieee")
        p_left += BK
        p_right += tl.cast(BK, tl.int64) * stride_right_inner
    p_out += o_row[:, None] * stride_out + o_column[None, :]
    tl.store(p_out, b_sum, mask=m_row[:, None] & m_column[None, :])


def adapted_product(
    left_MK: torch.Tensor,
    right_KN: torch.Tensor,
    narrow_MR: torch.Tensor,
    up_RN: torch.Tensor,
    bias_N: torch.Tensor | None,
    scale: float,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Returns left @ right + scale * dropout(narrow @ up) + bias, [M, N] in the dtype of the four matrices.

    `right` and `up` may be transposed views; what the dropout keeps is scaled by 1 / (1 - dropout) as always.
    """
    left_MK, narrow_MR = rows_apart(left_MK), rows_apart(narrow_MR)
    (m, k), n, rank = left_MK.shape, right_KN.shape[1], up_RN.shape[0]
    out_MN = left_MK.new_empty((m, n))
    tile = tile or tile_for(m, rank)
    if m:
        adapted_product_kernel[(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),)](
            left_MK,
            right_KN,
            narrow_MR,
            up_RN,
            out_MN if bias_N is None else rows_apart(bias_N),
            out_MN,
            m,
            n,
            k,
            left_MK.stride(0),
            *right_KN.stride(),
            narrow_MR.stride(0),
            *up_RN.stride(),
            n,
            scale / (1 - dropout),
            seed,
            philox.threshold(dropout),
            RANK=rank,
            BIAS=bias_N is not None,
            DROPOUT=dropout > 0,
            BM=tile.rows,
            BN=tile.columns,
            BK=tile.inner,
            BR=rank_tile(rank, left_MK.dtype),
            GROUP=GROUP,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out_MN

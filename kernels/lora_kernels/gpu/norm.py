"""RMS norm: bound by memory. Rows are read twice, the second time from the L2 cache where the rows in flight fit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_kernels.gpu.down import add_down
from lora_kernels.gpu.tile import leaves_idle, rank_tile, rows_apart

ROWS = 16
"""Rows of a program, the fewest that tensor cores multiply: they share one read of `a`."""
COLUMN_BYTES = 256
"""Of a row in a step: a vector load a thread. Twice that halves the programs that fit a consumer card's 99 KB."""
WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def rms_norm_lora_kernel(
    p_x,
    p_residual,
    p_weight,
    p_a,
    p_y,
    p_h,
    p_rstd,
    rows,
    columns,
    eps,
    stride_x,
    stride_residual,
    stride_a,
    stride_y,
    stride_h,
    RESIDUAL: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    SLICES: tl.constexpr,
):
    dtype = p_y.dtype.element_ty
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_column = tl.arange(0, COLUMNS)
    o_rank = tl.arange(0, RANKS)
    m_row = o_row < rows

    p_x += o_row[:, None] * stride_x
    p_h += o_row[:, None] * stride_h
    b_squares = tl.zeros((ROWS,), tl.float32)
    for column in range(0, columns, COLUMNS):
        m_tile = m_row[:, None] & (column + o_column < columns)[None, :]
        b_h = tl.load(p_x + column + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
        if RESIDUAL:
            o_residual = o_row[:, None] * stride_residual + column + o_column[None, :]
            b_h += tl.load(p_residual + o_residual, mask=m_tile, other=0.0)
            b_h = b_h.to(dtype)
            tl.store(p_h + column + o_column[None, :], b_h, mask=m_tile)
            b_h = b_h.to(tl.float32)
        b_squares += tl.sum(b_h * b_h, axis=1)
    b_rstd = tl.rsqrt(b_squares / columns + eps)
    tl.store(p_rstd + o_row, b_rstd, mask=m_row)
    if RESIDUAL:
        # The threads that read h below are others than those that have just written it.
        tl.debug_barrier()
        p_x = p_h

    # Ranks beyond a tile take the rows once more; the norm itself is written the first time.
    for first in range(0, RANK if RANK else 1, RANKS):
        b_xa = tl.zeros((SLICES, ROWS, RANKS), tl.float32)
        for column in range(0, columns, COLUMNS):
            m_column = column + o_column < columns
            m_tile = m_row[:, None] & m_column[None, :]
            b_h = tl.load(p_x + column + o_column[None, :], mask=m_tile, other=0.0)
            b_weight = tl.load(p_weight + column + o_column, mask=m_column, other=0.0).to(tl.float32)
            b_y = ((b_h * b_rstd[:, None]).to(dtype) * b_weight[None, :]).to(dtype)
            if first == 0:
                tl.store(p_y + o_row[:, None] * stride_y + column + o_column[None, :], b_y, mask=m_tile)
            if RANK:
                b_xa = add_down(b_xa, b_y, p_a, first, column, columns, stride_a, RANK)
        if RANK:
            o_xa = o_row[:, None] * stride_y + columns + first + o_rank[None, :]
            m_xa = m_row[:, None] & (first + o_rank < RANK)[None, :]
            tl.store(p_y + o_xa, tl.sum(b_xa, axis=0), mask=m_xa)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_lora_backward_kernel(
    p_dy,
    p_dh,
    p_y,
    p_h,
    p_rstd,
    p_weight,
    p_a,
    p_dx,
    p_dweight,
    rows,
    columns,
    stride_dy,
    stride_dh,
    stride_y,
    stride_h,
    stride_a,
    stride_dx,
    RESIDUAL: tl.constexpr,
    RANK: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_column = tl.arange(0, COLUMNS)
    o_rank = tl.arange(0, RANKS)
    m_row = o_row < rows
    b_rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)

    p_dy += o_row[:, None] * stride_dy
    p_h += o_row[:, None] * stride_h
    # <dnorm, norm>, where the low-rank part of dnorm, ds @ a, needs no product: <ds @ a, norm> = <ds, norm @ a.T>.
    b_dot = tl.zeros((ROWS,), tl.float32)
    for column in range(0, columns, COLUMNS):
        m_column = column + o_column < columns
        m_tile = m_row[:, None] & m_column[None, :]
        b_dy = tl.load(p_dy + column + o_column[None, :], mask=m_tile, other=0.0)
        b_h = tl.load(p_h + column + o_column[None, :], mask=m_tile, other=0.0)
        b_weight = tl.load(p_weight + column + o_column, mask=m_column, other=0.0).to(tl.float32)
        b_dot += tl.sum(b_dy * b_weight[None, :] * b_h, axis=1)
    b_dot *= b_rstd
    for first in range(0, RANK, RANKS):
        m_tile = m_row[:, None] & (first + o_rank < RANK)[None, :]
        o_xa = columns + first + o_rank[None, :]
        b_ds = tl.load(p_dy + o_xa, mask=m_tile, other=0.0).to(tl.float32)
        b_xa = tl.load(p_y + o_row[:, None] * stride_y + o_xa, mask=m_tile, other=0.0)
        b_dot += tl.sum(b_ds * b_xa, axis=1)
    b_mean = b_dot / columns

    for column in range(0, columns, COLUMNS):
        m_column = column + o_column < columns
        m_tile = m_row[:, None] & m_column[None, :]
        b_dnorm = tl.load(p_dy + column + o_column[None, :], mask=m_tile, other=0.0).to(tl.float32)
        for first in range(0, RANK, RANKS):
            m_rank = first + o_rank < RANK
            o_ds = columns + first + o_rank[None, :]
            b_ds = tl.load(p_dy + o_ds, mask=m_row[:, None] & m_rank[None, :], other=0.0)
            o_a = (first + o_rank)[:, None] * stride_a + (column + o_column)[None, :]
            b_a = tl.load(p_a + o_a, mask=m_rank[:, None] & m_column[None, :], other=0.0)
            b_dnorm = tl.dot(b_ds, b_a, b_dnorm, input_precision="ieee")
        b_h = tl.load(p_h + column + o_column[None, :], mask=m_tile, other=0.0)
        b_unit = b_h * b_rstd[:, None]
        if WEIGHT:
            o_dweight = tl.program_id(0).to(tl.int64) * columns + column + o_column
            tl.store(p_dweight + o_dweight, tl.sum(b_dnorm * b_unit, axis=0), mask=m_column)
        b_weight = tl.load(p_weight + column + o_column, mask=m_column).to(tl.float32)
        b_dx = (b_dnorm * b_weight[None, :] - b_unit * b_mean[:, None]) * b_rstd[:, None]
        if RESIDUAL:
            o_dh = o_row[:, None] * stride_dh + column + o_column[None, :]
            b_dx += tl.load(p_dh + o_dh, mask=m_tile)
        o_dx = o_row[:, None] * stride_dx + column + o_column[None, :]
        tl.store(p_dx + o_dx, b_dx, mask=m_tile)


def forward_into(
    y_MS: torch.Tensor,
    h_MK: torch.Tensor,
    rstd_M: torch.Tensor,
    x_MK: torch.Tensor,
    residual_MK: torch.Tensor | None,
    weight_K: torch.Tensor,
    a_RK: torch.Tensor | None,
    eps: float,
) -> None:
    """Writes [norm | norm @ a.T], h where there is a residual, and 1 / rms; rows may stand further apart.

    Where programs of 16 rows are too few for the GPU, each has one row and norm @ a.T is a product of its own; that it
    is in float32 too, whose sums in the kernel would spill.
    """
    rows, columns = x_MK.shape
    few = leaves_idle(triton.cdiv(rows, ROWS), x_MK.device)
    if a_RK is not None and (few or x_MK.dtype == torch.float32):
        forward_into(y_MS, h_MK, rstd_M, x_MK, residual_MK, weight_K, None, eps)
        torch.mm(y_MS[:, :columns], a_RK.t(), out=y_MS[:, columns:])
        return
    rank = 0 if a_RK is None else a_RK.shape[0]
    x_MK = rows_apart(x_MK)
    residual_MK = x_MK if residual_MK is None else rows_apart(residual_MK)
    a_RK = x_MK if a_RK is None else rows_apart(a_RK)
    tile_rows = 1 if few else ROWS
    rms_norm_lora_kernel[(triton.cdiv(rows, tile_rows),)](
        x_MK,
        residual_MK,
        weight_K.contiguous(),
        a_RK,
        y_MS,
        h_MK,
        rstd_M,
        rows,
        columns,
        eps,
        x_MK.stride(0),
        residual_MK.stride(0),
        a_RK.stride(0),
        y_MS.stride(0),
        h_MK.stride(0),
        RESIDUAL=len(h_MK) > 0,
        RANK=rank,
        ROWS=tile_rows,
        COLUMNS=ROWS // tile_rows * COLUMN_BYTES // x_MK.element_size(),
        RANKS=rank_tile(rank, x_MK.dtype),
        SLICES=WARPS,
        num_warps=WARPS,
    )


def backward(
    dy_MS: torch.Tensor,
    dh_MK: torch.Tensor | None,
    y_MS: torch.Tensor,
    h_MK: torch.Tensor,
    rstd_M: torch.Tensor,
    weight_K: torch.Tensor,
    a_RK: torch.Tensor | None,
    want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dx in the dtype of h, and dweight in float32, empty where nobody wants it."""
    rows, columns = h_MK.shape
    rank = 0 if a_RK is None else a_RK.shape[0]
    programs = triton.cdiv(rows, ROWS)
    dx_MK = h_MK.new_empty((rows, columns))
    # A row for each program, summed below: the same sum every time, which atomic additions would not give.
    dweight_PK = rstd_M.new_empty((programs, columns) if want_weight else (0, 0))
    dy_MS, h_MK = rows_apart(dy_MS), rows_apart(h_MK)
    dh = dy_MS if dh_MK is None else rows_apart(dh_MK)
    a_RK = dy_MS if a_RK is None else rows_apart(a_RK)
    rms_norm_lora_backward_kernel[(programs,)](
        dy_MS,
        dh,
        y_MS,
        h_MK,
        rstd_M,
        weight_K.contiguous(),
        a_RK,
        dx_MK,
        dweight_PK,
        rows,
        columns,
        dy_MS.stride(0),
        dh.stride(0),
        y_MS.stride(0),
        h_MK.stride(0),
        a_RK.stride(0),
        dx_MK.stride(0),
        RESIDUAL=dh_MK is not None,
        RANK=rank,
        WEIGHT=want_weight,
        ROWS=ROWS,
        COLUMNS=COLUMN_BYTES // h_MK.element_size(),
        RANKS=rank_tile(rank, h_MK.dtype),
        num_warps=WARPS,
    )
    return dx_MK, dweight_PK.sum(0)

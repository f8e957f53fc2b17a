"""SwiGLU: bound by memory, one read of gate and up and one write of h; the backward pass in one pass too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_kernels.gpu.down import add_down
from lora_kernels.gpu.tile import leaves_idle, rank_tile, rows_apart

ROWS = 16
"""Rows of a tile, the fewest that tensor cores multiply: they share one read of `a`."""
COLUMN_BYTES = 256
"""Of a row in a tile: a vector load a thread. Twice that halves the programs that fit a consumer card's 99 KB."""
WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def swiglu_lora_kernel(
    p_gate,
    p_up,
    p_a,
    p_h,
    rows,
    columns,
    stride_gate,
    stride_up,
    stride_a,
    stride_h,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    SLICES: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_rank = tl.arange(0, RANKS)
    m_row = o_row < rows
    # With an adapter one program has whole rows, to sum them; without, there is a program for each tile.
    start = 0 if RANK else tl.program_id(1) * COLUMNS
    stop = columns if RANK else start + COLUMNS
    # Ranks beyond a tile take the rows once more; h itself is written the first time.
    for first in range(0, RANK if RANK else 1, RANKS):
        b_ha = tl.zeros((SLICES, ROWS, RANKS), tl.float32)
        for column in range(start, stop, COLUMNS):
            o_column = column + tl.arange(0, COLUMNS)
            m_column = o_column < columns
            m_tile = m_row[:, None] & m_column[None, :]
            o_gate = o_row[:, None] * stride_gate + o_column[None, :]
            o_up = o_row[:, None] * stride_up + o_column[None, :]
            b_gate = tl.load(p_gate + o_gate, mask=m_tile, other=0.0).to(tl.float32)
            b_up = tl.load(p_up + o_up, mask=m_tile, other=0.0)
            b_h = (b_gate * tl.sigmoid(b_gate) * b_up).to(p_h.dtype.element_ty)
            if first == 0:
                tl.store(p_h + o_row[:, None] * stride_h + o_column[None, :], b_h, mask=m_tile)
            if RANK:
                b_ha = add_down(b_ha, b_h, p_a, first, column, columns, stride_a, RANK)
        if RANK:
            o_ha = o_row[:, None] * stride_h + columns + first + o_rank[None, :]
            m_ha = m_row[:, None] & (first + o_rank < RANK)[None, :]
            tl.store(p_h + o_ha, tl.sum(b_ha, axis=0), mask=m_ha)


@triton.jit(do_not_specialize=["rows"])
def swiglu_lora_backward_kernel(
    p_dh,
    p_gate,
    p_up,
    p_a,
    p_dgate,
    p_dup,
    p_h,
    rows,
    columns,
    stride_dh,
    stride_gate,
    stride_up,
    stride_a,
    stride_dgate,
    stride_dup,
    stride_h,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_row = o_row < rows
    m_column = o_column < columns
    m_tile = m_row[:, None] & m_column[None, :]

    p_dh += o_row[:, None] * stride_dh
    b_dh = tl.load(p_dh + o_column[None, :], mask=m_tile).to(tl.float32)
    for first in range(0, RANK, RANKS):
        o_rank = first + tl.arange(0, RANKS)
        m_rank = o_rank < RANK
        b_ds = tl.load(p_dh + columns + o_rank[None, :], mask=m_row[:, None] & m_rank[None, :], other=0.0)
        o_a = o_rank[:, None] * stride_a + o_column[None, :]
        b_a = tl.load(p_a + o_a, mask=m_rank[:, None] & m_column[None, :], other=0.0)
        b_dh = tl.dot(b_ds, b_a, b_dh, input_precision="ieee")

    b_gate = tl.load(p_gate + o_row[:, None] * stride_gate + o_column[None, :], mask=m_tile).to(tl.float32)
    b_up = tl.load(p_up + o_row[:, None] * stride_up + o_column[None, :], mask=m_tile)
    b_sigmoid = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    b_dgate = b_dh * b_up * (b_sigmoid + b_silu * (1 - b_sigmoid))
    tl.store(p_dgate + o_row[:, None] * stride_dgate + o_column[None, :], b_dgate, mask=m_tile)
    tl.store(p_dup + o_row[:, None] * stride_dup + o_column[None, :], b_dh * b_silu, mask=m_tile)
    if RANK:
        tl.store(p_h + o_row[:, None] * stride_h + o_column[None, :], b_silu * b_up, mask=m_tile)


def forward_into(h_MS: torch.Tensor, gate_MN: torch.Tensor, up_MN: torch.Tensor, a_RN: torch.Tensor | None) -> None:
    """Writes [h | h @ a.T], whose rows may stand further apart than N + R.

    Where programs of 16 whole rows are too few for the GPU, each has a tile and h @ a.T is a product of its own; that
    it is in float32 too, whose sums in the kernel would spill.
    """
    rows, columns = gate_MN.shape
    if a_RN is not None and (gate_MN.dtype == torch.float32 or leaves_idle(triton.cdiv(rows, ROWS), gate_MN.device)):
        forward_into(h_MS, gate_MN, up_MN, None)
        torch.mm(h_MS[:, :columns], a_RN.t(), out=h_MS[:, columns:])
        return
    rank = 0 if a_RN is None else a_RN.shape[0]
    tile_columns = COLUMN_BYTES // gate_MN.element_size()
    gate_MN, up_MN = rows_apart(gate_MN), rows_apart(up_MN)
    a_RN = gate_MN if a_RN is None else rows_apart(a_RN)
    swiglu_lora_kernel[(triton.cdiv(rows, ROWS), 1 if rank else triton.cdiv(columns, tile_columns))](
        gate_MN,
        up_MN,
        a_RN,
        h_MS,
        rows,
        columns,
        gate_MN.stride(0),
        up_MN.stride(0),
        a_RN.stride(0),
        h_MS.stride(0),
        RANK=rank,
        ROWS=ROWS,
        COLUMNS=tile_columns,
        RANKS=rank_tile(rank, gate_MN.dtype),
        SLICES=WARPS,
        num_warps=WARPS,
    )


def backward_into(
    dgate_MN: torch.Tensor,
    dup_MN: torch.Tensor,
    h_MN: torch.Tensor | None,
    dh_MS: torch.Tensor,
    gate_MN: torch.Tensor,
    up_MN: torch.Tensor,
    a_RN: torch.Tensor | None,
) -> None:
    """Writes the gradients, and h again where there is an adapter; rows of each may stand further apart than N."""
    rows, columns = gate_MN.shape
    rank = 0 if a_RN is None else a_RN.shape[0]
    tile_columns = COLUMN_BYTES // gate_MN.element_size()
    dh_MS, gate_MN, up_MN = rows_apart(dh_MS), rows_apart(gate_MN), rows_apart(up_MN)
    a_RN = dh_MS if a_RN is None else rows_apart(a_RN)
    h_MN = dgate_MN if h_MN is None else h_MN
    swiglu_lora_backward_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(columns, tile_columns))](
        dh_MS,
        gate_MN,
        up_MN,
        a_RN,
        dgate_MN,
        dup_MN,
        h_MN,
        rows,
        columns,
        dh_MS.stride(0),
        gate_MN.stride(0),
        up_MN.stride(0),
        a_RN.stride(0),
        dgate_MN.stride(0),
        dup_MN.stride(0),
        h_MN.stride(0),
        RANK=rank,
        ROWS=ROWS,
        COLUMNS=tile_columns,
        RANKS=rank_tile(rank, gate_MN.dtype),
        num_warps=WARPS,
    )

"""The narrow products of an adapter: bound by memory, each reads the wide tensor once.

Ranks above 64 are taken 64 at a time, each by programs of their own or in turn. Float32 has no matrix instructions that
keep its digits, so without dropout, which only a kernel can do on the way, its products are torch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_kernels.gpu import philox
from lora_kernels.gpu.tile import rank_tile, rows_apart
from lora_kernels.matmul import matmul_float32

DOWN_ROWS, DOWN_COLUMNS = 32, 64
"""With 128 columns and 64 ranks, 57 KiB of shared memory leave a consumer card one block of 4 warps."""
UP_ROWS, UP_COLUMNS, UP_SPLIT, UP_RANK = 128, 64, 1024, 32
"""A program goes through `UP_SPLIT` columns of dY: at M = 2048, N = 4096 there are 64 programs. Above `UP_RANK` the
parts of dB, written and read, are more bytes than a second read of dY. Where rows are not aligned, 64 columns spill."""
WEIGHT_ROWS, WEIGHT_COLUMNS, WEIGHT_SPLIT = 32, 64, 1024
"""A program goes through `WEIGHT_SPLIT` rows of x: at M = 2048, K = 4096 there are 128 programs."""
INPUT_ROWS, INPUT_COLUMNS = 64, 128
"""Rows of 16 bits; in float32 half of them."""
WARPS = 4


@triton.jit(do_not_specialize=["m", "seed"])
def lora_down_kernel(
    p_x,
    p_a,
    p_out,
    m,
    k,
    stride_x,
    stride_a,
    stride_out,
    seed,
    threshold,
    scale,
    RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """out[M, R] = scale * dropout(x)[M, K] @ a[R, K].T, for a block of rows and a block of ranks."""
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_rank = tl.program_id(1) * BR + tl.arange(0, BR)
    o_quad = tl.arange(0, BK // 4)
    o_col = tl.arange(0, BK)
    m_row, m_rank = o_row < m, o_rank < RANK
    p_x += o_row.to(tl.int64)[:, None] * stride_x
    p_a += o_rank.to(tl.int64)[None, :] * stride_a
    b_sum = tl.zeros((BM, BR), dtype=tl.float32)
    for first in range(0, k, BK):
        m_col = first + o_col < k
        b_x = tl.load(p_x + (first + o_col)[None, :], mask=m_row[:, None] & m_col[None, :], other=0.0)
        b_a = tl.load(p_a + (first + o_col)[:, None], mask=m_col[:, None] & m_rank[None, :], other=0.0)
        if DROPOUT:
            b_keep = philox.keep(o_row, first // 4 + o_quad, seed, threshold)
            b_x = tl.where(b_keep, b_x, 0.0)
        b_sum = tl.dot(b_x, b_a, b_sum, input_precision="ieee")
    p_out += o_row.to(tl.int64)[:, None] * stride_out + o_rank[None, :]
    tl.store(p_out, b_sum * scale, mask=m_row[:, None] & m_rank[None, :])


def down(x_MK: torch.Tensor, a_RK: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """Returns dropout(x) @ a.T, [M, R] in the dtype of both."""
    if x_MK.dtype == torch.float32 and not dropout:
        return torch.mm(x_MK, a_RK.t())
    x_MK, a_RK = rows_apart(x_MK), rows_apart(a_RK)
    (m, k), rank, ranks = x_MK.shape, a_RK.shape[0], rank_tile(a_RK.shape[0], x_MK.dtype)
    out_MR = x_MK.new_empty(m, rank)
    if m:
        lora_down_kernel[(triton.cdiv(m, DOWN_ROWS), triton.cdiv(rank, ranks))](
            x_MK,
            a_RK,
            out_MR,
            m,
            k,
            x_MK.stride(0),
            a_RK.stride(0),
            rank,
            seed,
            philox.threshold(dropout),
            1 / (1 - dropout),
            RANK=rank,
            DROPOUT=dropout > 0,
            BM=DOWN_ROWS,
            BR=ranks,
            BK=DOWN_COLUMNS,
            num_warps=WARPS,
        )
    return out_MR


@triton.jit(do_not_specialize=["m"])
def lora_up_backward_kernel(
    p_dy,
    p_b,
    p_xa,
    p_ds,
    p_db,
    m,
    n,
    stride_dy,
    stride_b,
    stride_xa,
    scaling,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """Parts of dS[M, R] = scaling * dY @ B and of dB[N, R] = scaling * dY.T @ XA, from one read of a block of dY.

    A program has BM rows and SPLIT columns of dY. Its part of dS goes to ds[split], of dB to db[block of rows]: those
    are 4 R / BM bytes for each element of dY, half a byte at rank 16, and the price of reading it once.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    o_row = block * BM + tl.arange(0, BM)
    o_rank = tl.arange(0, BR)
    m_row, m_rank = o_row < m, o_rank < RANK
    o_row = o_row.to(tl.int64)
    b_xa = tl.load(
        p_xa + o_row[:, None] * stride_xa + o_rank[None, :], mask=m_row[:, None] & m_rank[None, :], other=0.0
    )
    p_dy += o_row[:, None] * stride_dy
    p_db += block.to(tl.int64) * n * RANK
    b_ds = tl.zeros((BM, BR), dtype=tl.float32)
    for first in range(split * SPLIT, min(split * SPLIT + SPLIT, n), BN):
        o_col = first + tl.arange(0, BN)
        m_col = o_col < n
        m_b = m_col[:, None] & m_rank[None, :]
        b_dy = tl.load(p_dy + o_col[None, :], mask=m_row[:, None] & m_col[None, :], other=0.0)
        b_b = tl.load(p_b + o_col.to(tl.int64)[:, None] * stride_b + o_rank[None, :], mask=m_b, other=0.0)
        b_ds = tl.dot(b_dy, b_b, b_ds, input_precision="ieee")
        b_db = tl.dot(tl.trans(b_dy), b_xa, input_precision="ieee")
        tl.store(p_db + o_col[:, None] * RANK + o_rank[None, :], b_db * scaling, mask=m_b)
    p_ds += (split.to(tl.int64) * m + o_row)[:, None] * RANK + o_rank[None, :]
    tl.store(p_ds, b_ds * scaling, mask=m_row[:, None] & m_rank[None, :])


def up_columns_tile(n: int) -> int:
    """Returns how many columns of dy a program reads at a time: half as many where loads are narrow, or they spill."""
    return UP_COLUMNS if n % 16 == 0 else UP_COLUMNS // 2


def up_backward(
    dy_MN: torch.Tensor, b_NR: torch.Tensor, xa_MR: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scaling * dy @ b, [M, R] in the dtype of all three, and scaling * dy.T @ xa, [N, R] float32."""
    (m, n), rank, dtype = dy_MN.shape, b_NR.shape[1], dy_MN.dtype
    if rank > UP_RANK or dtype == torch.float32:
        # Scaled before it is rounded to 16 bits.
        ds_MR = matmul_float32(dy_MN, b_NR).mul_(scaling).to(dtype)
        return ds_MR, matmul_float32(dy_MN.t(), xa_MR).mul_(scaling)
    dy_MN, b_NR, xa_MR = rows_apart(dy_MN), rows_apart(b_NR), rows_apart(xa_MR)
    ranks = rank_tile(rank, dtype)
    blocks, splits = triton.cdiv(m, UP_ROWS), triton.cdiv(n, UP_SPLIT)
    ds_SMR = dy_MN.new_empty(splits, m, rank, dtype=torch.float32)
    db_SNR = dy_MN.new_empty(blocks, n, rank, dtype=torch.float32)
    if m:
        lora_up_backward_kernel[(blocks, splits)](
            dy_MN,
            b_NR,
            xa_MR,
            ds_SMR,
            db_SNR,
            m,
            n,
            dy_MN.stride(0),
            b_NR.stride(0),
            xa_MR.stride(0),
            scaling,
            RANK=rank,
            SPLIT=UP_SPLIT,
            BM=UP_ROWS,
            BR=ranks,
            BN=up_columns_tile(n),
            num_warps=WARPS,
        )
    return ds_SMR.sum(0).to(dtype), db_SNR.sum(0)


@triton.jit(do_not_specialize=["m", "seed"])
def lora_down_weight_kernel(
    p_ds,
    p_x,
    p_da,
    m,
    k,
    stride_ds,
    stride_x,
    seed,
    threshold,
    scale,
    RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Parts of dA[R, K] = scale * dS.T @ dropout(x): a program has SPLIT rows and BK columns of x, read once."""
    split = tl.program_id(1)
    o_rank = tl.program_id(2) * BR + tl.arange(0, BR)
    o_col = tl.program_id(0) * BK + tl.arange(0, BK)
    o_quad = tl.program_id(0) * (BK // 4) + tl.arange(0, BK // 4)
    m_rank, m_col = o_rank < RANK, o_col < k
    b_da = tl.zeros((BR, BK), dtype=tl.float32)
    for first in range(split * SPLIT, min(split * SPLIT + SPLIT, m), BM):
        o_row = first + tl.arange(0, BM)
        m_row = o_row < m
        p_row = p_x + o_row.to(tl.int64)[:, None] * stride_x
        b_x = tl.load(p_row + o_col[None, :], mask=m_row[:, None] & m_col[None, :], other=0.0)
        p_row = p_ds + o_row.to(tl.int64)[None, :] * stride_ds
        b_ds = tl.load(p_row + o_rank[:, None], mask=m_row[None, :] & m_rank[:, None], other=0.0)
        if DROPOUT:
            b_x = tl.where(philox.keep(o_row, o_quad, seed, threshold), b_x, 0.0)
        b_da = tl.dot(b_ds, b_x, b_da, input_precision="ieee")
    p_da += (split.to(tl.int64) * RANK + o_rank)[:, None] * k + o_col[None, :]
    tl.store(p_da, b_da * scale, mask=m_rank[:, None] & m_col[None, :])


def down_weight_gradient(ds_MR: torch.Tensor, x_MK: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """Returns ds.T @ dropout(x), [R, K] float32."""
    if x_MK.dtype == torch.float32 and not dropout:
        return torch.mm(ds_MR.t(), x_MK)
    ds_MR, x_MK = rows_apart(ds_MR), rows_apart(x_MK)
    (m, k), rank, ranks = x_MK.shape, ds_MR.shape[1], rank_tile(ds_MR.shape[1], x_MK.dtype)
    splits = triton.cdiv(m, WEIGHT_SPLIT)
    da_SRK = x_MK.new_empty(splits, rank, k, dtype=torch.float32)
    if m:
        lora_down_weight_kernel[(triton.cdiv(k, WEIGHT_COLUMNS), splits, triton.cdiv(rank, ranks))](
            ds_MR,
            x_MK,
            da_SRK,
            m,
            k,
            ds_MR.stride(0),
            x_MK.stride(0),
            seed,
            philox.threshold(dropout),
            1 / (1 - dropout),
            RANK=rank,
            DROPOUT=dropout > 0,
            SPLIT=WEIGHT_SPLIT,
            BM=WEIGHT_ROWS,
            BR=ranks,
            BK=WEIGHT_COLUMNS,
            num_warps=WARPS,
        )
    return da_SRK.sum(0)


@triton.jit(do_not_specialize=["m", "seed"])
def lora_down_input_kernel(
    p_ds,
    p_a,
    p_dx,
    m,
    k,
    stride_ds,
    stride_a,
    seed,
    threshold,
    scale,
    RANK: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """dx[M, K] = scale * keep * (ds[M, R] @ a[R, K]), for a block of rows and one of columns."""
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_col = tl.program_id(1) * BK + tl.arange(0, BK)
    o_quad = tl.program_id(1) * (BK // 4) + tl.arange(0, BK // 4)
    m_row, m_col = o_row < m, o_col < k
    b_keep = philox.keep(o_row, o_quad, seed, threshold)
    o_row = o_row.to(tl.int64)
    b_sum = tl.zeros((BM, BK), dtype=tl.float32)
    for first in tl.static_range(0, RANK, BR):
        o_rank = first + tl.arange(0, BR)
        m_rank = o_rank < RANK
        o_ds = o_row[:, None] * stride_ds + o_rank[None, :]
        b_ds = tl.load(p_ds + o_ds, mask=m_row[:, None] & m_rank[None, :], other=0.0)
        o_a = o_rank.to(tl.int64)[:, None] * stride_a + o_col[None, :]
        b_a = tl.load(p_a + o_a, mask=m_rank[:, None] & m_col[None, :], other=0.0)
        b_sum = tl.dot(b_ds, b_a, b_sum, input_precision="ieee")
    b_dx = tl.where(b_keep, b_sum * scale, 0.0)
    tl.store(p_dx + o_row[:, None] * k + o_col[None, :], b_dx, mask=m_row[:, None] & m_col[None, :])


def input_rows_tile(dtype: torch.dtype) -> int:
    """Returns how many rows of dx a program writes."""
    return INPUT_ROWS // 2 if dtype == torch.float32 else INPUT_ROWS


def down_input_gradient(ds_MR: torch.Tensor, a_RK: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """Returns dropout(ds @ a), [M, K] in the dtype of both."""
    if not dropout:
        return torch.mm(ds_MR, a_RK)
    ds_MR, a_RK = rows_apart(ds_MR), rows_apart(a_RK)
    (m, rank), k, dtype = ds_MR.shape, a_RK.shape[1], ds_MR.dtype
    dx_MK = ds_MR.new_empty(m, k)
    rows = input_rows_tile(dtype)
    if m:
        lora_down_input_kernel[(triton.cdiv(m, rows), triton.cdiv(k, INPUT_COLUMNS))](
            ds_MR,
            a_RK,
            dx_MK,
            m,
            k,
            ds_MR.stride(0),
            a_RK.stride(0),
            seed,
            philox.threshold(dropout),
            1 / (1 - dropout),
            RANK=rank,
            BM=rows,
            BR=rank_tile(rank, dtype),
            BK=INPUT_COLUMNS,
            num_warps=WARPS,
        )
    return dx_MK

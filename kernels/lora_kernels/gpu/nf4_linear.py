"""The product of a frozen 4-bit linear layer and its adapter straight from the packed weight: bound by its bytes.

For a few rows, where reading a quarter of the weight is worth unpacking it in every program. Forward and backward read
the same bytes: a byte's two weights are neighbours in K, which is summed over in the one and the columns of the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_kernels.frozen import Frozen
from lora_kernels.gpu import philox
from lora_kernels.gpu.linear import GROUP, Tile, block_of, narrow_product
from lora_kernels.gpu.tile import rank_tile, rows_apart

INPUTS = 64
"""Inputs in a tile of the weight: as many as share a scale in the usual blocks of bitsandbytes."""
OUTPUTS = 64
"""Outputs in a tile of the weight."""


def takes(weight: Frozen) -> bool:
    """Returns whether rows hold whole blocks, and blocks whole tiles: then a row of a tile has one scale."""
    blocks = weight.blocks
    return blocks is not None and weight.shape[1] % blocks.size == 0 and blocks.size % INPUTS == 0


def tile_for(m: int, forward: bool) -> Tile:
    """Returns the tile for `m` rows where nothing is tuned."""
    columns, inner = (OUTPUTS, INPUTS) if forward else (INPUTS, OUTPUTS)
    return Tile(16 if m <= 16 else 64, columns, inner, 4, 3)


@triton.jit
def unpacked(
    p_packed,
    p_absmax,
    p_nested_absmax,
    p_nested_code,
    b_code,
    b_offset,
    o_output,
    first_input,
    m_output,
    k,
    LOG2_BLOCK: tl.constexpr,
    LOG2_NESTED: tl.constexpr,
    NESTED: tl.constexpr,
    BK: tl.constexpr,
    dtype: tl.constexpr,
):
    """The weights of outputs `o_output` [BN], 64-bit, and of BK inputs from `first_input` on, which share a scale."""
    BN: tl.constexpr = o_output.shape[0]
    o_first = o_output * k + first_input
    o_byte = (o_first // 2)[:, None] + tl.arange(0, BK // 2)[None, :]
    b_packed = tl.load(p_packed + o_byte, mask=m_output[:, None]).to(tl.int32)
    o_block = o_first >> LOG2_BLOCK
    if NESTED:
        b_index = tl.load(p_absmax + o_block, mask=m_output)
        b_group = tl.load(p_nested_absmax + (o_block >> LOG2_NESTED), mask=m_output, other=0.0)
        b_scale = tl.load(p_nested_code + b_index) * b_group + b_offset
    else:
        b_scale = tl.load(p_absmax + o_block, mask=m_output, other=0.0)
    b_packed = tl.reshape(b_packed, (BN * BK // 2,))
    b_even = tl.reshape(tl.gather(b_code, b_packed >> 4, 0), (BN, BK // 2))
    b_odd = tl.reshape(tl.gather(b_code, b_packed & 15, 0), (BN, BK // 2))
    b_pair = tl.join((b_even * b_scale[:, None]).to(dtype), (b_odd * b_scale[:, None]).to(dtype))
    return tl.reshape(b_pair, (BN, BK))


@triton.jit(do_not_specialize=["m", "seed"])
def adapted_product_4bit_kernel(
    p_left,
    p_packed,
    p_absmax,
    p_code,
    p_nested_absmax,
    p_nested_code,
    p_offset,
    p_narrow,
    p_up,
    p_bias,
    p_out,
    m,
    outputs,
    inputs,
    stride_left,
    stride_narrow,
    stride_up_rank,
    stride_up_column,
    stride_out,
    scale,
    seed,
    threshold,
    LOG2_BLOCK: tl.constexpr,
    LOG2_NESTED: tl.constexpr,
    NESTED: tl.constexpr,
    FORWARD: tl.constexpr,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = left @ W.T (forward) or left @ W, + scale * dropout(narrow @ up) + bias, for W [outputs, inputs].

    BM rows and BN columns of `out`, BK of what is summed over: of BN and BK, one counts inputs and one outputs of W.
    """
    n, k = (outputs, inputs) if FORWARD else (inputs, outputs)
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

    b_code = tl.load(p_code + tl.arange(0, 16))
    b_offset = tl.load(p_offset) if NESTED else None
    p_left += o_row[:, None] * stride_left + o_inner[None, :]
    for first in range(0, k, BK):
        m_inner = first + o_inner < k
        b_left = tl.load(p_left + first, mask=m_row[:, None] & m_inner[None, :], other=0.0)
        if FORWARD:
            o_output, m_output, first_input = o_column, m_column, first
        else:
            o_output, m_output, first_input = (first + o_inner).to(tl.int64), m_inner, column * BN
        b_weight = unpacked(
            p_packed,
            p_absmax,
            p_nested_absmax,
            p_nested_code,
            b_code,
            b_offset,
            o_output,
            first_input,
            m_output,
            inputs,
            LOG2_BLOCK,
            LOG2_NESTED,
            NESTED,
            BK if FORWARD else BN,
            p_left.dtype.element_ty,
        )
        b_right = tl.trans(b_weight) if FORWARD else b_weight
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision="ieee")
    p_out += o_row[:, None] * stride_out + o_column[None, :]
    tl.store(p_out, b_sum, mask=m_row[:, None] & m_column[None, :])


def adapted_product(
    left_MK: torch.Tensor,
    weight: Frozen,
    narrow_MR: torch.Tensor,
    up_RN: torch.Tensor,
    bias_N: torch.Tensor | None,
    scale: float,
    *,
    forward: bool,
    dropout: float = 0.0,
    seed: int = 0,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Returns left @ W.T (`forward`) or left @ W, + scale * dropout(narrow @ up) + bias, in the dtype of `left`."""
    left_MK, narrow_MR = rows_apart(left_MK), rows_apart(narrow_MR)
    m, rank, blocks, nested = len(left_MK), up_RN.shape[0], weight.packed(), weight.packed().nested
    outputs, inputs = weight.shape
    n = outputs if forward else inputs
    out_MN = left_MK.new_empty((m, n))
    tile = tile or tile_for(m, forward)
    if m:
        adapted_product_4bit_kernel[(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),)](
            left_MK,
            weight.data,
            blocks.absmax,
            blocks.code,
            nested.absmax if nested else blocks.code,
            nested.code if nested else blocks.code,
            nested.offset if nested else blocks.code,
            narrow_MR,
            up_RN,
            out_MN if bias_N is None else rows_apart(bias_N),
            out_MN,
            m,
            outputs,
            inputs,
            left_MK.stride(0),
            narrow_MR.stride(0),
            *up_RN.stride(),
            n,
            scale / (1 - dropout),
            seed,
            philox.threshold(dropout),
            LOG2_BLOCK=blocks.size.bit_length() - 1,
            LOG2_NESTED=nested.size.bit_length() - 1 if nested else None,
            NESTED=nested is not None,
            FORWARD=forward,
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

"""Dequantize 4-bit blocks: bound by memory, one read of the packed weight and one write of the dense one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_kernels.frozen import Frozen

BYTES = 2048
"""Packed bytes a program unpacks: one vector load and four vector stores a thread at 4 warps."""
WARPS = 4
UNIT = 16
"""Packed bytes that surely share a scale: the smallest block of bitsandbytes has 32 weights."""


@triton.jit
def nf4_dequant_kernel(
    p_packed,
    p_absmax,
    p_code,
    p_nested_absmax,
    p_nested_code,
    p_offset,
    p_out,
    n_weights,
    n_bytes,
    columns,
    stride_out,
    LOG2_BLOCK: tl.constexpr,
    LOG2_NESTED: tl.constexpr,
    NESTED: tl.constexpr,
    DENSE_ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    UNIT: tl.constexpr,
):
    # 64-bit places of a program, 32-bit places inside it: weights beyond 2^31 at the price of one addition.
    first = tl.program_id(0).to(tl.int64) * BYTES
    o_byte = tl.arange(0, BYTES)
    m_byte = first + o_byte < n_bytes
    b_packed = tl.load(p_packed + first + o_byte, mask=m_byte, eviction_policy="evict_first").to(tl.int32)
    b_code = tl.load(p_code + tl.arange(0, 16))
    b_even = tl.gather(b_code, b_packed >> 4, 0)
    b_odd = tl.gather(b_code, b_packed & 15, 0)

    # One scale for each unit, not each byte: it is looked up once.
    o_unit = first + UNIT * tl.arange(0, BYTES // UNIT)
    m_unit = o_unit < n_bytes
    o_block = (2 * o_unit) >> LOG2_BLOCK
    if NESTED:
        b_index = tl.load(p_absmax + o_block, mask=m_unit)
        b_group = tl.load(p_nested_absmax + (o_block >> LOG2_NESTED), mask=m_unit)
        # Multiplied, rounded, then added, as bitsandbytes does: compiled without fused multiply-add.
        b_scale = tl.load(p_nested_code + b_index) * b_group + tl.load(p_offset)
    else:
        b_scale = tl.load(p_absmax + o_block, mask=m_unit)
    b_scale = tl.reshape(tl.broadcast_to(b_scale[:, None], (BYTES // UNIT, UNIT)), (BYTES,))

    b_out = tl.interleave(b_even * b_scale, b_odd * b_scale)
    o_weight = 2 * first + tl.arange(0, 2 * BYTES)
    m_weight = o_weight < n_weights
    if DENSE_ROWS:
        tl.store(p_out + o_weight, b_out, mask=m_weight)
    else:
        o_row = o_weight // columns
        tl.store(p_out + o_row * stride_out + (o_weight - o_row * columns), b_out, mask=m_weight)


def dequantize_into(out_NK: torch.Tensor, weight: Frozen) -> None:
    """Writes `weight` into `out_NK`, whose columns are dense and whose rows may stand further apart than K."""
    rows, columns = weight.shape
    if out_NK.stride(1) != 1:
        raise ValueError(f"nf4_dequant: the columns of the output stand {out_NK.stride(1)} apart, and must be dense.")
    n_weights, blocks, nested = rows * columns, weight.packed(), weight.packed().nested
    n_bytes = triton.cdiv(n_weights, 2)
    nf4_dequant_kernel[(triton.cdiv(n_bytes, BYTES),)](
        weight.data,
        blocks.absmax,
        blocks.code,
        nested.absmax if nested else blocks.code,
        nested.code if nested else blocks.code,
        nested.offset if nested else blocks.code,
        out_NK,
        n_weights,
        n_bytes,
        columns,
        out_NK.stride(0),
        LOG2_BLOCK=blocks.size.bit_length() - 1,
        LOG2_NESTED=nested.size.bit_length() - 1 if nested else None,
        NESTED=nested is not None,
        DENSE_ROWS=out_NK.stride(0) == columns,
        BYTES=BYTES,
        UNIT=UNIT,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )

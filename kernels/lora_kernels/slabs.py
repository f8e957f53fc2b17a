"""What a CPU works on at a time, lest it leaves the cache before it is used: rows of a weight, or of activations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from lora_kernels.frozen import Blocks, Frozen

SLAB = 2**23
"""Bytes of weights in a slab: in the cache yet when they are multiplied, and in the heap. Above 32 MiB malloc maps
memory anew each time: a 4096 x 4096 weight takes five times as long to unpack, as its pages are cleared."""

BLOCK = 2**21
"""Bytes of activations in a block of rows, about as many as the second level of a cache holds: what a step wrote is
near yet when the next reads it, and blocks are few enough for their calls not to count."""

_last_block: int | None = None
_Part = TypeVar("_Part")


def row_blocks(x_MK: torch.Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Yields the rows of a matrix a block at a time, as many as fit when they are of `dtype`."""
    rows, columns = x_MK.shape
    step = max(BLOCK // (columns * dtype.itemsize), 1)
    for first in list(range(0, rows, step))[:_last_block]:
        yield slice(first, min(first + step, rows))


@contextmanager
def one_block() -> Iterator[None]:
    """Runs the block with one of rows in the place of all, which holds no more: for who counts memory, on fakes."""
    global _last_block
    before, _last_block = _last_block, 1
    try:
        yield
    finally:
        _last_block = before


def counted(parts: list[_Part], sizes: Sequence[int]) -> list[_Part]:
    """Returns the parts that are worked on one after the other; in `one_block` that of the largest size, for all."""
    return parts if _last_block is None else parts[max(range(len(parts)), key=sizes.__getitem__) :][:1]


def dense_slabs(weight: Frozen, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields the rows of a slab and the slab, [rows, K] in `dtype`.

    There is one slab, the weight itself, if it is dense and in that dtype already.
    """
    n_rows, columns = weight.shape
    blocks = weight.blocks
    if blocks is None and weight.data.dtype == dtype:
        yield slice(0, n_rows), weight.data
        return
    # A slab of blocks begins where a block does.
    unit = 1 if blocks is None else blocks.size // math.gcd(columns, blocks.size)
    step = max(SLAB // (columns * dtype.itemsize) // unit, 1) * unit
    scales = None if blocks is None else _scales(blocks)
    for first in range(0, n_rows, step):
        rows = slice(first, min(first + step, n_rows))
        if scales is None:
            yield rows, weight.data[rows].to(dtype)
        else:
            yield rows, _dequantized(weight, rows, scales, dtype)


def _scales(blocks: Blocks) -> torch.Tensor:
    nested = blocks.nested
    if nested is None:
        return blocks.absmax
    dequantize = torch.ops.bitsandbytes.dequantize_blockwise.default
    return dequantize(blocks.absmax, nested.absmax, nested.code, nested.size, torch.float32).add_(nested.offset)


def _dequantized(weight: Frozen, rows: slice, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Uses the compiled loops of bitsandbytes; it is loaded, or there would be no weight of its making.

    Where blocks cross rows it is told of one long row: those loops (0.50.2, on processors with AVX512) start a block
    anew with each row, and without a word give a weight that is off by a quarter.
    """
    columns, blocks = weight.shape[1], weight.packed()
    first, last = rows.start * columns, rows.stop * columns
    packed = weight.data[first // 2 : -(-last // 2)].unsqueeze(1)
    absmax = scales[first // blocks.size : -(-last // blocks.size)]
    shape = (rows.stop - rows.start, columns)
    told = (1, last - first) if columns % blocks.size else shape
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
    return dequantize(packed, absmax, blocks.size, blocks.kind, told, dtype).view(shape)

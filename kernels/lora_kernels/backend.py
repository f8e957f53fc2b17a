"""Which implementation of an operation runs: the Triton kernels, or the CPU form."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

_forced = False


def is_triton(tensor: torch.Tensor) -> bool:
    """Returns whether the Triton kernels take this tensor: those on a GPU do, and all do inside `triton_anywhere`."""
    return tensor.is_cuda or _forced


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Returns the dtype to multiply matrices in: the tensor's, or float32 on a CPU without instructions for it."""
    wide = is_triton(tensor) or tensor.dtype not in _INSTRUCTIONS
    return tensor.dtype if wide or _cpu_multiplies(tensor.dtype) else torch.float32


ALIKE = 32
"""What the rows of a product in 16 bits on a CPU are filled up to a multiple of: oneDNN compiles each product of a
shape that is new to it, for 3 to 8 ms where SmolLM2-135M's products of 500 tokens take 0.5, and keeps some 0.2 MB."""


def alike(rows: int, like: torch.Tensor) -> int:
    """Returns how many rows to multiply in the place of so many, a number that changes from one product to the next.

    On a CPU that multiplies the dtype of `like` in 16 bits it is the next multiple of `ALIKE`, elsewhere `rows`.
    """
    compiled = like.is_cpu and not is_triton(like) and product_dtype(like).itemsize == 2
    return -(-rows // ALIKE) * ALIKE if compiled else rows


_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
"""The names under which torch lists them, on x86 and on ARM."""


@functools.cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    has: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has.get(name, False) for name in _INSTRUCTIONS[dtype])


def readable(left_MK: torch.Tensor) -> torch.Tensor:
    """Returns a matrix that torch may multiply from the left: without gaps between its rows where it would read them.

    On a CPU, oneDNN's products with AMX instructions (torch 2.13) read on where K is no multiple of 32, or of 8 up to
    64, and multiply what they find by zero: if that is not a number, neither is the sum.
    """
    columns = left_MK.shape[1]
    whole = columns % (8 if columns <= 64 else 32) == 0
    if left_MK.is_cuda or left_MK.dtype != torch.bfloat16 or whole or left_MK.stride(0) <= columns:
        return left_MK
    return left_MK.contiguous()


@contextmanager
def triton_anywhere() -> Iterator[None]:
    """Runs the block with the Triton kernels for CPU tensors too: in Triton's interpreter, or to compile only."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before

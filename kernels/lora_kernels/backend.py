"""Which implementation of an operation runs: the Triton kernels, or the CPU form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_forced = False


def is_triton(tensor: torch.Tensor) -> bool:
    """Returns whether the Triton kernels take this tensor: those on a GPU do, and all do inside `triton_anywhere`."""
    return tensor.is_cuda or _forced


@contextmanager
def triton_anywhere() -> Iterator[None]:
    """Runs the block with the Triton kernels for CPU tensors too: in Triton's interpreter, or to compile only."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before

"""Launches of interpreted kernels in which any access outside a tensor ends the process, by SIGSEGV.

The interpreter reads and writes wherever a kernel points. So each tensor of a launch is copied into memory of its own,
with pages that nobody may touch on both sides, and flush against those before it or those behind it. After the launch
what was written is copied back.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from unittest import mock

import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

Side = Literal["start", "end"]

FENCE_BYTES = 1 << 26
"""Forbidden on each side: an overrun by whole rows lands in it too. Address space only, no memory."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Fenced:
    """A copy of the bytes of memory that start at `first` and end before `last`, flush against a fence on `side`."""

    def __init__(self, first: int, last: int, side: Side):
        self.first, self.bytes = first, last - first
        pages = -(-self.bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.mapped = 2 * FENCE_BYTES + pages
        self.base = _libc.mmap(None, self.mapped, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if self.base in (None, ctypes.c_void_p(-1).value):
            raise MemoryError(f"no room for {self.mapped} bytes of address space")
        if _libc.mprotect(self.base + FENCE_BYTES, pages, mmap.PROT_READ | mmap.PROT_WRITE):
            raise OSError(ctypes.get_errno(), "mprotect")
        self.copy = self.base + FENCE_BYTES + (pages - self.bytes if side == "end" else 0)
        ctypes.memmove(self.copy, self.first, self.bytes)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the copy of `tensor`, which lies within these bytes, with its shape and strides."""
        length, place = last_byte(tensor) - tensor.data_ptr(), self.copy + tensor.data_ptr() - self.first
        buffer = (ctypes.c_uint8 * length).from_address(place)
        return torch.frombuffer(buffer, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride(), 0)

    def release(self) -> None:
        """Copies back what was written, and unmaps."""
        ctypes.memmove(self.first, self.copy, self.bytes)
        _libc.munmap(self.base, self.mapped)


def last_byte(tensor: torch.Tensor) -> int:
    """Returns the address behind the last byte of a tensor that has elements; strides may leave gaps."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (steps + 1) * tensor.element_size()


@contextmanager
def fenced_launches(side: Side) -> Iterator[set[str]]:
    """Within the block every tensor handed to an interpreted kernel is fenced, those that share memory together.

    Yields the names of the kernels that have been launched.
    """
    launched: set[str] = set()
    fences: list[Fenced] = []

    def fence(
        executor: GridExecutor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        launched.add(executor.fn.__name__)
        spans: dict[int, tuple[int, int]] = {}
        for arg in (*args, *kwargs.values()):
            if isinstance(arg, torch.Tensor) and arg.numel():
                storage = arg.untyped_storage().data_ptr()
                first, last = spans.get(storage, (arg.data_ptr(), 0))
                spans[storage] = min(first, arg.data_ptr()), max(last, last_byte(arg))
        fenced = {storage: Fenced(first, last, side) for storage, (first, last) in spans.items()}
        fences.extend(fenced.values())

        def inside(arg: Any) -> Any:
            if isinstance(arg, torch.Tensor) and arg.numel():
                return fenced[arg.untyped_storage().data_ptr()].view(arg)
            return arg

        return [inside(arg) for arg in args], {name: inside(arg) for name, arg in kwargs.items()}

    def unfence(*_: Any) -> None:
        while fences:
            fences.pop().release()

    with (
        mock.patch.object(GridExecutor, "_init_args_hst", fence),
        mock.patch.object(GridExecutor, "_restore_args_dev", unfence),
    ):
        yield launched


@contextmanager
def last_program_only() -> Iterator[None]:
    """Within the block a launch runs the last program of its grid alone: the one that reaches furthest."""
    run = GridExecutor.__call__

    def run_last(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        grid = (*executor.grid, 1, 1)[:3]
        last = tuple(programs - 1 for programs in grid)
        executor.grid = (1,)
        with (
            mock.patch.object(InterpreterBuilder, "set_grid_dim", lambda self, *_: setattr(self, "grid_dim", grid)),
            mock.patch.object(InterpreterBuilder, "set_grid_idx", lambda self, *_: setattr(self, "grid_idx", last)),
        ):
            run(executor, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", run_last):
        yield

"""What tiles of every kernel need of the tensors they read."""

from __future__ import annotations

import torch
import triton

from lora_kernels import dispatch

LARGEST_RANK_BYTES = 128
"""Of the ranks in a tile: more take another trip, as a tile of 256 needs 128 KiB of shared memory. In float32 a tile of
64 spills, and on sm_100 is multiplied by matrix instructions, which round float32."""


def rank_tile(rank: int, dtype: torch.dtype) -> int:
    """Returns the ranks in a tile: a power of two of at least 16, the shortest sum that tensor cores take."""
    return min(LARGEST_RANK_BYTES // dtype.itemsize, max(16, triton.next_power_of_2(rank)))


def rows_apart(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor, copied only where its columns are not dense: the gradient of a sum has strides of 0."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


PROGRAMS = 2
"""Of four warps on a multiprocessor, at least: what keeps its four schedulers busy while one warp waits for memory."""


def leaves_idle(programs: int, device: torch.device) -> bool:
    """Returns whether so few programs leave part of the GPU without work."""
    card = dispatch.gpu(device)
    return card is not None and programs < PROGRAMS * card.multiprocessors

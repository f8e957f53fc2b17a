"""What tiles of every kernel need of the tensors they read."""

from __future__ import annotations

import torch
import triton

LARGEST_RANK = 64
"""Ranks in a tile: more take another trip, as a tile of 256 needs 128 KiB of shared memory."""


def rank_tile(rank: int) -> int:
    """Returns the ranks in a tile: a power of two of at least 16, the shortest sum that tensor cores take."""
    return min(LARGEST_RANK, max(16, triton.next_power_of_2(rank)))


def rows_apart(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor, copied only where its columns are not dense: the gradient of a sum has strides of 0."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

"""Matrix products whose result is not of the dtype that is multiplied."""

from __future__ import annotations

import torch


def matmul_float32(left_MK: torch.Tensor, right_KN: torch.Tensor) -> torch.Tensor:
    """Returns left @ right, [M, N] float32 with nothing rounded on the way, for two matrices of one float dtype."""
    if left_MK.is_cuda and left_MK.dtype != torch.float32:
        return torch.mm(left_MK, right_KN, out_dtype=torch.float32)
    return torch.mm(left_MK.float(), right_KN.float())

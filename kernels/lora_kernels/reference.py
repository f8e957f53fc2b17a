"""The naive twin of every operation: what it computes, in plain torch, in any float dtype, slow and differentiable.

M rows of activations, N outputs and K inputs of a weight, R the rank of an adapter, T tokens, V words.
"""

from __future__ import annotations

import torch

from lora_kernels.frozen import Frozen


def nf4_dequant(weight: Frozen, dtype: torch.dtype) -> torch.Tensor:
    """w[i] = code[nibble[i]] * absmax[i // blocksize], each product rounded once to `dtype`."""
    rows, columns = weight.shape
    blocks = weight.blocks
    if blocks is None:
        return weight.data.to(dtype)
    absmax = blocks.absmax
    if blocks.nested:
        group = torch.arange(len(absmax), device=absmax.device) // blocks.nested.size
        absmax = blocks.nested.code[absmax.long()] * blocks.nested.absmax[group] + blocks.nested.offset
    nibbles = torch.stack([weight.data >> 4, weight.data & 15], dim=1).flatten()[: rows * columns].long()
    block = torch.arange(rows * columns, device=absmax.device) // blocks.size
    return (blocks.code[nibbles] * absmax[block]).to(dtype).reshape(rows, columns)

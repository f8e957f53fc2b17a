"""Dropout whose mask is never stored: a seed brings it back, in the backward pass as in the forward one."""

from __future__ import annotations

import torch

from lora_kernels import backend


def new_seed() -> int:
    """Returns a seed from torch's default CPU generator, so that a recomputed forward pass draws the same one."""
    return int(torch.randint(2**62, (), device="cpu"))


def keep_mask(like_MK: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """Returns what `seed` keeps of a tensor of this shape and device: [M, K] bool, each True with 1 - `dropout`.

    The operations never hold it on a GPU, where each works out its part in registers; this is for looking at it.
    """
    if backend.is_triton(like_MK):
        from lora_kernels.gpu import philox

        return philox.keep_mask(like_MK, dropout, seed)
    return ones_and_zeros(like_MK, dropout, seed).bool()


def ones_and_zeros(like_MK: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """Returns the mask of a CPU tensor to multiply by: 1 with probability 1 - `dropout`, else 0, in its dtype.

    A draw of 64 bits decides about four elements, `dropout` rounded to 2^-16: six times as fast as `bernoulli_`, and
    so the backward pass makes the mask again for less than it costs to keep.
    """
    draws = torch.empty(-(-like_MK.numel() // 4), dtype=torch.int64, device="cpu")
    draws.random_(-(2**63), None, generator=torch.Generator(device="cpu").manual_seed(seed))
    quarters_MK = draws.view(torch.int16)[: like_MK.numel()].view(like_MK.shape)
    mask_MK = torch.empty(like_MK.shape, dtype=like_MK.dtype, device="cpu")
    # Written as numbers: torch multiplies by a mask of bool ten times slower.
    return torch.ge(quarters_MK, min(round(dropout * 2**16), 2**16 - 1) - 2**15, out=mask_MK)

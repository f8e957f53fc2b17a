"""What an adapter changed in each layer: how large the change is, and over how many directions it is spread.

Shapes: M outputs, K inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

PREFIX = "base_model.model."


def measured(model: Any) -> list[dict[str, Any]]:
    """Returns `name`, `norm` and `effective_rank` of each layer's low-rank change, in the order of the model.

    The norm is Frobenius's, of s B A. The effective rank is the exponential of the entropy of its singular values
    (Roy & Vetterli 2007, "The effective rank", eq. 4 and 5): 1 where all lies in one direction, and the rank where it
    is spread evenly. Of a layer with DoRA the magnitude is no part of it.
    """
    return [{"name": name, "norm": norm, "effective_rank": rank} for name, norm, rank in _of_layers(model)]


@torch.no_grad()
def _of_layers(model: Any) -> Iterator[tuple[str, float, float]]:
    start = getattr(model, "start", {})
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for down, up in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            held = [getattr(module, part) for part in (down, up)]
            if not all("default" in part for part in held):
                continue
            a_RK, b_MR = (getattr(part["default"], "weight", part["default"]).detach().float() for part in held)
            # An adapter that moved its base as it began has come from there, and not from zero.
            if (begun := start.get(f"{name}.{down}.weight")) is not None:
                a_RK = torch.cat([a_RK, begun.to(a_RK)], dim=0)
                b_MR = torch.cat([b_MR, -start[f"{name}.{up}.weight"].to(b_MR)], dim=1)
            yield name.removeprefix(PREFIX), *spectrum(a_RK, b_MR, module.scaling["default"])


def spectrum(a_RK: torch.Tensor, b_MR: torch.Tensor, scaling: float) -> tuple[float, float]:
    """Returns the Frobenius norm and the effective rank of s B A, which is never made; 0 and 0 of zeros."""
    # The singular values of B A are those of the small product of the triangular parts of B and A^T.
    inner = torch.linalg.qr(b_MR, mode="r").R @ torch.linalg.qr(a_RK.T, mode="r").R.T
    values = scaling * torch.linalg.svdvals(inner.double())
    total = values.sum()
    if not total > 0:
        return 0.0, 0.0
    share = values / total
    entropy = -torch.special.xlogy(share, share).sum()
    return float(values.norm()), float(entropy.exp())

"""How a model is run: the transformers model inside, evaluation without gradients, mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def unwrapped(model: Any) -> Any:
    """Returns the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs the block in evaluation mode, without gradients, in the dtype training computes in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), mixed_precision(model):
            yield
    finally:
        model.train(was_training)


def mixed_precision(model: nn.Module) -> torch.autocast:
    """Returns the autocast that lets float32 adapters and heads work on a 16-bit base; else off."""
    frozen = next((p for p in _floating(model) if not p.requires_grad), None)
    if frozen is None:
        frozen = next(_floating(model))
    half = frozen.dtype if frozen.dtype in (torch.bfloat16, torch.float16) else None
    if frozen.is_meta:
        # A model without numbers is put together only; autocast knows no such device.
        return torch.autocast("cpu", enabled=False)
    if getattr(model, "computes_in_float32", False):
        half = None
    return torch.autocast(frozen.device.type, dtype=half, enabled=half is not None)


def _floating(model: nn.Module) -> Iterator[nn.Parameter]:
    # One by one: all parameters of a model are too many to look at in every step.
    return (p for p in model.parameters() if p.is_floating_point())

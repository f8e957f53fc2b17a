"""How a model is run: the transformers model inside, without its adapter, without gradients, in mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def unwrapped(model: Any) -> Any:
    """Returns the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# Those that run without their adapter.
_bare: WeakSet[nn.Module] = WeakSet()


@contextmanager
def without(model: Any) -> Iterator[None]:
    """Runs the block with the base as it was before the adapter, even where the adapter's start moved its weights."""
    if model in _bare:
        # What is enabled again at the end of such a block would be so for the rest of the one that it lies in.
        yield
        return
    _bare.add(model)
    try:
        with _moved_back(model) if getattr(model, "start", None) is not None else model.disable_adapter():
            yield
    finally:
        _bare.discard(model)


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """Runs the block with what the model is compared with: its base or, where it goes on from an adapter, that one.

    Such a model has the adapter it went on from as `reference`, by the names of its parameters.
    """
    reference = getattr(model, "reference", None)
    if reference is None or model in _bare:
        with without(model):
            yield
        return
    with _holding(dict(model.named_parameters()), reference):
        yield


@contextmanager
def _holding(parameters: dict[str, nn.Parameter], numbers: dict[str, torch.Tensor]) -> Iterator[None]:
    """Runs the block with other numbers in the parameters named."""
    now = {name: parameters[name].detach().clone() for name in numbers}
    try:
        for name, tensor in numbers.items():
            parameters[name].data.copy_(tensor)
        yield
    finally:
        for name, tensor in now.items():
            parameters[name].data.copy_(tensor)


@contextmanager
def _moved_back(model: Any) -> Iterator[None]:
    """Runs the block with the adapter as it started, by which the base is what it was before its weights were moved."""
    start = model.start
    # W - s B0 A0 is what the base holds, so B0 and A0 give W back.
    # Copied by hand: PEFT asks for all that it saves, token rows and modules trained whole too.
    parameters = dict(model.named_parameters())
    numbers = {name: start[_saved_name(name)] for name in parameters if _saved_name(name) in start}
    whole = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    with _holding(parameters, numbers):
        try:
            for module in whole:
                module.enable_adapters(False)
            yield
        finally:
            for module in whole:
                module.enable_adapters(True)


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


def _saved_name(parameter: str) -> str:
    """Returns the name that PEFT saves a parameter of A or B by."""
    return parameter.replace(".default.", ".")

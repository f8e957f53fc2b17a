"""What a training keeps of a forward pass for the backward one: everything, or the inputs of layers, to compute again.

The inputs can lie in the host's memory meanwhile, where a GPU has no room for those of all layers either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from lora_ft.model.modes import unwrapped

Checkpointing = Literal["off", "on", "offload"]
Away = Callable[[], AbstractContextManager[Any]]
"""Returns what puts tensors away where they are saved, and fetches them where they are needed."""


def to_host() -> save_on_cpu:
    """Returns the hooks that keep saved tensors in the host's memory: pinned, from which a GPU copies fastest."""
    return save_on_cpu(pin_memory=torch.cuda.is_available())


@contextmanager
def kept(model: nn.Module, how: Checkpointing, away: Away = to_host) -> Iterator[None]:
    """Runs the block with activations of `model` kept for the backward pass as `how` says.

    What a layer computes is computed once more in the backward pass (Chen et al. 2016, arXiv 1604.06174), with
    `offload` from inputs that were elsewhere meanwhile.
    """
    if how == "off":
        yield
        return
    inner: Any = unwrapped(model)
    inner.activation_checkpointing_enable({"use_reentrant": False})
    if how == "offload":
        for module in inner.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = functools.partial(_put_away, away)
    try:
        yield
    finally:
        inner.activation_checkpointing_disable()


def _put_away(away: Away, layer: Callable[..., Any], *inputs: Any) -> Any:
    # The hooks see the inputs alone: what is saved inside goes to those of the checkpoint.
    with away():
        return checkpoint(layer, *inputs, use_reentrant=False)

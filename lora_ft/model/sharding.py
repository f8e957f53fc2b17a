"""A frozen base spread over the processes that train an adapter on it: each holds a part of every layer.

It is FSDP2 (`torch.distributed.fsdp.fully_shard`) on what transformers would not cut in two, decoder layers above all,
and on what is frozen in it alone. Adapters and the head stay whole in each process, so whatever is done to an adapter
is done as without it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_ft.errors import UnsupportedModelError
from lora_ft.model.modes import unwrapped
from lora_ft.system import processes

log = logging.getLogger(__name__)


def shard(model: Any) -> None:
    """Spreads the frozen weights of the model's layers over the processes, for good; each has to call it.

    From then on all have to make equally many forward and backward passes.

    Raises:
        UnsupportedModelError: the model does not say what its layers are, or is no head on a model of them.
    """
    inner = unwrapped(model)
    names = set(getattr(inner, "_no_split_modules", None) or ())
    layers = [module for module in inner.modules() if type(module).__name__ in names]
    if not layers or inner.base_model is inner:
        raise UnsupportedModelError(
            f"train.shard-base: a {type(inner).__name__} is not a head on a model that says what its layers are, so it "
            "cannot be spread over processes; leave it out, and each holds the base whole."
        )
    device = next(inner.parameters()).device.type
    mesh = init_device_mesh(device, (processes.count(),))
    whole = sum(parameter.nbytes for parameter in inner.parameters())
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=_learned(layer))
    # The root of them all, with nothing of its own, fetches a layer while the one before it is computed.
    fully_shard(inner.base_model, mesh=mesh, ignored_params=_outside(inner.base_model, layers))
    held = sum(local(parameter).nbytes for parameter in inner.parameters())
    log.info("the base is spread over %d processes: %.1f of %.1f MiB are held here", processes.count(),
             held / 2**20, whole / 2**20)  # fmt: skip


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what this process holds of a tensor: all of it, unless it is spread over several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _learned(module: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in module.parameters() if parameter.requires_grad}


def _outside(module: nn.Module, layers: list[nn.Module]) -> set[nn.Parameter]:
    """Returns the parameters of a module that are in none of its layers, and all that are trained."""
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    return {parameter for parameter in module.parameters() if parameter not in inside} | _learned(module)

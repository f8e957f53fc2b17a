"""What training must not change: the weights of the base, seen to be the same from the start of a run to its end."""

from __future__ import annotations

import json

import torch
from torch import nn

from lora_ft import adapters
from lora_ft.base import Base
from lora_ft.errors import ProofError
from lora_ft.model import sharding
from lora_ft.proof import environment


class Frozen:
    """What training must not change of a model, from the start of a run to its end, over all interrupts.

    Args:
        changes_allowed: the run is gone on with on what it was not started on, such as another quantization.
    """

    def __init__(self, model: nn.Module, base: Base, *, changes_allowed: bool) -> None:
        self.model, self.changes_allowed = model, changes_allowed
        self.look()
        # How weights are quantized, and so their bytes, may differ between devices and versions.
        where = json.dumps([environment.device_name(base.device), environment.versions()])
        self.told = {"sha256": adapters.frozen_digest(model), "where": where}

    def look(self) -> None:
        """Takes the sum of all weights that `require` compares, of what this process holds of them."""
        self.sum = frozen_sum(self.model)

    def compared(self, began_on: dict[str, str]) -> dict[str, str]:
        """Returns `told`, for a checkpoint to keep, having compared it with what the run was started on.

        Raises:
            ProofError: the weights are others, though nothing else is.
        """
        same_place = began_on["where"] == self.told["where"] and not self.changes_allowed
        if same_place and began_on["sha256"] != self.told["sha256"]:
            raise ProofError("The frozen weights of the base are not those that the run was started on.")
        return self.told

    def require(self, *, digest: bool) -> None:
        """Raises ProofError where a weight was changed.

        Args:
            digest: compare the sha256 too. Of a large base it takes longer than an interrupt may, and of a base that is
                spread over processes none has all; the run that goes on, or the proof after it, compares that.
        """
        if frozen_sum(self.model) == self.sum and (
            not digest or adapters.frozen_digest(self.model) == self.told["sha256"]
        ):
            return
        raise ProofError("A frozen weight of the base changed during training; the adapter is not one of this base.")


def frozen_sum(model: nn.Module) -> int:
    """Returns a sum of all that training must not change, eight bytes at a time: some 20 times as fast as sha256.

    Of a base that is spread over processes it is of what this one holds.

    Unlike `adapters.frozen_digest` it misses what somebody makes it miss, and one chance in 2^64.
    """
    learned = {id(parameter) for parameter in adapters.trained(model).values()}
    total = 0
    for tensor in model.state_dict(keep_vars=True).values():
        if id(tensor) in learned or not isinstance(tensor, torch.Tensor):
            continue
        held = sharding.local(tensor.detach()).contiguous().reshape(-1).view(torch.uint8)
        held = held if held.data_ptr() % 8 == 0 else held.clone()
        words = held[: len(held) // 8 * 8].view(torch.int64).sum() + held[len(held) // 8 * 8 :].sum(dtype=torch.int64)
        # By its place among them: two that changed places are a change too.
        total = (31 * total + int(words)) % 2**64
    return total

"""Steps whose randomness follows from their place in a run, so that a resumed run is the same run, bit for bit.

The order of the rows in epoch e comes from (seed, e), and what is drawn in a forward pass, such as dropout, from (seed,
step, micro step): nothing depends on what happened before. Each step has a fingerprint by which two runs are compared.
Several processes take the micro steps of a step in turn.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from lora_ft import adapters
from lora_ft.errors import ConfigError, LoraFtError
from lora_ft.system import processes

HOOKS = ("_get_train_sampler", "_get_grad_norm", "_maybe_log_save_evaluate")
# As wide as each kind of number: equal sums of them are equal bits but for a chance of one in 2^32.
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def require(hooks: Sequence[str]) -> None:
    """Raises LoraFtError where this version of transformers never calls a method that a mixin relies on."""
    missing = [name for name in hooks if not hasattr(transformers.Trainer, name)]
    if missing:
        raise LoraFtError(
            f"transformers {transformers.__version__} has no Trainer.{missing[0]}, without which steps are neither "
            "guarded nor resumed exactly: install the version in constraints.txt."
        )


def seed_of(*place: int) -> int:
    """Returns a seed of 63 bits that is its own for every place."""
    digest = hashlib.sha256(struct.pack(f"<{len(place)}q", *place)).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def pass_seed(trainer: Any, own: int) -> int:
    """Returns the seed of a pass: of the step being made the one with the number `own`, from 0, in this process."""
    micro_step = own * processes.count() + processes.rank()
    return seed_of(trainer.args.seed, trainer.state.global_step, micro_step)


def reseed(seed: int) -> None:
    """Seeds the generators of Python, of numpy and of torch, for the CPU and all GPUs.

    The fused layers draw the seeds of their dropout from torch's generator of the CPU (`lora_kernels.new_seed`).
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def checksum(parameters: dict[str, nn.Parameter]) -> int:
    """Returns the sum of all bits, read as integers of 64 bits: one pass over the memory, without rounding."""
    by_width: dict[int, list[torch.Tensor]] = {}
    for parameter in parameters.values():
        width = parameter.element_size()
        by_width.setdefault(width, []).append(parameter.detach().view(_INTEGER[width]).reshape(-1))
    return sum(int(torch.cat(found).sum(dtype=torch.int64)) for found in by_width.values())


class EpochOrder(Sampler[int]):
    """The order of `count` rows: in each epoch the one that its number and the seed give.

    Args:
        epoch: returns the number of the epoch that begins.
        draw: returns an order of the rows, all that is random in it from the generator; a permutation, if not given.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        epoch: Callable[[], int],
        draw: Callable[[torch.Generator], Iterable[int]] | None = None,
    ) -> None:
        self.count, self.seed, self.epoch = count, seed, epoch
        self.draw = draw or (lambda generator: torch.randperm(count, generator=generator).tolist())

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        yield from self.of(self.epoch())

    def of(self, epoch: int) -> list[int]:
        """Returns the row numbers of an epoch, in their order."""
        return list(self.draw(torch.Generator().manual_seed(seed_of(self.seed, epoch))))


def _drawn_by(sampler: Any) -> Callable[[torch.Generator], Iterable[int]] | None:
    """Returns how a sampler of transformers orders its rows, for `EpochOrder`; None where that is a permutation.

    Raises:
        ConfigError: its order depends on the generator that all else draws from, so it could not be had again.
    """
    if type(sampler) is RandomSampler:
        return None
    if type(sampler) is SequentialSampler:
        return lambda generator: range(len(sampler))
    if type(sampler) is LengthGroupedSampler:
        return lambda generator: get_length_grouped_indices(sampler.lengths, sampler.batch_size, generator=generator)
    raise ConfigError(
        f"{type(sampler).__name__} orders the rows, and a resumed run would not have its order again: use the "
        "train_sampling_strategy random, sequential or group_by_length."
    )


class ExactSteps:
    """Mixin for a Trainer: randomness by place, a fingerprint of each step, and the rows that a step was made of.

    The collator must draw nothing: the Trainer reads one batch ahead, so what it drew would depend on history.
    """

    kept: tuple[str, ...] = ("fingerprint",)
    """Attributes that belong to a checkpoint (`lora_ft.checkpoints`)."""

    fingerprint = ""
    """A sha256 over loss, learning rate, gradient norm and adapter of all steps so far; 16 hexadecimal digits of it."""
    order: EpochOrder | None = None
    """None where the rows are streamed."""
    step_losses: list[torch.Tensor]
    """Losses of the micro steps of the step being made."""
    step_items: Any = None
    """Scored positions of the step being made, where they were counted."""
    step_norm: Any = None
    step_lr: float = 0.0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        require(HOOKS)
        self.step_losses = []
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        trainer: Any = self
        sampler = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        if sampler is None:  # streamed rows come as they are
            return None
        rows: Sized = trainer.train_dataset if train_dataset is None else train_dataset
        seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
        now = lambda: self.place_of(trainer.state.global_step)[0]  # noqa: E731
        self.order = EpochOrder(len(rows), seed, now, self.drawn_by(sampler))
        return self.order

    def drawn_by(self, sampler: Any) -> Callable[[torch.Generator], Iterable[int]] | None:
        """Returns how a sampler of transformers orders its rows, None where by a permutation. Raises ConfigError."""
        return _drawn_by(sampler)

    def place_of(self, step: int) -> tuple[int, int]:
        """Returns the epoch that a step, counted from 0, belongs to, and its number in it."""
        trainer: Any = self
        # The last batch of an epoch may be left out.
        batches = len(trainer.callback_handler.train_dataloader)
        # Of each process as many.
        return divmod(step, max(1, -(-batches // trainer.args.gradient_accumulation_steps)))

    def rows_of(self, step: int, micro_step: int) -> list[int]:
        """Returns the numbers, from 0, of the rows in a micro step, both counted from 0."""
        trainer: Any = self
        size, accumulate = trainer._train_batch_size, trainer.args.gradient_accumulation_steps * processes.count()
        epoch, update = self.place_of(step) if self.order is not None else (0, step)
        start = (update * accumulate + micro_step) * size
        return (
            self.order.of(epoch)[start : start + size] if self.order is not None else list(range(start, start + size))
        )

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        trainer: Any = self
        reseed(pass_seed(trainer, len(self.step_losses)))
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self.step_losses.append(loss)
        self.step_items = num_items_in_batch
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        trainer: Any = self
        self.step_norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        self.step_lr = trainer._get_learning_rate()
        return self.step_norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Called at the end of an epoch too, where no step was made.
        if self.step_losses:
            self.fingerprint = self._next_fingerprint()
            self.step_losses = []
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]

    def _next_fingerprint(self) -> str:
        """Returns the fingerprint of the step just made, chained to those before it: one line tells of all."""
        trainer: Any = self
        losses = torch.stack(self.step_losses).double().cpu().numpy().tobytes()
        numbers = struct.pack("<ddq", self.step_lr, float(self.step_norm), checksum(adapters.trained(trainer.model)))
        return hashlib.sha256(bytes.fromhex(self.fingerprint) + losses + numbers).hexdigest()[:16]

"""A batch that does not fit the memory is made in parts, whose gradients add up to those of the whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lora_ft.data.mask import IGNORE
from lora_ft.errors import OutOfMemoryError
from lora_ft.model import attention
from lora_ft.system import heap
from lora_ft.system.devices import is_out_of_memory
from lora_ft.training.exact import pass_seed, reseed

log = logging.getLogger(__name__)

Inputs = dict[str, torch.Tensor]


class Halving:
    """Mixin for a Trainer whose loss is divided by the scored positions of the global batch: it goes on in halves.

    Where the memory does not suffice for a forward and backward pass, it is made in two parts, or twice as many as
    before, and so is every one after it. The global batch stays, and with it what is learned, but for rounding and for
    what dropout draws.
    """

    kept: tuple[str, ...] = ("parts",)

    sharded: bool = False
    """Whether all processes have to make the same passes."""
    parts: int = 1
    """Passes that each batch is made in."""
    step_losses: list[torch.Tensor]
    tokens_seen: int = 0
    _batches: list[tuple[Inputs, Any]]
    """Those of the step being made, for it has to be made anew where a gradient was added up half way."""
    _seen_before: int = 0

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> torch.Tensor:
        micro_step = len(self.step_losses)
        if micro_step == 0:
            self._batches, self._seen_before = [], self.tokens_seen
        self._batches.append((inputs, num_items_in_batch))
        return self._made(model, [micro_step], again=range(micro_step + 1))

    def try_longest(self, inputs: Inputs) -> None:
        """Makes a forward and backward pass that no step follows, so that a lack of memory shows before the first."""
        trainer: Any = self
        model, self.step_losses = trainer.model_wrapped, []
        self._batches, self._seen_before = [(inputs, (inputs["labels"] != IGNORE).sum())], self.tokens_seen
        reseed(pass_seed(trainer, 0))
        self._made(model, [0], again=[0])
        model.zero_grad(set_to_none=True)
        self.tokens_seen = self._seen_before
        heap.give_back()

    def _made(self, model: nn.Module, micro_steps: Any, again: Any) -> torch.Tensor:
        """Returns the loss of the last of these micro steps; `again` names those to make anew with less memory."""
        trainer: Any = self
        while True:
            try:
                for micro_step in micro_steps:
                    if micro_steps is again:  # as `ExactSteps` did the first time
                        reseed(pass_seed(trainer, micro_step))
                    loss = self._in_parts(model, *self._batches[micro_step])
                return loss
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.refuse_shards()
            # Outside of the clause, whose error holds all that the pass had made.
            self.tokens_seen, micro_steps = self._seen_before, again
            self.make_room([inputs for inputs, _ in self._batches])
            self.made_smaller()

    def made_smaller(self) -> None:
        """Takes that the batches of the step being made are made in more passes from here on, and from their start."""

    def refuse_shards(self) -> None:
        """Raises OutOfMemoryError where no process may make more passes than the others."""
        if self.sharded:
            raise OutOfMemoryError(
                "The batch does not fit, and with --train.shard-base all processes must make the same passes: "
                "halve --train.batch-size and double --train.accumulate, which trains the same."
            ) from None

    def make_room(self, batches: Sequence[Inputs]) -> None:
        """Has each batch be made in twice as many passes, of those that these batches leave to be halved.

        Raises:
            OutOfMemoryError: no batch has parts that could be smaller.
        """
        trainer: Any = self
        trainer.model.zero_grad(set_to_none=True)
        self._halve(batches)
        heap.give_back()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _in_parts(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any) -> torch.Tensor:
        step = super().training_step  # type: ignore[misc]
        losses = [step(model, part, num_items_in_batch) for part in split(inputs, self.parts)]
        return torch.stack(losses).sum() if losses[1:] else losses[0]

    def _halve(self, batches: Sequence[Inputs]) -> None:
        """Raises OutOfMemoryError where no batch of the step has parts that could be smaller."""
        most = max(rows(inputs) for inputs in batches)
        if self.parts >= most:
            longest = max(tokens for inputs in batches for tokens in lengths(inputs))
            raise OutOfMemoryError(
                f"One row of {longest} tokens alone does not fit the memory: shorten rows (--data.max-length), or see "
                "what `lora-ft plan` says of --train.checkpoint-activations and --quant nf4."
            )
        self.parts = min(2 * self.parts, most)
        told = (
            "out of memory with %d rows in a pass: each batch is made in %d passes from here on, for the same gradient"
        )
        log.warning(told, -(-most * 2 // self.parts), self.parts)


def lengths(batch: Inputs) -> list[int]:
    """Returns how many tokens each row of a batch has, of several texts all of them, the padding left out."""
    mask = batch["attention_mask"]
    if mask.ndim == 4:
        return [end - begin for begin, end in pairwise(mask.flatten().tolist())]
    return mask.flatten(1).sum(1).tolist()


def rows(batch: Inputs) -> int:
    """Returns how many rows a batch has, also where they lie end to end in one."""
    return len(lengths(batch))


def split(batch: Inputs, parts: int) -> Iterator[Inputs]:
    """Yields the rows of a batch in so many parts at most, in their order, as batches like it."""
    if parts == 1:
        yield batch
        return
    counts = lengths(batch)
    end_to_end, size = batch["attention_mask"].ndim == 4, -(-len(counts) // parts)
    for first in range(0, len(counts), size):
        chosen = counts[first : first + size]
        if not end_to_end:
            yield {name: tensor[first : first + size] for name, tensor in batch.items()}
            continue
        begin = sum(counts[:first])
        part = {name: tensor[:, begin : begin + sum(chosen)] for name, tensor in batch.items() if tensor.ndim == 2}
        yield part | {"attention_mask": attention.bounds(chosen).to(batch["attention_mask"].device)}

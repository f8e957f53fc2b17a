"""A step whose texts are all contrasted with each other, in passes of a few rows (GradCache, arXiv 2101.06983).

First the vectors of all texts of the step are computed, without gradients; then the loss of all of them, and its
gradient by each vector; then, pass by pass, the vectors once more, and back from their gradients. What dropout draws in
a pass is the same both times, so the gradient is that of all texts in one pass, in the memory of a small one. Several
processes tell each other the vectors, and contrast those of all.

Shapes: R texts, D width of a vector, A anchors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_ft import processes
from lora_ft.data.mask import IGNORE
from lora_ft.devices import is_out_of_memory
from lora_ft.exact import pass_seed, reseed
from lora_ft.halving import Inputs, split
from lora_ft.losses import BLOCK
from lora_ft.modes import mixed_precision


class GradientCache:
    """Mixin for a Trainer with `ExactSteps` before it and `Halving` after it, whose task may contrast texts.

    One pass in one process needs nothing of it.
    """

    step_losses: list[torch.Tensor]
    parts: int
    _batches: list[tuple[Inputs, Any]]
    _coming: Sequence[Inputs] = ()
    """The batches of the step being made."""
    _cached: Sequence[Inputs] = ()
    """`gradient` and `error` of each of them, as `Task.loss` takes them; none where one pass makes the step."""
    taught: bool = True
    """Whether the rows of the step had anything to teach."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._coming, self._cached = batches, []
        trainer: Any = self
        if trainer.task.contrasts and batches and "score" not in batches[0] and torch.is_tensor(count):
            # There is nothing to tell a single row from.
            count = torch.where(count == 1, torch.zeros_like(count), count)
        return batches, count

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> torch.Tensor:
        trainer: Any = self
        micro_step = len(self.step_losses)
        if trainer.task.contrasts:
            in_one_pass = len(self._coming) == 1 and self.parts == 1 and processes.count() == 1
            if micro_step == 0 and not in_one_pass:
                self._fill()
                reseed(pass_seed(trainer, 0))
            if self._cached:
                inputs = {**inputs, **self._cached[micro_step]}
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if trainer.task.contrasts:
            # All texts of a step can be of one label: there is then no negative, and rightly no gradient.
            self.taught = (self.taught and micro_step > 0) or bool(loss != 0)
        return loss

    def made_smaller(self) -> None:
        """Contrasts the texts of a step with each other that was to be made in one pass, and now is in several."""
        trainer: Any = self
        if trainer.task.contrasts and self._coming and not self._cached:
            self._fill()
            self._batches = [
                ({**inputs, **cached}, count)
                for (inputs, count), cached in zip(self._batches, self._cached, strict=True)
            ]

    def _fill(self) -> None:
        """Sets what is cached for the step."""
        trainer: Any = self
        trainer.model.train()
        batches = [trainer._prepare_inputs(batch) for batch in self._coming]
        vectors = [self._vectors(batch, micro_step) for micro_step, batch in enumerate(batches)]
        told = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0] if batches[0][key].ndim == 1}
        own_RD = torch.cat(vectors)
        begin = int(sum(count for (count,) in processes.gathered([len(own_RD)])[: processes.rank()]))
        every_RD, told = processes.joined(own_RD), {key: processes.joined(part) for key, part in told.items()}
        errors_R, gradient_RD = contrasted(trainer.task, every_RD, told)
        mine = slice(begin, begin + len(own_RD))
        sizes = [len(part) for part in vectors]
        pieces = zip(gradient_RD[mine].split(sizes), errors_R[mine].split(sizes), strict=True)
        self._cached = [{"gradient": gradient, "error": error} for gradient, error in pieces]

    def _vectors(self, batch: Inputs, micro_step: int) -> torch.Tensor:
        """Returns the vectors of a batch, computed as in the pass that learns from it; with less memory if it must."""
        trainer: Any = self
        while True:
            reseed(pass_seed(trainer, micro_step))
            try:
                with torch.no_grad(), mixed_precision(trainer.model):
                    parts = split(batch, self.parts)
                    return torch.cat([trainer.task.vectors(trainer.model, part) for part in parts])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                trainer.refuse_shards()
            # Outside of the clause, whose error holds all that the pass had made.
            trainer.make_room(self._coming)


def contrasted(task: Any, vectors_RD: torch.Tensor, told: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of each text [R], zero of what is no anchor, and the gradient of its sum by vectors [R, D].

    Args:
        told: of each text, as in a batch.
    """
    leaf_RD = vectors_RD.detach().float().requires_grad_()
    errors_R = torch.zeros_like(leaf_RD[:, 0], requires_grad=False)
    with torch.enable_grad():
        for anchors_A in (told["labels"] != IGNORE).nonzero()[:, 0].split(BLOCK):
            errors_A = task.contrast(leaf_RD, told, anchors_A)
            errors_A.sum().backward()
            errors_R[anchors_A] = errors_A.detach()
    gradient_RD = torch.zeros_like(leaf_RD, requires_grad=False) if leaf_RD.grad is None else leaf_RD.grad
    return errors_R, gradient_RD

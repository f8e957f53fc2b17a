"""A step whose rows depend on each other, in passes of a few: texts by GradCache (Gao et al. 2021, arXiv 2101.06983).

First the vectors of all texts of the step are computed, without gradients; then the loss of all of them, and its
gradient by each vector; then, pass by pass, the vectors once more, and back from their gradients. What dropout draws in
a pass is the same both times, so the gradient is that of all texts in one pass, in the memory of a small one. Several
processes tell each other the vectors, and contrast those of all. Where all that a row needs of the others is a number
without a gradient (`Task.shared`), it is computed of the whole step in the same way, and the passes take it from there.

Shapes: R texts or rows, D width of a vector, A anchors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_ft.model.modes import mixed_precision
from lora_ft.scoring.losses import blocks
from lora_ft.system import processes
from lora_ft.system.devices import is_out_of_memory
from lora_ft.training.exact import pass_seed, reseed
from lora_ft.training.halving import Inputs, split


class GradientCache:
    """Mixin for a Trainer with `ExactSteps` before it and `Halving` after it, for rows that a task says are `together`.

    One pass in one process needs nothing of it.
    """

    step_losses: list[torch.Tensor]
    parts: int
    _batches: list[tuple[Inputs, Any]]
    _coming: Sequence[Inputs] = ()
    """The batches of the step being made."""
    _cached: Sequence[Inputs] = ()
    """What `Task.loss` takes of each of them besides; none where one pass makes the step."""

    @property
    def taught(self) -> bool:
        """Whether the texts of the step, those of all processes, told any from another; waits for the device."""
        if not self._contrasts:
            return True
        # All can be of one label, or each of its own: there is then no negative, or no positive, and no gradient.
        return bool((torch.stack(self.step_losses) != 0).any())

    @property
    def _together(self) -> bool:
        trainer: Any = self
        return bool(self._coming) and trainer.task.together(self._coming[0])

    @property
    def _contrasts(self) -> bool:
        trainer: Any = self
        return trainer.task.contrasts and self._together

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._coming, self._cached = batches, []
        if self._contrasts and torch.is_tensor(count):
            # There is nothing to tell a single row from.
            count = torch.where(count == 1, torch.zeros_like(count), count)
        return batches, count

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> torch.Tensor:
        micro_step = len(self.step_losses)
        if self._together:
            in_one_pass = len(self._coming) == 1 and self.parts == 1 and processes.count() == 1
            if micro_step == 0 and not in_one_pass:
                self._fill()
                reseed(pass_seed(self, 0))
            if self._cached:
                inputs = {**inputs, **self._cached[micro_step]}
        return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]

    def made_smaller(self) -> None:
        """Computes anew what the rows of the step need of each other, for its passes are others and draw otherwise.

        Of several processes the others do not know; they keep what they were told, which dropout alone makes differ.
        """
        if self._together and processes.count() == 1:
            self._fill()
            # Of the step's batches those that were begun.
            begun = zip(self._batches, self._cached, strict=False)
            self._batches = [({**inputs, **cached}, count) for (inputs, count), cached in begun]

    def _fill(self) -> None:
        """Sets what is cached for the step."""
        trainer: Any = self
        trainer.model.train()
        batches = [trainer._prepare_inputs(batch) for batch in self._coming]
        vectors = self._vectors(batches)
        told = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0] if batches[0][key].ndim == 1}
        own_RD = torch.cat(vectors)
        begin = int(sum(count for (count,) in processes.gathered([len(own_RD)])[: processes.rank()]))
        every_RD, told = processes.joined(own_RD), {key: processes.joined(part) for key, part in told.items()}
        if trainer.task.contrasts:
            errors_R, gradient_RD = contrasted(trainer.task, every_RD, told)
            found = {"gradient": gradient_RD, "error": errors_R}
        else:
            found = trainer.task.shared(every_RD)
        sizes = [len(part) for part in vectors]
        pieces = {name: value[begin : begin + len(own_RD)].split(sizes) for name, value in found.items()}
        self._cached = [{name: parts[i] for name, parts in pieces.items()} for i in range(len(batches))]

    def _vectors(self, batches: Sequence[Inputs]) -> list[torch.Tensor]:
        """Returns the vectors of each batch, computed as in the pass that learns from it; with less memory if it must.

        All are then computed anew: in how many parts a batch is made decides what dropout draws in it.
        """
        trainer: Any = self
        while True:
            try:
                with torch.no_grad(), mixed_precision(trainer.model):
                    return [self._vectors_of(batch, micro_step) for micro_step, batch in enumerate(batches)]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                trainer.refuse_shards()
            # Outside of the clause, whose error holds all that the pass had made.
            trainer.make_room(self._coming)

    def _vectors_of(self, batch: Inputs, micro_step: int) -> torch.Tensor:
        trainer: Any = self
        reseed(pass_seed(trainer, micro_step))
        return torch.cat([trainer.task.vectors(trainer.model, part) for part in split(batch, self.parts)])


def contrasted(task: Any, vectors_RD: torch.Tensor, told: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of each text [R], zero of what is no anchor, and the gradient of its sum by vectors [R, D].

    Args:
        told: of each text, as in a batch.
    """
    leaf_RD = vectors_RD.detach().float().requires_grad_()
    errors_R = torch.zeros_like(leaf_RD[:, 0], requires_grad=False)
    with torch.enable_grad():
        for anchors_A in blocks(told["labels"], len(leaf_RD)):
            errors_A = task.contrast(leaf_RD, told, anchors_A)
            errors_A.sum().backward()
            errors_R[anchors_A] = errors_A.detach()
    gradient_RD = torch.zeros_like(leaf_RD, requires_grad=False) if leaf_RD.grad is None else leaf_RD.grad
    return errors_R, gradient_RD

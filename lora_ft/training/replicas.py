"""Data-parallel training: every process computes its share of each global batch, and all make the same step.

The shares are whole batches, dealt out in turn, so that a step of P processes is made of the very batches that one
process would accumulate P times as many of, and what dropout draws follows from a batch's place in the step. Gradients
are averaged once a step, after the last of its backward passes. That is what `DistributedDataParallel` computes, which
does not fit here: the loss goes past the model's own `forward`, to which its hooks are bound, and where a process is
short of memory it makes more passes than the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from lora_ft import adapters
from lora_ft.data.mask import IGNORE
from lora_ft.errors import ProofError
from lora_ft.system import processes

Inputs = dict[str, torch.Tensor]


class Replica(nn.Module):
    """A model of which each process holds a copy, in a shell by which a Trainer knows that it is wrapped already."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Share(Sampler[list[int]]):
    """Every P-th batch, beginning with that of this process.

    Where the batches do not go round, a process without one gets `count + row` of the first row instead, by which
    `Unscored` knows to give it without labels: so all processes make equally many passes.
    """

    def __init__(self, batches: BatchSampler, count: int) -> None:
        self.batches, self.count = batches, count
        self.processes, self.rank = processes.count(), processes.rank()

    def __len__(self) -> int:
        return -(-len(self.batches) // self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        made = 0
        for number, batch in enumerate(self.batches):
            if number % self.processes == self.rank:
                made += 1
                yield batch
        if made < len(self):
            yield [self.count]


class Unscored:
    """Rows, and behind them each of them once more without its labels."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index] if index < len(self) else without_labels(self.rows[index - len(self)])


class SharedStream(IterableDataset):
    """A stream of rows without an end, of which a process yields those of every P-th batch, beginning with its own.

    Each process renders all rows: their order is all that the processes share of a stream.
    """

    def __init__(self, rows: IterableDataset, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.processes, self.rank = processes.count(), processes.rank()

    def __iter__(self) -> Iterator[Any]:
        for number, row in enumerate(self.rows):
            if number // self.batch_size % self.processes == self.rank:
                yield row


def without_labels(row: Any) -> Any:
    """Returns a row, or several that share one, with nothing to be learned from it."""
    if isinstance(row, list):
        return [without_labels(one) for one in row]
    labels = row["labels"]
    return row | {"labels": [type(label)(IGNORE) for label in labels] if isinstance(labels, list) else IGNORE}


class Replicas:
    """Mixin for a Trainer with `ExactSteps` and `Halving` after it: several processes train one model.

    Nothing in it is used where a run has one process.
    """

    replicated = True
    step_losses: list[torch.Tensor]
    tokens_seen: int
    interrupt: Any
    fingerprint: str
    order: Any
    place_of: Any
    _seen_before: int

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        # Also of a launcher's only process, which would be given to DistributedDataParallel.
        if not distributed.is_initialized():
            return super()._wrap_model(model, *args, **kwargs)  # type: ignore[misc]
        return model if isinstance(model, Replica) else Replica(model)

    def begin_alike(self, frozen_sha256: str) -> None:
        """Makes the adapter that of the first process.

        Raises:
            ProofError: the frozen weights of the processes differ.
        """
        trainer: Any = self
        processes.share(adapters.trained(trainer.model).values())
        if processes.told(frozen_sha256) != frozen_sha256:
            raise ProofError(
                "The processes of this run hold different weights of the base: where the adapter's start changes them "
                "(--lora.init), use another, or GPUs of one kind."
            )

    def fills_in(self) -> bool:
        """Returns whether this process has no batch for the pass it makes, and makes it on a row for nothing."""
        trainer: Any = self
        if processes.count() == 1 or self.order is None:
            return False
        accumulate = trainer.args.gradient_accumulation_steps
        _, update = self.place_of(trainer.state.global_step)
        number = (update * accumulate + len(self.step_losses)) * processes.count() + processes.rank()
        return number * trainer._train_batch_size >= len(self.order)

    def get_train_dataloader(self) -> DataLoader:
        """Returns what the Trainer's own does, of the batches of this process."""
        if processes.count() == 1:
            return super().get_train_dataloader()  # type: ignore[misc]
        trainer: Any = self
        rows, size = trainer.train_dataset, trainer._train_batch_size
        options = {"collate_fn": trainer.data_collator, "pin_memory": trainer.args.dataloader_pin_memory}
        if isinstance(rows, IterableDataset):
            return DataLoader(SharedStream(rows, size), batch_size=size, **options)
        batches = BatchSampler(trainer._get_train_sampler(), size, drop_last=False)
        return DataLoader(Unscored(rows), batch_sampler=Share(batches, len(rows)), **options)  # type: ignore[arg-type]

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        trainer: Any = self
        if processes.count() > 1 and trainer.accelerator.sync_gradients:
            processes.average_gradients(adapters.trained(trainer.model).values())
            self._agree()
        return loss

    def _agree(self) -> None:
        """Makes losses and tokens of the step, and whether it is to be the last, those of all processes.

        Raises:
            ProofError: they did not come out of the step before with the same adapter.
        """
        tokens = self.tokens_seen - self._seen_before
        # As many digits as a float64 holds whole.
        before = int(self.fingerprint[:12] or "0", 16)
        of_each = processes.gathered([tokens, self.interrupt.asked, before, *map(float, self.step_losses)])
        if len({numbers[2] for numbers in of_each}) > 1:
            raise ProofError(
                "The processes of this run no longer hold the same adapter: they compute the same step differently, "
                "as GPUs of different kinds may; use GPUs of one kind."
            )
        self.tokens_seen = self._seen_before + int(sum(numbers[0] for numbers in of_each))
        self.interrupt.agreed = any(numbers[1] for numbers in of_each)
        # In the order that one process would have made the passes in.
        passes: Sequence[tuple[float, ...]] = list(zip(*(numbers[3:] for numbers in of_each), strict=True))
        like = self.step_losses[0]
        self.step_losses = [like.new_tensor(loss) for losses in passes for loss in losses]

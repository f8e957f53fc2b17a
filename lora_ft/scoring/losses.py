"""Losses of rows, summed over their scored positions and divided once: right however rows are batched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from lora_ft.data.mask import IGNORE
from lora_ft.errors import OutOfMemoryError
from lora_ft.model import four_bits
from lora_ft.model.modes import evaluating
from lora_ft.system import heap
from lora_ft.system.devices import is_out_of_memory
from lora_ft.tasks import Batch, Features, Task

log = logging.getLogger(__name__)

BOOTSTRAP_DRAWS = 2000
# All draws of 100,000 rows at once would take 5 GB; a divisor of the above.
DRAWS_AT_ONCE = 50
# Rows whose similarities to all texts exist at a time, and of how many numbers these may be.
BLOCK, CELLS = 1024, 2**26
# Of fewer rows a draw with replacement gives few different samples: with four, one in 64 is a single row over again.
FEWEST_ROWS = 5


@dataclass(frozen=True)
class Losses:
    """Negative log-likelihood, count of scored positions and of those predicted right, float64 [rows] each.

    A task with another loss has it in the place of the first, of a single position.
    """

    nll: np.ndarray
    count: np.ndarray
    right: np.ndarray
    more: dict[str, np.ndarray] = field(default_factory=dict)
    """Metrics that are means over rows, by name: what they are means of, float64 [rows] each."""

    @property
    def mean(self) -> float:
        """Nats per scored position over all rows."""
        return float(self.nll.sum() / self.count.sum())

    @property
    def accuracy(self) -> float:
        """Share of scored positions whose likeliest class is the right one."""
        return float(self.right.sum() / self.count.sum())


def row_losses(task: Task, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Returns the numbers of each row of a batch that its loss is made of, [B] each, by name."""
    return task.by_row(model, batch)


def of_rows(task: Task, model: nn.Module, rows: Sequence[Features], batch_size: int, *, halves: bool = True) -> Losses:
    """Returns the loss of each of `rows`, in their order.

    Args:
        halves: go on with fewer rows at a time where the memory does not suffice.

    Raises:
        OutOfMemoryError: it does not, and that is not allowed.
    """
    if task.contrasts:
        return contrasted(task, vectors(task, model, rows, batch_size, halves=halves), len(rows))
    found: dict[str, np.ndarray] = {}

    def take(chosen: list[int], batch: Batch) -> None:
        for name, value_B in row_losses(task, model, batch).items():
            found.setdefault(name, np.zeros(len(rows)))[chosen] = value_B.float().cpu().numpy()

    each_batch(task, model, rows, batch_size, take, halves=halves)
    if not rows:
        return Losses(*np.zeros((3, 0)))
    settled = dict(task.settled(found))
    return Losses(settled.pop("nll"), settled.pop("count"), settled.pop("right"), settled)


def answers(task: Task, model: nn.Module, rows: Sequence[Features], batch_size: int) -> tuple[Losses, list[np.ndarray]]:
    """Returns what `of_rows` does, and of each row the logits at its scored positions, float32 [N, V]."""
    sums: np.ndarray = np.zeros((3, len(rows)))
    logits: list[np.ndarray] = [np.empty(0)] * len(rows)

    def take(chosen: list[int], batch: Batch) -> None:
        scores = task.score(model, batch)
        found = scores.by_row(task.errors(scores), len(chosen))
        sums[:, chosen] = torch.stack([found[name] for name in ("nll", "count", "right")]).cpu().numpy()
        logits_NV, row_N = scores.logits_NV.float().cpu().numpy(), scores.row_N.cpu().numpy()
        for row, place in enumerate(chosen):
            logits[place] = logits_NV[row_N == row]

    each_batch(task, model, rows, batch_size, take)
    return Losses(*sums), logits


def vectors(task: Task, model: nn.Module, rows: Sequence[Features], batch_size: int, *, halves: bool = True) -> Batch:
    """Returns what `collate` says of each text of `rows`, with its `vector` [R, D] and `row`, the place of that.

    In the order of the rows and on the processor; of a task that `contrasts`.
    """
    parts: list[Batch] = []

    def take(chosen: list[int], batch: Batch) -> None:
        told = {key: value.cpu() for key, value in batch.items() if value.ndim == 1}
        told["row"] = torch.tensor([place for place in chosen for _ in task.lengths(rows[place])])
        parts.append(told | {"vector": task.vectors(model, batch).cpu()})

    each_batch(task, model, rows, batch_size, take, halves=halves)
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    order = whole["row"].argsort(stable=True)
    return {key: value[order] for key, value in whole.items()}


def contrasted(task: Task, found: Batch, rows: int) -> Losses:
    """Returns the loss of each of so many rows among all of them, however they were batched.

    Args:
        found: of `vectors`.
    """
    nll = np.zeros(rows)
    for anchors_A in blocks(found["labels"], len(found["vector"])):
        nll[found["row"][anchors_A].numpy()] = task.contrast(found["vector"], found, anchors_A).numpy()
    return Losses(nll, np.ones(rows), np.zeros(rows))


def blocks(labels_R: torch.Tensor, candidates: int) -> Sequence[torch.Tensor]:
    """Returns the places of anchors, those with a label, so many at a time as similarities to all candidates allow."""
    return (labels_R != IGNORE).nonzero()[:, 0].split(max(1, min(BLOCK, CELLS // max(1, candidates))))


def each_batch(
    task: Task,
    model: nn.Module,
    rows: Sequence[Features],
    batch_size: int,
    take: Callable[[list[int], Batch], None],
    *,
    halves: bool = True,
) -> None:
    """Hands over batch after batch with the places of its rows; rows of like length share one.

    Where the memory does not suffice for so many, half as many go together from there on.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    with evaluating(model), four_bits.dequantized(model):
        start = 0
        while start < len(order):
            chosen = order[start : start + batch_size]
            batch = to(task.collate([rows[i] for i in chosen]), device)
            try:
                take(chosen, batch)
                start += len(chosen)
                continue
            except RuntimeError as error:
                if is_out_of_memory(error) and not halves:
                    raise OutOfMemoryError(
                        f"{len(chosen)} held-out rows do not fit at a time, and with --train.shard-base all processes "
                        "must make the same passes: halve --train.batch-size and double --train.accumulate."
                    ) from None
                if len(chosen) == 1 or not is_out_of_memory(error):
                    raise
            # Outside of the clause, whose error holds all that was made.
            batch_size = -(-len(chosen) // 2)
            log.warning("out of memory with %d rows to evaluate: %d go together from here on", len(chosen), batch_size)
            heap.give_back()
            torch.cuda.empty_cache()


def difference_interval(before: Losses, after: Losses, seed: int = 0) -> tuple[float, float] | None:
    """Returns the 95% interval of `after.mean - before.mean`, drawing rows with replacement (paired bootstrap).

    None where there are too few rows: the interval of one is a point, however unsure it is.
    """
    return _interval(after.nll - before.nll, before.count, seed)


def change_intervals(before: Losses, after: Losses, seed: int = 0) -> dict[str, tuple[float, float] | None]:
    """Returns of each metric that is a mean over rows what `difference_interval` does of the loss."""
    one_each = np.ones(len(before.nll))
    return {name: _interval(after.more[name] - value, one_each, seed) for name, value in before.more.items()}


def _interval(difference: np.ndarray, count: np.ndarray, seed: int) -> tuple[float, float] | None:
    """Returns the 95% interval of the sum of the differences over that of the counts."""
    if len(difference) < FEWEST_ROWS:
        return None
    rng, rows = np.random.default_rng(seed), len(difference)
    changes = []
    for _ in range(0, BOOTSTRAP_DRAWS, DRAWS_AT_ONCE):
        drawn = rng.integers(0, rows, (DRAWS_AT_ONCE, rows))
        changes.append(difference[drawn].sum(axis=1) / count[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(changes), [2.5, 97.5])
    return float(low), float(high)


def to(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch on `device`."""
    return {key: value.to(device) for key, value in batch.items()}

"""Losses of rows, summed over their scored positions and divided once: right however rows are batched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lora_ft import four_bits, heap
from lora_ft.devices import is_out_of_memory
from lora_ft.errors import OutOfMemoryError
from lora_ft.modes import evaluating
from lora_ft.tasks import Batch, Features, Scores, Task

log = logging.getLogger(__name__)

BOOTSTRAP_DRAWS = 2000
# All draws of 100,000 rows at once would take 5 GB; a divisor of the above.
DRAWS_AT_ONCE = 50
# Of fewer rows a draw with replacement gives few different samples: with four, one in 64 is a single row over again.
FEWEST_ROWS = 5


@dataclass(frozen=True)
class Losses:
    """Negative log-likelihood, count of scored positions and of those predicted right, float64 [rows] each."""

    nll: np.ndarray
    count: np.ndarray
    right: np.ndarray

    @property
    def mean(self) -> float:
        """Nats per scored position over all rows."""
        return float(self.nll.sum() / self.count.sum())

    @property
    def accuracy(self) -> float:
        """Share of scored positions whose likeliest class is the right one."""
        return float(self.right.sum() / self.count.sum())


def row_losses(task: Task, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns each row's summed negative log-likelihood, positions, and positions right: float32 [B] each."""
    return _by_row(task, task.score(model, batch), len(batch["labels"]))


def _by_row(task: Task, scores: Scores, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    nll_N = task.errors(scores)
    right_N = (scores.logits_NV.detach().argmax(dim=-1) == scores.targets_N).float()
    zeros_B = nll_N.new_zeros(rows)
    nll_B, count_B, right_B = (
        zeros_B.index_add(0, scores.row_N, value_N) for value_N in (nll_N, torch.ones_like(nll_N), right_N)
    )
    return nll_B, count_B, right_B


def of_rows(task: Task, model: nn.Module, rows: Sequence[Features], batch_size: int, *, halves: bool = True) -> Losses:
    """Returns the loss of each of `rows`, in their order.

    Args:
        halves: go on with fewer rows at a time where the memory does not suffice.

    Raises:
        OutOfMemoryError: it does not, and that is not allowed.
    """
    sums = np.zeros((3, len(rows)))

    def take(chosen: list[int], batch: Batch) -> None:
        sums[:, chosen] = torch.stack(row_losses(task, model, batch)).cpu().numpy()

    each_batch(task, model, rows, batch_size, take, halves=halves)
    return Losses(*sums)


def answers(task: Task, model: nn.Module, rows: Sequence[Features], batch_size: int) -> tuple[Losses, list[np.ndarray]]:
    """Returns what `of_rows` does, and of each row the logits at its scored positions, float32 [N, V]."""
    sums: np.ndarray = np.zeros((3, len(rows)))
    logits: list[np.ndarray] = [np.empty(0)] * len(rows)

    def take(chosen: list[int], batch: Batch) -> None:
        scores = task.score(model, batch)
        sums[:, chosen] = torch.stack(_by_row(task, scores, len(chosen))).cpu().numpy()
        logits_NV, row_N = scores.logits_NV.float().cpu().numpy(), scores.row_N.cpu().numpy()
        for row, place in enumerate(chosen):
            logits[place] = logits_NV[row_N == row]

    each_batch(task, model, rows, batch_size, take)
    return Losses(*sums), logits


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
    if len(before.nll) < FEWEST_ROWS:
        return None
    rng, rows, difference = np.random.default_rng(seed), len(before.nll), after.nll - before.nll
    changes = []
    for _ in range(0, BOOTSTRAP_DRAWS, DRAWS_AT_ONCE):
        drawn = rng.integers(0, rows, (DRAWS_AT_ONCE, rows))
        changes.append(difference[drawn].sum(axis=1) / before.count[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(changes), [2.5, 97.5])
    return float(low), float(high)


def to(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch on `device`."""
    return {key: value.to(device) for key, value in batch.items()}

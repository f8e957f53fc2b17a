"""A task: what a row becomes, how rows are batched, which positions are scored. One file each.

Shapes: B rows, T tokens, N scored positions, V classes or vocabulary.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from lora_ft.config import RunConfig
from lora_ft.data.examples import Example
from lora_ft.data.formats import Format
from lora_ft.errors import DataError
from lora_ft.scoring.rewards import Reward

log = logging.getLogger(__name__)

Features = dict[str, Any]
"""One row for the model: `input_ids`, `labels` and what else the task needs, as lists."""
Batch = dict[str, torch.Tensor]
T = TypeVar("T")

MADE_UP = 24
"""Rows that a task makes up."""
NAMES = {"chat": "Chat", "complete": "Complete", "classify": "Classify", "seq2seq": "Seq2Seq", "tag": "Tag",
         "embed": "Embed", "prefer": "Prefer", "reason": "Reason"}  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """What the model says at every scored position of a batch."""

    logits_NV: torch.Tensor
    targets_N: torch.Tensor
    """The right class at each position, int64; where there is a single one, the number it should be, float32."""
    row_N: torch.Tensor
    """The row of the batch that each position belongs to, int64."""

    def by_row(self, errors_N: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
        """Returns of each row the sum of the errors, `nll`, and how many positions there are, `count`, and `right`."""
        right_N = (self.logits_NV.detach().argmax(dim=-1) == self.targets_N).float()
        zeros_B = errors_N.new_zeros(rows)
        found = {"nll": errors_N, "count": torch.ones_like(errors_N), "right": right_N}
        return {name: zeros_B.index_add(0, self.row_N, value_N) for name, value_N in found.items()}


class Answering(Protocol):
    """A model that answers rows however many they are: it batches them by length, and gives back their order."""

    def of_rows(self, rows: Sequence[Features], compute: Callable[[nn.Module, Batch], Sequence[T]]) -> list[T]:
        """Returns what `compute` gives for each row; it is handed the model and one collated batch after another."""

    def texts(self, prompts: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
        """Returns the greedy reply to each prompt of token ids, and whether it came to its end."""


class Task:
    """The one extension point of the library; a subclass a file."""

    name: str
    model_class: Any
    """The `AutoModelFor...` class the base is loaded as."""
    peft_task: str
    """PEFT's name for it, written into `adapter_config.json`."""
    accuracy_name: str = "token_accuracy"
    """What the share of scored positions predicted right is called; empty where none is right or wrong."""
    measure: str = ""
    """Name in `class_metrics.MEASURES` of what measures the answers, for a task with a single one to each row."""
    own_metrics: tuple[str, ...] = ()
    """Metrics on the classes predicted, by name; `compared` gives what they take."""
    questions: tuple[Format, ...] = ()
    """Formats of rows that ask for an answer, of which `asked` takes what they make."""
    shares_rows: bool = False
    """Whether several rows of the task can lie in one."""
    trainer: str = "trainers.AdapterTrainer"
    """The room of the library and the class in it that trains the task: a `trainers.Proven`."""
    statistics: tuple[str, ...] = ()
    """Names of what `loss` may say of a batch besides."""
    numbers: Mapping[str, tuple[float, int]] = MappingProxyType({})
    """What it said of the last one: sums over rows, and over how many."""
    reward: Reward | None = None
    """What judges the replies of a task that is trained on its own ones; such a one has no loss to evaluate."""
    contrasts: bool = False
    """Whether `vectors` and `contrast` make the loss."""
    tokenizer: Any = None
    """Set by `prepare`, as what follows is."""
    max_length: int
    rules: tuple[str, ...] = ()
    """What a chat template does unasked, by name; worth saying once a run."""
    ways: tuple[str, ...] = ()
    """The two ways of finding a conversation's trained text that must agree."""
    cut_rows: int = 0
    """Rows longer than `max_length` among those that `features` has returned."""

    def meet(self, folder: Path, config: Any) -> None:
        """Takes what the folder of a base, and its configuration, say of how it is used."""

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example] = ()) -> None:
        """Takes what the task must know of all rows before the model is made, such as the set of labels."""

    def weigh(self, examples: Sequence[Example]) -> None:
        """Takes how much each class counts in training, the rare ones more. Raises DataError where there are none."""
        raise DataError([f"data.class-weights weighs the classes of classify, and {self.name} has none; leave it out."])

    def facts(self) -> dict[str, Any]:
        """Returns what `learn` took, as JSON; `tasks.get` rebuilds the task from it."""
        return {}

    def configure(self, options: Any) -> None:
        """Takes the group of options that has the task's name."""

    def config_changes(self) -> dict[str, Any]:
        """Returns fields of the model's configuration that this task sets."""
        return {}

    def prepare(self, tokenizer: Any, max_length: int) -> None:
        """Takes the tokenizer and the longest row, in tokens, that `features` may return; counts cut rows from 0."""
        self.tokenizer, self.max_length = tokenizer, max_length
        self.cut_rows = 0

    def count_cut(self, tokens: int) -> None:
        """Counts a row where it lost tokens."""
        self.cut_rows += tokens > 0

    def rehearsed(self, config: RunConfig) -> RunConfig:
        """Returns the configuration of a run whose model is a random one, as far as the task must change it."""
        return config

    def made_up(self) -> list[Example]:
        """Returns a few rows of the kind that the task learns, for whoever tries a recipe out without any."""
        raise NotImplementedError

    def see(self, examples: Sequence[Example]) -> None:
        """Takes the rows that `features` is about to be asked for, where one is read beside others."""

    def features(self, example: Example) -> Features:
        """Returns one row for the model. Raises DataError where the row does not suit the task."""
        raise NotImplementedError

    def streamed(self, example: Example) -> Features:
        """Returns what `features` does, of a row that is read when its turn comes, and never with all others.

        Raises:
            DataError: besides, such a row teaches nothing unless it is put beside others.
        """
        return self.features(example)

    def candidates(self, row: Features) -> list[Features]:
        """Returns the texts of a row that are looked among for one, a row each, where the task `contrasts`."""
        raise NotImplementedError

    def longest(self) -> Features:
        """Returns a row of as many tokens as one may have, all of them scored, where a row has more than one score."""
        tokens = [0] * self.max_length
        return {"input_ids": tokens, "attention_mask": [1] * self.max_length, "labels": tokens}

    def files(self, config: Any, max_length: int) -> dict[str, Any]:
        """Returns what other libraries read beside an adapter or a merged model, by name of the file, as JSON."""
        return {}

    def answer(self, row: Features) -> str | None:
        """Returns what `features` made the row learn, in words; None where it is some of the row's own tokens."""
        return None

    def texts(self, row: Features) -> list[Features]:
        """Returns the texts of a row, each a row that `score` takes."""
        return [row]

    def passes(self, row: Features) -> list[Features]:
        """Returns the rows of its batch that a row is trained as, of as many tokens as they may have."""
        return [row]

    def lengths(self, row: Features) -> list[int]:
        """Returns how many tokens each text of a row has: one text, but where the target is another."""
        return [len(row["input_ids"])]

    def canary(self, row: Features) -> Features:
        """Returns what of a row is kept in a seal."""
        return self.texts(row)[0]

    def order(self, rows: Sequence[Features]) -> Callable[[torch.Generator], Iterable[int]] | None:
        """Returns how to draw the order of the rows in an epoch, where any permutation will not do; else None."""
        return None

    def question(self, example: Example) -> tuple[list[int], str]:
        """Returns the prompt of a row as token ids, and the reply it should get. Raises DataError if it has none."""
        raise DataError([f"{example.where}: {self.name} rows have no reply to generate; evaluate their loss."])

    def questioned(self, examples: Sequence[Example], metrics: Sequence[str]) -> Sequence[Example]:
        """Returns the rows that `question` is asked for to compute metrics. Raises DataError where there are none."""
        return examples

    def asked(self, example: Example) -> Features:
        """Returns what `predict` takes of a row without an answer. Raises DataError where it does not suit the task."""
        raise DataError([f"{example.where}: {self.name} makes no predictions."])

    def predict(self, model: Answering, rows: Sequence[Features]) -> list[dict[str, Any]]:
        """Returns what the model says to each row of `asked`: values of JSON by name, first of all `prediction`."""
        raise NotImplementedError

    def compared(self, example: Example, classes: Sequence[int]) -> tuple[Any, Any]:
        """Returns what the likeliest classes at a row's scored positions say, and what is right, for `own_metrics`."""
        raise NotImplementedError

    def end_ids(self) -> list[int]:
        """Returns tokens that end a reply besides the model's own end of text."""
        return []

    def collate(self, rows: Sequence[Features]) -> Batch:
        """Returns rows padded to one length, with `labels` -100 wherever nothing is scored."""
        raise NotImplementedError

    def end_to_end(self, rows: Sequence[Features]) -> Batch:
        """Returns rows one after the other in a single one without padding, for `loss`, where `shares_rows`.

        Only a model in which no example sees another may be given it (`lora_ft.model.attention`).
        """
        raise NotImplementedError

    def inputs(self, batch: Batch) -> Batch:
        """Returns what of a batch the model takes."""
        return {key: value for key, value in batch.items() if key != "labels"}

    def said(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns what a seal keeps of a batch: the logits of classes or words [N, V], or numbers [N, 1]."""
        return self.score(model, batch).logits_NV

    def together(self, row: Mapping[str, Any]) -> bool:
        """Returns whether the loss of such a row, or of each in such a batch, depends on the others of its step."""
        return False

    def vectors(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns what the rows of a step are told of each other, float32 [R, D].

        That is the vector of each text of a batch where the task `contrasts`, else what `shared` takes of each row.
        """
        raise NotImplementedError

    def shared(self, vectors_RD: torch.Tensor) -> Batch:
        """Returns what `loss` takes besides of each row of a step [R], without gradients; from the `vectors` of all."""
        raise NotImplementedError

    def contrast(self, vectors_RD: torch.Tensor, batch: Batch, anchors_A: torch.Tensor) -> torch.Tensor:
        """Returns the loss of some of the texts among all of them, float32 [A], where the task `contrasts`.

        Args:
            batch: what there is to say of each text, as `collate` gives it.
            anchors_A: the places of those texts, int64.
        """
        raise NotImplementedError

    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Returns the logits at the scored positions only, so that those of a whole batch never exist."""
        raise NotImplementedError

    def logits(self, model: nn.Module, batch: Batch) -> list[np.ndarray]:
        """Returns the logits at the scored positions of each row, float32 [N, V]."""
        scores = self.score(model, batch)
        logits_NV, row_N = scores.logits_NV.float().cpu().numpy(), scores.row_N.cpu().numpy()
        return [logits_NV[row_N == row] for row in range(len(batch["labels"]))]

    def by_row(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Returns numbers of each row of a batch, [B] each, of which `settled` makes what is measured."""
        scores = self.score(model, batch)
        return scores.by_row(self.errors(scores), len(batch["labels"]))

    def settled(self, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns what is measured of each of all rows: `nll`, `count`, `right`, and metrics that are means over rows.

        Args:
            found: what `by_row` returned of all of them, float64 [rows] each.
        """
        return found

    def errors(self, scores: Scores) -> torch.Tensor:
        """Returns the loss of each scored position, float32 [N]: by default its negative log-likelihood."""
        return nn.functional.cross_entropy(scores.logits_NV.float(), scores.targets_N, reduction="none")

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns the negative log-likelihood summed over the scored positions of a batch, 0-d float32, to train on."""
        scores = self.score(model, batch)
        return nn.functional.cross_entropy(scores.logits_NV.float(), scores.targets_N, reduction="sum")


def replied(model: Answering, prompts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Returns the prediction of a task that writes text: it, and `finish_reason`, `stop` or `length` if it was cut."""
    return [
        {"prediction": text, "finish_reason": "stop" if ended else "length"} for text, ended in model.texts(prompts)
    ]


def get(name: str, facts: dict[str, Any] | None = None) -> Task:
    """Returns the task called `name`, with what an earlier run learned of its rows."""
    task_class = getattr(importlib.import_module(f"lora_ft.tasks.{name}"), NAMES[name])
    return task_class(**(facts or {}))


def of(config: RunConfig, facts: dict[str, Any] | None = None) -> Task:
    """Returns the task of a run with the options of its own, and with what an earlier run learned of its rows."""
    task = get(config.task, facts)
    task.configure(getattr(config, config.task, None))
    return task


def featurize(task: Task, examples: Sequence[Example]) -> list[Features]:
    """Returns the features of every example. Raises one DataError with the problems of all rows."""
    task.see(examples)
    rows: list[Features] = []
    errors: list[DataError] = []
    for example in examples:
        try:
            rows.append(task.features(example))
        except DataError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])([problem for error in errors for problem in error.problems])
    return rows


def tell_of_cut_rows(task: Task) -> None:
    """Warns where rows were longer than the longest that the task may return."""
    if task.cut_rows:
        log.warning("%d rows have more than %d tokens, and were cut", task.cut_rows, task.max_length)


def tokens(batch: Batch) -> int:
    """Returns how many tokens a batch holds, padding not counted."""
    mask = batch["attention_mask"]
    return batch["input_ids"].numel() if mask.ndim == 4 else int(mask.sum())


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Returns rows of token ids as int64 [B, T], the shorter ones filled on the right with `value`."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)

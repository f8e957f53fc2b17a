"""Classify: learn the class of a text, or of a pair of texts, which of several classes it has, or a number."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from lora_ft.data import labels as known
from lora_ft.data.examples import Example, Labelled, Text
from lora_ft.data.labels import MULTI, REGRESSION, SINGLE, Problem
from lora_ft.data.questions import TEXTS
from lora_ft.errors import DataError, UnsupportedModelError
from lora_ft.foreign.strictjson import shown
from lora_ft.model.modes import unwrapped
from lora_ft.tasks import MADE_UP, Answering, Batch, Features, Scores, Task, pad

log = logging.getLogger(__name__)


class Classify(Task):
    """One answer a row; the head is trained, saved and merged whole.

    Where a row may have several classes, each class is a question of its own: a position with the logits 0 and z, of
    which the cross-entropy is the binary one of z.
    """

    name = "classify"
    model_class = AutoModelForSequenceClassification
    peft_task = "SEQ_CLS"
    questions = TEXTS

    def __init__(self, labels: Sequence[str] = (), problem_type: Problem = "single_label_classification") -> None:
        if problem_type not in (SINGLE, MULTI, REGRESSION):
            raise TypeError(f"problem_type is none of {SINGLE}, {MULTI} and {REGRESSION}")
        self._know(labels)
        self.weights: tuple[float, ...] | None = None
        """What a row of each class counts in training, 1 in the mean over its rows; None where all count alike."""
        self._become(problem_type)

    def _become(self, problem_type: Problem) -> None:
        self.problem_type, self.measure = problem_type, problem_type
        self.accuracy_name = "accuracy" if problem_type == SINGLE else ""

    def _know(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self._places = {label: i for i, label in enumerate(self.labels)}

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example] = ()) -> None:
        if not examples and not held_out and not self.labels:
            raise DataError(["classify needs its rows at the start, to know the labels; leave out --data.streaming."])
        rows = [example for example in (*examples, *held_out) if isinstance(example, Labelled)]
        if rows:
            self._become(known.problem_of(rows))
        # Of rows that are streamed only those held out are there.
        trained = [row for row in examples or held_out if isinstance(row, Labelled)]
        values = [value for row in trained if (value := known.number(row.label)) is not None]
        if self.problem_type == REGRESSION and values:
            log.info("the labels are numbers, from %g to %g: learning to predict them", min(values), max(values))
            return
        if not self.labels:
            self._know(sorted({label for row in trained for label in known.of_row(row.label)}))
        if len(self.labels) < (2 if self.problem_type == SINGLE else 1):
            place = f"{(examples or held_out)[0].where}: " if examples or held_out else ""
            found = f"the rows have only the label {self.labels[0]!r}" if self.labels else "no row has a label"
            raise DataError([f"{place}{found}; classify needs text/label rows with two labels or more."])
        if strangers := list(known.unknown([row for row in held_out if isinstance(row, Labelled)], self.labels)):
            raise DataError(strangers)
        log.info(
            "learning %d classes, %s", len(self.labels), "one a row" if self.problem_type == SINGLE else "any a row"
        )
        if all(known.number(label) is not None for label in self.labels) and len(self.labels) > 20:
            log.warning("the labels are whole numbers, learned as names; numbers to predict have a point, as in 3.0")

    def weigh(self, examples: Sequence[Example]) -> None:
        if self.problem_type != SINGLE:
            raise DataError(["data.class-weights needs rows with one class each; leave it out."])
        counts = Counter(row.label for row in examples if isinstance(row, Labelled))
        # An adapter that is gone on from may know a class that no row has.
        each = counts.total() / len(counts)
        self.weights = tuple(each / counts[label] if label in counts else 0.0 for label in self.labels)

    def facts(self) -> dict[str, Any]:
        return {"labels": list(self.labels), "problem_type": self.problem_type}

    def config_changes(self) -> dict[str, Any]:
        # transformers calls the number so too.
        names = ("LABEL_0",) if self.problem_type == REGRESSION else self.labels
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {label: i for i, label in enumerate(names)},
            "problem_type": self.problem_type,
        }

    def made_up(self) -> list[Example]:
        texts = [f"the number {'no. ' * (n % 4)}{n * n}" for n in range(MADE_UP)]
        return [Labelled(f"made up:{n + 1}", text, ("even", "odd", "square")[n % 3]) for n, text in enumerate(texts)]

    def features(self, example: Example) -> Features:
        if not isinstance(example, Labelled):
            raise DataError([f"{example.where}: the row has no label; classify takes text/label rows."])
        target = self._target(example)
        return {**self._encoded(example, example.text_pair), "labels": target}

    def _encoded(self, example: Labelled | Text, text_pair: str | None) -> Any:
        """Returns the tokens of a row. Raises DataError where the tokenizer knows nothing of it."""
        encoded = self.tokenizer(example.text, text_pair, verbose=False)
        whole = len(encoded["input_ids"])
        if whole > self.max_length:
            encoded = self.tokenizer(example.text, text_pair, truncation=True, max_length=self.max_length)
        if all(token == self.tokenizer.pad_token_id for token in encoded["input_ids"]):
            # A decoder would be read at a place that says nothing.
            raise DataError([f"{example.where}: the base's tokenizer knows nothing of the text; leave the row out."])
        self.count_cut(whole - len(encoded["input_ids"]))
        return encoded

    def _target(self, example: Labelled) -> int | list[int] | float:
        """Returns what the row teaches. Raises DataError where its label is unknown or of another kind."""
        label = example.label
        if self.problem_type == REGRESSION:
            value = known.number(label)
            if value is None:
                raise DataError([f"{example.where}: label is {shown(label)}; the adapter predicts a number, give one."])
            # As close to it as float32 has one, for it would count as a row without a label.
            ignored = torch.tensor(known.NO_LOSS)
            return value if torch.tensor(value) != ignored else float(ignored.nextafter(torch.zeros(())))
        if isinstance(label, float) or isinstance(label, tuple) != (self.problem_type == MULTI):
            wants = "one class" if self.problem_type == SINGLE else "a list of classes"
            raise DataError(
                [f"{example.where}: label is {shown(label)}; the adapter learned {wants} a row, give that."]
            )
        for name in known.of_row(label):
            if name not in self._places:
                few = f"{', '.join(self.labels[:8])}{' ...' if len(self.labels) > 8 else ''}"
                raise DataError([f"{example.where}: label {name!r} is not one the adapter knows: {few}; correct it."])
        if isinstance(label, str):
            return self._places[label]
        return [int(name in label) for name in self.labels]

    def longest(self) -> Features:
        return super().longest() | {"labels": self._unknown()}

    def _unknown(self) -> int | list[int] | float:
        """Returns a target of the right kind for a row whose own nobody asks for."""
        kinds: dict[str, int | list[int] | float] = {SINGLE: 0, MULTI: [0] * len(self.labels), REGRESSION: 0.0}
        return kinds[self.problem_type]

    def asked(self, example: Example) -> Features:
        if not isinstance(example, Labelled | Text):
            return super().asked(example)
        pair = example.text_pair if isinstance(example, Labelled) else None
        return {**self._encoded(example, pair), "labels": self._unknown()}

    def predict(self, model: Answering, rows: Sequence[Features]) -> list[dict[str, Any]]:
        return [self._said(logits_NV) for logits_NV in model.of_rows(rows, self.logits)]

    def _said(self, logits_NV: np.ndarray) -> dict[str, Any]:
        """Returns the prediction of a row: a number, or its class or classes with the probability of each there is."""
        if self.problem_type == REGRESSION:
            return {"prediction": float(logits_NV[0, 0])}
        logits_NV = logits_NV.astype(np.float64)
        p_NV = np.exp(logits_NV - logits_NV.max(axis=-1, keepdims=True))
        p_NV /= p_NV.sum(axis=-1, keepdims=True)
        # Where a row may have several classes, each has a position of its own.
        p_V = p_NV[:, 1] if self.problem_type == MULTI else p_NV[0]
        likely = [label for label, p in zip(self.labels, p_V, strict=True) if p > 0.5]
        return {
            "prediction": likely if self.problem_type == MULTI else self.labels[int(p_V.argmax())],
            "probabilities": dict(zip(self.labels, p_V.tolist(), strict=True)),
        }

    def answer(self, row: Features) -> str:
        target = row["labels"]
        if self.problem_type == MULTI:
            return ", ".join(label for label, has in zip(self.labels, target, strict=True) if has) or "none"
        return self.labels[target] if self.problem_type == SINGLE else f"{target:g}"

    def collate(self, rows: Sequence[Features]) -> Batch:
        batch = {"input_ids": pad([row["input_ids"] for row in rows], self.tokenizer.pad_token_id)}
        for key in ("attention_mask", "token_type_ids"):
            if key in rows[0]:
                batch[key] = pad([row[key] for row in rows], 0)
        labels = torch.tensor([row["labels"] for row in rows])
        if self.problem_type == REGRESSION:
            labels = labels.float()
        batch["labels"] = labels
        return batch

    def score(self, model: nn.Module, batch: Batch) -> Scores:
        self._refuse_other_padding(unwrapped(model).config)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits_BV = model(**inputs).logits
        row_N = torch.arange(len(logits_BV), device=logits_BV.device)
        if self.problem_type != MULTI:
            return Scores(logits_BV, batch["labels"], row_N)
        pairs_BV2 = torch.stack([torch.zeros_like(logits_BV), logits_BV], dim=-1)
        return Scores(pairs_BV2.flatten(0, 1), batch["labels"].flatten(), row_N.repeat_interleave(logits_BV.shape[1]))

    def errors(self, scores: Scores) -> torch.Tensor:
        if self.problem_type == REGRESSION:
            return (scores.logits_NV[:, 0].float() - scores.targets_N).square()
        return super().errors(scores)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns the sum of the rows' losses: cross-entropy, binary cross-entropies, or a squared error.

        A weight is that of its row alone, so that the gradient does not depend on which rows share a batch.
        """
        scores = self.score(model, batch)
        errors_N = self.errors(scores)
        if self.weights is not None:
            errors_N = errors_N * torch.tensor(self.weights, device=errors_N.device)[scores.targets_N]
        return errors_N.sum()

    def _refuse_other_padding(self, config: Any) -> None:
        """Raises UnsupportedModelError where a decoder would look for the last token by another padding than ours.

        A decoder reads the class at the last token that is not `config.pad_token_id`; with another id that is some
        padding, and training goes on without a word. Encoders go by the attention mask and the first token.
        """
        reads_last = type(config) not in AutoModelForMaskedLM._model_mapping
        if self.tokenizer is not None and reads_last and config.pad_token_id != self.tokenizer.pad_token_id:
            raise UnsupportedModelError(
                f"the tokenizer pads with token {self.tokenizer.pad_token_id}, but pad_token_id in the model's "
                f"config.json is {config.pad_token_id}, by which a {config.model_type} model finds the last token, "
                "where the class is read; make them equal."
            )

"""Classify: learn which of a fixed set of classes a text, or a pair of texts, belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from lora_ft.data.formats import Example, Labelled
from lora_ft.errors import DataError, UnsupportedModelError
from lora_ft.modes import unwrapped
from lora_ft.tasks import Batch, Features, Scores, Task, pad


class Classify(Task):
    """One label a row; the head is trained, saved and merged whole."""

    name = "classify"
    model_class = AutoModelForSequenceClassification
    peft_task = "SEQ_CLS"
    accuracy_name = "accuracy"

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self.labels = tuple(labels)

    def learn(self, examples: Sequence[Example]) -> None:
        if not examples and not self.labels:
            raise DataError(["classify needs its rows at the start, to know the labels; leave out --data.streaming."])
        if not self.labels:
            self.labels = tuple(sorted({e.label for e in examples if isinstance(e, Labelled)}))
        if len(self.labels) < 2:
            place = f"{examples[0].where}: " if examples else ""
            found = f"the rows have only the label {self.labels[0]!r}" if self.labels else "no row has a label"
            raise DataError([f"{place}{found}; classify needs text/label rows with two labels or more."])

    def facts(self) -> dict[str, Any]:
        return {"labels": list(self.labels)}

    def config_changes(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    def features(self, example: Example) -> Features:
        if not isinstance(example, Labelled):
            raise DataError([f"{example.where}: the row has no label; classify takes text/label rows."])
        if example.label not in self.labels:
            raise DataError([f"{example.where}: label {example.label!r} is not one the adapter knows: "
                             f"{', '.join(self.labels[:8])}{' ...' if len(self.labels) > 8 else ''}."])  # fmt: skip
        encoded = self.tokenizer(example.text, example.text_pair, verbose=False)
        whole = len(encoded["input_ids"])
        if whole > self.max_length:
            encoded = self.tokenizer(example.text, example.text_pair, truncation=True, max_length=self.max_length)
        self.count_cut(whole - len(encoded["input_ids"]))
        return {**encoded, "labels": self.labels.index(example.label)}

    def longest(self) -> Features:
        return super().longest() | {"labels": 0}

    def answer(self, row: Features) -> str:
        return self.labels[row["labels"]]

    def collate(self, rows: Sequence[Features]) -> Batch:
        batch = {"input_ids": pad([row["input_ids"] for row in rows], self.tokenizer.pad_token_id)}
        for key in ("attention_mask", "token_type_ids"):
            if key in rows[0]:
                batch[key] = pad([row[key] for row in rows], 0)
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    def score(self, model: nn.Module, batch: Batch) -> Scores:
        self._refuse_other_padding(unwrapped(model).config)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits_BV = model(**inputs).logits
        return Scores(logits_BV, batch["labels"], torch.arange(len(logits_BV), device=logits_BV.device))

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

"""Seq2seq: learn a target text from a source text with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import AutoModelForSeq2SeqLM

from lora_ft.data.examples import Example, Pair, Text
from lora_ft.data.questions import PROMPTS
from lora_ft.data.render import IGNORE
from lora_ft.errors import DataError
from lora_ft.model.modes import unwrapped
from lora_ft.tasks import MADE_UP, Answering, Batch, Features, Scores, Task, pad, replied


class Seq2Seq(Task):
    """Every token of the target is learned, its end included, unless that was cut off: then no stop is taught."""

    name = "seq2seq"
    questions = PROMPTS
    model_class = AutoModelForSeq2SeqLM
    peft_task = "SEQ_2_SEQ_LM"

    def made_up(self) -> list[Example]:
        return [Pair(f"made up:{n + 1}", f"add: {n} and {n * n}", str(n + n * n)) for n in range(MADE_UP)]

    def features(self, example: Example) -> Features:
        if not isinstance(example, Pair):
            raise DataError([f"{example.where}: the row has no source and target; seq2seq takes source/target rows."])
        source, cut = self._source(example.prompt)
        target = list(self.tokenizer(text_target=example.completion, verbose=False)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if eos is not None and target[-1:] != [eos]:
            target.append(eos)
        labels = target[: self.max_length]
        self.count_cut(cut + len(target) - len(labels))
        return {"input_ids": source, "labels": labels}

    def _source(self, text: str) -> tuple[list[int], int]:
        """Returns the source's token ids and how many were cut off; the end that the encoder is used to stays."""
        whole = self.tokenizer(text, verbose=False)["input_ids"]
        if len(whole) <= self.max_length:
            return whole, 0
        kept = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        return kept, len(whole) - len(kept)

    def answer(self, row: Features) -> str:
        return self.tokenizer.decode(row["labels"])

    def lengths(self, row: Features) -> list[int]:
        return [len(row["input_ids"]), len(row["labels"])]

    def question(self, example: Example) -> tuple[list[int], str]:
        if not isinstance(example, Pair):
            return super().question(example)
        return self._source(example.prompt)[0], example.completion

    def asked(self, example: Example) -> Features:
        if not isinstance(example, Pair | Text):
            return super().asked(example)
        source, cut = self._source(example.prompt if isinstance(example, Pair) else example.text)
        self.count_cut(cut)
        return {"input_ids": source}

    def predict(self, model: Answering, rows: Sequence[Features]) -> list[dict[str, Any]]:
        return replied(model, [row["input_ids"] for row in rows])

    def collate(self, rows: Sequence[Features]) -> Batch:
        return {
            "input_ids": pad([row["input_ids"] for row in rows], self.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": pad([row["labels"] for row in rows], IGNORE),
        }

    def score(self, model: nn.Module, batch: Batch) -> Scores:
        labels_BT = batch["labels"]
        inner = unwrapped(model)
        shifted_BT = inner.prepare_decoder_input_ids_from_labels(labels=labels_BT)
        logits_BTV = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=shifted_BT,
            use_cache=False,
        ).logits
        row_N, column_N = (labels_BT != IGNORE).nonzero(as_tuple=True)
        return Scores(logits_BTV[row_N, column_N], labels_BT[row_N, column_N], row_N)

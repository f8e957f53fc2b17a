"""What the tasks of a causal language model share: right padding and scores at labelled positions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lora_ft.data.render import IGNORE
from lora_ft.model import attention
from lora_ft.model.head import Head, states
from lora_ft.model.modes import unwrapped
from lora_ft.tasks import Batch, Features, Scores, Task, pad


class Causal(Task):
    """Predict each labelled token from those before it."""

    model_class = AutoModelForCausalLM
    peft_task = "CAUSAL_LM"
    shares_rows = True

    def collate(self, rows: Sequence[Features]) -> Batch:
        return {
            "input_ids": pad([row["input_ids"] for row in rows], self.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": pad([row["labels"] for row in rows], IGNORE),
        }

    def end_to_end(self, rows: Sequence[Features]) -> Batch:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = torch.tensor([label for row in rows for label in (IGNORE, *row["labels"][1:])])
        return {**attention.row(ids), "labels": labels[None]}

    def score(self, model: nn.Module, batch: Batch) -> Scores:
        targets_BT = batch["labels"][:, 1:]
        # The head runs only where some row of the batch has a label; the model's own forward does it, so that
        # scaling and soft-capping of logits are the architecture's.
        kept_K = (targets_BT != IGNORE).any(dim=0).nonzero()[:, 0]
        narrow = {"logits_to_keep": kept_K} if _keeps_logits(model) else {}
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits_BKV = model(**inputs, use_cache=False, **narrow).logits
        if not narrow:
            logits_BKV = logits_BKV[:, kept_K]
        targets_BK = targets_BT[:, kept_K]
        row_N, column_N = (targets_BK != IGNORE).nonzero(as_tuple=True)
        return Scores(logits_BKV[row_N, column_N], targets_BK[row_N, column_N], row_N)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        inner = unwrapped(model)
        head = Head.of(inner)
        if head is None:
            return super().loss(model, batch)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        # The state of a token says the next one.
        targets_BT = batch["labels"][:, 1:]
        row_N, column_N = (targets_BT != IGNORE).nonzero(as_tuple=True)
        return head.loss(states(inner, inputs)[row_N, column_N], targets_BT[row_N, column_N])


def _keeps_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters

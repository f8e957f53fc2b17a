"""The step of a training by itself: forward pass, backward pass and optimizer on a batch that is there already."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lora_ft import adapters, tasks
from lora_ft import base as bases
from lora_ft.config import BaseCache, LoraConfig
from lora_ft.model import attention, four_bits
from lora_ft.model.modes import mixed_precision
from lora_ft.system import heap


class Steps:
    """A model with an adapter, and the steps that `lora_ft.train` would make on rows that lie end to end."""

    def __init__(self, base: str, quant: Any, rank: int, cache: BaseCache = "auto") -> None:
        self.task = tasks.get("chat")
        self.base = bases.load(base, quant=quant, model_class=self.task.model_class)
        self.task.tokenizer = self.base.tokenizer
        self.model = adapters.attach(self.base, LoraConfig(rank=rank), peft_task=self.task.peft_task)
        four_bits.choose_cache(self.model, cache)
        self.model.train()
        self.optimizer = torch.optim.AdamW(adapters.trained(self.model).values(), lr=1e-4, fused=True)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Runs the block as a training does: 4-bit weights dequantized where they are, examples kept apart."""
        with four_bits.dequantized(self.model), attention.packed(self.model), heap.free_memory_kept():
            yield

    def batch(self, lengths: Sequence[int], labelled: float = 1.0) -> dict[str, torch.Tensor]:
        """Returns rows of random tokens, of which the last share is labelled."""
        draw = torch.Generator().manual_seed(0)
        rows = []
        for length in lengths:
            tokens = torch.randint(10, len(self.base.tokenizer), (length,), generator=draw).tolist()
            hidden = round(length * (1 - labelled))
            rows.append({"input_ids": tokens, "labels": [-100] * hidden + tokens[hidden:]})
        return {key: value.to(self.base.device) for key, value in self.task.end_to_end(rows).items()}

    def make(self, batch: dict[str, torch.Tensor]) -> None:
        """Makes one step."""
        with mixed_precision(self.model):
            loss = self.task.loss(self.model, batch) / (batch["labels"] != -100).sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, batch: dict[str, torch.Tensor]) -> float:
        """Returns how long one step takes."""
        self._finish()
        began = time.perf_counter()
        self.make(batch)
        self._finish()
        return time.perf_counter() - began

    def _finish(self) -> None:
        if self.base.device.type == "cuda":
            torch.cuda.synchronize()

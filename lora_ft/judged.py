"""Replies to prompts of which only the answer is known, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_ft.generate import Sampling, reply_ids
from lora_ft.tasks import Features


@dataclass(frozen=True)
class Judged:
    """The likeliest reply to each of some rows."""

    replies: list[str]
    rewards: np.ndarray
    """Float64 [rows]."""
    tokens: np.ndarray
    """Tokens of each reply, its end among them, float64 [rows]."""


def replies(task: Any, model: Any, rows: Sequence[Features], **sampling: Any) -> list[list[int]]:
    """Returns the tokens of a reply to each row, the likeliest ones but where `Sampling` is told otherwise."""
    made = reply_ids(
        model,
        task.tokenizer,
        [row["prompt"] for row in rows],
        sampling=Sampling(task.options.max_new_tokens, **sampling),
        stop_ids=task.end_ids(),
    )
    return [ids for ids, _ in made]


def judge(task: Any, model: Any, rows: Sequence[Features]) -> Judged:
    """Returns the likeliest replies to rows of a task with a reward, and what they are worth."""
    ids = replies(task, model, rows)
    texts = task.tokenizer.batch_decode(ids, skip_special_tokens=True)
    worth = task.reward.of(texts, [row["answer"] for row in rows])
    return Judged(texts, np.array(worth, dtype=np.float64), np.array([len(one) for one in ids], dtype=np.float64))

"""Replies to prompts of which only the answer is known, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_ft.generate import Sampling, reply_ids
from lora_ft.tasks import Features


@dataclass(frozen=True)
class Said:
    """The likeliest reply to each of some rows."""

    replies: list[str]
    tokens: np.ndarray
    """Tokens of each reply, its end among them, float64 [rows]."""


@dataclass(frozen=True)
class Judged(Said):
    """The same, with what each is worth."""

    rewards: np.ndarray
    """Float64 [rows]."""


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


def say(task: Any, model: Any, rows: Sequence[Features]) -> Said:
    """Returns the likeliest replies to rows of a task with a reward."""
    ids = replies(task, model, rows)
    texts = task.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Said(texts, np.array([len(one) for one in ids], dtype=np.float64))


def judge(task: Any, model: Any, rows: Sequence[Features]) -> Judged:
    """Returns the likeliest replies to rows of a task with a reward, and what they are worth.

    Raises:
        LoraFtError: an adapter folder names the reward, and what it would do is not done for a folder.
    """
    task.reward.admit()
    said = say(task, model, rows)
    worth = task.reward.of(said.replies, [row["answer"] for row in rows])
    return Judged(said.replies, said.tokens, np.array(worth, dtype=np.float64))

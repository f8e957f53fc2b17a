"""A few held-out rows in words: what was asked, what was wanted, and what base and adapter say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from lora_ft import base as bases
from lora_ft import evaluate
from lora_ft.base import Base
from lora_ft.data.examples import Chat, Example, Pair
from lora_ft.data.preferences import Preference
from lora_ft.data.problems import Problem
from lora_ft.errors import DataError
from lora_ft.model import modes
from lora_ft.tasks import Task

COUNT = 3


def taken(
    task: Task, base: Base, model: Any, examples: Sequence[Example], measured: evaluate.Comparison | None
) -> list[dict[str, str]]:
    """Returns what base and adapter say to the first held-out rows that can be replied to, in words."""
    if measured is not None and measured.after:
        pairs = [(example, task.question(example)[1]) for example in measured.asked[:COUNT]]
        before, after = measured.before, measured.after
    else:
        pairs = list(itertools.islice(_answerable(task, base, examples), COUNT))
        asked = [example for example, _ in pairs]
        with modes.without(model):
            before = evaluate.replies(task, model, asked) if asked else []
        after = evaluate.replies(task, model, asked) if asked else []
    return [
        {"prompt": _asked(example), "expected": want, "before": said, "after": says}
        for (example, want), said, says in zip(pairs, before, after, strict=False)
    ]


def _answerable(task: Task, base: Base, examples: Sequence[Example]) -> Iterator[tuple[Example, str]]:
    """Yields the rows that end in a reply in words, with it, where the base has positions for prompt and reply."""
    held = bases.positions(base.model.config, base.source.name)
    for example in examples:
        try:
            prompt, want = task.question(example)
        except DataError:
            continue
        if want and (held is None or len(prompt) < held):
            yield example, want


def _asked(example: Example) -> str:
    """Returns what the user said last, for people to read."""
    if isinstance(example, Chat | Preference):
        asked = example.messages[:-1] if isinstance(example, Chat) else example.prompt
        said = [message["content"] for message in asked if message["role"] == "user"]
        return str(said[-1]) if said else ""
    if isinstance(example, Problem):
        return example.prompt if isinstance(example.prompt, str) else str(example.prompt[-1]["content"])
    return example.prompt if isinstance(example, Pair) else ""

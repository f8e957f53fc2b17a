"""What a row teaches, one class for each kind: what every format is read into, and what tasks make features of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_ft.data.preferences import Judged, Preference
from lora_ft.data.problems import Problem

Label = str | tuple[str, ...] | float


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation in OpenAI's form: `role`, `content`, and where present `weight`, `tool_calls`, `tool_call_id`."""

    where: str
    """Place of the row for messages, such as `train.jsonl:17`."""
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and the text that should follow it (prompt/completion, question/answer, Alpaca, source/target)."""

    where: str
    prompt: str
    completion: str
    """Empty where it is asked for, as `label` is; `tags` are none then."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, all of it to be learned."""

    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or a pair of texts, and its class, its classes, or a number to predict."""

    where: str
    text: str
    label: Label
    text_pair: str | None = None


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words, and what each is: `O`, `B-TYPE` or `I-TYPE`."""

    where: str
    words: tuple[str, ...]
    tags: tuple[str, ...]
    text: str | None = None
    """What the words stand in, where they were not given one by one."""
    places: tuple[tuple[int, int], ...] = ()
    """Where each word begins and ends in the text, in characters."""


@dataclass(frozen=True, slots=True)
class Match:
    """A text, one that belongs to it, and where there is one a third that does not."""

    where: str
    anchor: str
    positive: str
    negative: str | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """Two texts, and how alike they are."""

    where: str
    text: str
    text_pair: str
    score: float


Example = Chat | Pair | Text | Labelled | Tagged | Match | Scored | Preference | Judged | Problem

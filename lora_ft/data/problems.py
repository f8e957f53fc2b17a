"""Rows of a prompt and an answer that a reply can be checked against, with no reply to learn from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_ft.data.chats import OPENAI, conversation
from lora_ft.data.faults import found

if TYPE_CHECKING:
    from lora_ft.data.formats import Fields

ANSWER = "give the answer as text, a number, or for a schema an object"


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, and what its reply is checked against."""

    where: str
    """Place of the row for messages, such as `train.jsonl:17`."""
    prompt: str | tuple[dict[str, Any], ...]
    """Text to go on from, or a conversation to reply to, in OpenAI's form."""
    answer: str
    """Text, or JSON where the row has another value."""


def of_prompt(row: Fields, prompt: str, answer: str | None = None) -> Problem:
    """Returns a prompt that is text, or a list of messages, and its answer, if it has one."""
    value, place, wanted = row.get(prompt), row.place(prompt), answer_of(row, answer) if answer else ""
    if not isinstance(value, list):
        return Problem(row.where, row.text(prompt), wanted)
    said = conversation(value, place, OPENAI, row.faults, trained=False)
    if said and said[-1]["role"] == "assistant":
        row.faults.add(f"{place}[{len(said) - 1}]", "is from assistant", "end with what the reply is to")
    return Problem(row.where, said, wanted)


def answer_of(row: Fields, name: str) -> str:
    """Returns the answer as text."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float | dict | list):
        return row.faults.text(value, row.place(name), ANSWER)
    if not value and isinstance(value, list | dict):
        row.faults.add(row.place(name), found(value), ANSWER)
    return json.dumps(value, ensure_ascii=False)

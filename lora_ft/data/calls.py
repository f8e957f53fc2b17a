"""Calls of tools in what a model wrote: JSON objects with a name and arguments, whatever stands around them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from lora_ft.foreign import strictjson


class Call(NamedTuple):
    """One call."""

    name: str
    arguments: str
    """As JSON that is equal where the values are; what is no JSON is as it was written."""


def written(text: str) -> list[Call]:
    """Returns the calls in a text, in their order; what looks like one but is no sound JSON is none."""
    return list(_written(text))


def _written(text: str) -> Iterator[Call]:
    scanner, at = strictjson.Scanner(), text.find("{")
    while at >= 0:
        end = at + 1
        try:
            value, after = scanner.scan(text, at)
        except strictjson.JsonError:
            value = {}
        sound = {} if scanner.notes else value
        name, arguments = sound.get("name"), sound.get("arguments", sound.get("parameters"))
        if isinstance(name, str) and isinstance(arguments, dict | str):
            yield Call(name, _read(arguments) if isinstance(arguments, str) else _canonical(arguments))
            end = after
        at = text.find("{", end)


def _read(arguments: str) -> str:
    """Returns arguments that were written as a string, as OpenAI's API has them."""
    try:
        return _canonical(strictjson.loads(arguments))
    except strictjson.JsonError:
        return arguments


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)

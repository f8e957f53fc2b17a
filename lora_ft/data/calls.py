"""Calls of tools in what a model wrote: JSON objects with a name and arguments, whatever stands around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lora_ft.foreign import strictjson


class Call(NamedTuple):
    """One call; its arguments are as they were written where they are not JSON."""

    name: str
    arguments: Any


def written(text: str) -> list[Call]:
    """Returns the calls in a text, in their order; what looks like one but is no JSON is none."""
    return list(_written(text))


def _written(text: str) -> Iterator[Call]:
    scanner, at = strictjson.Scanner(), text.find("{")
    while at >= 0:
        end = at + 1
        try:
            value, after = scanner.scan(text, at)
        except strictjson.JsonError:
            value = None
        name, arguments = (
            (value.get("name"), value.get("arguments", value.get("parameters"))) if value else (None, None)
        )
        if isinstance(name, str) and isinstance(arguments, dict | str):
            yield Call(name, _read(arguments) if isinstance(arguments, str) else arguments)
            end = after
        at = text.find("{", end)


def _read(arguments: str) -> Any:
    """Returns arguments that were written as a string, as OpenAI's API has them."""
    try:
        return strictjson.loads(arguments)
    except strictjson.JsonError:
        return arguments

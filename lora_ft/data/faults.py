"""What is wrong with one row, in words: the place, what was found there, the rule and the remedy."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

from lora_ft.errors import DataError
from lora_ft.foreign.strictjson import JsonError, bare, flaws, loads, quoted

MISSING: Any = type("Missing", (), {"__repr__": lambda _: "MISSING"})()
"""Stands for a field that a row lacks, as None stands for null."""


class Faults:
    """Collects all that is wrong with one row, one line each; `raise_if_any` raises them together."""

    # A row is at most 8 MiB, yet that is room for millions of bad messages.
    LIMIT = 50

    def __init__(self, where: str) -> None:
        self.where = where
        self._lines: list[str] = []

    def add(self, place: str, what: str, rule: str) -> None:
        """Notes one problem. Raises DataError with all so far once there are `LIMIT`."""
        self._lines.append(f"{self.where}: {place} {what}; {rule}.")
        if len(self._lines) == self.LIMIT:
            raise DataError([*self._lines, f"{self.where}: the row was read no further."])

    def raise_if_any(self) -> None:
        """Raises DataError with every problem noted."""
        if self._lines:
            raise DataError(self._lines)

    def text(self, value: Any, place: str, rule: str = "give a string that is not empty") -> str:
        """Returns `value` where it is text with more than white space in it, else notes the fault and returns ""."""
        if isinstance(value, str) and value.strip():
            return value
        self.add(place, found(value), rule)
        return ""

    def json(self, text: str, place: str) -> Any:
        """Returns what the JSON `text` stands for; where that cannot be used, notes why and returns MISSING."""
        try:
            value = loads(text)
        except JsonError as fault:
            problems = list(fault.problems)
        else:
            problems = [flaw for _, flaw in flaws(value)]
            if not problems:
                return value
        for problem in problems:
            self.add(place, *phrase(problem, "write it as JSON"))
        return MISSING


def phrase(problem: str, remedy: str) -> tuple[str, str]:
    """Returns what is wrong and its remedy, which is `remedy` unless the problem brings its own after a semicolon."""
    what, _, rule = problem.partition("; ")
    return what, rule or remedy


def found(value: Any) -> str:
    """Returns what to say of a value that breaks a rule, such as `is 5` or `is a list of 3`."""
    if value is MISSING:
        return "is missing"
    if value is None:
        return "is null"
    if isinstance(value, str) and not value.strip():
        return "is empty"
    if isinstance(value, dict):
        return f"is an object with the keys {listed(list(value))}" if value else "is an empty object"
    if isinstance(value, list):
        return f"is a list of {len(value)}" if value else "is an empty list"
    return f"is {shown(value)}"


def shown(value: Any) -> str:
    """Returns `value` on one short line that any terminal can print."""
    if isinstance(value, str):
        return quoted(value)
    return str(value).lower() if isinstance(value, bool) else quoted(reprlib.repr(value))[1:-1]


def listed(names: Sequence[Any]) -> str:
    """Returns names with commas between them, the first few only."""
    few = ", ".join(bare(str(name)) for name in names[:8])
    return f"{few} and {len(names) - 8} more" if len(names) > 8 else few

"""JSON text -> values, refusing what JSON forbids or leaves open and Python's own reader lets through."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 64
INT64 = range(-(2**63), 2**63)
BLANK = " \t\r\n"
# A hostile row could repeat its mistake a million times.
MAX_NOTES = 20
# `model_max_length` of a tokenizer without one is 10^30.
MAX_DIGITS = 40

_TOO_DEEP = f"is nested deeper than {MAX_DEPTH} levels; make it flatter"


class JsonError(ValueError):
    """Text that is no JSON, or that two readers of JSON would understand differently; one phrase per problem."""

    def __init__(self, *problems: str, left: int | None = None) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems
        self.left = left
        """Characters from where the reading failed to the end of the text: none where the text was cut off."""


class Scanner:
    """Reads one value at a time out of a text; `notes` says what was wrong inside the last one.

    With `any_number`, infinities and long whole numbers are let through: transformers writes both into its own files.
    """

    def __init__(self, any_number: bool = False) -> None:
        self.notes: list[str] = []
        self.any_number = any_number
        self._scan = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_int=self._int,
            parse_float=self._float,
            parse_constant=self._constant,
        ).raw_decode

    def scan(self, text: str, start: int = 0) -> tuple[Any, int]:
        """Returns the value that begins at `start`, and where it ends. Raises JsonError where there is none."""
        self.notes.clear()
        try:
            return self._scan(text, start)
        except json.JSONDecodeError as error:
            # An open string is reported at its start.
            left = 0 if error.msg.startswith("Unterminated string") else max(0, len(text.rstrip(BLANK)) - error.pos)
            raise JsonError(f"is not JSON at character {error.pos - start + 1}: {error.msg}", left=left) from None
        except RecursionError:
            raise JsonError(_TOO_DEEP) from None

    def _note(self, problem: str) -> None:
        if len(self.notes) < MAX_NOTES and problem not in self.notes:
            self.notes.append(problem)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in fields:
                self._note(f"has the key {quoted(key)} twice in one object; keep one")
            fields[key] = value
        return fields

    def _int(self, digits: str) -> int:
        # Python takes quadratic time for long numbers, and refuses those beyond 4300 digits.
        if len(digits) <= 20 and int(digits) in INT64:
            return int(digits)
        if self.any_number and len(digits) <= MAX_DIGITS:
            return int(digits)
        self._note(f"has a whole number beyond 64 bits, {quoted(digits)}; write it as a string")
        return 0

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value) and not self.any_number:
            self._note(f"has a number beyond a 64-bit float, {quoted(digits)}; write it as a string")
        return value

    def _constant(self, name: str) -> float | None:
        if self.any_number and name != "NaN":
            return float(name)
        self._note(f"has {name}, which JSON does not know; use null or a number")
        return None


def loads(text: str, any_number: bool = False) -> Any:
    """Returns the one value that `text` holds. Raises JsonError with every problem in it."""
    scanner = Scanner(any_number)
    value, end = scanner.scan(text, len(text) - len(text.lstrip(BLANK)))
    rest = text[end:].lstrip(BLANK)
    if rest:
        raise JsonError(f"goes on after its JSON value, at character {end + 1}, with {quoted(rest)}; keep one value")
    if scanner.notes:
        raise JsonError(*scanner.notes)
    return value


def flaws(value: Any) -> Iterator[tuple[str, str]]:
    """Yields the place and the kind of each flaw in `value`: text that no tokenizer takes, or too deep a nesting."""
    # A place is a chain of links to its parents, written out only where there is a flaw.
    todo: list[tuple[Any, Any, int]] = [(None, value, 1)]
    while todo:
        link, value, depth = todo.pop()
        if isinstance(value, str):
            if "\0" in value:
                yield _place(link), "holds a NUL character; remove it"
            if not _is_text(value):
                yield _place(link), "holds half of a surrogate pair, which is no character; write the whole character"
        elif isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                yield _place(link), _TOO_DEEP
                return
            children = value.items() if isinstance(value, dict) else enumerate(value)
            todo.extend(((link, key), child, depth + 1) for key, child in children)
            if isinstance(value, dict):
                todo.extend((link, key, depth) for key in value)


def quoted(text: str) -> str:
    """Returns `text` in quotation marks, cut to a short line that any terminal can print."""
    cut = text if len(text) <= 60 else text[:57] + "..."
    return json.dumps(cut, ensure_ascii=not cut.isprintable())


def bare(name: str) -> str:
    """Returns a name that needs no quotation marks as it is, any other `quoted`."""
    return name if name.isprintable() and name.strip() and len(name) <= 60 else quoted(name)


def shown(value: Any) -> str:
    """Returns a value of a file in short: no message is as long as what it complains of."""
    text = quoted(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _place(link: Any) -> str:
    keys: list[str] = []
    while link is not None:
        link, key = link
        keys.append(f"[{key}]" if isinstance(key, int) else f".{bare(str(key))}")
    # Deeper than any field of any format, a place says nothing.
    return "".join(keys[:-9:-1]).removeprefix(".")

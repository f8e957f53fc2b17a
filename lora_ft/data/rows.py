"""What every reader of rows makes: a row and its place, or what is wrong with it.

A reader yields a DataError in place of a row that is broken and goes on; it raises one where it cannot go on.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from lora_ft.data.faults import listed
from lora_ft.errors import DataError

MAX_ROW_BYTES = 8 * 2**20
"""Longest row: 1024 tokens are some 4 KiB, so anything near this is not a row but a broken file."""
CHUNK_BYTES = 64 * 2**10
"""Read at a time from a text file."""


@dataclass(frozen=True, slots=True)
class Row:
    """The fields of one row as they were written, and where that was."""

    where: str
    fields: dict[str, Any]


Rows: TypeAlias = Iterator[Row | DataError]
ByteFile: TypeAlias = "io.BufferedReader[Any]"
Reader: TypeAlias = Callable[[ByteFile, str], Rows]


def refuse_twins(names: list[str], where: str) -> None:
    """Raises DataError where two columns share a name, so that one would hide the other."""
    twins = [name for name, count in Counter(names).items() if count > 1]
    if twins:
        raise DataError([f"{where}: has two columns named {listed(twins)}; name each column once."])


def undecodable(error: UnicodeDecodeError, whole: str = "line") -> str:
    """Returns what to say of bytes that are not UTF-8."""
    byte = f"byte {error.start + 1} of the {whole} is 0x{error.object[error.start]:02x}"
    return f"{byte}, which is not UTF-8; re-save the file as UTF-8."


def first_line(error: object) -> str:
    """Returns the first line of a library's message, cut to fit in one of ours."""
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return text if len(text) <= 200 else text[:197] + "..."

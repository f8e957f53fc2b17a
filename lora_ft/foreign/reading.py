"""Transformers asked to read a folder of others: no code of it runs, nothing is fetched, and a failure is one error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_ft.errors import LoraFtError

NO_CODE = "it needs code of its own, and no code from a base is ever run"


def opened(kind: Any, folder: Path, failed: Callable[[str], Exception], **options: Any) -> Any:
    """Returns what `kind.from_pretrained` makes of a local folder.

    Args:
        kind: a class of transformers that reads folders.
        failed: makes the error to raise of the reason, a phrase without its full stop.
        options: more arguments of `from_pretrained`.
    """
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except LoraFtError:
        raise
    except Exception as error:
        # Its own message says what to do, and its callers know it by its class.
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise failed(first_line(error)) from None


def first_line(error: Exception) -> str:
    """Returns what an error of a library says, in one phrase: wrong values in a file make it raise anything."""
    lines = [line.strip() for line in str(error).strip().splitlines()[:2]]
    # The line after a colon says what was wrong.
    told = (" ".join(lines) if lines and lines[0].endswith(":") else "".join(lines[:1])).rstrip(".: ")
    if "custom code" in told or "trust_remote_code" in told:
        return NO_CODE
    return (told if len(told) <= 300 else f"{told[:297]}...") or type(error).__name__

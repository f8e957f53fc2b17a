"""What the commands say to a terminal and ask there, and how much of the libraries is let through."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from lora_ft.system import processes, redaction
from lora_ft.system.redaction import redacted


def quiet() -> None:
    """Lets our own messages through, and of the libraries' only errors.

    Of several processes only the first tells what is so in all.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    redaction.install()
    logging.basicConfig(format="%(message)s", level=logging.ERROR, stream=sys.stderr)
    logging.getLogger("lora_ft").setLevel(logging.INFO if processes.is_first() else logging.ERROR)
    for name in ("lora_ft.training.halving", "lora_ft.scoring.losses"):
        logging.getLogger(name).setLevel(logging.INFO)  # what one alone may be short of
    warnings.simplefilter("ignore")


def say(text: str) -> None:
    """Prints a line of the answer, without the secrets that a path or a library's words may have brought in."""
    print(redacted(text))


def ask() -> str:
    """Returns a line that is typed, empty at the end of input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; numbers to four digits, and nothing for None."""
    from rich.console import Console
    from rich.table import Table

    made = Table(*head)
    for row in rows:
        made.add_row(*[f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in row])
    # A label may look like markup.
    Console(markup=False, emoji=False).print(made)

"""`metrics.jsonl`: what a run measured as it trained, a JSON object of numbers in each line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def read(file: Path) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl` in their order, each with its `step`; none where there is no such file.

    A line that a crash cut short, or that is none of a run, is left out.
    """
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return [line for line in map(_parsed, text.splitlines()) if line is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and type(found.get("step")) is int else None

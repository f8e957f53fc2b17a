"""What every benchmark writes: its lines as a CSV, each with versions, device, commit and date."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_ft.proof import environment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def facts(device: torch.device) -> dict[str, Any]:
    """Returns versions, device, commit and date."""
    commit = ["git", "describe", "--always", "--dirty"]
    return environment.versions() | {
        "device": environment.device_name(device),
        "processor": processor(),
        "commit": subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """Returns the processor's name, and whether it multiplies bfloat16 in tiles, which decides most on a CPU."""
    told = Path("/proc/cpuinfo")
    text = told.read_text(encoding="utf-8") if told.is_file() else ""
    named = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    tiles = re.search(r"\bamx_bf16\b", text)
    return (named[1] if named else platform.processor()) + (" with AMX" if tiles else "")


def write(file: Path, lines: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Writes lines with the facts behind each; one may have what others lack."""
    told = facts(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        names = dict.fromkeys(key for line in lines for key in line) | told
        writer = csv.DictWriter(stream, fieldnames=list(names))
        writer.writeheader()
        writer.writerows(line | told for line in lines)

"""What every benchmark writes: its lines as a CSV, each with versions, device, commit and date."""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_ft import environment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def facts(device: torch.device) -> dict[str, Any]:
    """Returns versions, device, commit and date."""
    commit = ["git", "describe", "--always", "--dirty"]
    return environment.versions() | {
        "device": environment.device_name(device),
        "commit": subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def write(file: Path, lines: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Writes lines with the facts behind each; one may have what others lack."""
    told = facts(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        names = dict.fromkeys(key for line in lines for key in line) | told
        writer = csv.DictWriter(stream, fieldnames=list(names))
        writer.writeheader()
        writer.writerows(line | told for line in lines)

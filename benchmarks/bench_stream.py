"""Seconds to the first step, and memory above the model, of a training that streams a file larger than it needs.

    python benchmarks/bench_stream.py [--rows 5000000] [--base smollm2-135m]

The file, generated chats, is written into a temporary folder, and deleted in the end. `lora-ft train chat` makes two
steps on it in a process of its own. Neither number is to grow with the file, so one of a thousandth of it comes first;
the command fails where the first step takes longer than a minute, or the process more than 1 GB above what it holds
with the libraries imported and the model's weights in memory. What it holds beside the weights alone, the libraries
counted, has a column of its own, and no bound.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro
from records import RESULTS, write

from lora_ft import base as bases
from lora_ft import sources

MOST_SECONDS, MOST_MB = 60.0, 1000
WORDS = ["amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "harbor", "iris", "jasper"]
POLL_S = 0.02


@dataclass(frozen=True)
class Options:
    """Measure what streaming waits for and holds."""

    rows: int = 5_000_000
    """Of the large file."""
    base: str = "smollm2-135m"
    """The base model: an alias, or a folder of a small one."""
    folder: Path | None = None
    """Where the file is written, for a while; unset, the system's temporary folder."""
    out: Path = RESULTS / "stream.csv"
    """The CSV to write."""


def main() -> int:
    options = tyro.cli(Options)
    libraries, model = libraries_bytes(), model_bytes(options.base)
    lines: list[dict[str, Any]] = []
    for count in (max(options.rows // 1000, 100), options.rows):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            file = Path(folder) / "rows.jsonl"
            write_rows(file, count)
            facts = {"rows": count, "file MB": round(file.stat().st_size / 1e6, 1)}
            seconds, peak = first_step(options, file)
        held = {
            "process MB": round(peak / 1e6),
            "MB beside the weights": round((peak - model) / 1e6),
            "MB above the model": round((peak - model - libraries) / 1e6),
        }
        lines.append(facts | {"first step s": round(seconds, 1)} | held)
        print("  ".join(f"{name}: {value}" for name, value in lines[-1].items()), flush=True)
    write(options.out, lines, torch.device("cpu"))
    return int(any(one["first step s"] > MOST_SECONDS or one["MB above the model"] > MOST_MB for one in lines))


def libraries_bytes() -> int:
    """Returns what a process holds that has imported all that a training imports."""
    code = "import psutil, lora_ft.runs; print(psutil.Process().memory_info().rss)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def model_bytes(base: str) -> int:
    """Returns what the weights of a base take unquantized; fetches them, which is no part of what is measured."""
    files = sources.safetensors_files(sources.resolve(base).folder)
    headers: list[dict[str, Any]] = [sources.safetensors_header(file)[1] for file in files]
    numbers = sum(prod(spec["shape"]) for header in headers for spec in header.values())
    return numbers * bases.choose_dtype("auto", "cpu")[0].itemsize


def write_rows(file: Path, count: int) -> None:
    """Writes so many chats, no two of them alike."""
    with file.open("w", encoding="utf-8") as stream:
        for i in range(count):
            first, second = WORDS[i % 10], WORDS[i // 10 % 10]
            turns = {
                "user": f"Of {i} parcels, {i % 97} went by {first}, the others by {second}: how many were these?",
                "assistant": f"{i - i % 97} parcels went by {second}.",
            }
            row = {"messages": [{"role": role, "content": content} for role, content in turns.items()]}
            stream.write(json.dumps(row) + "\n")


def first_step(options: Options, file: Path) -> tuple[float, int]:
    """Returns the seconds until the first step of a training is made, and the most memory of its process by then."""
    out = file.parent / "run"
    words = [
        "--base",
        options.base,
        "--quant",
        "none",
        "--data.train",
        str(file),
        "--data.streaming",
        "--out",
        str(out),
    ]
    command = [sys.executable, "-m", "lora_ft.cli", "train", "chat", *words, "--train.steps", "2"]
    began, peak = time.perf_counter(), 0
    with (file.parent / "said").open("w") as said:
        training = subprocess.Popen(command, stdout=said, stderr=said)
    watched, metrics = psutil.Process(training.pid), out / "metrics.jsonl"
    while training.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        peak = max(peak, watched.memory_info().rss)
        time.sleep(POLL_S)
    seconds = time.perf_counter() - began
    if training.wait() != 0:
        raise SystemExit(f"The training failed:\n{(file.parent / 'said').read_text()}")
    return seconds, peak


if __name__ == "__main__":
    sys.exit(main())

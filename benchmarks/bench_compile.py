"""What `torch.compile` of the decoder layers would save of a step of training, and what it costs first.

    python benchmarks/bench_compile.py [--quant none] [--repeats 5]

Steps on rows of one shape, first as they are, then compiled for shapes that vary. Prints seconds of a step before and
after, those of compiling, and the steps after which these are made up for. Needs a C++ compiler on a CPU.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from records import RESULTS, write
from steps import Steps

from lora_ft.model.modes import unwrapped


@dataclass(frozen=True)
class Options:
    """Compile the layers of a step."""

    base: str = "smollm2-135m"
    """The base model."""
    quant: Literal["nf4", "none"] = "none"
    """How the base is stored."""
    rank: int = 16
    """Of the adapter, on all linear layers."""
    rows: int = 4
    """Rows of a step."""
    length: int = 512
    """Tokens of a row, all labelled."""
    repeats: int = 5
    """Steps of each; medians are shown."""
    out: Path = RESULTS / "compile.csv"
    """The CSV to write."""


def main() -> None:
    options = tyro.cli(Options)
    steps = Steps(options.base, options.quant, options.rank)
    batch = steps.batch([options.length] * options.rows)
    with steps.ready():
        steps.seconds(batch)
        plain = statistics.median(steps.seconds(batch) for _ in range(options.repeats))
        for layer in unwrapped(steps.model).base_model.layers:
            layer.compile(dynamic=True)
        first = steps.seconds(batch)
        compiled = statistics.median(steps.seconds(batch) for _ in range(options.repeats))
    saved, spent = plain - compiled, first - compiled
    line: dict[str, Any] = {
        "seconds a step": round(plain, 2),
        "compiled": round(compiled, 2),
        "ratio": round(plain / compiled, 2),
        "seconds of compiling": round(spent, 1),
        "steps to make up for them": round(spent / saved) if saved > 0 else None,
    }
    print(*[f"{key} {value}" for key, value in line.items()], sep="  ")
    write(options.out, [line], steps.base.device)


if __name__ == "__main__":
    main()

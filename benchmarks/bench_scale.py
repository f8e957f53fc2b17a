"""What a token costs in a step of training, against the length of rows, their number, and the rank of the adapter.

    python benchmarks/bench_scale.py [--quant none] [--repeats 3]

Packs of short rows are to cost the same for each token whatever their size: nothing in a step grows with its square.
Steps of one table take turns; a cost is the median, beside that of the first line.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from records import RESULTS, write
from steps import Steps

SHORT = 128
"""Tokens of a short row."""
TABLES: dict[str, dict[str, list[int]]] = {
    "packs of short rows": {f"{count * SHORT} tokens": [SHORT] * count for count in (4, 8, 16, 32, 64)},
    "rows of a pack of 2048": {
        f"{2048 // length} of {length}": [length] * (2048 // length) for length in (64, 256, 512, 2048)
    },
}
RANKS = (8, 16, 64, 256)


@dataclass(frozen=True)
class Options:
    """Measure what tokens cost."""

    base: str = "smollm2-135m"
    """The base model."""
    quant: Literal["nf4", "none"] = "none"
    """How the base is stored."""
    rank: int = 16
    """Of the adapter, where it is not what changes."""
    repeats: int = 3
    """Steps of each; medians are shown."""
    out: Path = RESULTS / "scale.csv"
    """The CSV to write."""


def main() -> None:
    options = tyro.cli(Options)
    lines: list[dict[str, Any]] = []
    steps = Steps(options.base, options.quant, options.rank)
    for table, shapes in TABLES.items():
        lines += told(table, timed(options, {name: (steps, lengths) for name, lengths in shapes.items()}))
    of_rank = {f"rank {rank}": (Steps(options.base, options.quant, rank), [SHORT] * 8) for rank in RANKS}
    lines += told("ranks", timed(options, of_rank))
    write(options.out, lines, steps.base.device)


def timed(options: Options, shapes: dict[str, tuple[Steps, list[int]]]) -> dict[str, float]:
    """Returns the seconds that a token of each shape takes."""
    found: dict[str, list[float]] = {name: [] for name in shapes}
    for _ in range(options.repeats + 1):
        for name, (steps, lengths) in shapes.items():
            with steps.ready():
                found[name].append(steps.seconds(steps.batch(lengths)) / sum(lengths))
    # The first of each fills caches and grows buffers.
    return {name: statistics.median(taken[1:]) for name, taken in found.items()}


def told(table: str, found: dict[str, float]) -> list[dict[str, Any]]:
    """Returns the lines of a table, having printed them."""
    print(table)
    first = next(iter(found.values()))
    lines = []
    for name, taken in found.items():
        lines.append(
            {
                "table": table,
                "shape": name,
                "ms a token": round(1e3 * taken, 3),
                "of the first": round(taken / first, 3),
            }
        )
        print(f"  {name:<14} {1e3 * taken:8.3f} ms a token  {taken / first:6.2f} of the first", flush=True)
    return lines


if __name__ == "__main__":
    main()

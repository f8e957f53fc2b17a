"""The fused layer against PEFT and bitsandbytes, forward and backward in 4 bits, over rows and dtypes.

    python benchmarks/bench_lora_linear.py [--out benchmarks/results/FILE.csv]

Prints a table and writes a CSV. Ratios are of medians of runs that take turns in one process (`lora_ft.speed.bench`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from records import RESULTS, write

from lora_ft.speed import bench

WEIGHTS = ((2048, 2048), (1536, 576), (576, 1536))
ROWS = (1, 4, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Options:
    """Time one adapted linear layer."""

    out: Path = RESULTS / "lora_linear.csv"
    """The CSV to write."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Dtypes of activations."""
    rows: tuple[int, ...] = ROWS
    """Rows of activations."""


def main() -> None:
    options = tyro.cli(Options)
    on = bench.device()
    lines = []
    for dtype in (getattr(torch, name) for name in options.dtypes):
        rate = bench.matmul_rate(dtype, on)
        for n, k in WEIGHTS:
            for m in options.rows:
                found = bench.linear(m, n, k, dtype, on, rate)
                ratios = {f"{name} takes": round(found.ratio(name), 2) for name in found.rivals}
                line = {"dtype": found.dtype, "rows": m, "n": n, "k": k, "ms": round(1e3 * found.seconds, 3)}
                lines.append(line | {"of matmul": round(found.share, 2)} | ratios)
                print(*[f"{key} {value}" for key, value in (line | ratios).items()], sep="  ", flush=True)
    write(options.out, lines, on)


if __name__ == "__main__":
    main()

"""The share of the machine's rate of matrix products that a step of training reaches, and where the rest goes.

    python benchmarks/bench_roofline.py [--quant none nf4] [--rows 4 --length 512]

Products of large matrices are timed in turns with the steps, in the dtype of the training. The arithmetic of a step is
that of its matrix products, counted on its shapes (`lora_ft.memory.ledger`); the time of each operation is that of a
profile. On a GPU the share of a step in which it is busy is shown too: in the rest it waits for kernels to be launched.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from records import RESULTS, write
from steps import Steps
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lora_ft import memory
from lora_ft.config import BaseCache, DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_ft.speed import rates

SHOWN = 12


@dataclass(frozen=True)
class Options:
    """Hold a step against the machine's rate of matrix products."""

    base: str = "smollm2-135m"
    """The base model."""
    quant: tuple[Literal["none", "nf4", "nf4 uncached"], ...] = ("none", "nf4", "nf4 uncached")
    """How the base is stored; uncached, a weight is dequantized whenever it is multiplied by."""
    rank: int = 16
    """Of the adapter, on all linear layers."""
    rows: int = 4
    """Rows of a step."""
    length: int = 512
    """Tokens of a row, all labelled."""
    repeats: int = 5
    """Steps of each; medians are shown."""
    out: Path = RESULTS / "roofline.csv"
    """The CSV to write."""


def main() -> None:
    options = tyro.cli(Options)
    lines: list[dict[str, Any]] = []
    for quant in options.quant:
        stored, _, uncached = quant.partition(" ")
        cache: BaseCache = "off" if uncached else "auto"
        steps = Steps(options.base, stored, options.rank, cache)
        dtype, on = steps.base.dtype, steps.base.device
        step = planned(options, stored, dtype, cache)
        batch = steps.batch([options.length] * options.rows)
        with steps.ready():
            steps.seconds(batch)
            times, reached = [], []
            for _ in range(options.repeats):
                reached.append(rates.matmul_rate(dtype, on))
                times.append(steps.seconds(batch))
            rate, seconds = statistics.median(reached), statistics.median(times)
            taken = by_operation(steps, batch)
            line = {
                "quant": quant,
                "tokens/s": round(options.rows * options.length / seconds, 1),
                "planned GiB": round(step.peak_bytes / 2**30, 2),
                "GFLOP a step": round(step.flops / 1e9, 1),
                "GFLOP/s": round(step.flops / seconds / 1e9, 1),
                "GFLOP/s of products alone": round(rate / 1e9, 1),
                "share": round(step.flops / seconds / rate, 3),
            }
            if on.type == "cuda":
                line["share that the GPU is busy"] = round(sum(taken.values()) / seconds, 3)
            print(*[f"{key} {value}" for key, value in line.items()], sep="  ", flush=True)
            lines.append(line)
            for name, own in sorted(taken.items(), key=lambda one: -one[1])[:SHOWN]:
                print(f"  {own / sum(taken.values()):6.1%}  {name}", flush=True)
    write(options.out, lines, on)


def planned(options: Options, quant: Any, dtype: torch.dtype, cache: BaseCache) -> memory.Step:
    """Returns the memory and the arithmetic of a step."""
    computed: Any = str(dtype).removeprefix("torch.")
    config = RunConfig(
        task="chat",
        base=options.base,
        out=Path("unwritten"),
        quant=quant,
        lora=LoraConfig(rank=options.rank),
        data=DataConfig(max_length=options.length),
        train=TrainConfig(batch_size=options.rows, dtype=computed, base_cache=cache),
    )
    return memory.plan(config, "cpu").asked


def by_operation(steps: Steps, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Returns the seconds that each operation of a step takes itself; on a GPU those of each kernel."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiled:
        steps.make(batch)
    if steps.base.device.type != "cuda":
        return {event.key: event.self_cpu_time_total / 1e6 for event in profiled.key_averages()}
    # Operations that launch kernels, and marks around several of them, have their time too.
    return {
        event.key: event.self_device_time_total / 1e6
        for event in profiled.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    }


if __name__ == "__main__":
    main()

"""Teach a model to answer from rewards alone: sums, of which it samples many answers and is told which are right.

    python recipes/reason.py --out runs/reason

Rows are `{"prompt": ..., "answer": ...}` or `{"question": ..., "answer": ...}` lines; those here are made: sums of two
numbers up to 15, after a solved one. Held out are sums of operands that training never adds, in neither order. The
reward is the exact answer, which is the last number in a reply: the base often knows the sum, and then goes on to
others. `lora-ft train reason` takes the same options, and rows of your own.

16 steps, 512 replies and 10,152 tokens in all, lift the mean reward of the likeliest replies to 37 held-out rows from
0.46 to 0.89 (95% interval of the change: 0.24 to 0.59) in 58 s, peak 1.89 GiB, on 2 cores of an Intel Xeon with AMX,
2026-11-27, commit dc25b62.
"""

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

from lora_ft.cli import run_recipe
from lora_ft.config import DataConfig, LoraConfig, Quant, ReasonConfig, RunConfig, TaskName, TrainConfig
from lora_ft.data.problems import Problem

OPERANDS = range(1, 16)
# Pairs, each of them two rows.
HELD_OUT = 20
SEED = 7


@dataclass(frozen=True, kw_only=True)
class ReasonRecipe(RunConfig):
    """Learn sums from their answers."""

    task: TaskName = "reason"
    base: str = "smollm2-135m"
    out: Path = Path("runs/reason")
    # The base is small: there is nothing to save.
    quant: Quant = "none"
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16, alpha=32))
    data: DataConfig = field(default_factory=lambda: DataConfig(max_length=64))
    reason: ReasonConfig = field(default_factory=lambda: ReasonConfig(samples=8, max_new_tokens=6))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=4, steps=16, lr=1e-3, warmup=0))


def rows() -> tuple[list[Problem], list[Problem]]:
    """Returns the rows to train on and those held out."""
    pairs = [(a, b) for a in OPERANDS for b in OPERANDS if a <= b]
    random.Random(SEED).shuffle(pairs)
    return _problems(pairs[HELD_OUT:], "train"), _problems(pairs[:HELD_OUT], "held out")


def _problems(pairs: list[tuple[int, int]], name: str) -> list[Problem]:
    both = [pair for a, b in pairs for pair in dict.fromkeys(((a, b), (b, a)))]
    return [Problem(f"{name}:{number}", f"5 + 3 = 8\n{a} + {b} =", str(a + b)) for number, (a, b) in enumerate(both, 1)]


if __name__ == "__main__":
    sys.exit(run_recipe(ReasonRecipe, made=rows))

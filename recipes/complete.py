"""Teach a model to continue plain text, or prompts without any chat template.

    python recipes/complete.py --data.train your.jsonl --out runs/complete

Rows may be `{"text": ...}` lines, a text file (a row a paragraph) or prompt/completion pairs, of which only the
completion is learned. `lora-ft train complete` takes the same options.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from lora_ft.cli import run_recipe
from lora_ft.config import DataConfig, LoraConfig, RunConfig, TaskName, TrainConfig


@dataclass(frozen=True, kw_only=True)
class CompleteRecipe(RunConfig):
    """Learn to continue."""

    task: TaskName = "complete"
    base: str = "smollm2-135m"
    out: Path = Path("runs/complete")
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16, alpha=32))
    data: DataConfig = field(default_factory=lambda: DataConfig(eval="0.1", max_length=512))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=2, accumulate=4, epochs=1, lr=5e-4))


if __name__ == "__main__":
    sys.exit(run_recipe(CompleteRecipe))

"""Find entities in words, such as persons and places.

    python recipes/tag.py --data.train your.conll --data.eval held_out.conll --out runs/tag

Rows may be CoNLL columns (a word and its tag a line, a blank line between sentences), `{"words": [...], "tags": [...]}`
lines, or `{"text": ..., "spans": [{"start": 0, "end": 4, "label": "PER"}]}` lines. Tags are O, B-TYPE and I-TYPE.
`lora-ft train tag` takes the same options.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from lora_ft.cli import run_recipe
from lora_ft.config import DataConfig, LoraConfig, Quant, RunConfig, TaskName, TrainConfig


@dataclass(frozen=True, kw_only=True)
class TagRecipe(RunConfig):
    """Learn the tag of each word."""

    task: TaskName = "tag"
    base: str = "minilm"
    out: Path = Path("runs/tag")
    # A small encoder: quantized it would be slower, and hardly smaller.
    quant: Quant = "none"
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16, alpha=32))
    data: DataConfig = field(default_factory=lambda: DataConfig(eval="0.1", max_length=256))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=16, epochs=3, lr=1e-3))


if __name__ == "__main__":
    sys.exit(run_recipe(TagRecipe))

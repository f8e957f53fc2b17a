"""Teach an encoder-decoder such as T5 to turn one text into another.

    python recipes/seq2seq.py --data.train your.jsonl --out runs/seq2seq

Rows are `{"source": ..., "target": ...}` lines, or any other pairs: prompt/completion, question/answer, Alpaca. Targets
are also generated for the held-out rows, and compared with the right ones by chrF and ROUGE; add `bleu` for
translations. The base is fetched from the hub; `--base` takes another, or a folder. `lora-ft train seq2seq` takes the
same options.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from lora_ft.cli import run_recipe
from lora_ft.config import DataConfig, LoraConfig, Quant, RunConfig, TaskName, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Seq2SeqRecipe(RunConfig):
    """Learn the target of each source."""

    task: TaskName = "seq2seq"
    base: str = "google-t5/t5-small"
    out: Path = Path("runs/seq2seq")
    # A small base: quantized it would be slower, and hardly smaller.
    quant: Quant = "none"
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16, alpha=32))
    data: DataConfig = field(default_factory=lambda: DataConfig(eval="0.1", max_length=512, metrics=("chrf", "rouge")))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=8, epochs=3, lr=1e-3))


if __name__ == "__main__":
    sys.exit(run_recipe(Seq2SeqRecipe))

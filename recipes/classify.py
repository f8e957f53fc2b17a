"""Teach a model the classes of texts, or of pairs of texts.

    python recipes/classify.py --data.train train.jsonl --data.eval test.jsonl --out runs/classify

Rows are `{"text": ..., "label": ...}` lines, or a CSV file with these columns; with `text_pair` a row is two texts. A
label is a word, a list of words, or a number with a point: the rows decide which of the three is learned. Without a
file of its own, `--data.eval 0.1` holds out a tenth of each class. CLINC150, whose `data_full.json` has lists of pairs
under `train`, `val` and `test`, becomes such rows by:

    python -c "import json; d = json.load(open('data_full.json')); [open(f'{part}.jsonl', 'w').writelines(json.dumps(
    {'text': text, 'label': label}) + '\\n' for text, label in d[part]) for part in ('train', 'val', 'test')]"

With all of `train` and `--data.eval test.jsonl`, minilm gets 94.5% of the 4,500 sentences of 150 intents right (macro
F1 0.945) after 769 s, peak 1.21 GiB. Of the first 20 intents in sorted order (2,000 rows, 600 held out) `--base
smollm2-135m --quant nf4 --train.epochs 3` gets 96.7% right after 480 s, peak 3.05 GiB. Both on 2 cores of an Intel Xeon
with AMX, the second beside other work, 2026-11-27, commit dc25b62. `lora-ft train classify` takes the same options.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from lora_ft.cli import run_recipe
from lora_ft.config import DataConfig, LoraConfig, Quant, RunConfig, TaskName, TrainConfig


@dataclass(frozen=True, kw_only=True)
class ClassifyRecipe(RunConfig):
    """Learn classes."""

    task: TaskName = "classify"
    base: str = "minilm"
    out: Path = Path("runs/classify")
    # The base has 22 million weights: there is nothing to save.
    quant: Quant = "none"
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16, alpha=32))
    data: DataConfig = field(default_factory=lambda: DataConfig(eval="0.1", max_length=128))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=32, epochs=10, lr=1e-3))


if __name__ == "__main__":
    sys.exit(run_recipe(ClassifyRecipe))

"""Fine-tune a chat model on conversations or on prompts with answers.

    python recipes/chat.py --data.train your.jsonl --out runs/chat

Rows may be OpenAI chat JSONL, prompt/completion, question/answer, Alpaca or ShareGPT, with calls of tools or without;
the first row decides. `lora-ft train chat` takes the same options.

Of the 208 conversations in LLaMA-Factory's `glaive_toolcall_en_demo.json` that have fewer than 2,200 characters with
their tools, a fifth is held out (`--data.eval 0.2 --data.max-length 768 --train.steps 20`): 61,895 tokens bring the
held-out loss of smollm2-135m from 0.988 to 0.518 nats a token (95% interval of the change: -0.56 to -0.39) in 212 s of
one thread on an Intel Xeon with AMX that other work shared, peak 3.21 GiB, 2026-11-27, commit d609e9f.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from lora_ft.cli import run_recipe
from lora_ft.config import DataConfig, LoraConfig, RunConfig, TaskName, TrainConfig


@dataclass(frozen=True, kw_only=True)
class ChatRecipe(RunConfig):
    """Learn the assistant's turns."""

    task: TaskName = "chat"
    base: str = "smollm2-135m"
    out: Path = Path("runs/chat")
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16, alpha=32))
    data: DataConfig = field(default_factory=lambda: DataConfig(eval="0.1", max_length=512))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=2, accumulate=4, epochs=1, lr=5e-4))


if __name__ == "__main__":
    sys.exit(run_recipe(ChatRecipe))

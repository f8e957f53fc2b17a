"""lora_ft, PEFT with the stock Trainer, and TRL's SFTTrainer on the same rows: speed, memory, and what they learn.

    python benchmarks/bench_train.py --data rows.jsonl [--quant nf4 none] [--repeats 3]

Every system trains SmolLM2-135M on the same token ids and labels for one pass, with the same rank, learning rate and
rows a step, each in a process of its own and in turns. Prints a table and writes a CSV; TRL takes part where it is
installed (`pip install trl`). The held-out loss is measured by one and the same code on every adapter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).parents[1]
System = Literal["lora_ft", "lora_ft packed", "peft", "trl"]
RANK, ALPHA, LR, SEED = 16, 32, 5e-4, 42


@dataclass(frozen=True)
class Options:
    """Compare training loops."""

    data: Path
    """Rows in any format that the task chat takes."""
    base: str = "smollm2-135m"
    """The base model."""
    quant: tuple[Literal["nf4", "none"], ...] = ("nf4", "none")
    """How the base is stored; `none` is bfloat16 where the processor multiplies it."""
    systems: tuple[System, ...] = ("lora_ft", "lora_ft packed", "peft", "trl")
    """What to run."""
    rows: int = 160
    """Rows trained on, for one pass."""
    held_out: int = 64
    """Rows that the loss is measured on after it."""
    max_length: int = 512
    """Tokens that rows are cut at."""
    batch_size: int = 4
    """Rows a step; packed rows of `max_length` tokens count as the rows in them would have, on average."""
    repeats: int = 3
    """Runs of each; medians are shown."""
    out: Path = ROOT / "benchmarks" / "results" / "train.csv"
    """The CSV to write."""
    work: str | None = None
    """A job as JSON, for the processes that this script starts."""


def main() -> None:
    options = tyro.cli(Options)
    if options.work is not None:
        print(json.dumps(work(options, **json.loads(options.work))))
        return
    import torch
    from records import write

    systems = [s for s in options.systems if s != "trl" or importlib.util.find_spec("trl")]
    if len(systems) < len(options.systems):
        print("trl is not installed and left out")
    lines = []
    for quant in options.quant:
        found: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
        for _ in range(options.repeats):
            for system in systems:
                found[system].append(started(options, system, quant))
        medians = {s: {k: statistics.median(run[k] for run in runs) for k in runs[0]} for s, runs in found.items()}
        for system, median in medians.items():
            ratios = {
                f"speed / {rival}": round(median["tokens_per_s"] / other["tokens_per_s"], 2)
                for rival, other in medians.items()
                if rival in ("peft", "trl")
            } | {
                f"memory / {rival}": round(median["peak_bytes"] / other["peak_bytes"], 2)
                for rival, other in medians.items()
                if rival in ("peft", "trl")
            }
            line = {
                "system": system,
                "quant": quant,
                "tokens/s": round(median["tokens_per_s"], 1),
                "labelled tokens/s": round(median["labelled_per_s"], 1),
                "peak GiB": round(median["peak_bytes"] / 2**30, 2),
                "held-out loss": round(median["held_out_loss"], 4),
                "steps": int(median["steps"]),
            }
            lines.append(line | ratios)
            print(*[f"{key} {value}" for key, value in lines[-1].items()], sep="  ", flush=True)
        # Each takes long, and what is known is kept.
        write(options.out, lines, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def started(options: Options, system: System, quant: str) -> dict[str, Any]:
    """Returns what a run in a process of its own reports, with the held-out loss that another one measures."""
    with tempfile.TemporaryDirectory() as scratch:
        run = _process(options, system=system, quant=quant, out=scratch)
        return run | _process(options, system="held-out loss", quant=quant, out=scratch)


def _process(options: Options, **job: Any) -> dict[str, Any]:
    passed = ["--data", str(options.data), "--base", options.base, "--rows", str(options.rows)]
    passed += ["--held-out", str(options.held_out), "--max-length", str(options.max_length)]
    passed += ["--batch-size", str(options.batch_size), "--work", json.dumps(job)]
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, __file__, *passed], capture_output=True, text=True, env=os.environ | quiet, check=False
    )
    if done.returncode:
        sys.exit(f"{job}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def work(options: Options, system: str, quant: Any, out: str) -> dict[str, Any]:
    """Returns what one process found out."""
    import logging

    logging.disable(logging.INFO)
    from lora_ft import base as bases
    from lora_ft import tasks
    from lora_ft.data import formats

    task = tasks.get("chat")
    loaded = bases.load(options.base, quant=quant, model_class=task.model_class, seed=SEED)
    task.prepare(loaded.tokenizer, options.max_length)
    examples = formats.read(str(options.data))
    train = tasks.featurize(task, examples[: options.rows])
    if system == "held-out loss":
        return {"held_out_loss": _held_out_loss(options, task, loaded, examples, Path(out))}
    tokens = sum(len(row["input_ids"]) for row in train)
    labelled = sum(label != -100 for row in train for label in row["labels"][1:])
    run = _lora_ft if system.startswith("lora_ft") else _stock
    seconds, steps = run(options, task, loaded, train, Path(out), system)
    return {
        "tokens_per_s": tokens / seconds,
        "labelled_per_s": labelled / seconds,
        "steps": steps,
        "peak_bytes": _peak_bytes(loaded.device),
    }


def _peak_bytes(device: Any) -> int:
    from lora_ft.training.watch import peak_bytes

    return peak_bytes(device)


def _lora_ft(options: Options, task: Any, loaded: Any, rows: Any, out: Path, system: str) -> tuple[float, int]:
    from lora_ft import adapters, saved, train
    from lora_ft.config import DataConfig, LoraConfig, RunConfig, TrainConfig

    packed = system == "lora_ft packed"
    size = options.batch_size
    if packed:
        # As many tokens a step as the others have.
        mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
        size = max(1, round(size * mean / options.max_length))
    config = RunConfig(
        task="chat",
        base=options.base,
        out=out / "run",
        lora=LoraConfig(rank=RANK, alpha=ALPHA),
        data=DataConfig(max_length=options.max_length, packing=packed),
        train=TrainConfig(batch_size=size, epochs=1, lr=LR, seed=SEED),
    )
    model = adapters.attach(loaded, config.lora, peft_task=task.peft_task, seed=SEED)
    fit = train.fit(task, loaded, model, rows, [], config)
    saved.save(model, out / "adapter")
    return fit.seconds, fit.steps


def _stock(options: Options, task: Any, loaded: Any, rows: Any, out: Path, system: str) -> tuple[float, int]:
    """Trains with TRL, or with PEFT and the stock Trainer, in the settings that are best for them on a CPU.

    TRL pads there: the attention by which it packs without leakage, or goes without padding, runs on GPUs alone.
    """
    import datasets
    import peft
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    common: dict[str, Any] = {
        "output_dir": str(out / "run"),
        "per_device_train_batch_size": options.batch_size,
        "num_train_epochs": 1,
        "learning_rate": LR,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.03,
        "optim": "adamw_torch",
        "bf16": loaded.dtype == torch.bfloat16,
        "use_cpu": loaded.device.type == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": SEED,
        "gradient_checkpointing": False,
    }
    kept = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    data = datasets.Dataset.from_list(kept)
    set_seed(SEED)
    trainer: Any
    if system == "trl":
        import trl

        arguments = trl.SFTConfig(
            **common, max_length=options.max_length, dataset_kwargs={"skip_prepare_dataset": True}
        )
        trainer = trl.SFTTrainer(
            loaded.model, args=arguments, train_dataset=data, processing_class=loaded.tokenizer, peft_config=settings
        )
    else:
        model = peft.get_peft_model(loaded.model, settings)
        collate = DataCollatorForSeq2Seq(loaded.tokenizer, label_pad_token_id=-100)
        trainer = Trainer(model, TrainingArguments(**common), collate, train_dataset=data)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.model.save_pretrained(out / "adapter", save_embedding_layers=False)
    return seconds, trainer.state.global_step


def _held_out_loss(options: Options, task: Any, loaded: Any, examples: Any, out: Path) -> float:
    import peft

    from lora_ft import tasks
    from lora_ft.scoring import losses

    model = peft.PeftModel.from_pretrained(loaded.model, out / "adapter")
    rows = tasks.featurize(task, examples[-options.held_out :])
    return losses.of_rows(task, model, rows, 16).mean


if __name__ == "__main__":
    main()

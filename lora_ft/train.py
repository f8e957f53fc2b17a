"""Train the adapter: `transformers.Trainer` with our loss, optimizer and proofs as mixins."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import peft
import psutil
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lora_ft import adapters, losses
from lora_ft import base as bases
from lora_ft.base import Base
from lora_ft.config import RunConfig, TrainConfig
from lora_ft.errors import AdapterError, ConfigError, ProofError
from lora_ft.tasks import Features, Task

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
CLOCK = "clock.json"
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Fit:
    """What training did."""

    steps: int
    tokens: int
    """Tokens read, padding not counted."""
    seconds: float
    peak_bytes: int
    """Largest memory: of the process on a CPU, of the allocator on a GPU."""
    interrupted: bool

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class TaskLoss:
    """Mixin for a Trainer: the loss is the task's, per scored token of the whole global batch.

    Accumulating over small batches so gives the gradient of the big one (transformers#34191).
    """

    task: Task
    eval_rows: Sequence[Features]
    tokens_seen: int = 0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer: Any = self
        self.tokens_seen += int(inputs["attention_mask"].sum())
        nll_B, count_B, _ = losses.row_losses(self.task, model, inputs)
        if num_items_in_batch is None:
            loss = nll_B.sum() / count_B.sum()
        else:
            # The count is that of all processes, and their gradients are averaged.
            loss = nll_B.sum() / num_items_in_batch * trainer.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        trainer: Any = self
        rows = self.eval_rows if eval_dataset is None else eval_dataset
        found = losses.of_rows(self.task, trainer.model, rows, trainer.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_loss": found.mean}
        trainer.log(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics


class LoraPlus:
    """Mixin for a Trainer: B learns `plus_ratio` times as fast as A where the ratio is set."""

    plus_ratio: float | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        trainer: Any = self
        if self.plus_ratio is None or trainer.optimizer is not None:
            return super().create_optimizer()  # type: ignore[misc]
        trainer.optimizer = create_loraplus_optimizer(
            trainer.model,
            torch.optim.AdamW,
            lr=trainer.args.learning_rate,
            loraplus_lr_ratio=self.plus_ratio,
            weight_decay=trainer.args.weight_decay,
            loraplus_weight_decay=trainer.args.weight_decay,
        )
        return trainer.optimizer


class AdapterTrainer(TaskLoss, LoraPlus, Trainer):
    """The Trainer that `fit` runs."""

    def __init__(self, task: Task, eval_rows: Sequence[Features], plus_ratio: float | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task, self.eval_rows, self.plus_ratio = task, eval_rows, plus_ratio
        # Our loss divides by the global count itself; the Trainer must not divide by the accumulation again.
        self.model_accepts_loss_kwargs = True

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The adapter alone: PEFT would ask the hub about the vocabulary, the Trainer pickle its arguments.
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)


class GradientProof(TrainerCallback):
    """Before the first step, a resumed run's too, every trained tensor has a gradient, and some a non-zero one.

    Gradient checkpointing in particular can cut the adapters off without a word (peft#1142).
    """

    done = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.done:
            return
        self.done = True
        learned = adapters.trained(kwargs["model"])
        without = [name for name, p in learned.items() if p.grad is None]
        if without:
            raise ProofError(f"No gradient reaches {without[0]} and {len(without) - 1} more trained tensors.")
        if not any(bool(p.grad.any()) for p in learned.values() if p.grad is not None):
            raise ProofError("The gradient of every trained tensor is zero: nothing can be learned from these rows.")


class Interrupt(TrainerCallback):
    """On SIGINT or SIGTERM, finish the step, save a checkpoint and stop; a second signal stops at once."""

    def __init__(self) -> None:
        self.asked = self.stopped = False
        self.previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._ask)
            except ValueError:  # only the main thread may; elsewhere its owner decides
                return

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # After the last step the training is done, and is not thrown away.
        if self.asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Gives the signals back to whom they belonged."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class MetricsFile(TrainerCallback):
    """Writes each logged line to `metrics.jsonl`, with tokens per second and peak memory in bytes."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path, self.clock = path, clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run goes on after the step it resumes from; a new one starts the file anew.
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        kept = [line for line in map(_parsed, lines) if line is not None and line["step"] <= state.global_step]
        kept = kept if state.global_step else []
        self.path.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "train_runtime" in logs:
            return
        logs.update(self.clock.read())  # for the callbacks after this one too
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class Clock(TrainerCallback):
    """Tokens and seconds since training began, kept in its checkpoints, and the peak memory so far."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.trainer: Any = None
        self.began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            counted = json.loads(self._file(args, state).read_text(encoding="utf-8"))
            self.trainer.tokens_seen += counted["tokens"]
            self.began -= counted["seconds"]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The last file of a checkpoint to be written: where it is, the others are whole.
        self._file(args, state).write_text(json.dumps(self.read()) + "\n", encoding="utf-8")

    def seconds(self) -> float:
        """Returns the seconds of training so far, those before an interrupt included."""
        return time.perf_counter() - self.began

    def read(self) -> dict[str, float]:
        """Returns `tokens`, `seconds`, `tokens_per_s` and `peak_bytes`."""
        tokens, seconds = self.trainer.tokens_seen, self.seconds()
        return {
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(tokens / seconds, 1),
            "peak_bytes": peak_bytes(self.device),
        }

    @staticmethod
    def _file(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / CLOCK


class Rows(Dataset):
    """Rendered rows in memory."""

    def __init__(self, rows: Sequence[Features]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Features:
        return self.rows[index]


class Streamed(IterableDataset):
    """Rows rendered as they are read; `make` opens the source anew for each pass."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __iter__(self) -> Any:
        yield from self.make()


def fit(
    task: Task,
    base: Base,
    model: peft.PeftModel,
    rows: Sequence[Features] | Streamed,
    eval_rows: Sequence[Features],
    config: RunConfig,
    callbacks: Iterable[TrainerCallback] = (),
) -> Fit:
    """Returns what training the adapter did; `model` holds the result, the best one where it was evaluated.

    Raises:
        ProofError: no gradient reached the adapter, or a frozen weight changed.
        AdapterError: there is no checkpoint to resume from.
    """
    out, train = config.out, config.train
    out.mkdir(parents=True, exist_ok=True)
    interrupt, clock = Interrupt(), Clock(base.device)
    chosen = [GradientProof(), interrupt, clock, MetricsFile(out / METRICS, clock), *callbacks]
    if train.patience is not None:
        chosen.append(EarlyStoppingCallback(train.patience))
    trainer = AdapterTrainer(
        task,
        eval_rows,
        config.lora.plus_ratio,
        model=model,
        args=arguments(train, out, base, evaluated=bool(eval_rows)),
        train_dataset=rows if isinstance(rows, Streamed) else Rows(rows),
        eval_dataset=Rows(eval_rows) if eval_rows else None,
        data_collator=task.collate,
        callbacks=chosen,
    )
    trainer.remove_callback(PrinterCallback)
    clock.trainer = trainer
    frozen = adapters.frozen_digest(model)
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    resumed = newest_checkpoint(out) if config.resume else None
    clock.began = time.perf_counter()
    try:
        with bases.dequantized(model):
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    finally:
        interrupt.restore()
    seconds = clock.seconds()
    if adapters.frozen_digest(model) != frozen:
        raise ProofError("A frozen weight of the base changed during training; the adapter is not one of this base.")
    return Fit(trainer.state.global_step, trainer.tokens_seen, seconds, peak_bytes(base.device), interrupt.stopped)


def arguments(train: TrainConfig, out: Path, base: Base, *, evaluated: bool) -> TrainingArguments:
    """Returns the Trainer's arguments for ours; nothing is reported anywhere unless it was named."""
    evaluates = evaluated and train.eval_steps is not None
    save_steps = train.save_steps or (train.eval_steps if evaluates else None)
    if base.dtype == torch.float16 and base.device.type == "cpu":
        raise ConfigError("train.dtype float16 trains on a GPU only; on a processor use bfloat16 or float32.")
    missing = [name for name in train.report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"train.report-to {missing[0]}: the package is not installed; `pip install {missing[0]}`.")
    # Beside the checkpoints, which are deleted when the run is done.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(out / "tensorboard"))
    made = TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulate,
        num_train_epochs=train.epochs,
        max_steps=train.steps or -1,
        learning_rate=train.lr,
        lr_scheduler_type=SCHEDULES[train.schedule],
        warmup_steps=train.warmup,
        weight_decay=train.weight_decay,
        max_grad_norm=train.clip,
        optim="adamw_torch",
        seed=train.seed,
        data_seed=train.seed,
        bf16=base.dtype == torch.bfloat16,
        fp16=base.dtype == torch.float16,
        use_cpu=base.device.type == "cpu",
        dataloader_pin_memory=base.device.type == "cuda",
        gradient_checkpointing=train.checkpoint_activations,
        gradient_checkpointing_kwargs={"use_reentrant": False} if train.checkpoint_activations else None,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=train.eval_steps if evaluates else None,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        save_total_limit=3,
        load_best_model_at_end=evaluates,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        logging_steps=train.log_steps,
        # The default writes the running mean over a loss that is not a number.
        logging_nan_inf_filter=False,
        report_to=list(train.report_to) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
    )
    # One device a process: the Trainer would copy a quantized model to every GPU it sees.
    made._n_gpu = min(made.n_gpu, 1)
    return made


def _parsed(line: str) -> dict[str, Any] | None:
    """Returns a line of `metrics.jsonl`, or None for one cut short by a crash."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def newest_checkpoint(out: Path) -> Path:
    """Returns the newest complete checkpoint of a run. Raises AdapterError where there is none."""
    found = checkpoints(out)
    if not found:
        raise AdapterError(f"{out}: there is no checkpoint to resume from; run without --resume.")
    return found[-1]


def checkpoints(out: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    found = [p for p in (out / CHECKPOINTS).glob("checkpoint-*") if (p / CLOCK).is_file()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def peak_bytes(device: torch.device) -> int:
    """Returns the largest memory so far: of this process on a CPU, of the allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

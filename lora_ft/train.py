"""Train the adapter: the rows, the Trainer that the task names, and the proofs around it."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from lora_ft.base import Base
from lora_ft.config import BaseCache, RunConfig, TrainConfig
from lora_ft.data import pack
from lora_ft.errors import ConfigError, DataError, DivergedError, OutOfMemoryError, UnsupportedModelError
from lora_ft.model import activations, attention, four_bits, sharding
from lora_ft.model.activations import Checkpointing
from lora_ft.system import heap, processes
from lora_ft.tasks import Batch, Features, Task
from lora_ft.training import logged, optimizer, trainers
from lora_ft.training.frozen import Frozen
from lora_ft.training.halving import Halving
from lora_ft.training.replicas import Replicas
from lora_ft.training.trainers import Proven
from lora_ft.training.watch import Clock, GradientProof, Interrupt, MetricsFile, peak_bytes

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
UNCOMPILED = (
    "compiling takes half a minute, and the code goes by the lengths that are met first, so that a resumed run "
    "need not be the same to the bit (benchmarks/bench_compile.py has what it saves)"
)
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


@dataclass(frozen=True)
class Passes:
    """How the forward and backward passes of a batch are made; what is learned is the same."""

    parts: int
    """Passes that the rows of a batch are dealt to, to begin with."""
    checkpointing: Checkpointing
    cache: BaseCache


class Rows(Dataset):
    """Rendered rows in memory."""

    def __init__(self, rows: Sequence[Features]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    def longest(self, task: Task, count: int) -> list[Any]:
        """Returns the items of the most tokens."""
        tokens = [self._tokens(task, index) for index in range(len(self))]
        return [self[index] for index in sorted(range(len(self)), key=lambda index: -tokens[index])[:count]]

    def _tokens(self, task: Task, index: int) -> int:
        return sum(task.lengths(self.rows[index]))


class Packs(Rows):
    """Rows in memory, several to an item: those that fill `budget` tokens together."""

    def __init__(self, rows: Sequence[Features], budget: int) -> None:
        super().__init__(rows)
        self.members = pack.fill([len(row["input_ids"]) for row in rows], budget)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Any:
        return [self.rows[i] for i in self.members[index]]

    def _tokens(self, task: Task, index: int) -> int:
        return sum(super(Packs, self)._tokens(task, i) for i in self.members[index])

    def names(self, row_names: Sequence[str]) -> list[str]:
        """Returns what each item is called, of what its rows are."""
        return [", ".join(row_names[i] for i in members) for members in self.members] if row_names else []


class Streamed(IterableDataset):
    """Rows rendered as they are read, over and over; `make` opens the source anew for each pass.

    The passes follow each other without an end, so that a run resumes at any place, in a later pass too.
    """

    def __init__(self, make: Any) -> None:
        self.make = make

    def __iter__(self) -> Any:
        while True:
            empty = True
            for row in self.make():
                empty = False
                yield row
            if empty:
                raise DataError(["data.train: the stream holds no rows."])


def fit(
    task: Task,
    base: Base,
    model: peft.PeftModel,
    rows: Sequence[Features] | Streamed,
    eval_rows: Sequence[Features],
    config: RunConfig,
    callbacks: Iterable[TrainerCallback] = (),
    row_names: Sequence[str] = (),
    passes: Passes | None = None,
) -> Fit:
    """Returns what training the adapter did; `model` holds the result, the best one where it was evaluated.

    Args:
        row_names: where each of `rows` came from, to name those of a step that could not be made.
        passes: how each batch is computed; unset, as `config` says.

    Raises:
        ProofError: no gradient reached the adapter, or a frozen weight changed.
        AdapterError: there is no whole checkpoint to resume from.
        DivergedError: loss or gradient were not finite in step after step; `model` is that of the last checkpoint.
        DataError: a row that was streamed is a bad one; the steps before it are saved, but where there are several
            processes.
        StorageError: the folder cannot be written to, or the best checkpoint is damaged.
    """
    out, train = config.out, config.train
    log.info("torch.compile is off: %s", UNCOMPILED)
    passes = passes or Passes(1, "on" if train.checkpoint_activations else "off", train.base_cache)
    data, collate, shared = _batches(task, model, rows, config)
    if isinstance(data, Packs):
        row_names = data.names(row_names)
    interrupt, clock, proof = Interrupt(), Clock(base.device), GradientProof()
    chosen = [proof, interrupt, clock, MetricsFile(out / logged.FILE, clock), *callbacks]
    if "tensorboard" in train.report_to:
        chosen.append(_tensorboard(out))
    if train.patience is not None:
        chosen.append(EarlyStoppingCallback(train.patience))
    for reason in optimizer.choose(train.optimizer, base.device.type)[1]:
        log.warning(reason)
    kind = trainers.of(task)
    trainer: Any = kind(
        task,
        eval_rows,
        config.lora.plus_ratio,
        interrupt,
        model=model,
        args=arguments(config, base, evaluated=bool(eval_rows), kind=kind),
        train_dataset=data,
        eval_dataset=Rows(eval_rows) if eval_rows else None,
        data_collator=collate,
        callbacks=chosen,
        optimizer_cls_and_kwargs=optimizer.made_of(train, base.device.type),
    )
    trainer.remove_callback(PrinterCallback)
    clock.trainer = proof.trainer = trainer
    trainer.clock = clock
    trainer.row_names = row_names
    trainer.sharded = train.shard_base and processes.count() > 1
    if issubclass(kind, Halving):
        trainer.parts = passes.parts
    if isinstance(data, Rows) and issubclass(kind, Halving):
        trainer.longest = collate(data.longest(task, train.batch_size))
    trainer.frozen = Frozen(model, base, changes_allowed=bool(config.allow_changed))
    trainer.began_on = trainer.frozen.told
    four_bits.choose_cache(model, passes.cache)
    if issubclass(kind, Replicas):
        trainer.begin_alike(trainer.frozen.told["sha256"])
    elif processes.count() > 1:
        raise ConfigError(f"the task {task.name} trains in one process: start it without torchrun.")
    if trainer.sharded:
        sharding.shard(model)
        trainer.frozen.look()
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock.began = time.perf_counter()
    try:
        with (
            activations.kept(model, passes.checkpointing),
            four_bits.dequantized(model),
            attention.packed(model) if shared else nullcontext(),
            heap.free_memory_kept(),
        ):
            trainer.train(resume_from_checkpoint=config.resume)
    except DivergedError as diverged:
        if not processes.is_first():
            raise
        step = trainer.back_to_last_good()
        raise DivergedError(f"{diverged} {_way_back(step)}") from None
    except (DataError, OutOfMemoryError):
        # Rows that are streamed are found out when their turn comes, before the step that they are for.
        # Of several processes the others may not be there to save it with.
        if trainer.state.global_step and processes.count() == 1:
            trainer._save_checkpoint(trainer.model)
        raise
    finally:
        interrupt.restore()
    seconds = clock.seconds()
    heap.give_back()
    trainer.frozen.require(digest=not (interrupt.stopped or trainer.sharded))
    return Fit(trainer.state.global_step, trainer.tokens_seen, seconds, peak_bytes(base.device), interrupt.stopped)


def _batches(
    task: Task, model: peft.PeftModel, rows: Sequence[Features] | Streamed, config: RunConfig
) -> tuple[Dataset, Callable[[Sequence[Any]], Batch], bool]:
    """Returns the items to draw batches of, what makes a batch of them, and whether rows lie end to end in it.

    They do wherever the task and the model allow it: padding is then neither read nor computed, and the gradient is the
    same. `data.packing` decides only how many of them make an item.

    Raises:
        UnsupportedModelError: data.packing is asked for, and rows cannot share one.
    """
    packing = config.data.packing
    against = attention.refusal(model) if task.shares_rows else f"rows of the task {task.name} cannot"
    if packing and against is not None:
        raise UnsupportedModelError(f"data.packing: several rows cannot share one here: {against}; leave it out.")
    if isinstance(rows, Streamed):
        items: Dataset = rows
    else:
        items = Packs(rows, config.data.max_length) if packing else Rows(rows)
    if against is not None:
        log.info("rows are padded to the longest of a batch: %s", against)
        return items, task.collate, False
    return items, _end_to_end_of_packs(task) if packing else task.end_to_end, True


def _end_to_end_of_packs(task: Task) -> Callable[[Sequence[Any]], Batch]:
    return lambda packs: task.end_to_end([row for members in packs for row in members])


def _way_back(step: int | None) -> str:
    if step is None:
        return "No checkpoint had been saved: start anew."
    return (
        f"The adapter is that of step {step} again: go on from it with --resume --allow-changed, naming what changes."
    )


def require_trackers(train: TrainConfig) -> None:
    """Raises ConfigError where a package that `train.report-to` names is not installed."""
    missing = [name for name in train.report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"train.report-to {missing[0]}: the package is not installed; `pip install {missing[0]}`.")


def _tensorboard(out: Path) -> TrainerCallback:
    """Returns what writes events for TensorBoard, beside the folder of the run: they hold the name of the machine."""
    callback = TensorBoardCallback()
    if callback.logging_dir is None:
        out = out.resolve()
        callback.logging_dir = str(out.with_name(f"{out.name}-tensorboard"))
    log.info("events for TensorBoard are written to %s", callback.logging_dir)
    return callback


def arguments(config: RunConfig, base: Base, *, evaluated: bool, kind: type[Proven]) -> TrainingArguments:
    """Returns the arguments of a kind of Trainer for ours; nothing is reported anywhere unless it was named."""
    train = config.train
    evaluates = evaluated and train.eval_steps is not None
    save_steps = train.save_steps or (train.eval_steps if evaluates else None)
    if base.dtype == torch.float16 and base.device.type == "cpu":
        raise ConfigError("train.dtype float16 trains on a GPU only; on a processor use bfloat16 or float32.")
    settings: dict[str, Any] = {
        "output_dir": str(config.out / CHECKPOINTS),
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.accumulate,
        "num_train_epochs": train.epochs,
        "max_steps": train.steps or -1,
        "learning_rate": train.lr,
        "lr_scheduler_type": SCHEDULES[train.schedule],
        "warmup_steps": train.warmup,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.clip,
        "seed": train.seed,
        "data_seed": train.seed,
        "bf16": base.dtype == torch.bfloat16,
        "fp16": base.dtype == torch.float16,
        "use_cpu": base.device.type == "cpu",
        "dataloader_pin_memory": base.device.type == "cuda",
        # That is `activations`; the arguments of TRL would turn it on.
        "gradient_checkpointing": False,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": train.eval_steps if evaluates else None,
        "save_strategy": "steps" if save_steps else "no",
        "save_steps": save_steps or 500,
        "save_total_limit": 3,
        "load_best_model_at_end": evaluates,
        "metric_for_best_model": "eval_loss" if evaluates else None,
        "greater_is_better": False if evaluates else None,
        "logging_steps": train.log_steps,
        # The default writes the running mean over a loss that is not a number.
        "logging_nan_inf_filter": False,
        # The callback for TensorBoard is ours: the Trainer's takes its folder from the environment.
        "report_to": [name for name in train.report_to if name != "tensorboard"] or "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "log_level": "error",
    }
    made = kind.arguments_class(**settings | kind.own_arguments(config))
    # One device a process: the Trainer would copy a quantized model to every GPU it sees.
    made._n_gpu = min(made.n_gpu, 1)
    return made

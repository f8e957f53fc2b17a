"""The Trainer that a task is trained by: one of transformers or TRL, with our loss, optimizer and proofs as mixins."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from lora_ft.checkpoints import Checkpoints
from lora_ft.config import RunConfig
from lora_ft.data.mask import IGNORE
from lora_ft.model import attention
from lora_ft.model.modes import mixed_precision
from lora_ft.scoring import losses
from lora_ft.system import processes
from lora_ft.tasks import Batch, Features, Task, tokens
from lora_ft.training.frozen import Frozen
from lora_ft.training.gradcache import GradientCache
from lora_ft.training.guard import UNTAUGHT, GuardedSteps
from lora_ft.training.halving import Halving
from lora_ft.training.optimizer import ChosenOptimizer
from lora_ft.training.replicas import Replicas
from lora_ft.training.watch import Clock, EvaluationStopped, Interrupt


def of(task: Task) -> type[Proven]:
    """Returns the class of the Trainer that trains a task."""
    module, _, name = task.trainer.partition(".")
    return getattr(importlib.import_module(f"lora_ft.training.{module}"), name)


class Proven(ChosenOptimizer, Checkpoints, GuardedSteps):
    """Mixin before any Trainer, of transformers or TRL, that `train.fit` runs: all that does not depend on the loss.

    That is the optimizer asked for, checkpoints and exact steps, steps that are guarded, an evaluation that a signal
    ends, and what the proofs and the clock read. What a Trainer of TRL counts itself has to come to be `tokens_seen`.
    """

    arguments_class: type[TrainingArguments] = TrainingArguments
    kept: tuple[str, ...] = ("evaluation_due", "began_on", "tokens_seen")
    frozen: Frozen
    began_on: dict[str, str]
    """What the run was started on, as `Frozen` tells it."""
    clock: Clock
    tokens_seen: int = 0
    """Tokens read in training, padding not counted."""
    longest: Batch | None = None
    """The batch that takes the most memory, to be tried before the first step by a Trainer that halves batches."""
    evaluation_due: bool = False
    """Whether a signal stopped the evaluation of the step last made, which a resumed run makes first."""

    def __init__(
        self, task: Task, eval_rows: Sequence[Features], plus_ratio: float | None, interrupt: Interrupt, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.task, self.eval_rows, self.plus_ratio, self.interrupt = task, eval_rows, plus_ratio, interrupt

    @classmethod
    def own_arguments(cls, config: RunConfig) -> dict[str, Any]:
        """Returns the fields of `arguments_class` beside those that every training has, which they replace."""
        return {}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Returns 0: the Trainer's estimate looks at each parameter in every step, and nothing here reads it."""
        return 0

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationStopped:
            self.evaluation_due = True
            trainer.control.should_evaluate = trainer.control.should_save = False
            self._stop()
            self._save_checkpoint(trainer.model)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        self.began_on = self.frozen.compared(self.began_on)
        if self.longest is not None:
            began = time.perf_counter()
            trainer.try_longest(self.longest)
            self.longest = None
            self.clock.began += time.perf_counter() - began
        if self.evaluation_due:
            try:
                metrics = trainer._evaluate(None, None)
            except EvaluationStopped:
                return self._stop()
            self.evaluation_due = False
            trainer._determine_best_metric(metrics=metrics, trial=None)
            self._save_checkpoint(trainer.model)
        return super()._run_epoch(*args, **kwargs)

    def _stop(self) -> None:
        trainer: Any = self
        self.interrupt.stopped = trainer.control.should_training_stop = True


class TaskLoss:
    """Mixin for a Trainer: the loss is the task's, per scored token of the whole global batch.

    Accumulating over small batches so gives the gradient of the big one (transformers#34191).
    """

    task: Task
    eval_rows: Sequence[Features]
    interrupt: Interrupt
    sharded: bool = False
    """Whether the base is spread over several processes."""
    tokens_seen: int
    said: dict[str, list[float]]
    """Of each of the task's statistics, summed over the rows since the last line of metrics, and those rows."""
    kept: tuple[str, ...] = ("said",)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.said = {name: [0.0, 0] for name in self.task.statistics}
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def try_longest(self, inputs: Batch) -> None:
        before = {name: list(sums) for name, sums in self.said.items()}
        super().try_longest(inputs)  # type: ignore[misc]
        self.said = before

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer: Any = self
        filler = trainer.fills_in()
        if filler:
            # It has no labels, by which the batch is counted; a loss that is multiplied by nothing may have any.
            inputs = {**inputs, "labels": torch.zeros_like(inputs["labels"])}
        else:
            self.tokens_seen += tokens(inputs)
        # Of the Trainer's own only the outermost forward is under autocast, and a task may call what lies inside.
        with mixed_precision(model):
            nll = self.task.loss(trainer.model, inputs)
        if filler:
            nll = nll * 0
        else:
            for name, numbers in self.task.numbers.items():
                self.said[name] = [sum(pair) for pair in zip(self.said[name], numbers, strict=True)]
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"] != IGNORE).sum()
        # The count is that of all processes, and their gradients are averaged. Where it is zero, so is the sum.
        count = torch.as_tensor(num_items_in_batch, device=nll.device).clamp(min=1)
        loss = nll / count * trainer.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.said:
            of_each = processes.gathered([number for sums in self.said.values() for number in sums])
            totals = [sum(numbers) for numbers in zip(*of_each, strict=True)]
            found = zip(self.said, totals[::2], totals[1::2], strict=True)
            logs |= {name: total / rows for name, total, rows in found if rows}
            self.said = {name: [0.0, 0] for name in self.said}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        trainer: Any = self
        rows = self.eval_rows if eval_dataset is None else eval_dataset
        with self.interrupt.evaluation(), attention.unpacked(trainer.model):
            # Of a base that is spread over processes, all have to make the same passes; a row that is contrasted with
            # the others needs them all.
            alike = self.sharded or processes.count() == 1 or self.task.contrasts
            share = rows if alike else rows[processes.rank() :: processes.count()]
            size = trainer.args.per_device_eval_batch_size
            found = losses.of_rows(self.task, trainer.model, share, size, halves=not self.sharded)
        if alike:
            mean = processes.told(found.mean)
        else:
            of_each = processes.gathered([found.nll.sum(), found.count.sum()])
            nll, count = (sum(numbers) for numbers in zip(*of_each, strict=True))
            mean = nll / count
        metrics = {f"{metric_key_prefix}_loss": mean}
        trainer.log(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics


class AdapterTrainer(TaskLoss, Replicas, Proven, GradientCache, Halving, Trainer):
    """The Trainer of every task that names no other."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Our loss divides by the global count itself; the Trainer must not divide by the accumulation again.
        self.model_accepts_loss_kwargs = True

    def _reason(self, norm: Any) -> str | None:
        """Returns why the step must not be made: besides those of all tasks, that no text is told from another."""
        return super()._reason(norm) or (None if self.taught else UNTAUGHT)

    def drawn_by(self, sampler: Any) -> Callable[[torch.Generator], Iterable[int]] | None:
        trainer: Any = self
        # Rows that are streamed have no order but their own.
        return self.task.order(getattr(trainer.train_dataset, "rows", ())) or super().drawn_by(sampler)

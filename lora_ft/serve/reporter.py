"""The callback that tells a job's clients of its training: numbers of each step, and checkpoints that can be used."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lora_ft import adapters, saved
from lora_ft.base import Base
from lora_ft.config import RunConfig
from lora_ft.model import attention
from lora_ft.proof import environment
from lora_ft.runs import Rows
from lora_ft.scoring import losses
from lora_ft.serve import events, ids
from lora_ft.serve.leftovers import CHECKPOINTS
from lora_ft.serve.models import checkpoint_name, register
from lora_ft.serve.states import RUNNING
from lora_ft.serve.store import dumps, now
from lora_ft.serve.trial import steps_per_epoch
from lora_ft.settings import to_yaml
from lora_ft.system import atomicio
from lora_ft.tasks import Task
from lora_ft.training.exact import EpochOrder

if TYPE_CHECKING:
    from lora_ft.serve.worker import Worker

# Jobs of this many steps and more tell of every tenth, as the hosted service does.
MANY_STEPS, EVERY = 100, 10
# Rows of a step whose accuracy is measured: what this costs is a forward pass of so many rows.
MEASURED = 4
# What the loss of replies that are compared says of a step, and what clients read it as.
COMPARED = {"rewards/accuracies": "train_reward_accuracy", "rewards/margins": "train_reward_margin"}


class Reporter(TrainerCallback):
    """Writes what happens into the database, before the Trainer saves: what a checkpoint knows has been told."""

    def __init__(
        self, worker: Worker, config: RunConfig, parent: Path | None, task: Task, base: Base, model: Any, rows: Rows
    ) -> None:
        self.worker, self.config, self.task, self.base, self.rows = worker, config, task, base, rows
        self.features: Any = rows.train_features
        lengths = [len(row["input_ids"]) for row in self.features]
        train = {"batch_size": config.train.batch_size, "accumulate": config.train.accumulate}
        self.packs = config.data.packing
        self.per_epoch = steps_per_epoch(lengths, train, config.data.max_length if self.packs else None)
        self.began, self.first = 0.0, 0
        if parent is not None:
            # A run that goes on from a checkpoint fills the adapter again, from there.
            saved.fill(model, parent)
            adapters.keep_as_reference(model, task)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        step, total = state.global_step, state.max_steps
        if logs.get("event") == "step skipped":
            with self.worker.change(RUNNING) as connection:
                told = f"Step {step}/{total} was skipped: {logs['reason']}"
                events.add(connection, self.worker.job_id, told, level="warn", mark=f"skipped-{step}")
        if "loss" not in logs:
            return
        ends_epoch = step % self.per_epoch == 0 or step == total
        told = total < MANY_STEPS or step % EVERY == 1 or ends_epoch
        numbers: dict[str, Any] = {"step": step, "total_steps": total, "train_loss": logs["loss"]}
        if told:
            numbers |= self._measured(model, step, ends_epoch)
        numbers |= {ours: logs[name] for name, ours in COMPARED.items() if name in logs}
        more = {"learning_rate": logs.get("learning_rate"), "grad_norm": logs.get("grad_norm")}
        more |= {"tokens": int(logs["tokens"]), "seconds": logs["seconds"]}
        finite = {key: value for key, value in numbers.items() if _is_finite(value)}
        kept = finite | {key: value for key, value in more.items() if value is not None and _is_finite(value)}
        with self.worker.change(RUNNING) as connection:
            connection.execute("INSERT OR REPLACE INTO steps VALUES (?, ?, ?)", (self.worker.job_id, step, dumps(kept)))
            connection.execute(
                "UPDATE jobs SET step = ?, estimated_finish = ? WHERE id = ?",
                (step, now() + self._left_s(step, total), self.worker.job_id),
            )
            if told and "train_loss" in finite:
                line = events.step_line(finite)
                events.add(connection, self.worker.job_id, line, data=finite, metrics=True, mark=f"step-{step}")
        # Of a job that stops with its server nothing is listed: it goes on as if it had not.
        if ends_epoch or (control.should_training_stop and self.worker.row["wanted"] == "pause"):
            self._publish(model, step, finite)

    def _measured(self, model: Any, step: int, ends_epoch: bool) -> dict[str, float]:
        """Returns accuracy on some rows of the step, and the loss on some held-out rows; on all at an epoch's end."""
        numbers = {}
        size = self.config.train.batch_size * self.config.train.accumulate
        with attention.unpacked(model):
            if not self.packs and not self.task.statistics:
                epoch, place = divmod(step - 1, self.per_epoch)
                order = EpochOrder(len(self.features), self.config.train.seed, lambda: 0).of(epoch)
                chosen = [self.features[i] for i in order[place * size : (place + 1) * size][:MEASURED]]
                numbers["train_mean_token_accuracy"] = self._losses(model, chosen).accuracy
            held_out = self.rows.held_out_features
            if held_out:
                start = (step - 1) * size
                chosen = [held_out[(start + i) % len(held_out)] for i in range(min(size, len(held_out)))]
                found = self._losses(model, chosen)
                numbers |= self._told("valid", found)
            if held_out and ends_epoch:
                found = self._losses(model, held_out)
                numbers |= self._told("full_valid", found)
        return numbers

    def _told(self, part: str, found: losses.Losses) -> dict[str, float]:
        """Returns loss and accuracy of some rows, and further metrics, under the names that clients read."""
        accuracy = self.task.accuracy_name if self.task.statistics else "mean_token_accuracy"
        more = {f"{part}_{name}": float(values.mean()) for name, values in found.more.items()}
        return {f"{part}_loss": found.mean, f"{part}_{accuracy}": found.accuracy, **more}

    def _losses(self, model: Any, rows: Any) -> losses.Losses:
        return losses.of_rows(self.task, model, rows, MEASURED)

    def _left_s(self, step: int, total: int) -> int:
        made = max(1, step - self.first)
        return math.ceil((time.monotonic() - self.began) / made * (total - step))

    def _publish(self, model: Any, step: int, numbers: dict[str, Any]) -> None:
        """Makes the adapter of this step a model that can be asked, once."""
        worker = self.worker
        place = Path(CHECKPOINTS) / worker.job_id / f"step-{step}"
        if not place.is_dir():
            with atomicio.folder(place) as draft:
                saved.write(model, draft)
                draft.library(self.task.tokenizer.save_pretrained)
                draft.write("config.yaml", to_yaml(self.config))
                draft.write_json(environment.FILE, environment.describe(self.base, task=self.task.facts()))
        name = checkpoint_name(worker.name, step)
        metrics = {key: value for key, value in numbers.items() if key != "total_steps"}
        with worker.change(RUNNING) as connection:
            known = connection.execute(
                "SELECT 1 FROM checkpoints WHERE job_id = ? AND step = ?", (worker.job_id, step)
            ).fetchone()
            if known:
                return
            made = now()
            connection.execute(
                "INSERT INTO checkpoints(id, job_id, created_at, step, model, metrics) VALUES (?, ?, ?, ?, ?, ?)",
                (ids.new("ftckpt_"), worker.job_id, made, step, name, json.dumps(metrics)),
            )
            register(connection, name, worker.row["model"], place, Path(), worker.job_id, made)
            events.add(connection, worker.job_id, f"Checkpoint created at step {step}", mark=f"checkpoint-{step}")


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)

"""Checkpoints that are whole or not there, are compared with their digests before they are used, and hold no pickle.

A checkpoint is a folder `checkpoint-STEP`, written by `atomicio` with a manifest:

- `adapter.safetensors`: every trained tensor, by the name of its parameter;
- `optimizer.safetensors`, `optimizer.json`: state by the name of the parameter, and the groups;
- `rng.safetensors`, `progress.json`: generators, schedule, scaler of float16, place in the rows, running sums, and what
  the other mixins of the Trainer name in `kept`;
- `trainer_state.json`: the Trainer's own, with the state of its callbacks, such as the counter of early stopping.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerControl

from lora_ft import adapters
from lora_ft.errors import AdapterError, ConfigError, DivergedError, StorageError
from lora_ft.system import atomicio, manifest, processes
from lora_ft.training import optimizer
from lora_ft.training.exact import require

log = logging.getLogger(__name__)

ADAPTER, RNG = "adapter.safetensors", "rng.safetensors"
PROGRESS, STATE = "progress.json", "trainer_state.json"
# What this module puts itself in the place of: a transformers without them would save its own way, or resume wrongly.
HOOKS = (
    "_save_checkpoint", "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state",
    "_load_best_model", "_run_epoch",
)  # fmt: skip
# What is written, by these names, beside the checkpoints.
NAMES = r"checkpoint-\d+|staged-model"
# Free bytes for each byte of a checkpoint: the adapter folder must still fit after it.
ROOM = 2.0


def found(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, the oldest first; whether they are whole is for `newest` to say."""
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def newest(folder: Path) -> Path:
    """Returns the newest whole checkpoint in a folder.

    On the way to it, those of other bytes than were written are named, and renamed `.corrupt`. Those that cannot be
    read, or are not of this module, are named and left as they are.

    Raises:
        AdapterError: there is none, or none that is whole; training never starts anew unasked.
    """
    damaged, passed = [], []
    for place in reversed(found(folder)):
        if not is_ours(place):
            passed.append(f"{place.name} has no {manifest.NAME}, so it is not one of these checkpoints.")
            log.warning("%s is passed over: it has no %s", place.name, manifest.NAME)
            continue
        try:
            manifest.verify(place)
        except StorageError as error:
            if error.damaged:
                log.warning("%s is left aside as %s: %s", place.name, atomicio.set_aside(place).name, error)
                damaged.append(place.name)
            else:
                log.warning("%s is passed over: %s", place.name, error)
                passed.append(str(error))
            continue
        return place
    if passed:
        raise AdapterError(
            f"{folder}: no checkpoint can be gone on from, though none of these is damaged: {' '.join(passed)} Mend "
            "that and go on with --resume, or train into another folder."
        )
    if damaged:
        raise AdapterError(f"{folder}: no checkpoint is whole ({', '.join(damaged)}); start anew without --resume.")
    raise AdapterError(f"{folder}: there is no checkpoint to resume from; run without --resume.")


def is_ours(place: Path) -> bool:
    """Returns whether a checkpoint is one of this module, damaged or not, and not another program's."""
    return os.path.lexists(place / manifest.NAME)


def step_of(place: Path) -> int:
    """Returns the optimizer steps that had been made when a checkpoint was saved."""
    return int(place.name.rsplit("-", 1)[1])


class Checkpoints:
    """Mixin for any Trainer of transformers or TRL: its checkpoints are those of this module.

    It comes before the Trainer among the base classes. Several processes need `lora_ft.training.replicas` besides, and
    the first one writes. Where a checkpoint cannot be saved, training says so and goes on, and those saved before stay.
    """

    # TRL's sum of tokens, which it logs; what a Trainer lacks is passed over.
    kept: tuple[str, ...] = ("_total_train_tokens",)
    replicated: bool = False
    """Whether several processes hold the same adapter."""
    _continues: bool = False
    _running_loss: float
    _resumed: dict[str, Any] | None = None
    """The progress read from a checkpoint, until training has begun."""

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:
        """As the Trainer's, from a checkpoint if one is named, or from the newest whole one if True.

        Raises:
            AdapterError: there is no whole checkpoint, or it is of another adapter or optimizer.
            StorageError: the checkpoint named is damaged.
            ConfigError: a run that starts anew would mix its checkpoints with those of another.
        """
        trainer: Any = self
        require(HOOKS)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ConfigError("These checkpoints are of whole adapters; train without FSDP and DeepSpeed.")
        if trainer.args.world_size > 1 and not self.replicated:
            raise ConfigError("These checkpoints are of one process; train without torchrun.")
        with processes.in_turn():
            chosen = self._chosen(resume_from_checkpoint) if processes.is_first() else None
        chosen = processes.told(chosen)
        self._continues = bool(chosen)
        if not any(isinstance(callback, _Begin) for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(_Begin(self))
        return super().train(str(chosen) if chosen else None, **kwargs)  # type: ignore[misc]

    def _chosen(self, asked: str | Path | bool | None) -> str | Path | bool | None:
        """Returns the checkpoint to go on from, if any, with nothing beside it that is not of this run."""
        trainer: Any = self
        place = Path(trainer.args.output_dir)
        atomicio.sweep(place, NAMES)
        if asked is True:
            return newest(place)
        if asked:
            manifest.verify(Path(asked))
            _leave(place, newer_than=Path(asked))
        elif found(place):
            raise ConfigError(f"{place} holds the checkpoints of a run: resume it, or choose another folder.")
        return asked

    def _send_telemetry(self) -> None:
        """Sends nothing: TRL would tell its makers of the model, the device and the data."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        if self._continues and _is_done(trainer):
            # Saved after its last step: the Trainer would make one more before it looks.
            trainer.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def back_to_last_good(self) -> int | None:
        """Returns the step whose adapter, from the newest whole checkpoint, the model has again; None without one."""
        trainer: Any = self
        try:
            place = newest(Path(trainer.args.output_dir))
        except AdapterError:
            return None
        _fill(trainer.model, place)
        return step_of(place)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        trainer: Any = self
        trainer.store_flos()
        step = trainer.state.global_step
        adapter = optimizer.on_cpu(adapters.trained(trainer.model))
        broken = [name for name, tensor in adapter.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise DivergedError(
                f"After step {step}, {broken[0]} and {len(broken) - 1} more tensors of the adapter are not finite, so "
                "no checkpoint was saved: lower --train.lr, or use --train.dtype bfloat16 instead of float16."
            )
        # The Trainer's sum is each process's own, and it logs their mean.
        self._running_loss = sum(loss for [loss] in processes.gathered([float(trainer._tr_loss)])) / processes.count()
        best = processes.told(self._commit(step, adapter) if processes.is_first() else None)
        if best is not None:
            trainer.state.best_model_checkpoint = best

    def _commit(self, step: int, adapter: dict[str, torch.Tensor]) -> str | None:
        """Writes a checkpoint; returns that of the best evaluation, None where there is none or none was written."""
        trainer: Any = self
        folder = Path(trainer.args.output_dir)
        place = folder / f"checkpoint-{step}"
        best = self._best(folder, step)
        try:
            with atomicio.draft(place) as draft:
                if place.exists() and not is_ours(place):
                    raise StorageError(f"{place} is the checkpoint of another program, and stays: move it away.")
                self._write(draft, adapter, best)
                # Saved before where a signal ended its evaluation.
                draft.commit(place, {"step": step}, exchange=True)
        except StorageError as error:
            kept = [path.name for path in found(folder)]
            log.warning(
                "STEP %d IS NOT SAVED, training goes on: %s The newest checkpoint is %s%s.",
                step, error, kept[-1] if kept else "none at all",
                "; an earlier one stands in for this step, the best so far" if best == place.name else "",
            )  # fmt: skip
            return None
        if best is not None:
            trainer.state.best_model_checkpoint = str(folder / best)
        self._rotate(place)
        return trainer.state.best_model_checkpoint

    def _best(self, folder: Path, step: int) -> str | None:
        """Returns the name of the checkpoint of the best evaluation, which may be the one being saved."""
        trainer: Any = self
        best = trainer.state.best_global_step
        name = f"checkpoint-{best}"
        return name if best and (best == step or (folder / name).is_dir()) else None

    def _write(self, draft: atomicio.Draft, adapter: dict[str, torch.Tensor], best: str | None) -> None:
        trainer: Any = self
        moments, groups = optimizer.state(trainer)
        rng, progress = self._progress()
        state = {**dataclasses.asdict(trainer.state), "best_model_checkpoint": best}
        state["stateful_callbacks"] = _callback_states(trainer)
        texts = {
            name: json.dumps(value)
            for name, value in ((optimizer.GROUPS, groups), (PROGRESS, progress), (STATE, state))
        }
        tensors = {ADAPTER: adapter, optimizer.TENSORS: moments, RNG: rng}
        held = sum(t.nbytes for file in tensors.values() for t in file.values()) + sum(map(len, texts.values()))
        free = atomicio.free_bytes(draft.path)
        if free < ROOM * held:
            told = StorageError(
                f"{free / 2**20:.1f} MiB are free, and a checkpoint of {held / 2**20:.1f} MiB needs {ROOM:g} times its "
                "size: free some space."
            )
            told.full = True
            raise told
        for name, file in tensors.items():
            draft.tensors(name, file)
        for name, text in texts.items():
            draft.write(name, text)

    def _progress(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Returns the states of torch's generators, and all else that is neither adapter nor optimizer."""
        trainer: Any = self
        rng = {"cpu": torch.random.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.random.get_rng_state()
        scaler = getattr(trainer.accelerator, "scaler", None)
        name, words, *rest = np.random.get_state(legacy=True)
        progress = {
            "step": trainer.state.global_step,
            "epoch": trainer.state.epoch,
            "rows": trainer.state.global_step * _rows_in_a_step(trainer),
            "schedule": trainer.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "python": random.getstate(),
            "numpy": [name, np.asarray(words).tolist(), *rest],
            "running_loss": self._running_loss.hex(),
            "last_logged": trainer._globalstep_last_logged,
            "kept": {name: getattr(self, name) for name in _kept(self)},
        }
        return rng, progress

    def _rotate(self, saved: Path) -> None:
        """Deletes the oldest checkpoints beyond the limit, never the one just saved or the best one."""
        trainer: Any = self
        limit, best = trainer.args.save_total_limit, trainer.state.best_model_checkpoint
        if not limit:
            return
        older = [path for path in found(saved.parent) if step_of(path) < step_of(saved) and is_ours(path)]
        spared = [path for path in older if best is not None and path.name == Path(best).name]
        others = [path for path in older if path not in spared]
        for path in others[: max(0, len(others) - (limit - 1 - len(spared)))]:
            try:
                atomicio.remove(path)
            except StorageError as error:
                log.warning("an old checkpoint stays: %s", error)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trainer: Any = self
        _fill(trainer.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        trainer: Any = self
        place = Path(trainer.state.best_model_checkpoint)
        try:
            manifest.verify(place)
        except StorageError as error:
            if not error.damaged and place.is_dir():
                raise
            aside = atomicio.set_aside(place) if place.is_dir() else place
            raise StorageError(
                f"The adapter of the best evaluation, {aside.name}, is lost: {error} Go on with --resume from another."
            ) from None
        _fill(trainer.model, place)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        trainer: Any = self
        place = Path(checkpoint)
        progress = optimizer.json_of(place / PROGRESS)
        rows = trainer.state.global_step * _rows_in_a_step(trainer)
        if rows != progress["rows"]:
            log.warning("the run had read %d rows, and goes on as if it had read %d", progress["rows"], rows)
        # Of this run, which may be allowed to have others; what waits for a metric has none.
        base_lrs = getattr(trainer.lr_scheduler, "base_lrs", None)
        trainer.lr_scheduler.load_state_dict(progress["schedule"])
        if base_lrs is not None:
            trainer.lr_scheduler.base_lrs = list(base_lrs)
        optimizer.load(trainer, place)
        best = self._best(place.parent, -1)
        trainer.state.best_model_checkpoint = str(place.parent / best) if best else None
        if best is None and trainer.state.best_global_step:
            log.warning("the best checkpoint, of step %d, is no longer there", trainer.state.best_global_step)
        _restore_callbacks(trainer)
        # The state holds how often the stopped run logged and saved; this one may do it at other steps.
        trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
        self._resumed = progress

    def _load_scaler(self, checkpoint: str | None) -> None:
        trainer: Any = self
        if checkpoint is not None and (state := optimizer.json_of(Path(checkpoint) / PROGRESS)["scaler"]) is not None:
            trainer.accelerator.scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        progress, rng = optimizer.json_of(Path(checkpoint) / PROGRESS), load_file(Path(checkpoint) / RNG)
        version, words, gauss = progress["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(tuple(progress["numpy"]))
        torch.random.set_rng_state(rng["cpu"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.random.set_rng_state(rng["cuda"])

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The Trainer's own would pickle its arguments.
        trainer: Any = self
        place = Path(output_dir or trainer.args.output_dir)
        staged = place / "staged-model"
        if staged.exists():  # of a save that failed, with the weights of then
            atomicio.remove(staged)
        with atomicio.folder(staged, {}) as draft:
            draft.library(lambda folder: trainer.model.save_pretrained(folder, state_dict=state_dict))
            if trainer.processing_class is not None:
                draft.library(trainer.processing_class.save_pretrained)
        atomicio.move_in(staged, place, last="")


class _Begin(TrainerCallback):
    """Puts running sums and kept attributes in place once training has begun, for it begins by setting them to zero."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, progress = self.trainer, self.trainer._resumed
        if progress is None:
            return
        trainer._resumed = None
        trainer._tr_loss.fill_(float.fromhex(progress["running_loss"]))
        trainer._globalstep_last_logged = progress["last_logged"]
        for name in _kept(trainer):
            if name in progress["kept"]:  # an earlier version may have kept less
                setattr(trainer, name, progress["kept"][name])


def _leave(folder: Path, newer_than: Path) -> None:
    """Renames the checkpoints after the one that is gone on from: they are of a run that is left."""
    for place in found(folder):
        if step_of(place) > step_of(newer_than) and is_ours(place):
            aside = atomicio.set_aside(place, "left").name
            log.warning("%s is newer than %s, and is left aside as %s", place.name, newer_than.name, aside)


def _is_done(trainer: Any) -> bool:
    """Returns whether all steps were made, or early stopping has counted as far as it may."""
    return trainer.state.global_step >= trainer.state.max_steps or any(
        callback.early_stopping_patience_counter >= callback.early_stopping_patience
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, EarlyStoppingCallback)
    )


def _kept(trainer: Any) -> list[str]:
    """Returns the attributes that the mixins of a Trainer name in `kept`."""
    named = [name for kind in type(trainer).__mro__ for name in vars(kind).get("kept", ())]
    return [name for name in named if hasattr(trainer, name)]


def _rows_in_a_step(trainer: Any) -> int:
    return trainer._train_batch_size * trainer.args.gradient_accumulation_steps * processes.count()


def _fill(model: nn.Module, place: Path) -> None:
    """Copies the tensors of a checkpoint into the model. Raises AdapterError unless names, shapes and dtypes agree."""
    wanted, stored = adapters.trained(model), optimizer.tensors_of(place / ADAPTER)
    problems = [f"{name} is missing" for name in wanted.keys() - stored.keys()]
    problems += [f"{name} has no place in the model" for name in stored.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(stored[name].shape)} of {stored[name].dtype}, not {tuple(p.shape)} of {p.dtype}"
        for name, p in wanted.items()
        if name in stored and (stored[name].shape, stored[name].dtype) != (p.shape, p.dtype)
    ]
    if problems:
        raise AdapterError(f"{place}: it is of another adapter, {len(problems)} tensors differ: {sorted(problems)[0]}.")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(stored[name])


def _callback_states(trainer: Any) -> dict[str, Any]:
    """Returns the state of each callback that has one, by the name of its class, which no two of them share."""
    exported = [one for one in trainer.callback_handler.callbacks if isinstance(one, ExportableState)]
    return {type(one).__name__: one.state() for one in exported} | {"TrainerControl": TrainerControl().state()}


def _restore_callbacks(trainer: Any) -> None:
    for callback in trainer.callback_handler.callbacks:
        stored = trainer.state.stateful_callbacks.get(type(callback).__name__)
        if isinstance(callback, ExportableState) and stored:
            for name, value in stored["attributes"].items():
                setattr(callback, name, value)

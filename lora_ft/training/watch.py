"""Callbacks that watch a training: signals, the clock, the metrics file, and the proof that gradients arrive."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lora_ft import adapters
from lora_ft.errors import Interrupted, ProofError, StorageError
from lora_ft.system import atomicio, processes
from lora_ft.training import logged

log = logging.getLogger(__name__)

SHOW_CURSOR = b"\x1b[?25h"
STOPPED = b"Stopped at once.\n"


class GradientProof(TrainerCallback):
    """Before the first step, a resumed run's too, every trained tensor has a gradient, and some a non-zero one.

    Gradient checkpointing in particular can cut the adapters off without a word (peft#1142).
    """

    trainer: Any = None
    done = False
    skipped: str | None = None
    """Why no step could prove it so far."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.done:
            return
        if self.trainer.skipped is not None:
            self.skipped = self.trainer.skipped
            return
        self.done = True
        learned = adapters.trained(kwargs["model"])
        without = [name for name, p in learned.items() if p.grad is None]
        if without:
            raise ProofError(f"No gradient reaches {without[0]} and {len(without) - 1} more trained tensors.")
        if not any(bool(p.grad.any()) for p in learned.values() if p.grad is not None):
            raise ProofError("The gradient of every trained tensor is zero: nothing can be learned from these rows.")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.skipped is not None and not self.done and state.global_step >= state.max_steps:
            raise ProofError(f"Every step was skipped, so nothing was learned: {self.skipped}.")


class EvaluationStopped(Exception):  # noqa: N818 - it is no error, only an end
    """A signal came while the held-out rows were read, which takes too long to wait for."""


class Interrupt(TrainerCallback):
    """On SIGINT or SIGTERM, finish the step, save a checkpoint and stop; a second signal ends the process at once.

    Of several processes the terminal and the launcher may each signal one, and all have to stop after the same step:
    there an evaluation is finished, and only the same signal a second time ends a process at once.
    """

    def __init__(self) -> None:
        self.stopped = self.evaluates = False
        self.agreed = False
        """Whether any of several processes had been signalled when the step was computed."""
        self.came: set[int] = set()
        self.previous: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether this process was signalled."""
        return bool(self.came)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._ask)
            except ValueError:  # only the main thread may; elsewhere its owner decides
                return

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # After the last step the training is done, and is not thrown away.
        asked = self.asked if processes.count() == 1 else self.agreed
        if asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Ends the block with EvaluationStopped where a signal comes in it, or has come."""
        if processes.count() > 1:
            yield
            return
        self.evaluates = True
        try:
            if self.asked:
                raise EvaluationStopped
            yield
        finally:
            self.evaluates = False

    def restore(self) -> None:
        """Gives the signals back to whom they belonged."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number in self.came or (self.came and processes.count() == 1):
            # Whatever is being written is a draft, and stays one.
            # The bar has hidden the cursor, and will not end.
            os.write(sys.stderr.fileno(), (SHOW_CURSOR if os.isatty(sys.stderr.fileno()) else b"") + STOPPED)
            os._exit(Interrupted.exit_status)
        self.came.add(number)
        log.info("stopping after this step; a second signal stops at once")
        if self.evaluates:
            raise EvaluationStopped


class Clock(TrainerCallback, ExportableState):
    """Tokens and seconds since training began, those before an interrupt included, and the peak memory so far."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.trainer: Any = None
        self.earlier_s = 0.0
        self.began = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {"args": {}, "attributes": {"earlier_s": self.seconds()}}

    def seconds(self) -> float:
        """Returns the seconds of training so far."""
        return self.earlier_s + time.perf_counter() - self.began

    def read(self) -> dict[str, float]:
        """Returns `tokens`, `seconds`, `tokens_per_s` and `peak_bytes`."""
        tokens, seconds = self.trainer.tokens_seen, self.seconds()
        return {
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(tokens / seconds, 1),
            "peak_bytes": peak_bytes(self.device),
        }


class MetricsFile(TrainerCallback):
    """Writes each logged line to `metrics.jsonl`, with the run's fingerprint, tokens per second and peak memory.

    Two runs are the same where the steps and fingerprints of their files are: what a clock or a memory says is not
    compared (tests/README.md has the command). Of several processes the first one writes.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path, self.clock = path, clock
        self.unwritten: list[dict[str, Any]] = []
        """Lines that the disk had no room for."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not processes.is_first():
            return
        # A resumed run goes on after the step it resumes from; a new one starts the file anew.
        self._rewrite(
            [line for line in self._lines() if line["step"] <= state.global_step] if state.global_step else []
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The last line holds the fingerprint of the whole run.
        if state.global_step == state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "train_runtime" in logs:
            return
        fingerprint = {"fingerprint": self.clock.trainer.fingerprint} if "loss" in logs else {}
        logs.update(self.clock.read())  # for the callbacks after this one too
        if not processes.is_first():
            return
        # JSON has no word for what is not a number.
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
        line = {"step": state.global_step, **fingerprint, **line}
        try:
            if self.unwritten:
                self._write_the_rest(line)
            else:
                atomicio.append(self.path, json.dumps(line))
        except StorageError as error:
            if not self.unwritten:
                log.warning("lines of the metrics have to wait, training goes on: %s", error)
            self.unwritten.append(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.unwritten:
            try:
                self._write_the_rest()
            except StorageError as error:
                log.warning("the last %d lines of the metrics are lost: %s", len(self.unwritten), error)

    def _write_the_rest(self, *more: dict[str, Any]) -> None:
        """Writes the lines that had to wait, and `more`; the last line in the file may be cut short."""
        self._rewrite([*self._lines(), *self.unwritten, *more])
        self.unwritten.clear()

    def _lines(self) -> list[dict[str, Any]]:
        return logged.read(self.path)

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        atomicio.write(self.path, "".join(f"{json.dumps(line)}\n" for line in lines))


def peak_bytes(device: torch.device) -> int:
    """Returns the largest memory so far: of this process on a CPU, of the allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

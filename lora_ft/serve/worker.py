"""The process of one job: looks at its files, trains, and writes what happens into the server's database.

    python -m lora_ft.serve.worker JOB ATTEMPT validate|train

It runs in the server's folder. Each write is for one attempt at the job: where the server, or a later one, has taken
the job away meanwhile, nothing is written and the process ends. It also ends, having saved what it can, when its
standard input closes, that is when the server is gone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_ft.errors import (
    BusyError,
    DivergedError,
    Interrupted,
    LoraFtError,
    OutOfMemoryError,
    ProofError,
    StorageError,
)
from lora_ft.serve import events, files, ids, jobs
from lora_ft.serve.models import fine_tuned_name, register
from lora_ft.serve.states import PAUSED, QUEUED, RUNNING, SUCCEEDED, VALIDATING
from lora_ft.serve.store import Store, dumps, now
from lora_ft.system.redaction import redacted

log = logging.getLogger(__name__)

# The exit status of a worker that met another process in the job's folder, or on its GPU.
BUSY = 75


_server_gone = threading.Event()


class TakenAway(Exception):  # noqa: N818 - it is no error, only an end
    """The job is no longer this process's to work on."""


class Worker:
    """One attempt at one job."""

    def __init__(self, store: Store, job_id: str, attempt: int) -> None:
        self.store, self.job_id, self.attempt = store, job_id, attempt
        row = store.one("SELECT * FROM jobs WHERE id = ?", job_id)
        if row is None:
            raise TakenAway
        self.row = row
        self.name = fine_tuned_name(row["model"], row["suffix"], job_id[-8:])

    @contextmanager
    def change(self, state: str) -> Iterator[sqlite3.Connection]:
        """Runs the block as one transaction. Raises TakenAway unless the job is in `state` and still this attempt's."""
        with self.store.change() as connection:
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (self.job_id,)).fetchone()
            if (row["status"], row["attempt"]) != (state, self.attempt):
                raise TakenAway
            self.row = row
            yield connection

    def validate(self) -> bool:
        """Returns whether the files can be trained on; the job is queued then, and has failed if not."""
        from lora_ft.serve import trial

        try:
            plan = trial.examine(self.row, self.row["source"], self._parent())
        except trial.JobError as bad:
            with self.change(VALIDATING) as connection:
                jobs.fail(connection, self.job_id, bad.code, str(bad), bad.param)
            return False
        trial.write_config(trial.config_path(Path(), self.job_id), plan.config)
        with self.change(VALIDATING) as connection:
            events.add(connection, self.job_id, "Files validated, moving job to queued state", mark="validated")
            for number, note in enumerate(plan.notes):
                events.add(connection, self.job_id, note, level="warn", mark=f"note-{number}")
            jobs.change_state(
                connection, self.job_id, QUEUED, hyperparameters=dumps(plan.values), total_steps=plan.total_steps
            )
        return True

    def train(self) -> int:
        """Returns the exit status, having trained the job to its end or to where it was stopped."""
        from lora_ft import runs
        from lora_ft.config import RunConfig
        from lora_ft.serve import trial
        from lora_ft.settings import from_yaml
        from lora_ft.system import locks

        out = trial.folder(Path(), self.job_id)
        # Held before the job is said to run: the process of an earlier server may still be at its last step, and
        # another program on the GPU. Such a job has never left the queue, and nothing that was asked of it is lost.
        with locks.run_folder(out), locks.gpu(runs.gpu(), out):
            with self.change(QUEUED) as connection:
                jobs.change_state(connection, self.job_id, RUNNING)
                events.add(connection, self.job_id, "Fine-tuning job started", mark="started")
            config = from_yaml(RunConfig, trial.config_path(Path(), self.job_id))
            try:
                self._train(config)
            except (Interrupted, KeyboardInterrupt):
                self._stopped()
        return 0

    def _train(self, config: Any) -> None:
        from rich.console import Console

        from lora_ft import runs
        from lora_ft.checkpoints import found
        from lora_ft.proof import environment
        from lora_ft.serve.reporter import Reporter
        from lora_ft.train import CHECKPOINTS
        from lora_ft.training import started

        out = config.out
        started.clear_up(out)
        # With the record there and the checkpoints gone, the adapter has been proven: only the telling was cut short.
        if not (started.is_trained(out) and not (out / CHECKPOINTS).is_dir()):
            begun = started.is_trained(out) or bool(found(out / CHECKPOINTS))
            config = dataclasses.replace(config, resume=begun)
            parent = self._parent()
            made = runs.run(
                config,
                console=Console(quiet=True),
                watch=lambda *what: [Reporter(self, config, parent, *what)],
            )
            made.prove()
        self._succeed(out, environment.read(out)["fit"])

    def _succeed(self, out: Path, fit: dict[str, Any]) -> None:
        file_id, text = ids.new("file-"), events.table(self.store, self.job_id)
        held = files.Files(self.store)
        with held.draft(file_id) as draft:
            draft.write(files.TABLE, text)
            draft.commit(held.folder / file_id)
        with self.change(RUNNING) as connection:
            files.insert(connection, file_id, files.TABLE, files.RESULTS, len(text.encode()))
            made = now()
            register(connection, self.name, self.row["model"], out, Path(), self.job_id, made)
            events.add(connection, self.job_id, f"New fine-tuned model created: {self.name}", mark="model")
            events.add(connection, self.job_id, "The job has successfully completed", mark="ended")
            jobs.change_state(
                connection, self.job_id, SUCCEEDED, finished_at=made, fine_tuned_model=self.name, result_file=file_id,
                trained_tokens=fit["tokens"], step=fit["steps"],
            )  # fmt: skip

    def _stopped(self) -> None:
        """Says of a job that was stopped whether it is paused, or waits for the next process or server."""
        with self.change(RUNNING) as connection:
            if self.row["wanted"] == "pause":
                jobs.change_state(connection, self.job_id, PAUSED)
                told = f"The job has been paused at step {self.row['step']}; its state is saved"
                events.add(connection, self.job_id, told)
            elif self.row["wanted"] == "resume":
                # The pause was called off when this process had been told to stop: another goes on.
                jobs.change_state(connection, self.job_id, QUEUED)
            else:
                gone = "the server ended before the job did" if _server_gone.is_set() else "the server was stopped"
                jobs.back_to_queue(connection, self.row, gone)

    def fail(self, code: str, message: str) -> None:
        """Ends the job with an error, whether it was validated, about to be trained, or trained."""
        state = found if (found := self._state()) in (VALIDATING, QUEUED) else RUNNING
        with self.change(state) as connection:
            jobs.fail(connection, self.job_id, code, message)

    def wait(self, busy: BusyError) -> None:
        """Says, once for each process that it waits for, why a job stays in the queue."""
        with self.change(QUEUED) as connection:
            mark = f"busy-{hashlib.sha256(str(busy).encode()).hexdigest()[:16]}"
            events.add(connection, self.job_id, f"The job waits: {busy}", level="warn", mark=mark)

    def _parent(self) -> Path | None:
        """Returns the folder of the adapter that the job goes on from, where it does. Raises JobError if it is gone."""
        from lora_ft.serve import trial

        name = self.row["parent"]
        if name is None:
            return None
        row = self.store.one("SELECT folder FROM models WHERE id = ?", name)
        if row is None:
            raise trial.JobError("invalid_model", f"{name} was deleted: choose another model.", "model")
        return Path(row["folder"])

    def _state(self) -> str:
        row = self.store.one("SELECT status FROM jobs WHERE id = ?", self.job_id)
        return row["status"] if row else ""


def explained(error: Exception) -> tuple[str, str]:
    """Returns the code and the message for an error that ended a job; the message says what to change."""
    name = type(error).__name__
    if isinstance(error, OutOfMemoryError):
        return "out_of_memory", str(error)
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        remedy = "set batch_size or context_length lower, or choose a smaller base"
        return "out_of_memory", f"The memory of the device was not enough: {remedy}."
    if isinstance(error, DivergedError):
        return "nan_loss", f"{error} Set learning_rate_multiplier lower."
    if isinstance(error, StorageError) and error.full:
        return "disk_full", f"The disk is full. {error}"
    if isinstance(error, ProofError | LoraFtError):
        return "training_error", str(error)
    if isinstance(error, OSError) and error.errno == 28:
        return "disk_full", f"The disk is full: free some space. {error}"
    return "internal_error", f"{name}: {redacted(str(error))[:500]}. The server's log has the details."


def run(store: Store, job_id: str, attempt: int, whole: bool) -> int:
    """Returns the exit status of one attempt: 0 once the database says what came of it.

    Args:
        whole: whether to train after the files were looked at.
    """
    try:
        worker = Worker(store, job_id, attempt)
    except TakenAway:
        return 0
    try:
        if worker.row["status"] == VALIDATING and not worker.validate():
            return 0
        return worker.train() if whole else 0
    except TakenAway:
        return 0
    except BusyError as busy:
        with suppress(TakenAway):
            worker.wait(busy)
        return BUSY
    except Exception as error:
        # The one place where any error is met: a job must end with one that its client can read.
        log.error("%s failed", job_id, exc_info=error)
        try:
            worker.fail(*explained(error))
        except TakenAway:
            log.info("%s was taken away meanwhile", job_id)
        return 0


def main() -> int:
    """Returns the exit status of the process."""
    from lora_ft.system.terminal import quiet

    quiet()
    job_id, attempt, mode = sys.argv[1:]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_server, daemon=True).start()
    try:
        return run(Store(Path.cwd()), job_id, int(attempt), mode == "train")
    except KeyboardInterrupt:
        # Before the job was running: it is as if this process had never been.
        return 0


def _end_with_server() -> None:
    # Not through sys.stdin: a process forked meanwhile would wait for ever for its lock.
    while os.read(0, 1):
        continue
    _server_gone.set()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())

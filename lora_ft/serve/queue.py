"""The queue of a server: which job's process runs on which device, and what becomes of those that end.

A device works on one job at a time. Beside them one process may look at the files of jobs that still wait, so that a
bad file is told at once. Everything is decided from the database: a queue may end at any point and another take over.
"""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import lora_ft
from lora_ft.serve import jobs, leftovers, uploads
from lora_ft.serve.files import Files
from lora_ft.serve.states import FINAL, QUEUED, RUNNING, VALIDATING
from lora_ft.serve.store import Store
from lora_ft.serve.worker import BUSY

log = logging.getLogger(__name__)

# A look at the database costs some 0.1 ms; a client that polls sees the next state within this.
TICK_S = 0.2
CLEAR_UP_S = 60.0
# Processes of one job that died in a row without a single step between them.
TOO_MANY_CRASHES = 5
# Seconds until a job looks again whether what it needs is free: each time twice as many, up to the last.
FIRST_WAIT_S, LAST_WAIT_S = 1.0, 60.0
# How long processes that were asked to stop may take for their step, at the end of the server.
STOP_S = 60.0


@dataclass
class Process:
    """A job's process."""

    job_id: str
    attempt: int
    device: int | None
    """Number of its device; None for one that only looks at files."""
    started_at_step: int
    popen: subprocess.Popen[bytes]
    asked: bool = False
    """Whether it was told to stop: a second time would end it at once."""


@dataclass(frozen=True)
class Wait:
    """What a job waits for: that another process lets go of its folder or its GPU."""

    times: int
    """How often in a row it was in use."""
    until: float
    """When to look again, on the monotonic clock."""


class Queue:
    """Starts and ends the processes of jobs, in a thread of its own from `start` to `stop`."""

    def __init__(self, store: Store, devices: int = 1) -> None:
        self.store, self.devices = store, devices
        self._processes: list[Process] = []
        self._wake, self._ending = threading.Event(), threading.Event()
        self._cleared_up = 0.0
        self._waits: dict[str, Wait] = {}
        self._thread = threading.Thread(target=self._run, name="queue", daemon=True)

    def start(self) -> None:
        """Takes over what an earlier server left, and begins."""
        for job_id in jobs.Jobs(self.store).recover():
            log.info("%s was running when the last server ended, and is queued again", job_id)
        self._thread.start()

    def wake(self) -> None:
        """Has the queue look now and not at its next turn."""
        self._wake.set()

    def stop(self) -> None:
        """Has every process save and end, and waits for them."""
        self._ending.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        for process in self._processes:
            self._ask(process)
        end = time.monotonic() + STOP_S
        for process in self._processes:
            try:
                process.popen.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._kill(process)
            self._ended(process)

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self.turn()
            except Exception as error:
                # Nothing may end the queue: what could not be done now is done at the next turn.
                log.error("the queue met an error and goes on", exc_info=error)
            self._wake.wait(TICK_S)
            self._wake.clear()
        self.store.close()

    def turn(self) -> None:
        """Does all that there is to do now."""
        for process in list(self._processes):
            if process.popen.poll() is not None:
                self._processes.remove(process)
                self._ended(process)
        for process in self._processes:
            self._heed(process)
        self._start_next()
        leftovers.clear(self.store)
        if time.monotonic() - self._cleared_up > CLEAR_UP_S:
            self._cleared_up = time.monotonic()
            # Of a job that was cancelled meanwhile nobody asks again.
            over = time.monotonic() - CLEAR_UP_S
            self._waits = {job_id: wait for job_id, wait in self._waits.items() if wait.until > over}
            held = Files(self.store)
            held.clear_up()
            uploads.expire(held)

    def _heed(self, process: Process) -> None:
        """Does to a process what was asked of its job."""
        row = self.store.one("SELECT id, status, wanted FROM jobs WHERE id = ?", process.job_id)
        if row is None or row["status"] in FINAL:
            # A job that succeeded is written as the last thing; what its process still does is nothing but ending.
            if row is None or row["status"] == "cancelled":
                self._kill(process)
        elif row["wanted"] == "pause" and row["status"] == RUNNING:
            self._ask(process)
        elif row["wanted"] == "resume" and not process.asked:
            with self.store.change() as connection:
                connection.execute("UPDATE jobs SET wanted = NULL WHERE id = ? AND wanted = 'resume'", (row["id"],))

    def _start_next(self) -> None:
        taken = {process.device for process in self._processes}
        for device in range(self.devices):
            if device in taken:
                continue
            row = jobs.next_to_run(self.store, self._passed_over()) or self._unseen()
            if row is not None:
                self._start(row, device)
        if None not in {process.device for process in self._processes}:
            row = self._unseen()
            if row is not None:
                self._start(row, None)

    def _passed_over(self) -> tuple[str, ...]:
        """Returns the jobs that have a process already, or wait for another one to let go of what they need."""
        waiting = [job_id for job_id, wait in self._waits.items() if wait.until > time.monotonic()]
        return (*(process.job_id for process in self._processes), *waiting)

    def _unseen(self) -> sqlite3.Row | None:
        """Returns the oldest job whose files nobody looks at yet."""
        busy = self._passed_over()
        rows = self.store.all("SELECT * FROM jobs WHERE status = ? ORDER BY n", VALIDATING)
        return next((row for row in rows if row["id"] not in busy), None)

    def _start(self, row: sqlite3.Row, device: int | None) -> None:
        mode = "validate" if device is None else "train"
        command = [sys.executable, "-m", "lora_ft.serve.worker", row["id"], str(row["attempt"]), mode]
        popen = subprocess.Popen(
            command, cwd=self.store.home, env=environment(device, self.devices), stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._processes.append(Process(row["id"], row["attempt"], device, row["step"], popen))

    def _ended(self, process: Process) -> None:
        """Sees that no job stays as if a process that has ended still worked on it."""
        if process.popen.stdin:
            process.popen.stdin.close()
        status, before = process.popen.returncode, self._waits.pop(process.job_id, None)
        if status == BUSY:
            times = before.times if before else 0
            seconds = min(LAST_WAIT_S, FIRST_WAIT_S * 2 ** min(times, 10))
            self._waits[process.job_id] = Wait(times + 1, time.monotonic() + seconds)
        with self.store.change() as connection:
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (process.job_id,)).fetchone()
            if row["attempt"] != process.attempt or row["status"] not in (VALIDATING, QUEUED, RUNNING):
                return
            if status in (0, BUSY) and row["status"] != RUNNING:
                return
            # A later process counts from here on, whatever this one did.
            crashes = row["crashes"] + 1 if row["step"] <= process.started_at_step else 1
            connection.execute("UPDATE jobs SET crashes = ? WHERE id = ?", (crashes, row["id"]))
            why = f"its process ended by signal {-status}" if status < 0 else f"its process ended with status {status}"
            log.warning("%s: %s", row["id"], why)
            if crashes >= TOO_MANY_CRASHES:
                told = (
                    f"The process of the job died {crashes} times in a row without a step: {why}. See the server's log."
                )
                jobs.fail(connection, row["id"], "internal_error", told)
            elif row["status"] == RUNNING:
                jobs.back_to_queue(connection, row, why)
            else:
                connection.execute("UPDATE jobs SET attempt = attempt + 1 WHERE id = ?", (row["id"],))

    @staticmethod
    def _ask(process: Process) -> None:
        """Has a process finish its step, save and end."""
        if not process.asked and process.popen.poll() is None:
            process.asked = True
            process.popen.send_signal(signal.SIGTERM)

    @staticmethod
    def _kill(process: Process) -> None:
        """Ends a process and all that it started, at once: what it was writing is a draft, and stays one."""
        if process.popen.poll() is None:
            os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.wait()


def environment(device: int | None, devices: int) -> dict[str, str]:
    """Returns the environment of a job's process: one device, and the library that this process has."""
    package = Path(lora_ft.__file__).parents[1]
    paths = [str(package), *(p for p in sys.path if p and Path(p).is_absolute()), os.environ.get("PYTHONPATH", "")]
    made = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths)))}
    if device is None:
        made["CUDA_VISIBLE_DEVICES"] = ""
    elif devices > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        made["CUDA_VISIBLE_DEVICES"] = visible[device] if len(visible) == devices else str(device)
    return made

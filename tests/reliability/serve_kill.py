"""Servers and workers that are killed at random moments: each job ends as if nothing had happened.

python -m tests.reliability.serve_kill --count 50
"""

from __future__ import annotations

import argparse
import random
import sqlite3
import tempfile
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from lora_ft.serve.states import FINAL
from lora_ft.serve.store import DATABASE
from tests import tiny_server
from tests.reliability.forks import MEMORY
from tests.tiny_server import JOBS, Server, chats

STEPS = 36
WHAT = ("server", "worker", "both")
OPTIONS = {"seed": 3, "hyperparameters": {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 10}}


def told_of(server: Server, job: str) -> tuple:
    """Returns all that must not depend on kills: state, tokens, steps, checkpoints, models and the adapter's bytes."""
    row = server.job(job)
    steps = [event["data"] for event in server.events(job) if event["type"] == "metrics"]
    checkpoints = server.ask("GET", f"{JOBS}/{job}/checkpoints?limit=100")[1]["data"]
    listed = [(one["step_number"], one["metrics"]) for one in checkpoints]
    table = server.ask("GET", f"/v1/files/{row['result_files'][0]}/content")[1] if row["result_files"] else ""
    # The seconds that a step took are the clock's.
    lines = [line.rpartition(",")[0] for line in table.splitlines()]
    held = [server.ask("GET", f"/v1/models/{one['fine_tuned_model_checkpoint']}")[0] for one in checkpoints]
    adapter = server.adapter(job) if row["status"] == "succeeded" else b""
    return row["status"], row["trained_tokens"], steps, listed, lines, held, adapter


def _reach(server: Server, job: str, step: int) -> None:
    """Waits until a job has made a step, or has ended."""
    server.until(job, lambda row: bool(row["finished_at"]) or server.steps(job) >= step, 600)


@dataclass
class Kills:
    """What was killed while a job was on its way, and where that changed how it ended."""

    killed: Counter[str] = field(default_factory=Counter)
    """How often the server, the job's process, and both."""
    missed: int = 0
    """Kills of what was not there: nothing worked on the job yet, or it had ended."""
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = ", ".join(f"{count} of {what}" for what, count in sorted(self.killed.items()))
        same = self.killed.total() - len(self.wrong)
        return f"{told}; {same} jobs ended as the one that was not killed; {self.missed} kills of nothing not counted"


def _kill(server: Server, job: str, what: str) -> bool:
    """Returns whether a kill of `server`, `worker` or `both` met all it was meant for, and the job had not ended."""
    met = True
    if what != "server":
        found = server.workers(job)
        met = bool(found)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    if what != "worker":
        met = met and server.process.poll() is None
        server.kill()
    # Past the server, which may be no more.
    with closing(sqlite3.connect(server.home / DATABASE, timeout=60)) as connection:
        (status,) = connection.execute("SELECT status FROM jobs WHERE id = ?", (job,)).fetchone()
    return met and status not in FINAL


def kills(folder: Path, count: int, seed: int = 0) -> Kills:
    """Returns what came of `count` kills, each in a job of its own, beside the job that nothing happened to."""
    rng, done = random.Random(seed), Kills()
    base = tiny_server.base_folder(folder / "base")
    home = tiny_server.home(folder / "home", base)
    server = Server(home).__enter__()
    try:
        file = server.upload(chats(12))
        began = time.monotonic()
        whole = server.start_job(file, **OPTIONS)
        server.ended(whole)
        took = time.monotonic() - began
        want = told_of(server, whole)
        assert want[0] == "succeeded", server.job(whole)
        while done.killed.total() < count:
            number = done.killed.total() + done.missed
            assert done.missed <= 4 * count, str(done)
            job, what = server.start_job(file, **OPTIONS), WHAT[done.killed.total() % len(WHAT)]
            if number % 2:
                # Most of a short job's time goes to starting, and to proving what was made.
                time.sleep(rng.uniform(0, took))
            else:
                _reach(server, job, rng.randrange(1, STEPS + 1))
                time.sleep(rng.uniform(0, 0.2))
            at = f"{what} at step {server.steps(job)}"
            is_real = _kill(server, job, what)
            if what != "worker":
                server = Server(home, token=server.token).__enter__()
            done.killed[what] += is_real
            done.missed += not is_real
            server.until(job, lambda row: row["status"] in FINAL, 600)
            found = told_of(server, job)
            names = ("status", "tokens", "steps", "checkpoints", "table", "models", "adapter")
            unlike = [name for name, one, two in zip(names, want, found, strict=True) if one != two]
            if unlike:
                done.wrong.append(f"kill of {at}: {', '.join(unlike)} differ: {server.job(job)['error']}")
            met = "" if is_real else "met nothing, "
            print(f"{number + 1}: {at}: {met}{', '.join(unlike) or 'the same'}", flush=True)
    finally:
        server.__exit__()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        done = kills(Path(scratch), count)
    print(done)
    if done.wrong:
        raise SystemExit("\n".join(done.wrong))


if __name__ == "__main__":
    main()

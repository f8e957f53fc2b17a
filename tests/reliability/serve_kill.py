"""Servers and workers that are killed at random moments: each job ends as if nothing had happened.

python -m tests.reliability.serve_kill --count 50
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from tests import tiny_server
from tests.reliability.forks import MEMORY
from tests.tiny_server import JOBS, Server, chats

STEPS = 36
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


def differing(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Returns what was not as in the job that nothing happened to, of `count` jobs with a kill each."""
    rng, wrong = random.Random(seed), []
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
        for number in range(count):
            job = server.start_job(file, **OPTIONS)
            if number % 4 < 2:
                # Most of a short job's time goes to starting, and to proving what was made.
                time.sleep(rng.uniform(0, 1.1 * took))
            else:
                _reach(server, job, rng.randrange(1, STEPS + 1))
                time.sleep(rng.uniform(0, 0.2))
            what = "server" if number % 2 else "worker"
            at = f"{what} at step {server.steps(job)}"
            if what == "server":
                server.kill()
                server = Server(home, token=server.token).__enter__()
            else:
                for process in server.workers(job):
                    process.kill()
            server.until(job, lambda row: row["status"] in ("succeeded", "failed", "cancelled"), 600)
            found = told_of(server, job)
            names = ("status", "tokens", "steps", "checkpoints", "table", "models", "adapter")
            unlike = [name for name, one, two in zip(names, want, found, strict=True) if one != two]
            if unlike:
                wrong.append(
                    f"kill {number} of the {what} ({at}): {', '.join(unlike)} differ: {server.job(job)['error']}"
                )
            print(f"{number + 1}: {at}: {', '.join(unlike) or 'the same'}", flush=True)
    finally:
        server.__exit__()
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        wrong = differing(Path(scratch), count)
    print(f"{count} kills: {count - len(wrong)} jobs ended as the one that was not killed")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()

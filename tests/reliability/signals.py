"""Runs that are asked to stop: how long until they have, and what they say.

python -m tests.reliability.signals
"""

from __future__ import annotations

import os
import shlex
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from lora_ft import cli, train
from lora_ft.checkpoints import found, newest, step_of
from lora_ft.training import logged, trainers
from tests.reliability.forks import MEMORY, Place, fingerprints, start, wait

# Beside one step.
MOST_S = 5.0


def slow(seconds: float) -> Callable:
    """Returns a loss that takes so long."""
    real = trainers.TaskLoss.compute_loss

    def slowly(*args, **kwargs):
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            time.sleep(0.01)
        return real(*args, **kwargs)

    return slowly


def faults(folder: Path) -> list[str]:
    """Returns what was wrong with runs that got SIGINT or SIGTERM, once and twice, in a step and in an evaluation."""
    wrong = []
    place = Place(folder, steps=500)
    cases = [(number, where) for number in (signal.SIGINT, signal.SIGTERM) for where in ("a step", "an evaluation")]
    for number, where in cases:
        out, said = folder / f"{number.name}-{where.split()[1]}", folder / "said.txt"
        more = ["--data.eval", "0.3", "--train.eval-steps", "2"] if where == "an evaluation" else []
        words = place.words(out, *more)
        if more:  # every second checkpoint is evaluated
            words[words.index("--train.save-steps") + 1] = "2"
        step_s = 0.3 if where == "a step" else 30.0
        target = (trainers.TaskLoss, "compute_loss") if where == "a step" else (trainers.losses, "of_rows")

        def action(words=words, target=target, step_s=step_s) -> int:
            replaced = slow(step_s) if target[1] == "compute_loss" else lambda *args, **kwargs: time.sleep(step_s)
            with mock.patch.object(*target, replaced):
                return cli.main(words)

        pid = start(action, said)
        while len(fingerprints(out)) < 2:
            time.sleep(0.02)
        time.sleep(0.1)
        asked = time.perf_counter()
        os.kill(pid, number)
        ended = wait(pid, said)
        took_s = time.perf_counter() - asked
        last = ended.said.strip().splitlines()[-1].strip()
        if ended.status != 130 or took_s > MOST_S + 0.3:
            wrong.append(f"{number.name} in {where}: status {ended.status} after {took_s:.1f} s: {ended.said}")
        elif last != shlex.join(["lora-ft", *words, "--resume"]):
            wrong.append(f"{number.name} in {where}: the last line is not the command that resumes: {ended.said}")
        elif step_of(newest(out / train.CHECKPOINTS)) != fingerprints(out)[-1][0]:
            wrong.append(f"{number.name} in {where}: the step that it finished is not saved")

    out = folder / "twice"

    def stuck() -> int:
        with mock.patch.object(trainers.TaskLoss, "compute_loss", slow(60)):
            return cli.main(place.words(out))

    pid = start(stuck, said)
    while not (out / logged.FILE).exists():
        time.sleep(0.02)
    time.sleep(0.3)
    for _ in range(2):
        os.kill(pid, signal.SIGINT)
        time.sleep(0.1)
    asked = time.perf_counter()
    ended = wait(pid, said)
    if ended.status != 130 or time.perf_counter() - asked > 1 or found(out / train.CHECKPOINTS):
        wrong.append(f"a second signal should end it at once: {ended}")
    return wrong


def main() -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        wrong = faults(Path(scratch))
    print(
        f"5 runs asked to stop: {5 - len(wrong)} stopped in time, saved, with status 130 and the command that resumes"
    )
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()

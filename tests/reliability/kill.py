"""Runs that are killed while they save: what is left is whole, and going on gives the run that was never killed.

    python -m tests.reliability.kill --count 500 --rival 100

A run trains, on rows and on packs of them in turn, saves at every step, and writes, seals and proves its adapter. It
dies, as of `kill -9`, at a random byte of all that it writes, or in every fifth case at a random moment. Others go on
from an evaluation that a signal ended, whose step is saved a second time, and die at each change of a checkpoint's name
in turn. The rival, transformers' Trainer with PEFT, saves the same model as often and is killed at a random moment of a
save.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from lora_ft import adapters, checkpoints, tasks, train
from lora_ft import base as bases
from lora_ft.config import LoraConfig
from lora_ft.training import trainers
from lora_ft.training.started import is_trained
from tests import tiny
from tests.reliability.disks import Deadly
from tests.reliability.forks import MEMORY, Ended, Place, fingerprints, fork, litter, one_thread

# Every so many runs are killed by the clock instead of at a byte, with the disk as it always is.
BY_CLOCK = 5
KINDS = {"rows": (), "packs": ("--data.packing", "--data.max-length", "32")}


@dataclasses.dataclass
class Tally:
    """What came of a number of kills."""

    kills: int = 0
    unreadable: int = 0
    """Resumed runs that failed on what they had chosen."""
    lost: int = 0
    """Kills after which more than one step had to be made again."""
    unlike: int = 0
    """Resumed runs that were not, step by step and in the end, the run that was never killed."""
    litter: int = 0
    """Files and folders left over once the run was finished."""
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills: {self.unreadable} unreadable checkpoints chosen, {self.lost} with more than one save "
            f"interval lost, {self.unlike} resumed runs that differ, {self.litter} left-over files"
        )

    @property
    def clean(self) -> bool:
        return not (self.unreadable or self.lost or self.unlike or self.litter)


class Written(Deadly):
    """Counts what a whole run writes, into a file that its parent reads."""

    def __init__(self, told: Path) -> None:
        super().__init__(None)
        self.told = told

    def tick(self, path: Path) -> None:
        super().tick(path)
        self.told.write_text(str(self.written))

    def put(self, stream, data: bytes) -> None:
        super().put(stream, data)
        self.told.write_text(str(self.written))


class Whole:
    """A run that nobody kills, in `folder`: how long it takes, how much it writes, and what it ends with."""

    def __init__(self, folder: Path, more: tuple[str, ...]) -> None:
        folder.mkdir(exist_ok=True)
        self.place = Place(folder, more=more)
        out, told = folder / "whole", folder / "written.txt"
        began = time.perf_counter()
        ended = self.place.run(out, disk=Written(told))
        assert ended.status == 0, ended.said
        self.took_s, self.size = time.perf_counter() - began, int(told.read_text())
        self.fingerprints, self.adapter = fingerprints(out), (out / "adapter_model.safetensors").read_bytes()


def ours(folder: Path, count: int, seed: int = 0) -> Tally:
    """Returns what came of `count` kills of our runs."""
    tally, rng = Tally(), random.Random(seed)
    wholes = [Whole(folder / kind, more) for kind, more in KINDS.items()]
    assert wholes[0].fingerprints != wholes[1].fingerprints
    while tally.kills < count:
        whole = wholes[tally.kills % len(wholes)]
        place = whole.place
        out = folder / "run"
        by_clock = tally.kills % BY_CLOCK == BY_CLOCK - 1
        if by_clock:
            ended = place.run(out, kill_after_s=rng.uniform(0, whole.took_s))
        else:
            ended = place.run(out, disk=Deadly(rng.randrange(1, whole.size + 1)))
        if not ended.killed:  # it was done before the clock was
            shutil.rmtree(out, ignore_errors=True)
            continue
        tally.kills += 1
        logged = max((step for step, _ in fingerprints(out)), default=0)
        kept = [checkpoints.step_of(path) for path in checkpoints.found(out / train.CHECKPOINTS)]
        tally.lost += not is_trained(out) and logged - max(kept, default=0) > 1
        ended = place.finish(out)
        tally.unreadable += ended.status != 0
        count_differences(tally, out, ended, whole.fingerprints, whole.adapter)
        if tally.kills % 50 == 0:
            print(f"so far: {tally}", file=sys.stderr, flush=True)
    return tally


def count_differences(tally: Tally, out: Path, ended: Ended, expected: Any, final: bytes) -> None:
    """Counts in what a run that went on differs from the whole one, and removes it."""
    if fingerprints(out) != expected or (out / "adapter_model.safetensors").read_bytes() != final:
        tally.unlike += 1
    tally.litter += len(litter(out))
    if not tally.clean and len(tally.notes) < 3:
        tally.notes.append(ended.said)
    shutil.rmtree(out)


def evaluated(folder: Path, count: int) -> Tally:
    """Returns what came of `count` kills of runs that go on from the evaluation of their first step."""
    place, tally = Place(folder, more=("--data.eval", "0.3", "--train.eval-steps", "1")), Tally()
    whole, begun, out = folder / "whole", folder / "begun", folder / "run"
    ended = place.run(whole)
    assert ended.status == 0, ended.said
    expected, final = fingerprints(whole), (whole / "adapter_model.safetensors").read_bytes()
    stop = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with mock.patch.object(trainers.losses, "of_rows", stop):
        ended = place.run(begun)
    assert ended.status == 130, ended.said
    while tally.kills < count:
        shutil.copytree(begun, out)
        ended = place.run(out, "--resume", disk=Deadly(None, at_name=tally.kills + 1))
        if not ended.killed:  # all changes of names have had their turn
            break
        tally.kills += 1
        done = (out / "environment.json").is_file() and not (out / train.CHECKPOINTS).exists()
        ended = place.finish(out) if done else place.run(out, "--resume")
        tally.unreadable += ended.status != 0
        count_differences(tally, out, ended, expected, final)
    return tally


class Rival:
    """transformers' Trainer with PEFT on the same base, saving at every step."""

    steps = 5

    def __init__(self, folder: Path) -> None:
        self.base = tiny.model_folder(folder / "rival")

    def train(self, out: Path, saves: int | None, resume: bool = False) -> str:
        """Returns a digest of the adapter trained; writes a byte to the pipe `saves` whenever a save begins."""
        from transformers import Trainer, TrainingArguments

        class Told(Trainer):
            def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
                if saves is not None:
                    os.write(saves, b"s")
                super()._save_checkpoint(*args, **kwargs)
                if saves is not None:
                    os.write(saves, b"e")

        task = tasks.get("complete")
        base = bases.load(str(self.base), quant="none", dtype="float32", device="cpu")
        task.prepare(base.tokenizer, 64)
        settings = LoraConfig(rank=4, alpha=16.0, dropout=0.1)
        model = adapters.attach(base, settings, peft_task=task.peft_task, seed=0)
        arguments = TrainingArguments(
            str(out), per_device_train_batch_size=2, max_steps=self.steps, learning_rate=1e-2, save_steps=1,
            save_total_limit=3, use_cpu=True, report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        rows = train.Rows(tiny.rows("complete", 12))
        trainer = Told(model=model, args=arguments, train_dataset=rows, data_collator=task.collate)
        trainer.train(resume_from_checkpoint=resume)
        return f"{sum(float(p.double().abs().sum()) for p in adapters.trained(model).values()):.17g}"


def rival(folder: Path, count: int, seed: int = 0) -> Tally:
    """Returns what came of `count` kills of the rival."""
    one_thread()
    made, tally, rng = Rival(folder), Tally(), random.Random(seed)
    said, told = folder / "rival.txt", folder / "digest.txt"

    def run(out: Path, saves: int | None = None, resume: bool = False) -> None:
        told.write_text(made.train(out, saves, resume))

    assert fork(lambda: run(folder / "warm-rival"), said).status == 0, said.read_text()
    expected = told.read_text()
    while tally.kills < count:
        out, at_save = folder / "run-rival", rng.randrange(2, Rival.steps + 1)
        saved = _kill_in_save(lambda pipe, out=out: run(out, pipe), at_save, rng)
        if saved is None:
            shutil.rmtree(out, ignore_errors=True)
            continue
        tally.kills += 1
        told.unlink(missing_ok=True)
        ended = fork(lambda out=out: run(out, resume=True), said)
        if ended.status != 0:
            tally.unreadable += 1
            tally.notes = tally.notes or [ended.said.strip().splitlines()[-1]]
        elif told.read_text() != expected:
            tally.unlike += 1
        tally.litter += len(list(out.rglob(".tmp*")))
        shutil.rmtree(out)
    return tally


def _kill_in_save(action: Any, at_save: int, rng: random.Random) -> int | None:
    """Returns the pid of a forked run killed at a random moment of a save, or None where it came too late."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            action(writing)
        finally:
            os._exit(0)
    os.close(writing)
    spans: list[float] = []
    try:
        for _ in range(at_save - 1):
            os.read(reading, 1)
            began = time.perf_counter()
            os.read(reading, 1)
            spans.append(time.perf_counter() - began)
        os.read(reading, 1)
        time.sleep(rng.uniform(0, min(spans)))
        os.kill(pid, signal.SIGKILL)
    finally:
        os.waitpid(pid, 0)
        over = os.read(reading, 1)
        os.close(reading)
    return None if over else pid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--rival", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        tally = ours(Path(scratch), options.count, options.seed)
        print(f"lora_ft: {tally}", *tally.notes, sep="\n", flush=True)
        (Path(scratch) / "evaluated").mkdir()
        again = evaluated(Path(scratch) / "evaluated", options.count)
        print(f"lora_ft, from within an evaluation: {again}", *again.notes, sep="\n", flush=True)
        if options.rival:
            found = rival(Path(scratch), options.rival, options.seed)
            print(f"Trainer and PEFT: {found}", *found.notes, sep="\n")
    if not (tally.clean and again.clean):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Short trainings in forked processes, so that each may be killed without paying for the imports again."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lora_ft.runs  # noqa: F401 - and all that it imports, once for every fork
from lora_ft import cli, train
from lora_ft.checkpoints import found
from lora_ft.pages import curves
from lora_ft.system import atomicio
from lora_ft.training import logged
from lora_ft.training.started import is_trained
from tests import tiny

# kill -9 loses nothing that the kernel has taken, so the disk may be memory, which is quicker.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
LITTER = (".tmp-*", ".del-*", ".old-*", "*.corrupt", "staged-*")


@dataclasses.dataclass
class Ended:
    """How a forked process ended, and what it said."""

    status: int
    """Exit status, or minus the number of the signal."""
    said: str

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


def one_thread() -> None:
    """Keeps torch and transformers from threads, whose pools do not outlive a fork ("Invalid thread pool")."""
    torch.set_num_threads(1)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"


def start(action: Callable[[], Any], said: Path) -> int:
    """Returns the pid of a forked process that runs `action`; a traceback goes into `said`, with status 70."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        with said.open("w", encoding="utf-8") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            sys.stdout = sys.stderr = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True)
            logging.getLogger().handlers.clear()
            try:
                status = int(action() or 0)
            except SystemExit as stop:
                status = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


def wait(pid: int, said: Path) -> Ended:
    """Returns how a forked process has ended, once it has."""
    _, code = os.waitpid(pid, 0)
    return Ended(os.waitstatus_to_exitcode(code), said.read_text(encoding="utf-8"))


def fork(action: Callable[[], Any], said: Path, *, kill_after_s: float | None = None) -> Ended:
    """Returns how a forked process that ran `action` ended."""
    pid = start(action, said)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return wait(pid, said)


class Place:
    """A folder with a tiny base and rows, and `lora-ft train` on them, in this process or a forked one."""

    def __init__(self, folder: Path, *, steps: int = 5, count: int = 12, more: tuple[str, ...] = ()) -> None:
        one_thread()
        os.environ["LORA_FT_HOME"] = str(folder / "home")
        self.folder, self.steps = folder, steps
        tiny.model_folder(folder / "base")
        rng = random.Random(0)
        lines = []
        for _ in range(count):
            words = [rng.randrange(40, 200) for _ in range(rng.randrange(3, 8))]
            lines.append(
                json.dumps({"prompt": " ".join(f"w{w}" for w in words), "completion": f" w{10 + words[0] % 3}"})
            )
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.more = more
        # Drawing for the first time finds fonts; and what is here now need not be looked through in every fork.
        list(curves.curves([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}], {}, 2))
        gc.collect()
        gc.freeze()

    def words(self, out: Path, *more: str) -> list[str]:
        """Returns the command line of a run that saves at every step."""
        return [
            *(
                "train",
                "complete",
                "--base",
                str(self.folder / "base"),
                "--data.train",
                str(self.folder / "rows.jsonl"),
            ),
            *("--out", str(out), "--lora.rank", "4", "--lora.dropout", "0.1", "--train.batch-size", "2"),
            *("--train.steps", str(self.steps), "--train.save-steps", "1", "--train.lr", "1e-2", "--train.warmup", "0"),
            *(*self.more, *more),
        ]

    def run(self, out: Path, *more: str, disk: atomicio.Disk | None = None, kill_after_s: float | None = None) -> Ended:
        """Returns how the command ended in a forked process, writing through `disk`."""

        def action() -> int:
            atomicio.disk = disk or atomicio.Disk()
            return cli.main(self.words(out, *more))

        return fork(action, self.folder / "said.txt", kill_after_s=kill_after_s)

    def finish(self, out: Path) -> Ended:
        """Returns how the run ended when it was gone on with, or begun anew where it had saved nothing yet."""
        places = out / train.CHECKPOINTS, out / "environment.json"
        if places[1].is_file() and not places[0].exists():
            # It was done to the last step but that of clearing up; the refusal to train again comes after that.
            ended = self.run(out, "--resume")
            return Ended(0 if ended.status == 2 and "already holds an adapter" in ended.said else 70, ended.said)
        return self.run(out, *(["--resume"] if found(places[0]) or is_trained(out) else []))


def fingerprints(out: Path) -> list[tuple[int, str]]:
    """Returns step and fingerprint of each line of the metrics that has one; a line cut short is left out."""
    told = []
    with contextlib.suppress(FileNotFoundError):
        for line in (out / logged.FILE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if "fingerprint" in found:
                    told.append((found["step"], found["fingerprint"]))
    return told


def litter(out: Path) -> list[Path]:
    """Returns what a killed run left that a restart should have removed."""
    return [path for pattern in LITTER for path in out.rglob(pattern)]

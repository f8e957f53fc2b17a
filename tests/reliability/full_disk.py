"""Runs on a disk that is full: at every call that writes, in turn, and on a real one of 3 MB.

    python -m tests.reliability.full_disk
    python -m tests.reliability.full_disk --every 25

At odd calls the disk has space again afterwards; at even ones it stays full. Then the disk is mended and the run is
gone on with, which must give the run that never met a full disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_ft import cli, train
from lora_ft.checkpoints import found
from lora_ft.errors import StorageError
from lora_ft.system import manifest
from tests.reliability.disks import Failing
from tests.reliability.forks import MEMORY, Ended, Place, fingerprints, fork, litter

# Less than the adapter of rank 40 has.
MOST_BYTES = 100_000


@dataclasses.dataclass
class Tally:
    """What came of the full disks."""

    calls: int = 0
    tried: int = 0
    went_on: int = 0
    """Runs that ended well all the same."""
    wrong: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"full at {self.tried} of {self.calls} calls: {self.went_on} runs ended well, {self.tried - self.went_on} "
            f"with one message; {len(self.wrong)} tracebacks, damaged checkpoints or runs that could not go on"
        )


def faults(ended: Ended, out: Path) -> str | None:
    """Returns what is wrong with a run that met a full disk, or None."""
    if ended.status not in (0, 1) or "Traceback" in ended.said:
        return f"status {ended.status}: {ended.said}"
    if ended.status == 1 and "No space left" not in ended.said and "free some space" not in ended.said:
        return f"the message does not say why: {ended.said}"
    for place in found(out / train.CHECKPOINTS):
        try:
            manifest.verify(place)
        except StorageError as error:
            return str(error)
    return None


def every_call(folder: Path, every: int = 1, first: int = 1) -> Tally:
    """Returns what came of a disk that is full at each `every`th call of a run."""
    place, told, whole = Place(folder, steps=3), folder / "calls.txt", folder / "whole"
    ended = place.run(whole, disk=Failing(0, told=told))
    assert ended.status == 0, ended.said
    tally = Tally(calls=int(told.read_text()))
    for at in range(first, tally.calls + 1, every):
        out = folder / "run"
        tally.tried += 1
        ended = place.run(out, disk=Failing(at, forever=at % 2 == 0))
        tally.went_on += ended.status == 0
        fault = faults(ended, out)
        if fault is None:
            ended = place.finish(out)
            if ended.status != 0 or fingerprints(out)[-1] != fingerprints(whole)[-1] or litter(out):
                fault = f"it could not go on: {ended}, {litter(out)}"
        if fault is not None:
            tally.wrong.append(f"call {at}: {fault}")
        shutil.rmtree(out)
    return tally


@contextmanager
def small_disk(folder: Path, size: str = "3m") -> Iterator[Path]:
    """Mounts a disk of that size in the block. Raises PermissionError where this process may not."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode != 0:
        raise PermissionError(done.stderr.decode().strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def on_small_disk(folder: Path) -> list[str]:
    """Returns what went wrong in a run on a disk of 3 MB, which has no room for all its checkpoints."""
    place, wrong = Place(folder, steps=5, more=("--lora.rank", "40")), []
    with small_disk(folder / "disk") as disk:
        out = disk / "run"
        ended = place.run(out)
        if ended.status != 0 or "Traceback" in ended.said or "IS NOT SAVED, training goes on" not in ended.said:
            wrong.append(f"it should train on without room for a checkpoint: {ended}")
        shutil.rmtree(out)
        (disk / "mine").write_bytes(bytes(shutil.disk_usage(disk).free - 150_000))
        ended = place.run(out)
        if (fault := faults(ended, out)) is not None or ended.status != 1:
            wrong.append(f"it should say that the adapter has no room: {fault or ended}")
        (disk / "mine").unlink()
        ended = place.finish(out)
        if ended.status != 0 or litter(out):
            wrong.append(f"it should go on once there is room: {ended}, {litter(out)}")
    return wrong


def with_small_files(folder: Path) -> list[str]:
    """Returns what went wrong in runs that the system lets write no large file, as a disk that is full lets none.

    For where no disk may be mounted: here too it is the system that fails the write, and not a test in its place.
    """
    place, wrong, out = Place(folder, steps=5, more=("--lora.rank", "40")), [], folder / "run"

    def action() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, MOST_BYTES))
        return cli.main(place.words(out))

    ended = fork(action, folder / "said.txt")
    if ended.status != 1 or "Traceback" in ended.said or "IS NOT SAVED, training goes on" not in ended.said:
        wrong.append(f"it should train on without checkpoints, and say that the adapter cannot be written: {ended}")
    if "adapter_model.safetensors" not in ended.said and "File too large" not in ended.said:
        wrong.append(f"it should say which file cannot be written, and why: {ended}")
    shutil.rmtree(out, ignore_errors=True)
    ended = place.run(out)
    if ended.status != 0 or litter(out):
        wrong.append(f"it should run once files may be large again: {ended}, {litter(out)}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        (Path(scratch) / "a").mkdir()
        (Path(scratch) / "b").mkdir()
        (Path(scratch) / "c").mkdir()
        tally = every_call(Path(scratch) / "a", options.every)
        print(tally)
        wrong = tally.wrong
        try:
            small = on_small_disk(Path(scratch) / "b")
            print(f"a real disk of 3 MB: {len(small)} faults")
            wrong += small
        except PermissionError as error:
            small = with_small_files(Path(scratch) / "c")
            print(
                f"files of at most {MOST_BYTES:,} bytes, for no disk may be mounted here ({error}): {len(small)} faults"
            )
            wrong += small
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()

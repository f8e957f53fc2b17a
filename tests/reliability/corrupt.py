"""Checkpoints and the record of their run's start, changed: flipped bits, cut ends, zeros; each must be seen.

    python -m tests.reliability.corrupt --count 1000

Beside it: how many of the same changes safetensors and JSON notice by themselves.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_ft import train
from lora_ft.checkpoints import found
from lora_ft.errors import StorageError
from lora_ft.system import manifest
from lora_ft.training import started
from tests.reliability.disks import Deadly
from tests.reliability.forks import MEMORY, Place


def changed(data: bytes, kind: str, rng: random.Random) -> bytes:
    """Returns the bytes of a file after a fault of a disk."""
    at = rng.randrange(len(data))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == "truncation":
        return data[:at]
    # What a crash leaves of blocks that were promised and never written.
    length = rng.randrange(1, len(data) - at + 1)
    return data[:at] + bytes(length) + data[at + length :]


def opens(file: Path) -> bool:
    """Returns whether the file's own format takes it."""
    try:
        load_file(file) if file.suffix == ".safetensors" else json.loads(file.read_bytes())
    except (SafetensorError, ValueError):
        return False
    return True


def seen(place: Path, count: int, seed: int = 0) -> tuple[collections.Counter, collections.Counter, list[str]]:
    """Returns how many changes of each kind were made, how many their formats took, and which were not seen."""
    rng = random.Random(seed)
    run = place.parent / started.FILE
    files = [*sorted(path for path in place.iterdir() if path.is_file()), run]
    made, taken, missed = collections.Counter(), collections.Counter(), []
    while made.total() < count:
        file, kind = files[made.total() % len(files)], rng.choice(["flip", "truncation", "zero-fill"])
        data = file.read_bytes()
        damaged = changed(data, kind, rng)
        if damaged == data:  # zeros over zeros
            continue
        file.write_bytes(damaged)
        made[kind] += 1
        taken[kind] += opens(file)
        try:
            manifest.read_sealed(run, started.LOST) if file == run else manifest.verify(place)
            missed.append(f"{kind} in {file.name}")
        except StorageError as error:
            if file.name not in str(error):
                missed.append(f"{kind} in {file.name} was told as: {error}")
        file.write_bytes(data)
    manifest.verify(place)
    return made, taken, missed


def checkpoint(folder: Path) -> Path:
    """Returns a checkpoint of a run that died in the second save."""
    place, out, size = Place(folder, steps=2), folder / "run", 0
    while not found(out / train.CHECKPOINTS):
        shutil.rmtree(out, ignore_errors=True)
        size += 1 << 15
        ended = place.run(out, disk=Deadly(size))
        assert ended.killed, ended.said
    return found(out / train.CHECKPOINTS)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        made, taken, missed = seen(checkpoint(Path(scratch)), options.count, options.seed)
    kinds = ", ".join(f"{count} {kind}s" for kind, count in sorted(made.items()))
    print(f"{made.total()} changes ({kinds}): {made.total() - len(missed)} detected and named")
    print(
        f"their own formats take {taken.total()} of them: " + ", ".join(f"{n} {k}s" for k, n in sorted(taken.items()))
    )
    if missed:
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()

"""All that is here, one after the other, in one process: `python -m tests.reliability [--small]`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.reliability import corrupt, full_disk, kill, resume, signals
from tests.reliability.forks import MEMORY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="few of each, for every test run")
    small = parser.parse_args().small
    kills, names, rivals, draws, every, changes = (6, 5, 2, 6, 40, 300) if small else (500, 500, 100, 50, 1, 1000)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        places = {
            name: Path(scratch) / name
            for name in ("kill", "evaluated", "resume", "full", "small", "files", "corrupt", "signals")
        }
        for place in places.values():
            place.mkdir()
        tally = kill.ours(places["kill"], kills)
        print(f"kill: {tally}", flush=True)
        wrong += [] if tally.clean else ["kill", *tally.notes]
        again = kill.evaluated(places["evaluated"], names)
        print(f"kill, from within an evaluation: {again}", flush=True)
        wrong += [] if again.clean else ["kill, from within an evaluation", *again.notes]
        print(f"kill, Trainer and PEFT: {kill.rival(places['kill'], rivals)}", flush=True)
        differing = resume.differing(places["resume"], draws)
        print(f"resume: {draws - len(differing)} of {draws} equal the run in one piece bit for bit", flush=True)
        full = full_disk.every_call(places["full"], every)
        print(f"full disk: {full}", flush=True)
        try:
            faults = full_disk.on_small_disk(places["small"])
            print(f"a real disk of 3 MB: {len(faults)} faults", flush=True)
        except PermissionError as error:
            faults = full_disk.with_small_files(places["files"])
            print(f"a real disk of 3 MB: may not be mounted here ({error}), so files of at most", end=" ")
            print(f"{full_disk.MOST_BYTES:,} bytes instead: {len(faults)} faults", flush=True)
        made, _, missed = corrupt.seen(corrupt.checkpoint(places["corrupt"]), changes)
        print(f"corrupt: {made.total() - len(missed)} of {made.total()} detected and named", flush=True)
        stopped = signals.faults(places["signals"])
        print(f"signals: {5 - len(stopped)} of 5 as they should", flush=True)
    wrong += [*differing, *full.wrong, *faults, *missed, *stopped]
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()

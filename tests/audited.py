"""A small training whose every write the interpreter tells of: `python -m tests.audited FOLDER` prints strange ones.

Unlike a look at the code this sees any way of writing that goes through Python. What libraries in Rust or C write by
themselves goes through `atomicio` because only it is given their names; `tests/reliability/planted.py` reads all files.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NAMES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.move")

# Files that have a reason to write for themselves, each with parts of paths that it may write to.
EXCEPTIONS = {
    # A lock that is never written to.
    "lora_ft/system/locks.py": ("/lora_ft-",),
    # What a process with limits prints.
    "lora_ft/foreign/cell.py": (os.devnull,),
    # What is compiled for this processor stays in the user's cache; the kernels know nothing of lora_ft.
    "lora_kernels/cpu/build.py": ("/cache/lora_kernels", "loops.o"),
    # Python's own, of what it compiled.
    "<frozen importlib._bootstrap_external>": ("__pycache__",),
    # The Trainer would make its folder, which is there.
    "transformers/trainer.py": ("/checkpoints",),
    # Pipes of a process that is started, and its null device.
    "/subprocess.py": (os.devnull,),
}


def frames(frame: FrameType | None) -> list[str]:
    """Returns the files of the code that is running, the innermost first."""
    found = []
    while frame is not None:
        found.append(frame.f_code.co_filename)
        frame = frame.f_back
    return found


class Hook:
    """Notes each write that no frame of `atomicio` stands behind, and that is no exception."""

    def __init__(self) -> None:
        self.strange: list[str] = []
        self.ours = 0
        self.on = False
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        writes = (event == "open" and isinstance(args[2], int) and args[2] & FLAGS) or event in NAMES
        if not self.on or not writes:
            return
        self.on = False
        try:
            path, files = str(args[0]), frames(sys._getframe(1))
            if any(file.endswith("lora_ft/system/atomicio.py") for file in files):
                self.ours += 1
            elif not self.excused(path, files):
                ours = next((file for file in files if "/lora_ft/" in file), files[0])
                self.strange.append(f"{event} {path} by {ours}")
        finally:
            self.on = True

    def excused(self, path: str, files: list[str]) -> bool:
        allowed = (parts for end, parts in EXCEPTIONS.items() if any(file.endswith(end) for file in files))
        return any(part in path for parts in allowed for part in parts)


def ways(folder: Path) -> dict[str, Callable[[], Any]]:
    """Returns ways to write that a look at the code passes over, to see that the hook does not."""
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

    target, mode = folder / "target", "w"
    target.write_text("x")
    handle = os.open(target, os.O_RDWR)
    return {
        "savefig": lambda: Figure().savefig(folder / "a.png"),
        "to_csv": lambda: pd.DataFrame([1]).to_csv(folder / "b.csv"),
        "ZipFile": lambda: zipfile.ZipFile(folder / "c.zip", "w").close(),
        "open with a mode of somewhere else": lambda: open(folder / "d", mode).close(),  # noqa: PTH123
        "FileHandler": lambda: logging.FileHandler(folder / "e.log").close(),
        "memmap": lambda: np.memmap(folder / "f", mode="w+", shape=4),
        "replace": lambda: target.replace(folder / "g"),
        "csv": lambda: csv.writer((folder / "h").open(mode)).writerow([1]),
        "fdopen": lambda: os.fdopen(os.open(folder / "i", os.O_WRONLY | os.O_CREAT), mode).close(),
        "truncate": lambda: os.truncate(handle, 0),
        "mkstemp": lambda: tempfile.mkstemp(dir=folder),
        "rmtree": lambda: shutil.rmtree(folder / "j"),
        "copy": lambda: shutil.copyfile(folder / "g", folder / "k"),
    }


def main(folder: Path) -> None:
    from lora_ft import cli
    from tests.reliability.forks import Place

    place, hook, unseen = Place(folder, steps=2, more=("--data.eval", "0.3", "--train.eval-steps", "1")), Hook(), []
    hook.on = True
    status = cli.main(place.words(folder / "run"))
    hook.on = False
    strange, hook.strange = hook.strange, []
    (folder / "j").mkdir()
    (folder / "j" / "x").write_text("x")
    for name, write in ways(folder).items():
        hook.on = True
        write()
        hook.on = False
        if not hook.strange:
            unseen.append(name)
        hook.strange.clear()
    print(json.dumps({"status": status, "ours": hook.ours, "strange": sorted(set(strange)), "unseen": unseen}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Disks that fail at the k-th call, or kill the process at the k-th byte; `atomicio` writes through one of them."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

from safetensors.torch import save

from lora_ft.system import atomicio

CALLS = ("make_folder", "put", "tensors", "library", "sync", "set_mode", "rename", "remove")

TAKES_SPACE = ("make_folder", "put", "tensors", "library")


class Failing(atomicio.Disk):
    """Fails at call number `at`, counted from 1, with `number`; with `at` 0 it only counts.

    Args:
        forever: what takes space fails from that call on; removing and renaming go through, as on a full disk.
        told: a file that always holds the number of calls, for another process.
    """

    def __init__(self, at: int, number: int = errno.ENOSPC, *, forever: bool = False, told: Path | None = None) -> None:
        self.at, self.number, self.forever, self.told, self.calls = at, number, forever, told, 0
        for name in CALLS:
            setattr(self, name, self._counted(getattr(self, name), name in TAKES_SPACE))

    def _counted(self, call, takes_space: bool):
        def counted(*args):
            self.calls += 1
            if self.told is not None:
                self.told.write_text(str(self.calls))
            if self.calls == self.at or (self.forever and takes_space and 0 < self.at < self.calls):
                raise OSError(self.number, os.strerror(self.number))
            return call(*args)

        return counted


class Deadly(atomicio.Disk):
    """Kills the process, as `kill -9` does, once so many bytes were written; counts what it writes.

    A rename counts as a byte, before and after it, so that the process also dies between files. Tensors are written
    by the test, for the library does it out of reach: under the final name within the draft, which is worse.

    Args:
        after: the bytes; `at_name`: instead of them, before or after which change of a checkpoint's name, counted from
            1, it dies.
    """

    def __init__(self, after: int | None, at_name: int | None = None) -> None:
        self.after, self.at_name, self.written, self.names = after, at_name, 0, 0

    def put(self, stream, data: bytes) -> None:
        if self.after is not None and self.written + len(data) >= self.after:
            super().put(stream, data[: self.after - self.written])
            self.die()
        super().put(stream, data)
        self.written += len(data)

    def tensors(self, path: Path, tensors, metadata) -> None:
        self.write(path, save(tensors, metadata))

    def rename(self, old: Path, new: Path) -> None:
        self.tick(old)
        super().rename(old, new)
        self.tick(old)

    def remove(self, path: Path) -> None:
        self.tick(path)
        if path.is_dir():
            for file in sorted(path.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
                self.tick(path)
        super().remove(path)

    def tick(self, path: Path) -> None:
        self.written += 1
        self.names += "checkpoint-" in path.name
        if (self.after is not None and self.written >= self.after) or self.names == self.at_name:
            self.die()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

"""The calls that put bytes and names on a disk; `atomicio` alone makes them, and a test may put others in place."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


class Disk:
    """The calls that change what is on the disk; each raises OSError where it fails."""

    def make_folder(self, path: Path) -> None:
        """Makes a folder and those above it, with the mode of the umask."""
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes, *, append: bool = False) -> None:
        """Writes a new file, or the end of one."""
        with path.open("ab" if append else "xb", buffering=0) as stream:
            for start in range(0, len(data), CHUNK):
                self.put(stream, data[start : start + CHUNK])

    def put(self, stream: io.FileIO, data: bytes) -> None:
        """Writes bytes to an open file."""
        rest = memoryview(data)
        while rest:
            rest = rest[stream.write(rest) :]

    def tensors(self, path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None) -> None:
        """Writes a safetensors file."""
        from safetensors.torch import save_file

        save_file(tensors, path, metadata=metadata)

    def library(self, folder: Path, writer: Callable[[Path], Any]) -> None:
        """Has a library write its files into a folder."""
        writer(folder)

    def sync(self, path: Path) -> None:
        """Waits until a file, or the list of names in a folder, is on the disk."""
        if path.is_dir() and os.name == "nt":
            return  # Windows keeps no handle to a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def set_mode(self, path: Path, mode: int) -> None:
        path.chmod(mode)

    def rename(self, old: Path, new: Path) -> None:
        """Gives a file or folder another name, in place of a file of that name."""
        old.replace(new)

    def remove(self, path: Path) -> None:
        """Removes a file, or a folder and all in it; what is not there is removed already."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def free_bytes(self, folder: Path) -> int:
        """Returns the bytes that may still be written where `folder` is, or will be."""
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

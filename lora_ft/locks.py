"""One run in a folder, and one on a GPU: locks that the system frees when their owner ends, however it ends.

The lock files lie in the cache of this user (`sources.cache_home`), so that no folder of a run holds one and nobody has
to delete any. A processor is no device in this sense: two runs on it are slow, but each is right and fits.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_ft import atomicio
from lora_ft.errors import BusyError, StorageError
from lora_ft.sources import cache_home

_held: set[Path] = set()


@contextmanager
def run_folder(out: Path) -> Iterator[None]:
    """Holds the folder of a run in the block. Raises BusyError, at once, where another process holds it."""
    name = hashlib.sha256(str(out.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    with _locked(f"run-{name}", f"the folder {out}", out):
        yield


@contextmanager
def gpu(identity: str | None, out: Path) -> Iterator[None]:
    """Holds a GPU in the block; none where `identity` is None. Raises BusyError, at once, where another run holds it.

    Args:
        identity: the uuid of the GPU, which is its own whatever other GPUs are hidden from the process.
        out: the folder of the run, for whoever is refused.
    """
    if identity is None:
        yield
        return
    with _locked(f"gpu-{identity}", f"the GPU {identity}", out):
        yield


@contextmanager
def _locked(name: str, what: str, out: Path) -> Iterator[None]:
    place = cache_home() / "locks" / name
    if place in _held:  # by this process, further out
        yield
        return
    owner = place.with_name(f"{name}.json")
    atomicio.make_folder(place.parent)
    # Nothing is ever written to the file itself, and it is never deleted: a lock on a deleted file holds nobody off.
    try:
        handle = os.open(place, os.O_RDONLY | os.O_CREAT, 0o666)
    except OSError as error:
        raise StorageError(
            f"{place}: cannot be made: {error.strerror}: free some space, or set LORA_FT_HOME."
        ) from None
    try:
        if not _lock(handle):
            raise BusyError(f"{what} is in use by {_told(owner)}: wait for it to end, or choose another.")
        atomicio.write_json(owner, {"pid": os.getpid(), "folder": str(out.resolve())})
        _held.add(place)
        try:
            yield
        finally:
            _held.discard(place)
            # Or a process that was forked in the block, and has the file open too, would hold it on.
            _unlock(handle)
    finally:
        os.close(handle)


def _told(owner: Path) -> str:
    try:
        said = json.loads(owner.read_text(encoding="utf-8"))
        return f"process {said['pid']}, which trains into {said['folder']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process, which has just begun"


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> bool:
        """Returns whether the lock was free, and is held now until `handle` is closed."""
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(handle: int) -> None:
        """Frees the lock."""
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _lock(handle: int) -> bool:
        """Returns whether the lock was free, and is held now until `handle` is closed."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(handle: int) -> None:
        """Frees the lock."""
        fcntl.flock(handle, fcntl.LOCK_UN)

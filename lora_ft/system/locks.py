"""One run in a folder, and one on a GPU: locks that the system frees when their owner ends, however it ends.

A folder is held by itself, so that whoever comes to it meets the lock, of any user and with any settings. A GPU is held
by a file that all processes of this user share, whatever their environment says; who holds what is written down beside
it. A processor is no device in this sense: two runs on it are slow, but each is right and fits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_ft.errors import BusyError, StorageError
from lora_ft.system import atomicio

log = logging.getLogger(__name__)

_held: set[tuple[int, str]] = set()
"""Thread and name of the locks that this process holds: neither another thread nor a forked process holds them."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)


@contextmanager
def run_folder(out: Path) -> Iterator[None]:
    """Holds the folder of a run in the block. Raises BusyError, at once, where another run holds it.

    It is made where it is not there yet, and removed at the end where nothing was put into it.
    """
    name = f"run-{hashlib.sha256(str(out.resolve()).encode('utf-8', 'surrogateescape')).hexdigest()[:32]}"
    with _locked(name, f"the folder {out}", out, in_place=sys.platform != "win32"):
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


def shared() -> Path:
    """Returns the folder that all processes of this user keep their locks in. Raises StorageError where it is not his.

    Neither HOME nor TMPDIR nor LORA_FT_HOME decides where it is: two processes need not have the same ones.
    """
    if sys.platform == "win32":
        return Path(tempfile.gettempdir()) / "lora_ft-locks"
    place = Path("/tmp") / f"lora_ft-{os.getuid()}"
    atomicio.make_folder(place)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StorageError(f"{place}: is not a folder of this user, so it cannot hold locks: have it removed.")
    if found.st_mode & 0o077:  # or others could hold a GPU that they do not use
        atomicio.keep_to_owner(place)
    return place


@contextmanager
def _locked(name: str, what: str, out: Path, *, in_place: bool = False) -> Iterator[None]:
    """Holds a lock in the block.

    Args:
        in_place: the folder `out` is the lock, where its file system can lock folders.
    """
    key = threading.get_ident(), name
    if key in _held:  # further out
        yield
        return
    owner = shared() / f"{name}.json"
    atomicio.make_folder(owner.parent)
    made = in_place and not os.path.lexists(out)
    handle = _folder_locked(out, what, owner) if in_place else None
    if handle is None:
        handle = _opened(owner.with_suffix(""))
        if not _lock(handle):
            os.close(handle)
            raise BusyError(f"{what} is in use by {_told(owner)}: wait for it to end, or choose another.")
    try:
        atomicio.write_json(owner, {"pid": os.getpid(), "folder": str(out.resolve())})
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)
            if made:
                atomicio.remove_empty(out)
    finally:
        # Or a process that was forked in the block, and has the file open too, would hold it on.
        _unlock(handle)
        os.close(handle)


def _folder_locked(out: Path, what: str, owner: Path) -> int | None:
    """Returns the handle of a folder that is locked now; None where its file system locks no folders."""
    while True:
        if out.is_file():
            return None  # whoever writes there says so
        atomicio.make_folder(out)
        handle = _opened(out)
        try:
            free = _lock(handle)
        except OSError as error:
            os.close(handle)
            log.info("%s cannot be locked itself (%s): only processes of this user are held off", out, error.strerror)
            return None
        if not free:
            os.close(handle)
            raise BusyError(f"{what} is in use by {_told(owner)}: wait for it to end, or choose another.")
        try:
            if os.path.samestat(os.fstat(handle), out.stat()):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)  # it was removed between the two


def _opened(place: Path) -> int:
    # Nothing is ever written to a lock file, and it is never deleted: a lock on a deleted file holds nobody off.
    try:
        return os.open(place, os.O_RDONLY | (0 if place.is_dir() else os.O_CREAT), 0o666)
    except OSError as error:
        raise StorageError(
            f"{place}: cannot be locked: {error.strerror}: see that it may be read, and free some space."
        ) from None


def _told(owner: Path) -> str:
    try:
        said = json.loads(owner.read_text(encoding="utf-8"))
        return f"process {said['pid']}, which trains into {said['folder']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process, which has just begun or is another user's"


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

"""Every file that lora_ft writes: whole or not there at all, whatever stops the program or fills the disk.

A file is written under another name beside its place, brought to the disk and renamed. So is a folder, whose last file
may be a manifest of the sizes and digests of the others: a rename says that all was written, digests that it still is
what was written. Nothing else in the library opens a file for writing, so that a test can count these calls, have one
fail, or stop at any byte.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_ft.errors import StorageError
from lora_ft.system import manifest
from lora_ft.system.disk import CHUNK, Disk
from lora_ft.system.redaction import redacted

# Names of what was being written, deleted, or exchanged for a new one, when a program was killed.
DRAFT, DOOMED, OLD = ".tmp-", ".del-", ".old-"
LEFT = re.compile(rf"({'|'.join(map(re.escape, (DRAFT, DOOMED, OLD)))})(.+)-[0-9a-f]{{8}}")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


disk = Disk()
"""What all calls go through; a test puts another in its place."""


def write(path: Path, content: str | bytes) -> None:
    """Writes a whole file, in place of the one that is there. Raises StorageError, which leaves that one as it was."""
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    with _replacing(path) as fresh, _told(path):
        disk.write(fresh, data)


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Writes a JSON file without any secrets in it, as `write` does."""
    write(path, _json(value, sort_keys))


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that holds a digest of itself, without any secrets in it, as `write` does."""
    write(path, manifest.sealed({"format": manifest.FORMAT, "content": json.loads(redacted(json.dumps(content)))}))


def append(path: Path, line: str) -> None:
    """Writes one line at the end of a file; a crash may leave the last line cut short. Raises StorageError."""
    with _told(path):
        disk.write(path, f"{line}\n".encode(), append=True)


@contextmanager
def growing(path: Path) -> Iterator[Callable[[str], None]]:
    """Yields what writes text at the end of a new file, which is at `path` once the block succeeds, else nowhere.

    Raises:
        StorageError: it cannot be written.
    """
    with _replacing(path) as fresh:

        def more(text: str) -> None:
            with _told(path):
                disk.write(fresh, text.encode("utf-8"), append=True)

        more("")
        yield more


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields the place of a new file, which takes that of `path` once the block succeeds and is gone if it does not."""
    fresh = _beside(path)
    try:
        with _told(path):
            _make_folder(path.parent)
        yield fresh
        with _told(path):
            disk.sync(fresh)
            disk.rename(fresh, path)
    except BaseException:
        _forget(fresh)
        raise
    with _told(path):
        disk.sync(path.parent)


def by_library(path: Path, writer: Callable[[Path], Any]) -> int:
    """Returns the bytes of a whole new file that `writer`, a library's, writes; it is given the place to write to.

    Raises StorageError.
    """
    with draft(path) as made:
        made.library(lambda folder: writer(folder / path.name))
        with _told(path):
            disk.set_mode(made.path / path.name, made.mode)
            disk.sync(made.path / path.name)
            disk.rename(made.path / path.name, path)
            disk.sync(path.parent)
    return path.stat().st_size


class Draft:
    """A folder that is being written. It is nothing to anybody until `commit` gives it its name.

    Its methods raise StorageError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            make_folder(path)
        except BaseException:
            _forget(path)
            raise
        self.mode = path.stat().st_mode & 0o666

    def write(self, name: str, content: str | bytes) -> None:
        """Writes one file."""
        with _told(self.path / name):
            disk.remove(self.path / name)
            disk.write(self.path / name, content if isinstance(content, bytes) else content.encode("utf-8"))

    def write_json(self, name: str, value: Any, *, sort_keys: bool = False) -> None:
        """Writes one JSON file, without any secrets in it."""
        self.write(name, _json(value, sort_keys))

    def write_files(self, files: dict[str, Any]) -> None:
        """Writes JSON files by their names, some of which may be of a folder in this one."""
        for name, value in files.items():
            make_folder((self.path / name).parent)
            self.write_json(name, value)

    def tensors(self, name: str, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
        """Writes one safetensors file."""
        with _told(self.path / name):
            disk.tensors(self.path / name, tensors, metadata)

    def append(self, name: str, data: bytes) -> None:
        """Writes bytes at the end of one file, which is made where it is not there."""
        with _told(self.path / name):
            disk.write(self.path / name, data, append=True)

    def copy(self, file: Path, name: str | None = None) -> None:
        """Writes a copy of a file, under its own name or another, behind what the draft has under it."""
        with file.open("rb") as source:
            self.append(name or file.name, b"")
            while chunk := source.read(CHUNK):
                self.append(name or file.name, chunk)

    def remove(self, name: str) -> None:
        """Removes one file, which need not be there."""
        with _told(self.path / name):
            disk.remove(self.path / name)

    def library(self, writer: Callable[[Path], Any]) -> None:
        """Has `writer`, a library's, write its files into the folder that it is given."""
        with _told(self.path):
            disk.library(self.path, writer)

    def commit(self, place: Path, facts: dict[str, Any] | None = None, *, exchange: bool = False) -> None:
        """Brings all files to the disk, and then the folder to `place`, which may be an empty folder.

        Args:
            facts: what the manifest is to say besides its list of files; without them none is written.
            exchange: the folder that is there makes room, once this one is whole on the disk. Killed between the two
                renames, `sweep` gives that one its name back.

        Raises:
            StorageError: also where a folder is there that is not empty, and was not to be exchanged.
        """
        with _told(place):
            for file in manifest.files_of(self.path):
                # Some libraries make files that only their owner may read, whatever the umask.
                disk.set_mode(file, self.mode)
                disk.sync(file)
            if facts is not None:
                disk.write(self.path / manifest.NAME, manifest.made_of(self.path, facts))
                disk.sync(self.path / manifest.NAME)
            for inner in sorted((path for path in self.path.rglob("*") if path.is_dir()), reverse=True):
                disk.sync(inner)
            disk.sync(self.path)
            if exchange and place.exists():
                self._exchange(place)
                return
            if _is_taken(place):
                raise StorageError(
                    f"{place}: is there already, and stays as it is: remove it, or choose another place."
                )
            disk.rename(self.path, place)
            disk.sync(place.parent)

    def _exchange(self, place: Path) -> None:
        old = place.with_name(f"{OLD}{place.name}-{secrets.token_hex(4)}")
        disk.rename(place, old)
        try:
            disk.rename(self.path, place)
        except OSError:
            with suppress(OSError):
                disk.rename(old, place)
            raise
        disk.sync(place.parent)
        _forget(old)

    def discard(self) -> None:
        """Removes what was not committed."""
        _forget(self.path)


@contextmanager
def draft(place: Path) -> Iterator[Draft]:
    """Yields a draft beside `place`; what the block has not committed is removed after it."""
    made = Draft(_beside(place))
    try:
        yield made
    finally:
        made.discard()


@contextmanager
def folder(place: Path, facts: dict[str, Any] | None = None) -> Iterator[Draft]:
    """Yields a draft that becomes `place` once the block succeeds, as `Draft.commit` does it."""
    with draft(place) as made:
        yield made
        made.commit(place, facts)


@contextmanager
def cached(place: Path) -> Iterator[Draft]:
    """Yields a draft as `folder` does. Where another process has made `place` in the meantime, that one stays."""
    with draft(place) as made:
        yield made
        try:
            made.commit(place)
        except StorageError:
            if not _is_taken(place):
                raise


def move_in(staged: Path, place: Path, *, last: str) -> None:
    """Moves the files of a folder that `Draft.commit` made, with a manifest, into `place`, `last` as the last of them.

    May be cut short and called again: what has been moved is known by its digest.

    Raises:
        StorageError: a file is neither in `staged` nor in `place` as it was written, is reached through a link, or
            cannot be moved.
    """
    files = manifest.read(staged)["files"]
    for name in files:
        manifest.refuse_way_out(place, name)
    for name in sorted(files, key=lambda name: (name == last, name)):
        if manifest.damage_of(staged / name, files[name]) is None:
            with _told(place / name):
                _make_folder((place / name).parent)
                disk.rename(staged / name, place / name)
                disk.sync((place / name).parent)
        elif (damage := manifest.damage_of(place / name, files[name])) is not None:
            raise StorageError(f"{place / name} {damage}, and {staged.name} holds no whole copy: the disk lost it.")
    remove(staged)


def make_folder(place: Path) -> None:
    """Makes a folder, and those above it, unless it is there; their names are on the disk then. Raises StorageError."""
    with _told(place):
        _make_folder(place)


def keep_to_owner(place: Path) -> None:
    """Lets nobody but its owner into a folder. Raises StorageError."""
    with _told(place):
        disk.set_mode(place, 0o700)


def remove_empty(place: Path) -> None:
    """Removes a folder that nothing is in; any other stays."""
    if place.is_dir() and not any(place.iterdir()):
        with suppress(OSError):
            place.rmdir()


def free_bytes(place: Path) -> int:
    """Returns the bytes that may still be written where `place` is, or will be."""
    return disk.free_bytes(place)


def remove(place: Path) -> None:
    """Removes a folder: its name first, so that it is never found with some of its files gone."""
    doomed = place.with_name(f"{DOOMED}{place.name}-{secrets.token_hex(4)}")
    with _told(place):
        disk.rename(place, doomed)
        disk.remove(doomed)


def set_aside(place: Path, ending: str = "corrupt") -> Path:
    """Returns the name with an ending that a folder was given, so that nothing takes it for what it was."""
    names = (place.with_name(f"{place.name}{more}.{ending}") for more in ("", *(f".{i}" for i in range(2, 1000))))
    other = next(name for name in names if not name.exists())
    with _told(place):
        disk.rename(place, other)
        disk.sync(place.parent)
    return other


def sweep(place: Path, names: str = ".+") -> None:
    """Removes what programs that were killed have left half written or half deleted in a folder.

    What was to make room for a new one, and has none, gets its name back.

    Args:
        names: a regular expression of the names that were being written; what has none of ours is left alone.
    """
    for path in place.glob(".*"):
        left = LEFT.fullmatch(path.name)
        if left is None or not re.fullmatch(names, left[2]):
            continue
        with _told(path):
            if left[1] == OLD and not (place / left[2]).exists():
                disk.rename(path, place / left[2])
            else:
                disk.remove(path)


def _make_folder(place: Path) -> None:
    made = [path for path in (place, *place.parents) if not path.exists()]
    disk.make_folder(place)
    for path in reversed(made):
        disk.sync(path.parent)


def _json(value: Any, sort_keys: bool) -> str:
    return redacted(json.dumps(value, indent=2, sort_keys=sort_keys)) + "\n"


def _beside(path: Path) -> Path:
    return path.with_name(f"{DRAFT}{path.name}-{secrets.token_hex(4)}")


def _is_taken(place: Path) -> bool:
    return place.is_dir() and any(place.iterdir())


def _forget(path: Path) -> None:
    """Removes what was being written; where even that fails, the next `sweep` does it."""
    with suppress(OSError):
        if path.exists():
            disk.remove(path)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns a failed write into an error that names the place and the remedy."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        full = number in FULL
        remedy = "free some space, then go on" if full else "see that the folder may be written to"
        told = StorageError(f"{path}: cannot be written: {os.strerror(number)}: {remedy}.")
        told.full = full
        raise told from None


def _errno(error: Exception) -> int | None:
    """Returns the number of a failed system call; libraries in Rust raise errors of their own, with it in the text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None

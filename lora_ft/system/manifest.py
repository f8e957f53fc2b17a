"""What a committed folder or a sealed file says of itself, with a digest of each byte: written, read, compared."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lora_ft.errors import StorageError
from lora_ft.foreign.files import bytes_of, is_plain_name
from lora_ft.foreign.strictjson import bare, quoted

NAME = "manifest.json"
FORMAT = 1
MAX_SEALED_BYTES = 16 << 20
# 200 bytes a file, and a folder of ours holds a few dozen.
MAX_BYTES = 1 << 20


def made_of(place: Path, facts: dict[str, Any]) -> bytes:
    """Returns the manifest of the files in a folder: `facts`, and the size in bytes and sha256 of each."""
    files = {
        path.relative_to(place).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files_of(place)
    }
    return sealed({"format": FORMAT, "facts": facts, "files": files})


def _is_list_of_files(files: Any) -> bool:
    """Returns whether it is an object of names, each with size and digest."""
    return isinstance(files, dict) and all(
        isinstance(kept, dict)
        and kept.keys() == {"bytes", "sha256"}
        and type(kept["bytes"]) is int
        and isinstance(kept["sha256"], str)
        for kept in files.values()
    )


def refuse_way_out(place: Path, name: str) -> None:
    """Raises StorageError where a name, as a manifest writes it, leads out of `place` or goes through a link."""
    if not all(map(is_plain_name, name.split("/"))):
        raise StorageError(
            f"{place / NAME}: names {quoted(name)}, which is no file in its folder: it was made to deceive; "
            "delete the folder."
        )
    inner = place
    for part in name.split("/"):
        inner = inner / part
        if inner.is_symlink():
            raise StorageError(
                f"{inner}: it is a link, to what may be no part of the folder: put the file itself there."
            )


def sealed(content: dict[str, Any]) -> bytes:
    """Returns the bytes of a manifest, which hold a digest of themselves: no bit of them can change unseen."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def damage_of(path: Path, kept: dict[str, Any]) -> str | None:
    """Returns what is wrong with a file, or None where it is as the manifest has it. Raises OSError."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    if not path.is_file():
        return "is no file"
    if size != kept["bytes"]:
        return f"has {size} bytes, not {kept['bytes']}"
    return None if _sha256(path) == kept["sha256"] else "has the right size but other bytes than were written"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_of(place: Path) -> list[Path]:
    """Returns all files below a folder, in the order of their names."""
    return sorted(path for path in place.rglob("*") if path.is_file())


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """Returns what `atomicio.write_sealed` wrote.

    Raises:
        StorageError: it is not as it was written, which ends in `remedy`, or cannot be read.
    """
    try:
        if path.stat().st_size > MAX_SEALED_BYTES:
            raise StorageError.of_damage(f"{path}: is larger than {MAX_SEALED_BYTES:,} bytes; {remedy}")
        data = path.read_bytes()
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: cannot be read: {error.strerror}.") from None
    try:
        found = json.loads(data)
        whole = sealed({key: value for key, value in found.items() if key != "sha256"}) == data
    except (ValueError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise StorageError.of_damage(f"{path}: is not as it was written: its own digest differs; {remedy}")
    if found.get("format") != FORMAT:
        raise StorageError(f"{path}: has format {bare(str(found.get('format')))}; this version reads format {FORMAT}.")
    if not isinstance(found.get("content"), dict):
        raise StorageError(f"{path}: holds no object: it was not written by lora-ft.")
    return found["content"]


def read(place: Path) -> dict[str, Any]:
    """Returns the manifest of a committed folder, whose names are all of files in it.

    Raises:
        StorageError: it is not as it was written, or names what is not in the folder or is reached through a link.
            Anybody can write a manifest with the right digest.
    """
    file = place / NAME
    if not os.path.lexists(file):
        raise StorageError(f"{file}: is not there, so nothing says that the folder is whole.")
    refuse_way_out(place, NAME)
    found = parsed(bytes_of(file, MAX_BYTES, StorageError), file)
    for name in found["files"]:
        refuse_way_out(place, name)
    return found


def parsed(data: bytes, file: Path) -> dict[str, Any]:
    """Returns the manifest of these bytes, whose names may be any. Raises StorageError where it is not as written.

    Args:
        file: what the error calls it.
    """
    try:
        found = json.loads(data)
        whole = sealed({key: value for key, value in found.items() if key != "sha256"}) == data
    except (ValueError, AttributeError, RecursionError) as error:
        raise StorageError.of_damage(f"{file}: cannot be read: {error}.") from None
    if not whole:
        raise StorageError.of_damage(f"{file}: is not as it was written: its own digest differs.")
    if found.get("format") != FORMAT:
        raise StorageError(f"{file}: has format {bare(str(found.get('format')))}; this version reads format {FORMAT}.")
    if not isinstance(found.get("facts"), dict) or not _is_list_of_files(found.get("files")):
        raise StorageError(f"{file}: holds no facts, or no sizes and digests of files: it was not written by lora-ft.")
    return found


def verify(place: Path) -> dict[str, Any]:
    """Returns the facts in the manifest of a folder, every file of which has the size and sha256 written there.

    Raises:
        StorageError: names each file that is missing or is not as it was written, which is `damaged`, or that cannot
            be read.
    """
    manifest, damages, unread = read(place), [], []
    for name, kept in manifest["files"].items():
        try:
            damage = damage_of(place / name, kept)
        except OSError as error:
            unread.append(f"{name} cannot be read: {error.strerror}")
        else:
            damages += [f"{name} {damage}"] if damage else []
    if damages or unread:
        told = StorageError(f"{place}: {'; '.join(damages + unread)}.")
        told.damaged = bool(damages)
        raise told
    return manifest["facts"]

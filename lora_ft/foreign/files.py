"""Files of a folder that others made: small enough, whole, and in the folder that they seem to be in."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_ft.errors import LoraFtError
from lora_ft.foreign.strictjson import JsonError, flaws, loads

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
"""Endings of files that can run code when they are opened; none is ever opened, whatever else the folder holds."""
WHY_NO_PICKLE = "a pickle, which can run code when opened"

KB, MB = 2**10, 2**20
# Under these lie the largest of the hub: configurations some 100 KB, tokenizers 35 MB.
MAX_CONFIG_BYTES = 4 * MB
MAX_TOKENIZER_BYTES = 128 * MB


def bytes_of(path: Path, most_bytes: int, error: type[LoraFtError]) -> bytes:
    """Returns the bytes of a file. Raises `error` where it is no plain file, or too large."""
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path}: it is no plain file.")
        size = path.stat().st_size
        if size > most_bytes:
            raise error(f"{path}: it has {size:,} bytes; such a file has {most_bytes:,} at most.")
        return path.read_bytes()
    except OSError as why:
        # Also an error of ours that is one of the system's kind.
        if isinstance(why, LoraFtError):
            raise
        raise error(f"{path}: cannot be read: {why.strerror or why}.") from None


def text_of(path: Path, most_bytes: int, error: type[LoraFtError]) -> str:
    """Returns the text of a file. Raises `error` where it is no plain file, too large or not UTF-8."""
    try:
        return bytes_of(path, most_bytes, error).decode()
    except UnicodeDecodeError as why:
        raise error(f"{path}: cannot be read: byte {why.start + 1} is not UTF-8.") from None


def object_of(
    path: Path, error: type[LoraFtError], most_bytes: int = MAX_CONFIG_BYTES, any_number: bool = False
) -> dict[str, Any]:
    """Returns the one JSON object in a file.

    Args:
        error: what to raise where the file is too large, is not JSON, has a key twice or is nested too deep.
        any_number: whether infinities and whole numbers beyond 64 bits may stand in it.
    """
    try:
        value = loads(text_of(path, most_bytes, error), any_number)
    except JsonError as why:
        raise error(f"{path}: cannot be read: {why}.") from None
    if not isinstance(value, dict):
        raise error(f"{path}: it holds a {type(value).__name__}, not an object.")
    if flaw := next(flaws(value), None):
        place, what = flaw
        raise error(f"{path}: cannot be read: {place or 'it'} {what}.")
    return value


def refuse_links_out(folder: Path, error: type[LoraFtError]) -> None:
    """Raises `error` where a file is a link out of its folder, which would pass for the folder's own.

    The hub's cache keeps the files of all commits of a repository in one folder, and links to them.
    """
    if not folder.is_dir():
        raise error(f"{folder}: there is no such folder.")
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in _links(folder):
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(place) for place in homes):
            raise error(
                f"{folder.name}: {path.relative_to(folder)} is a link out of the folder, to a file that is not part "
                "of it: put the file itself in its place."
            )


def _links(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            yield path
        elif path.is_dir():
            yield from (inner for inner in sorted(path.iterdir()) if inner.is_symlink())


def is_plain_name(name: Any) -> bool:
    """Returns whether `name` can only be a file in the folder that is looked in."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name.isprintable()
        and not set(name) & set("/\\:")
        and name not in (".", "..")
    )

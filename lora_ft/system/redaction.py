"""Secrets taken out of what is printed, logged or written.

Tokens come from the environment or from the hub's own store, never from an option; so whatever of them stands in a
text got there by accident, such as the address of a mirror in a library's error.
"""

from __future__ import annotations

import base64
import html
import json
import linecache
import logging
import ntpath
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any
from urllib.parse import quote

HIDDEN = "[redacted]"

NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
"""Environment variables whose values are secret."""
PLACES = re.compile(r"_(PATH|FILE|DIR|HOME)$", re.IGNORECASE)
"""Those of them that say where a secret is kept, not what it is."""
# TOKENIZERS_PARALLELISM=false holds none, and no secret worth the name is shorter.
LEAST_CHARS = 8

SHAPES = re.compile(
    r"\b(?:hf|api_org|gh[opsu]|github_pat)_[A-Za-z0-9_]{16,}"  # hub, GitHub
    r"|\bsk-[A-Za-z0-9_-]{16,}"  # OpenAI and those who write theirs alike
    r"|(?<=\bBearer )[A-Za-z0-9._~+/-]{16,}=*"
)
"""What a secret looks like wherever it came from."""
ADDRESS = re.compile(r"(?<=://)(?:[^\s/@:\"'<>]*:[^\s\"'<>]*|[^\s/@\"'<>]+)(?=@)")
"""The user and password in an address: up to the last `@`, for a password may hold one, or a slash."""
BASIC = re.compile(r"(?<=\bBasic )[A-Za-z0-9+/_-]{8,}=*")
"""A user and password in a header, which anybody can decode."""


def redacted(text: str) -> str:
    """Returns `text` with `[redacted]` in place of every secret that is in it."""
    for secret in _known():
        if secret in text:
            text = text.replace(secret, HIDDEN)
    return ADDRESS.sub(HIDDEN, BASIC.sub(HIDDEN, SHAPES.sub(HIDDEN, text)))


def holds_secret(text: str) -> bool:
    """Returns whether any part of `text` is, or looks like, a secret."""
    return redacted(text) != text


def portable(name: str) -> str:
    """Returns a name as others may read it: of a path that leads out of the current folder its last part alone."""
    if PurePosixPath(name).is_absolute():
        return PurePosixPath(name).name
    # Takes both kinds of slashes.
    inner = ntpath.normpath(name)
    if PureWindowsPath(name).is_absolute() or inner.startswith("..\\") or (name.startswith("~") and "\\" in inner):
        return PureWindowsPath(inner).name
    return "." if inner == ".." else name


def install() -> None:
    """Takes secrets out of every log record, warning and uncaught error of this process, whatever library it is of."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        return _cleaned(made)

    record.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)
    sys.excepthook = _print_error
    threading.excepthook = lambda args: _print_error(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = _print_unraisable
    shown = warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        # Also the line of source, which `formatwarning` reads where it is given none.
        line = linecache.getline(filename, lineno).strip() if line is None else line
        shown(redacted(str(message)), category, filename, lineno, file, redacted(line))

    warnings.showwarning = show


class RedactingFilter(logging.Filter):
    """Takes secrets out of the records of one logger or handler, for programs that keep their own logging."""

    def filter(self, record: logging.LogRecord) -> bool:
        _cleaned(record)
        return True


def _cleaned(record: logging.LogRecord) -> logging.LogRecord:
    try:
        said = record.getMessage()
    except (TypeError, ValueError):  # a wrong format is the handler's to report
        said = f"{record.msg} {record.args}"
    clean = redacted(said)
    if clean != said:
        record.msg, record.args = clean, None
    if record.exc_info and record.exc_info[0]:
        # A formatter takes this text where it is set, and makes none of its own.
        record.exc_text = redacted("".join(traceback.format_exception(*record.exc_info)).rstrip())
    return record


def _print_error(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _print_unraisable(args: Any) -> None:
    """Prints an error that nobody can catch, as of `__del__`."""
    where = f"{args.err_msg or 'Exception ignored in'}: {args.object!r}\n"
    told = "".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback))
    print(redacted(where + told), end="", file=sys.stderr)


def _known() -> Iterator[str]:
    """Yields the secrets of this machine as they can stand in texts of several kinds."""
    values = {v.strip() for n, v in os.environ.items() if NAMES.search(n) and not PLACES.search(n)}
    # Mirrors, package indexes and proxies are told with a password in their address.
    values |= {
        login.partition(":")[2] or login for v in os.environ.values() if "@" in v for login in ADDRESS.findall(v)
    }
    for value in sorted(values | {_stored(_store())}, key=len, reverse=True):
        if len(value) >= LEAST_CHARS and not _is_place(value):
            yield from dict.fromkeys((value, json.dumps(value)[1:-1], html.escape(value), quote(value, safe="")))
            yield from _in_base64(value)


@cache
def _in_base64(value: str) -> list[str]:
    """Returns what in base64 can only be of a secret, wherever in a longer text it begins, such as `user:token`.

    Three bytes are four characters, so there are three ways of it; the characters at its ends hold bits of what is
    around it, too.
    """
    raw, found = value.encode("utf-8", "surrogatepass"), []
    for before in range(3):
        text = base64.b64encode(bytes(before) + raw).decode()
        first, last = (0, 2, 3)[before], len(text.rstrip("=")) - bool((before + len(raw)) % 3)
        found += [text[first:last], text[first:last].replace("+", "-").replace("/", "_")]
    return found


def _store() -> Path:
    """Returns the file in which huggingface_hub keeps the token of `hf auth login`."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
    return Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")


@cache
def _is_place(value: str) -> bool:
    """Returns whether a value names a file or folder: a variable of any name may."""
    try:
        return os.path.exists(value)  # noqa: PTH110 - takes any text, whatever it holds
    except ValueError:
        return False


@cache
def _stored(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""

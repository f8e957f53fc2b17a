"""Runs programs that a model wrote beside tests, in processes that can do no more than compute, for a while."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from lora_ft.errors import ConfigError
from lora_ft.system import allowance

log = logging.getLogger(__name__)

# Processor time for a program and its tests.
SECONDS = 5
# The limit of processor time ends what is busy; this one ends what waits. Generous, for the machine may be busy.
PATIENCE_S = 20.0
MEMORY_BYTES = 512 * 2**20
FILE_BYTES = 2**20
# Of all files of a program together, and how many there may be; looked at so often.
FOLDER_BYTES, FOLDER_FILES = 2**24, 256
WATCH_S = 0.05
CAGED = Path(__file__).with_name("caged.py")


def passed(programs: Sequence[tuple[str, str]]) -> list[bool]:
    """Returns of each pair of a program and its tests whether the tests ran to their end, and none failed.

    The program is run as a module called `reply`, the tests after it with its names, and then what they define as
    `test_...`. That a process ends well proves nothing, for a program can end it: a pass is a token, other each time,
    that `caged` is given to read after the last test. A program that looks for it in its own process would find it.
    """
    with ThreadPoolExecutor(allowance.cores()) as pool:
        return list(pool.map(lambda pair: _run(*pair)[0], programs))


def require(*, closed: bool = False) -> None:
    """Says what this system cannot keep programs from.

    Args:
        closed: whether that is refused, as where nobody has asked for programs to be run.

    Raises:
        ConfigError: this system runs no program, or not `closed`.
    """
    open_to = _open_to()
    if open_to and closed:
        raise ConfigError(
            f"reason.reward unit_tests: this system cannot keep the programs of replies from {', '.join(open_to)}, and "
            "the adapter's folder alone names this reward: measure on a Linux with Landlock and seccomp, or "
            "call `reward.require` of the loaded task in Python."
        )
    if open_to:
        log.warning("this system cannot keep the programs of replies from %s: run in a container", ", ".join(open_to))


@cache
def _open_to() -> tuple[str, ...]:
    """Returns what this system cannot keep programs from. Raises ConfigError where it runs none."""
    well, open_to = _run("def one():\n    return 1", "assert one() == 1")
    if not well or _run("", "assert False")[0]:
        raise ConfigError(
            "reason.reward unit_tests: this machine runs no Python program within limits, so no reply could pass; see "
            f"what `{sys.executable} -I {CAGED.name}` says, or use another reward."
        )
    return tuple(open_to)


def _run(code: str, tests: str) -> tuple[bool, list[str]]:
    """Returns whether the tests passed, and what the system could not keep the program from."""
    token = secrets.token_hex(16).encode()
    asked = {"code": code, "tests": tests, "seconds": SECONDS, "memory_bytes": MEMORY_BYTES, "file_bytes": FILE_BYTES}
    with contextlib.ExitStack() as stack:
        # What a program makes unreadable is left to the system that empties the folder of temporary files.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-ft-", ignore_cleanup_errors=True))
        (tells, token_out), (verdict, told) = os.pipe(), os.pipe()
        for end in (tells, token_out, verdict):
            stack.callback(os.close, end)
        os.write(token_out, token)
        words = stack.enter_context(tempfile.TemporaryFile())
        words.write(json.dumps(asked).encode("utf-8", "surrogatepass"))
        words.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", str(CAGED), str(tells), str(told)],
            stdin=words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, env={},
            pass_fds=(tells, told), start_new_session=True,
        )  # fmt: skip
        try:
            _wait(process, folder)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(told)
        # More than a line and a token is none of ours; a pipe holds 64 KiB, at which its writer waits and is ended.
        line, _, rest = os.read(verdict, 1 << 16).partition(b"\n")
    try:
        return rest == token, json.loads(line)
    except (ValueError, RecursionError):
        return False, []


def _wait(process: subprocess.Popen[bytes], folder: str) -> None:
    """Waits till a process has ended, was too slow or has filled its folder."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and not _is_full(folder):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(WATCH_S)
            return


def _is_full(folder: str) -> bool:
    """Returns whether files take more than they may, or cannot be looked at."""
    taken = count = 0
    folders = [folder]
    try:
        while folders:
            # A program deletes files and folders meanwhile.
            with contextlib.suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        taken += entry.stat(follow_symlinks=False).st_blocks * 512
                    count += 1
                    if taken > FOLDER_BYTES or count > FOLDER_FILES:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
    except OSError:
        return True
    return False

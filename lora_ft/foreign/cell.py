"""A process of its own for what a foreign file makes this program compute, with an end to its time and memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = Callable[[Any], Any]

MAX_ANSWER_BYTES = 64 * 2**20
# The limit of processor time ends a busy process; this one ends a process that waits, or runs where there is no such
# limit. Generous, for the machine may be busy with other work.
PATIENCE_S = 30.0


class StoppedError(Exception):
    """The process was ended for the time it took, or its answer refused; the text says why."""


class RaisedError(Exception):
    """What the question raised there: the text of that error."""


class Cell:
    """Answers questions with `answer` in a child process, one at a time; questions and answers are JSON.

    The child has no environment variables and no way to print. It is forked where that is safe, so that it starts in
    milliseconds with everything imported, and started anew after it was stopped.
    """

    def __init__(self, answer: Answer, *, seconds: float, memory_bytes: int) -> None:
        """
        Args:
            answer: a function of a module, since it may be imported again in the child.
            seconds: processor time for one question.
            memory_bytes: address space above what the process has at its start; held on Linux only.
        """
        self.answer, self.seconds, self.memory_bytes = answer, seconds, memory_bytes
        self._lock = threading.Lock()
        self._process: Any = None
        self._pipe: Any = None
        self._owner = 0

    def ask(self, question: Any) -> Any:
        """Returns the answer. Raises RaisedError where the question failed, StoppedError where it took too much."""
        told = _bytes_of(question)
        with self._lock:
            self._start()
            try:
                self._pipe.send_bytes(told)
                if not self._pipe.poll(PATIENCE_S + self.seconds):
                    raise EOFError
                kind, value = json.loads(self._pipe.recv_bytes())
            except (EOFError, OSError):
                self.close()
                raise StoppedError(f"takes more than {self.seconds:g} s") from None
        if kind == "answer":
            return value
        raise {"raised": RaisedError, "stopped": StoppedError}[kind](value)

    def close(self) -> None:
        """Ends the child; the next question starts another."""
        # A process that was forked off this one must not end its parent's child.
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = None

    def _start(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            return
        # Forking is safe beside the threads of torch and CUDA, as in a DataLoader, so long as the child uses neither.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(self.answer, theirs, self._pipe, self.seconds, self.memory_bytes), daemon=True
        )
        self._process.start()
        theirs.close()
        self._owner = os.getpid()


def _serve(answer: Answer, pipe: Any, parents: Any, seconds: float, memory_bytes: int) -> None:
    """Answers until the parent is gone."""
    parents.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent's own way of ending, which a fork brings along, would keep this process from ending at all.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    _limit(memory_bytes)
    while True:
        try:
            question = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        _count_down(seconds)
        try:
            told = _bytes_of(["answer", answer(question)])
            if len(told) > MAX_ANSWER_BYTES:
                told = _bytes_of(["stopped", f"gives more than {MAX_ANSWER_BYTES:,} bytes"])
        except MemoryError:
            told = _bytes_of(["stopped", f"takes more than {memory_bytes >> 20} MiB"])
        except RecursionError:
            told = _bytes_of(["raised", "it is nested too deep"])
        # Whatever a foreign file makes a library raise is its answer.
        except Exception as error:
            told = _bytes_of(["raised", str(error)[:2000]])
        _count_down(0)
        pipe.send_bytes(told)


def _bytes_of(value: Any) -> bytes:
    """Returns JSON, no longer than its text: an escape would take twice the bytes of a Chinese letter."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _limit(memory_bytes: int) -> None:
    """Ends the growth of this process above what it has, its writing of files and its dumps of memory."""
    if sys.platform != "linux":
        return
    import resource

    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    for which, value in (
        (resource.RLIMIT_AS, held + memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def _count_down(seconds: float) -> None:
    """Has the kernel end this process after so much processor time, even inside one call of a library; 0 stops it."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)

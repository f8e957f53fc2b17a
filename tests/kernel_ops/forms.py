"""The forms that an operation has: kernels, and on a CPU loops that are compiled for it, or torch's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from lora_kernels import backend
from lora_kernels.cpu import build, loops

ON_CPU = ("loops", "torch")
ALL = ("kernel", *ON_CPU)


@contextmanager
def computed_by(form: str) -> Iterator[set[str]]:
    """Runs the block with operations in one form; a test of loops is skipped where they cannot be compiled.

    Yields the names of the loops that have run.
    """
    ran: set[str] = set()
    if form == "kernel":
        with backend.triton_anywhere():
            yield ran
    elif form == "loops":
        made = build.library(torch.float32)
        if isinstance(made, str):
            pytest.skip(made)
        run = loops._run
        with mock.patch.object(loops, "_run", lambda name, *rest: (ran.add(name), run(name, *rest))):
            yield ran
    else:
        with mock.patch.object(loops, "takes", return_value=False):
            yield ran

"""What a hostile case is, and what all kinds of them are made with."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ADAPTER = "adapter_model.safetensors"
MODEL = "model.safetensors"


@dataclass(frozen=True)
class Good:
    """What every case starts from."""

    base: Path
    adapter: Path
    """Of that base."""
    canary: Path
    """What planted code makes; it must never be there."""
    run: Path = Path()
    """A run of that adapter, killed before its adapter was in its folder."""


@dataclass(frozen=True)
class Case:
    """One hostile thing: `make` turns a copy of the good one into it."""

    kind: str
    """adapter, base, template, config or run."""
    name: str
    make: Callable[[Path], None]
    phrase: str = ""
    """What the refusal must say, a regular expression, so that no other guard is taken for the one that is tried."""


class Bomb:
    """Pickled, it touches the canary when it is opened."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.canary}'",))


Made = Iterator[tuple[str, str, Callable[[Path], None]] | tuple[str, Callable[[Path], None]]]
Maker = Callable[[Good, random.Random, int], Made]
"""Yields names of cases, phrases of their refusals where `phrases` has none, and what makes them; the number is how
often it was asked before."""


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)

    return make


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def changed_tensors(file: str, how: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Returns what changes the tensors of a file, and keeps it a sound file."""

    def make(folder: Path) -> None:
        tensors = load_file(folder / file)
        how(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return make

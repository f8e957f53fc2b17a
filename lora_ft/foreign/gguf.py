"""The head of a GGUF file walked through before a library reads it: what it counts must be there.

The format: magic, version, number of tensors and of settings, the settings, the tensors' names, shapes and places
(github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from lora_ft.errors import LoraFtError

VERSIONS = (2, 3)
# Bytes of each kind of number; 8 is text, 9 a list.
NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, LIST = 8, 9
# A tokenizer of a million tokens has lists of as many; no model has so many tensors or settings.
MAX_COUNT = 100_000
MAX_LIST = 2_000_000
MAX_DIMENSIONS = 8


def check(file: Path, error: type[LoraFtError]) -> None:
    """Raises `error` where the file is not GGUF, or its head counts more than the file holds or a model has."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise error(f"{file}: not a GGUF file (it does not begin with GGUF).")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as held:
            try:
                _Head(held).walk()
            except (struct.error, ValueError) as why:
                told = "it ends in the middle of its head" if isinstance(why, struct.error) else why
                raise error(f"{file.name}: not a GGUF file, or damaged: {told}; fetch it again.") from None


class _Head:
    """A place in the file, moved on by what is read. Raises struct.error at its end, ValueError for what is wrong."""

    def __init__(self, held: mmap.mmap) -> None:
        self.held, self.at = held, 4

    def walk(self) -> None:
        version, tensors, settings = self.take("<IQQ")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, and {' and '.join(map(str, VERSIONS))} are read")
        if max(tensors, settings) > MAX_COUNT:
            raise ValueError(f"it counts {tensors:,} tensors and {settings:,} settings, and {MAX_COUNT:,} is the most")
        for _ in range(settings):
            self.text()
            self.value(self.take("<I")[0])
        for _ in range(tensors):
            self.text()
            (dimensions,) = self.take("<I")
            if dimensions > MAX_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions:,} dimensions")
            self.take(f"<{dimensions}QIQ")

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.held, self.at)
        self.at += struct.calcsize(form)
        return values

    def skip(self, count: int) -> None:
        if count > len(self.held) - self.at:
            raise ValueError(f"a value of {count:,} bytes is longer than the rest of the file")
        self.at += count

    def text(self) -> None:
        self.skip(self.take("<Q")[0])

    def value(self, kind: int) -> None:
        if kind == TEXT:
            self.text()
        elif kind in NUMBERS:
            self.skip(NUMBERS[kind])
        elif kind == LIST:
            inner, count = self.take("<IQ")
            if count > MAX_LIST:
                raise ValueError(f"a list has {count:,} values, and {MAX_LIST:,} is the most")
            if inner in NUMBERS:
                self.skip(count * NUMBERS[inner])
            elif inner == TEXT:
                for _ in range(count):
                    self.text()
            else:
                raise ValueError(f"a list is of the kind {inner}, which is none")
        else:
            raise ValueError(f"a setting is of the kind {kind}, which is none")

"""GGUF files: what the head says is held to what the file has, before a library reads it and after.

The format: magic, version, number of tensors and of settings, the settings, the tensors' names, shapes and places,
then their data (github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.errors import LoraFtError, UnsupportedModelError
from lora_ft.foreign.reading import first_line, opened
from lora_ft.foreign.strictjson import quoted
from lora_ft.foreign.templates import MAX_CHARS

VERSIONS = (2, 3)
# How each kind of number is read; 8 is text, 9 a list.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
# Of a kind of tensor: numbers of a block, and its bytes (ggml.h, ggml_type; as in gguf.GGML_QUANT_SIZES).
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip
# A tokenizer of a million tokens has lists of as many; no model has so many tensors or settings.
MAX_COUNT = 100_000
MAX_LIST = 2_000_000
MAX_DIMENSIONS = 8
# The longest token of any vocabulary is some hundred spaces; the mean of a list is ten bytes.
MAX_WORD_BYTES, MEAN_WORD_BYTES = 1024, 64
# Four merges a token; a model of a word or two has some thousand all the same.
MERGES_A_TOKEN, FEW_TOKENS = 4, 4096
MAX_BLOCKS = 1000
MAX_EXPERTS = 10_000
MAX_SIZE = 2**31 - 1
# What transformers builds a model from, after the name of its architecture.
SIZES = {
    "block_count": MAX_BLOCKS,
    "expert_count": MAX_EXPERTS,
    "expert_used_count": MAX_EXPERTS,
    **dict.fromkeys(("context_length", "embedding_length", "feed_forward_length", "vocab_size"), MAX_SIZE),
    **dict.fromkeys(("attention.head_count", "attention.head_count_kv", "rope.dimension_count"), MAX_SIZE),
}
EMBEDDINGS = "token_embd.weight"


@dataclass(frozen=True)
class Listed:
    """A list among the settings: how long it is, and the kind of what is in it."""

    kind: int
    count: int


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file, as its head describes it."""

    shape: tuple[int, ...]
    """Rows first, as torch has it."""
    begin: int
    """Byte of the data."""
    size_bytes: int


def load(file: Path) -> tuple[Any, Any]:
    """Returns model, in bfloat16, and tokenizer that a GGUF file holds, every weight of the model read from it.

    Raises:
        UnsupportedModelError: the file is damaged, or transformers makes no whole model of it.
    """
    head = check(file, UnsupportedModelError)

    def failed(reason: str) -> LoraFtError:
        return UnsupportedModelError(f"{file.name}: transformers cannot read this GGUF file: {reason}.")

    # In an empty folder, for transformers would take tokenizer and settings from files beside this one.
    with tempfile.TemporaryDirectory() as empty:
        return _load(file, head, Path(empty), failed)


def _load(file: Path, head: Head, empty: Path, failed: Callable[[str], LoraFtError]) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = str(file.resolve())
    config = opened(AutoConfig, empty, failed, gguf_file=place)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    # Sizes that do not go together raise what the arithmetic does.
    except Exception as error:
        raise failed(first_line(error)) from None
    called_for = sum(parameter.numel() for parameter in skeleton.parameters())
    held = sum(math.prod(tensor.shape) for tensor in head.tensors.values())
    if called_for > 2 * held:
        raise failed(f"its settings call for {called_for:,} numbers, and its tensors hold {held:,}")
    tokenizer = opened(AutoTokenizer, empty, failed, gguf_file=place)
    model, loading = opened(
        AutoModelForCausalLM,
        empty,
        failed,
        gguf_file=place,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    # transformers fills what is not there with random numbers, and goes on.
    missing = sorted({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])})
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UnsupportedModelError(
            f"{file.name}: it holds no tensor for {missing[0]}{more}, which its settings call for: fetch it again."
        )
    return model, tokenizer


def check(file: Path, error: type[LoraFtError]) -> Head:
    """Returns the head of a GGUF file.

    Raises `error` where the file is none, its head counts more than it holds or a model has, or its settings are no
    sizes, or sizes that its tensors do not have.
    """
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise error(f"{file}: not a GGUF file (it does not begin with GGUF).")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as held:
            head = Head(held)
            try:
                head.walk()
                head.check_settings()
            except (struct.error, ValueError) as why:
                told = "it ends in the middle of its head" if isinstance(why, struct.error) else why
                raise error(f"{file.name}: not a GGUF file, or damaged: {told}; fetch it again.") from None
            finally:
                del head.held
    return head


class Head:
    """A place in the file, moved on by what is read. Raises struct.error at its end, ValueError for what is wrong."""

    def __init__(self, held: mmap.mmap) -> None:
        self.held, self.at = held, 4
        self.settings: dict[str, Any] = {}
        """Numbers, texts and `Listed`, by name."""
        self.tensors: dict[str, Tensor] = {}

    def walk(self) -> None:
        """Reads all of the head."""
        version, tensors, settings = self.take("<IQQ")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, and {' and '.join(map(str, VERSIONS))} are read")
        if max(tensors, settings) > MAX_COUNT:
            raise ValueError(f"it counts {tensors:,} tensors and {settings:,} settings, and {MAX_COUNT:,} is the most")
        for _ in range(settings):
            name = self.text(MAX_WORD_BYTES)
            if name in self.settings:
                raise ValueError(f"the setting {quoted(name)} stands twice")
            self.settings[name] = self.value(self.take("<I")[0])
        found = [self.tensor() for _ in range(tensors)]
        self.place(found)

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.held, self.at)
        self.at += struct.calcsize(form)
        return values

    def skip(self, count: int) -> None:
        if count > len(self.held) - self.at:
            raise ValueError(f"a value of {count:,} bytes is longer than the rest of the file")
        self.at += count

    def text(self, most_bytes: int) -> str:
        begin = self.at + 8
        self.skip(self.take("<Q")[0])
        if self.at - begin > most_bytes:
            raise ValueError(f"a text has {self.at - begin:,} bytes, and {most_bytes:,} is the most")
        # Raises ValueError where it is no text.
        return self.held[begin : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            # A letter of a template takes four bytes at most.
            return self.text(4 * MAX_CHARS)
        if kind in NUMBERS:
            return self.take(f"<{NUMBERS[kind]}")[0]
        if kind != LIST:
            raise ValueError(f"a setting is of the kind {kind}, which is none")
        inner, count = self.take("<IQ")
        if count > MAX_LIST:
            raise ValueError(f"a list has {count:,} values, and {MAX_LIST:,} is the most")
        if inner in NUMBERS:
            self.skip(count * struct.calcsize(f"<{NUMBERS[inner]}"))
        elif inner == TEXT:
            begin = self.at
            for _ in range(count):
                self.text(MAX_WORD_BYTES)
            if self.at - begin > (8 + MEAN_WORD_BYTES) * max(count, FEW_TOKENS):
                raise ValueError(f"a list of {count:,} words has {self.at - begin:,} bytes")
        else:
            raise ValueError(f"a list is of the kind {inner}, which is none")
        return Listed(inner, count)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Returns name, shape, kind and place of the next tensor."""
        name = self.text(MAX_WORD_BYTES)
        (dimensions,) = self.take("<I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions:,} dimensions")
        *shape, kind, offset = self.take(f"<{dimensions}QIQ")
        return name, tuple(reversed(shape)), kind, offset

    def place(self, found: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        """Keeps the tensors, having compared their sizes with the rest of the file."""
        alignment = self.settings.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
        begins = -(-self.at // alignment) * alignment
        end, after = begins, ""
        for name, shape, kind, offset in sorted(found, key=lambda tensor: tensor[3]):
            if name in self.tensors:
                raise ValueError(f"the tensor {quoted(name)} stands twice")
            if kind not in BLOCKS:
                raise ValueError(f"the tensor {quoted(name)} is of the kind {kind}, which is none")
            numbers, size = BLOCKS[kind]
            if not shape or min(shape) < 1 or shape[-1] % numbers:
                raise ValueError(f"the tensor {quoted(name)} has a shape that is none of its kind: {shape}")
            begin, held = begins + offset, math.prod(shape) // numbers * size
            if offset % alignment or begin < end:
                raise ValueError(f"the tensor {quoted(name)} begins in the middle of another{after}")
            if begin + held > len(self.held):
                raise ValueError(f"the tensor {quoted(name)} has {held:,} bytes, more than the rest of the file")
            self.tensors[name] = Tensor(shape, begin, held)
            end, after = begin + held, f", {quoted(name)}"

    def check_settings(self) -> None:
        """Raises ValueError where a setting is none, or is not what the tensors say."""
        model = self.settings.get("general.architecture")
        if not isinstance(model, str):
            raise ValueError("general.architecture, the name of the model, is no text")
        for name, value in self.settings.items():
            if not name.startswith(f"{model}."):
                continue
            most = SIZES.get(name.removeprefix(f"{model}."))
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{quoted(name)} is {value}, which is no number")
            if (
                most is not None
                and not isinstance(value, Listed)
                and (type(value) is not int or not 0 <= value <= most)
            ):
                raise ValueError(f"{quoted(name)} is {value!r}, not a whole number up to {most:,}")
        self._check_blocks(model)
        self._check_vocabulary(model)

    def _check_blocks(self, model: str) -> None:
        """A model is built block by block, so that each must have tensors."""
        held = len({match[1] for name in self.tensors if (match := re.match(r"((?:enc\.|dec\.)?blk\.\d+)\.", name))})
        counted = self.settings.get(f"{model}.block_count", 0)
        if counted != 0 and counted > held:
            raise ValueError(f'"{model}.block_count" is {counted}, and there are tensors of {held} blocks')

    def _check_vocabulary(self, model: str) -> None:
        """Raises ValueError where there are more words than embeddings, or a special one is none of them."""
        embeddings = self.tensors.get(EMBEDDINGS)
        if embeddings is None or len(embeddings.shape) != 2:
            raise ValueError(f"there is no tensor {EMBEDDINGS}, the embeddings of its tokens")
        rows, width = embeddings.shape
        for name, held in ((f"{model}.embedding_length", width), (f"{model}.vocab_size", rows)):
            if self.settings.get(name, held) != held:
                raise ValueError(f"{quoted(name)} is {self.settings[name]}, and {EMBEDDINGS} has {held}")
        for name, value in self.settings.items():
            most = MERGES_A_TOKEN * max(rows, FEW_TOKENS)
            if isinstance(value, Listed) and value.count > most:
                raise ValueError(f"{quoted(name)} has {value.count:,} values, of a model of {rows:,} tokens")
        tokens = self.settings.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, Listed) or tokens.kind != TEXT or not 0 < tokens.count <= rows:
            raise ValueError(f'"tokenizer.ggml.tokens" is no list of words, up to the {rows:,} of {EMBEDDINGS}')
        for name, value in self.settings.items():
            is_token = name.startswith("tokenizer.ggml.") and name.endswith("_token_id")
            if is_token and (type(value) is not int or not 0 <= value < tokens.count):
                raise ValueError(f"{quoted(name)} is {value!r}, which is none of {tokens.count:,} tokens")

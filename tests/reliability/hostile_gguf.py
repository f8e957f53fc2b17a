"""Hostile GGUF files: heads that count what is not there, sound ones whose settings are not those of their tensors."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.reliability.cases import Good, Made, write

TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "w", "1", "w1", *(f"w{i}" for i in range(2, 59))]
SETTINGS: dict[str, Any] = {
    "block_count": 1,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 2,
    "attention.head_count_kv": 2,
    "context_length": 64,
    "vocab_size": len(TOKENS),
}
BLOCK = {
    **{f"attn_{name}": (32, 32) for name in ("q", "k", "v", "output")},
    **{"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)},
}
SHAPES = {
    "token_embd.weight": (len(TOKENS), 32),
    "output_norm.weight": (32,),
    **{f"blk.0.{name}.weight": shape for name, shape in BLOCK.items()},
}


def write_gguf(
    file: Path,
    settings: dict[str, Any] | None = None,
    shapes: dict[str, tuple[int, ...] | None] | None = None,
    *,
    tokens: list[str] = TOKENS,
    merges: list[str] | None = None,
    tokenizer: str = "gpt2",
    eps: float = 1e-5,
    bos: float = 1,
    template: str | None = None,
) -> Path:
    """Returns `file`: a llama of one layer, sound but for what is changed.

    Args:
        settings: to put in the place of others, after `llama.`.
        shapes: of tensors, likewise; None leaves one out.
    """
    writer = gguf.GGUFWriter(str(file), "llama")
    for key, value in (SETTINGS | (settings or {})).items():
        if isinstance(value, float):
            writer.add_float32(f"llama.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"llama.{key}", value)
        elif value < 0:
            writer.add_int32(f"llama.{key}", value)
        else:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(eps)
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["w 1"] if merges is None else merges)
    (writer.add_float32 if isinstance(bos, float) else writer.add_uint32)("tokenizer.ggml.bos_token_id", bos)
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    draw = np.random.default_rng(0)
    for name, shape in {**SHAPES, **(shapes or {})}.items():
        if shape is not None:
            writer.add_tensor(name, draw.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def without(*names: str) -> dict[str, tuple[int, ...] | None]:
    return dict.fromkeys(names)


def changed(**changes: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_gguf(folder / "evil.gguf", **changes)

    return make


def spoiled_tensor(*, shape: tuple[int, int] = (32, 32), kind: int = 0, offset: int | None = None) -> Any:
    """Returns what writes a file and overwrites what its head says of a tensor; the shape is in the order of GGUF."""

    def make(folder: Path) -> None:
        file = write_gguf(folder / "evil.gguf")
        data, name = file.read_bytes(), b"blk.0.attn_q.weight"
        at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
        (kept,) = struct.unpack_from("<Q", data, at + 20)
        spec = struct.pack("<QQIQ", *shape, kind, kept if offset is None else offset)
        file.write_bytes(data[:at] + spec + data[at + len(spec) :])

    return make


def gguf_bombs(good: Good, rng: random.Random, turn: int) -> Made:
    """Yields files that a reader of GGUF reads, and that describe another model than they hold."""
    name = rng.choice(sorted(set(SHAPES) - {"token_embd.weight"}))
    block, big = f"blk.0.{rng.choice(sorted(BLOCK))}.weight", 2 ** rng.randint(24, 40)
    for what, phrase, make in (
        (f"without {name}", "no tensor for", changed(shapes=without(name))),
        ("without embeddings", "token_embd.weight", changed(shapes=without("token_embd.weight"))),
        ("of no tensors", "there are tensors of 0 blocks", changed(shapes=without(*SHAPES))),
        ("of 300 blocks", "there are tensors of 1 blocks", changed(settings={"block_count": rng.randint(2, 999)})),
        (
            "of so many blocks",
            "not a whole number up to 1,000",
            changed(settings={"block_count": rng.randint(1001, 10**8)}),
        ),
        ("of a block and a half", "not a whole number", changed(settings={"block_count": 1.5})),
        ("of minus one block", "not a whole number", changed(settings={"block_count": -1})),
        (
            "of wide embeddings",
            "token_embd.weight has 32",
            changed(settings={"embedding_length": 2 ** rng.randint(10, 30)}),
        ),
        ("of a wide inside", "settings call for", changed(settings={"feed_forward_length": 2 ** rng.randint(20, 30)})),
        ("of a large vocabulary", "token_embd.weight has", changed(settings={"vocab_size": rng.randint(10**6, 10**9)})),
        ("of no vocabulary", "not a whole number", changed(settings={"vocab_size": -rng.randint(1, 9)})),
        ("of a size that is none", "which is no number", changed(settings={"embedding_length": math.nan})),
        ("of an epsilon that is none", "which is no number", changed(eps=rng.choice([math.nan, math.inf]))),
        ("of seven heads", "cannot read this GGUF file", changed(settings={"attention.head_count": 7})),
        ("of no heads", "cannot read this GGUF file", changed(settings={"attention.head_count": 0})),
        ("of minus two heads", "not a whole number", changed(settings={"attention.head_count": -2})),
        (
            "of so many heads",
            "cannot read this GGUF file",
            changed(settings={"attention.head_count": 2**20, "rope.dimension_count": 64}),
        ),
        ("of a text for a size", "not a whole number", changed(settings={"context_length": "evil"})),
        ("of a first token that is none", "which is none of", changed(bos=rng.randint(64, 2**31))),
        ("of a fraction for a token", "which is none of", changed(bos=1e30)),
        ("of merges that are none", "cannot read this GGUF file", changed(merges=["a b c d", "", "zz"])),
        ("of more merges than tokens", "of a model of 64 tokens", changed(merges=["w 1"] * 20_000)),
        ("of a word too long", "a text has", changed(tokens=[*TOKENS[:-1], "w" * 100_000])),
        ("of more words than embeddings", "no list of words", changed(tokens=[*TOKENS, *(f"x{i}" for i in range(99))])),
        ("of a tokenizer that is none", "Cannot build a tokenizer", changed(tokenizer="evil")),
        ("of a template of 2 MB", "a text has", changed(template="a" * (2 << 20))),
        (
            f"with {block} of another shape",
            "cannot read this GGUF file|holds no tensor for",
            changed(shapes={block: (96, 96)}),
        ),
        ("of a tensor larger than it", "more than the rest of the file", spoiled_tensor(shape=(big, big))),
        ("of a tensor of no size", "a shape that is none", spoiled_tensor(shape=(0, 32))),
        ("of a tensor of no kind", "is of the kind", spoiled_tensor(kind=rng.randint(42, 2**31))),
        ("of blocks cut in the middle", "a shape that is none of its kind", spoiled_tensor(kind=14)),
        ("of a tensor behind its end", "more than the rest of the file", spoiled_tensor(offset=2**60)),
        ("of tensors in each other", "in the middle of another", spoiled_tensor(offset=0)),
        ("of a tensor out of line", "in the middle of another", spoiled_tensor(offset=3)),
    ):
        yield f"GGUF {what}", phrase, make


def gguf_heads(good: Good, rng: random.Random, turn: int) -> Made:
    """Yields files that begin as GGUF: magic, version, numbers of tensors and of settings, settings, tensors."""

    def file(tensors: int, settings: int, rest: bytes = b"", version: int = 3) -> Callable[[Path], None]:
        return write("evil.gguf", b"GGUF" + struct.pack("<IQQ", version, tensors, settings) + rest)

    def text(value: bytes, length: int | None = None) -> bytes:
        return struct.pack("<Q", len(value) if length is None else length) + value

    many = 2 ** rng.randint(32, 62)
    name = text(b"general.architecture")
    listed = struct.pack("<IIQ", 9, rng.choice([0, 4, 8]), many)
    lists = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
    noise = b"GGUF" + rng.randbytes(rng.randint(1, 3000))
    yield "GGUF of so many tensors", "is the most", file(many, 0)
    yield "GGUF of so many settings", "is the most", file(0, many)
    yield "GGUF with a name too long", "longer than the rest of the file", file(0, 1, text(b"a", many))
    yield (
        "GGUF with a text too long",
        "longer than the rest",
        file(0, 1, name + struct.pack("<I", 8) + text(b"x", many)),
    )
    yield "GGUF with a list too long", "is the most", file(0, 1, name + listed)
    yield "GGUF with lists in lists", "of the kind 9, which is none", file(0, 1, name + lists)
    yield (
        "GGUF with a setting of no kind",
        "which is none",
        file(0, 1, name + struct.pack("<I", rng.randint(13, 2**31))),
    )
    yield "GGUF of no version", "its version is", file(0, 0, version=rng.choice([0, 1, 4, 2**31]))
    yield (
        "GGUF of an unknown model",
        "there is no tensor token_embd.weight",
        file(0, 1, name + struct.pack("<I", 8) + text(b"evil")),
    )
    yield "GGUF of a setting twice", "stands twice", file(0, 2, (name + struct.pack("<I", 8) + text(b"evil")) * 2)
    yield "GGUF of noise", "not a GGUF file", write("evil.gguf", noise)

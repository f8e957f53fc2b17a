"""Hostile files of weights: safetensors, pickles, indexes, GGUF, and numbers and shapes that are wrong."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.reliability.cases import ADAPTER, MODEL, Bomb, Good, Made, Maker, change, changed_tensors, write


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Returns a file with that header, which may be bytes, and data; `length` is what it says of the header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """Returns header and data of a good file."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def spoiled_headers(file: Path, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yields what the file could be turned into, with a name."""
    header, data = parts(file)
    names = [name for name in header if name != "__metadata__"]
    first, second = rng.sample(names, 2)

    def changed(name: str, **fields: Any) -> bytes:
        return safetensors_bytes({**header, name: {**header[name], **fields}}, data)

    def renamed(name: str) -> bytes:
        return safetensors_bytes({name if key == first else key: spec for key, spec in header.items()}, data)

    begin, end = header[first]["data_offsets"]
    raw = json.dumps(header).encode()
    twice = raw[:-1] + b', "' + first.encode() + b'": ' + json.dumps(header[second]).encode() + b"}"
    yield "header of 2^63 bytes", safetensors_bytes(header, data, 2**63 - 1)
    yield "header of 2^40 bytes", safetensors_bytes(header, data, 2**40)
    yield "header longer than the file", safetensors_bytes(header, data, len(raw) + len(data) + rng.randint(1, 99))
    yield "header that ends early", safetensors_bytes(header, data, len(raw) - rng.randint(1, 20))
    yield "header of spaces", safetensors_bytes(b" " * (9 << 20), data)
    yield (
        "header of a million tensors",
        safetensors_bytes({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(150_000)}),
    )
    yield "header nested deep", safetensors_bytes(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", data)
    yield "header that is a list", safetensors_bytes([1, 2], data)
    yield (
        "header that is not UTF-8",
        safetensors_bytes(raw.replace(b"lora", b"l\xffra").replace(b"self", b"s\xfelf"), data),
    )
    yield "a name twice", safetensors_bytes(twice, data)
    yield "offsets that overlap", changed(second, data_offsets=header[first]["data_offsets"])
    yield "offsets behind the end", changed(first, data_offsets=[begin, end + 10 ** rng.randint(6, 17)])
    yield "offsets below zero", changed(first, data_offsets=[-rng.randint(1, 99), end])
    yield "offsets the wrong way", changed(first, data_offsets=[end, begin])
    yield "offsets that are text", changed(first, data_offsets=[str(begin), str(end)])
    yield "offsets that are fractions", changed(first, data_offsets=[begin + 0.5, end])
    yield "one offset", changed(first, data_offsets=[begin])
    yield "an unknown dtype", changed(first, dtype=rng.choice(["O", "PICKLE", "F1024", "f32", ""]))
    yield "a dtype that is a list", changed(first, dtype=["F32"])
    yield "a shape that overflows", changed(first, shape=[2**62, 2**62, rng.randint(2, 9)])
    yield "a shape below zero", changed(first, shape=[-1, *header[first]["shape"]])
    yield "a shape of a thousand dimensions", changed(first, shape=[1] * 1000)
    yield "a shape of truths", changed(first, shape=[True, True])
    yield "no shape", safetensors_bytes({**header, first: {"dtype": "F32", "data_offsets": [begin, end]}}, data)
    yield "metadata that is no text", safetensors_bytes({**header, "__metadata__": {"format": {"a": 1}}}, data)
    yield "cut short", file.read_bytes()[: -rng.randint(1, len(data))]
    yield "more behind the end", file.read_bytes() + b"x" * rng.randint(1, 99)
    yield "nothing in it", b""
    yield "a name with a path", renamed(rng.choice(["../../etc/passwd", "/etc/passwd", "a/../b", "C:\\x", "..\\..\\x"]))
    yield "a name that turns the text", renamed(f"base_model.model.\u202e{rng.random()}\u2066")
    yield "a name of control characters", renamed(f"a\x1b[2J{rng.random()}\x07")
    yield "a name of 10,000 letters", renamed("a" * 10_000)
    yield "an empty name", renamed("")


def headers_of(weights: str, of: str) -> Maker:
    def maker(good: Good, rng: random.Random, turn: int) -> Made:
        file = getattr(good, of) / weights
        for name, data in spoiled_headers(file, rng):
            yield f"{weights}: {name}", write(weights, data)

    return maker


def sparse_header(good: Good, rng: random.Random, turn: int) -> Made:
    def make(folder: Path) -> None:
        with (folder / ADAPTER).open("wb") as stream:
            stream.write(struct.pack("<Q", 99 << 30))
            stream.truncate(100 << 30)

    if turn == 0:
        yield "a file of 100 GB that is all header", make


# Pickles -----------------------------------------------------------------------------------------------------------


def pickled(path: Path, canary: Path, zipped: bool) -> None:
    if zipped:
        torch.save(Bomb(canary), path)
    else:
        path.write_bytes(pickle.dumps(Bomb(canary)))


def pickles(weights: str, stem: str) -> Maker:
    def maker(good: Good, rng: random.Random, turn: int) -> Made:
        for ending in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            zipped = rng.random() < 0.5

            def instead(folder: Path, ending: str = ending, zipped: bool = zipped) -> None:
                (folder / weights).unlink()
                pickled(folder / f"{stem}{ending}", good.canary, zipped)

            yield f"weights in a {ending}", instead

        def disguised(folder: Path) -> None:
            pickled(folder / weights, good.canary, zipped)

        yield f"a pickle called {weights}", disguised

    return maker


def base_index(good: Good, rng: random.Random, turn: int) -> Made:
    tensors = load_file(good.base / MODEL)

    def index(folder: Path, **weight_map: str) -> None:
        (folder / MODEL).unlink()
        named = dict.fromkeys(tensors, "part.safetensors") | weight_map
        save_file(tensors, folder / "part.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))

    outside = rng.choice(["../part.safetensors", "/etc/passwd", "a/../../part.safetensors", "..\\part.safetensors"])

    def traversal(folder: Path) -> None:
        shutil.copyfile(good.base / MODEL, folder.parent / "part.safetensors")
        index(folder, **{next(iter(tensors)): outside})

    def of_pickles(folder: Path) -> None:
        index(folder, **{next(iter(tensors)): "part.bin"})
        pickled(folder / "part.bin", good.canary, True)

    def linked(folder: Path) -> None:
        index(folder)
        (folder / "part.safetensors").unlink()
        (folder / "part.safetensors").symlink_to(good.base / MODEL)

    def nested(folder: Path) -> None:
        (folder / MODEL).unlink()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": ' + "[" * 50_000 + "]" * 50_000 + "}")

    def explicit(folder: Path) -> None:
        shutil.copyfile(good.base / MODEL, folder.parent / "part.safetensors")
        change(folder / "config.json", transformers_weights="../part.safetensors")

    yield f"an index that names {outside}", traversal
    yield "an index that names a pickle", of_pickles
    if turn == 0:
        yield "a shard that is a link out", linked
        yield "an index nested deep", nested
        yield "transformers_weights outside", explicit


def adapter_tensors(good: Good, rng: random.Random, turn: int) -> Made:
    changed = partial(changed_tensors, ADAPTER)

    def spot(tensors: dict[str, torch.Tensor], value: float) -> None:
        tensor = tensors[rng.choice(sorted(tensors))]
        tensor.view(-1)[rng.randrange(tensor.numel())] = value

    def rank(tensors: dict[str, torch.Tensor]) -> None:
        name = rng.choice([name for name in sorted(tensors) if "lora_A" in name])
        tensors[name] = torch.zeros(tensors[name].shape[0] + rng.randint(1, 9), tensors[name].shape[1])

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[rng.choice(sorted(tensors))]

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"base_model.model.model.layers.{rng.randint(50, 99)}.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 64)

    yield "a tensor that is not a number", changed(lambda tensors: spot(tensors, float("nan")))
    yield "a tensor that is infinite", changed(lambda tensors: spot(tensors, float("-inf")))
    yield "a tensor of another rank", changed(rank)
    yield "a tensor too many", changed(add)
    yield "a tensor too few", changed(drop)


def base_tensors(good: Good, rng: random.Random, turn: int) -> Made:
    changed = partial(changed_tensors, MODEL)

    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        name = rng.choice([name for name in sorted(tensors) if tensors[name].ndim == 2])
        tensors[name] = torch.zeros(tensors[name].shape[0] + rng.randint(1, 9), tensors[name].shape[1])

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[rng.choice(sorted(tensors))]

    def retype(tensors: dict[str, torch.Tensor]) -> None:
        name = rng.choice([name for name in sorted(tensors) if tensors[name].ndim == 2])
        tensors[name] = torch.zeros(2, 2, dtype=torch.int64)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[rng.choice(sorted(tensors))]
        tensor.view(-1)[rng.randrange(tensor.numel())] = float("nan")

    yield "a weight that is not a number", changed(spoil)
    yield "a weight of another shape", changed(reshape)
    yield "a weight of another shape and kind", changed(retype)
    yield "a weight too few", changed(drop)

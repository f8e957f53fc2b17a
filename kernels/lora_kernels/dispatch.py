"""Which way a product with a frozen weight is computed on a GPU: by measured crossovers, never by guess.

`dispatch.json` holds the crossovers known for each architecture and where each number comes from. What was measured on
the very card, by `lora-ft bench kernels`, goes before it; whoever measured hands it over with `use_measured`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Literal, get_args

import torch

Path = Literal["gemm_4bit", "dequant", "triton", "triton_4bit"]
"""`gemm_4bit`: bitsandbytes' own kernel. `dequant`: a dense copy of the weight for a moment, then cuBLAS. `triton`: our
product of that copy, with the adapter inside. `triton_4bit`: ours straight from the packed weight."""

COLUMNS_OF_A_BLOCK = 64
"""Outputs a block of bitsandbytes' kernel computes: with the number of multiprocessors, what its crossovers go by."""

_forced: Path | None = None
_measured: dict[str, dict[str, Path]] = {}


@dataclass(frozen=True, slots=True)
class Gpu:
    """What crossovers depend on."""

    name: str
    arch: str
    """Its compute capability, such as "sm_89"."""
    multiprocessors: int


@functools.cache
def gpu(device: torch.device) -> Gpu | None:
    """Returns what is known of a GPU, None for a device that is none."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.name, f"sm_{found.major}{found.minor}", found.multi_processor_count)


def choose(m: int, n: int, k: int, card: Gpu | None, packed: bool, dtype: torch.dtype) -> Path:
    """Returns the way for `m` rows of `dtype` and a weight [n, k], which is in 4 bits where `packed`."""
    if _forced is not None:
        return _forced
    # For no rows, bitsandbytes' kernel cannot be launched.
    if card is None or m == 0:
        return "dequant"
    measured = _measured.get(card.name, {}).get(shape_key(m, n, k, packed, dtype))
    if measured is not None and measured in ways(packed, dtype):
        return measured
    return "gemm_4bit" if packed and m <= most_rows(n, card, dtype) else "dequant"


def ways(packed: bool, dtype: torch.dtype) -> tuple[Path, ...]:
    """Returns the ways that a weight, in 4 bits where `packed`, may be multiplied by rows of `dtype`.

    Our own products need matrix instructions: those of float32 round its numbers, and without any, tiles spill.
    """
    offered: tuple[Path, ...] = get_args(Path) if packed else ("dequant", "triton")
    return tuple(way for way in offered if dtype != torch.float32 or not way.startswith("triton"))


def most_rows(n: int, card: Gpu, dtype: torch.dtype) -> int:
    """Returns the most rows for which bitsandbytes' kernel beats a dense copy and cuBLAS on a weight of `n` outputs."""
    known, waves = table(), -(-n // COLUMNS_OF_A_BLOCK) / card.multiprocessors
    if dtype == torch.float32:
        return known["most_rows_float32"]
    crossovers = known["most_rows"].get(card.arch, [])
    return max(known["few_rows"], next((entry["rows"] for entry in crossovers if waves >= entry["waves"]), 0))


@functools.cache
def table() -> dict[str, Any]:
    """Returns the contents of `dispatch.json`."""
    return json.loads(File(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def shape_key(m: int, n: int, k: int, packed: bool, dtype: torch.dtype) -> str:
    """Returns the name of a shape in a measured table; rows count by the next power of two, so few are measured."""
    return f"{1 << (m - 1).bit_length()}x{n}x{k}-{str(dtype).removeprefix('torch.')}{'-4bit' if packed else ''}"


def use_measured(card_name: str, ways: Mapping[str, str]) -> None:
    """Takes the best way of each shape, by `shape_key`, as measured on the card of this name.

    Raises:
        ValueError: a way is unknown.
    """
    unknown = sorted(set(ways.values()) - set(get_args(Path)))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no way to compute a product; use {', '.join(get_args(Path))}")
    _measured[card_name] = dict(ways)  # type: ignore[arg-type]


@contextmanager
def forced(path: Path) -> Iterator[None]:
    """Runs the block with this way whatever the shape, where the weight allows it."""
    global _forced
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before

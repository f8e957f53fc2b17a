"""In what two adapter folders differ: what they were made with and of, and what each does to the base's weights.

Nothing is loaded but the two files of the adapters, so that any two can be compared, their base there or not.

Shapes: M outputs, K inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_ft import saved, seal
from lora_ft.config import RunConfig
from lora_ft.errors import AdapterError, LoraFtError
from lora_ft.foreign import tensors
from lora_ft.foreign.adapter import patterns_of, refuse_names
from lora_ft.foreign.files import object_of
from lora_ft.foreign.strictjson import shown
from lora_ft.proof import environment
from lora_ft.settings import from_yaml, plain
from lora_ft.training import logged

PREFIX = "base_model.model."
# Names of the two factors of an update, in files of PEFT.
FACTORS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
# Where a run wrote to says nothing of what it did.
NOT_COMPARED = ("out", "resume", "allow_changed", "dry_run")
# What a run measured of the machine and not of the model.
OF_THE_MACHINE = ("seconds", "tokens_per_s", "peak_bytes")
ABSENT = "(not there)"
Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Layer:
    """The change of one parameter by each adapter: Frobenius norms, and of their difference."""

    name: str
    first: float | None
    """None where the adapter does not change it."""
    second: float | None
    difference: float
    cosine: float | None
    """Of the two changes; None where one is zero or not there."""


@dataclass
class Difference:
    """In what two adapters differ."""

    facts: dict[str, dict[str, Pair]]
    """By kind: what differs, by dotted name, as each of the two has it."""
    layers: list[Layer]
    """Those of other numbers, the largest difference first."""
    notes: list[str] = field(default_factory=list)

    def kinds(self) -> list[Layer]:
        """Returns the layers of each name together, such as all `q_proj`, as if they were one."""
        together: dict[str, list[Layer]] = {}
        for layer in self.layers:
            together.setdefault(layer.name.rpartition(".")[2], []).append(layer)
        return [_together(f"all {name}", layers) for name, layers in sorted(together.items())]

    def as_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON."""
        return {**self.facts, "weights": [asdict(layer) for layer in self.layers], "notes": self.notes}


def _together(name: str, layers: list[Layer]) -> Layer:
    first, second, difference = (
        math.hypot(*(getattr(layer, key) or 0.0 for layer in layers)) for key in ("first", "second", "difference")
    )
    product = sum((layer.cosine or 0.0) * (layer.first or 0.0) * (layer.second or 0.0) for layer in layers)
    return Layer(name, first, second, difference, product / (first * second) if first and second else None)


@dataclass
class _Change:
    """The change of a parameter, as the file has it: a tensor, or two factors of one."""

    a_RK: torch.Tensor
    b_MR: torch.Tensor | None = None
    """None where `a_RK` is the whole of it, of any shape."""


def of(first: Path, second: Path) -> Difference:
    """Returns in what two adapter folders differ.

    Raises:
        AdapterError: one of them is no adapter, or was damaged; its patterns take too long to match.
    """
    told = [_facts(folder) for folder in (first, second)]
    facts = {kind: _unlike(*(each[kind] for each in told)) for kind in told[0]}
    changes = [_changes(folder) for folder in (first, second)]
    names = sorted(changes[0].keys() | changes[1].keys())
    layers = [_layer(name, *(each.get(name) for each in changes)) for name in names]
    layers = sorted((layer for layer in layers if layer.difference != 0), key=lambda layer: -layer.difference)
    return Difference(facts, layers, _notes(first, second))


def _facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns what a folder says of its making, by kind and dotted name; of an adapter of others, what there is."""
    settings = saved.read_settings(folder)
    record = environment.read(folder) if (folder / environment.FILE).is_file() else {}
    run = plain(from_yaml(RunConfig, folder / "config.yaml")) if (folder / "config.yaml").is_file() else {}
    sealed = object_of(folder / seal.FILES[1], AdapterError) if (folder / seal.FILES[1]).is_file() else {}
    told = {
        "configuration": {key: value for key, value in run.items() if key not in NOT_COMPARED},
        "PEFT's settings": settings,
        "rows": {"data": record.get("data"), "task": record.get("task"), "combined": record.get("combined")},
        "base": {key: record.get(key) for key in ("base", "quant", "dtype", "tied_embeddings", "left_whole")},
        "versions": {key: record.get(key) for key in ("versions", "device")},
        "tokenizer": {"sha256": record.get("tokenizer_sha256")},
        "seal": {key: sealed.get(key) for key in ("kl_effect", "positions", "seal_sha256")},
        "metrics": _last_metrics(folder),
    }
    return {kind: dict(_flat(found)) for kind, found in told.items()}


def _last_metrics(folder: Path) -> dict[str, Any]:
    """Returns the last value of everything that a run measured as it trained, but for time and memory."""
    lines = logged.read(folder / logged.FILE)
    found = {key: value for line in lines for key, value in line.items() if isinstance(value, int | float)}
    return {key: value for key, value in found.items() if key not in OF_THE_MACHINE}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields what is in nested objects by its dotted name; lists of objects are numbered."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value, start=1))
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}.{key}" if name else str(key))


def _unlike(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Pair]:
    """Returns what two mappings have different, as short texts or numbers; null and absent are the same."""
    return {
        key: (_short(first.get(key)), _short(second.get(key)))
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    }


def _short(value: Any) -> Any:
    if value is None:
        return ABSENT
    return value if isinstance(value, int | float) else shown(value).strip('"')


def _changes(folder: Path) -> dict[str, _Change]:
    """Returns the change of each parameter that the file of an adapter holds, scaled as PEFT does it."""
    settings, file = saved.lora_settings(folder), folder / saved.WEIGHTS
    refuse_names(tensors.header(file, AdapterError)[1], file)
    held = tensors.load(file, AdapterError)
    for name, tensor in sorted(held.items()):
        if not torch.isfinite(tensor.double()).all():
            raise AdapterError(f"{file}: {name} is not finite: the file was damaged.")
    modules = [
        name.removeprefix(PREFIX).removesuffix(a_name)
        for a_name, _ in FACTORS
        for name in held
        if name.endswith(a_name)
    ]
    patterns = patterns_of(settings.alpha_pattern, modules, str(folder / saved.CONFIG))
    found: dict[str, _Change] = {}
    for a_name, b_name in FACTORS:
        for name in [name for name in held if name.endswith(a_name)]:
            module = name.removeprefix(PREFIX).removesuffix(a_name)
            b_MR = held.pop(f"{PREFIX}{module}{b_name}", None)
            if b_MR is None or b_MR.shape[1] != len(held[name]):
                raise AdapterError(f"{file}: {name} has no other factor of its rank: the file was damaged.")
            a_RK = held.pop(name).double()
            alpha = settings.alpha_pattern.get(patterns.get(module, ""), settings.lora_alpha)
            scaling = alpha / (math.sqrt(len(a_RK)) if settings.use_rslora else len(a_RK))
            found[module] = _Change(scaling * a_RK, b_MR.double())
    return found | {name.removeprefix(PREFIX): _Change(tensor.double()) for name, tensor in held.items()}


def _layer(name: str, first: _Change | None, second: _Change | None) -> Layer:
    norm, other = (None if change is None else math.sqrt(_inner(change, change)) for change in (first, second))
    if first is None or second is None:
        return Layer(name, norm, other, norm or other or 0.0, None)
    if _shape(first) != _shape(second):
        raise AdapterError(
            f"{name} is {_shape(first)} in one adapter and {_shape(second)} in the other: they are of other bases, and "
            "their weights cannot be compared."
        )
    # Of the factors of the difference itself: from three inner products the small difference of two large updates would
    # come out as rounding.
    difference = math.sqrt(_inner(*[_minus(first, second)] * 2))
    product = (norm or 0.0) * (other or 0.0)
    return Layer(name, norm, other, difference, _inner(first, second) / product if product else None)


def _minus(first: _Change, second: _Change) -> _Change:
    if first.b_MR is None or second.b_MR is None:
        return _Change(first.a_RK - second.a_RK)
    if first.a_RK.shape == second.a_RK.shape and torch.equal(first.a_RK, second.a_RK):
        return _Change(first.a_RK, first.b_MR - second.b_MR)
    return _Change(torch.cat([first.a_RK, second.a_RK]), torch.cat([first.b_MR, -second.b_MR], dim=1))


def _inner(first: _Change, second: _Change) -> float:
    """Returns the inner product of two updates, <B A, B' A'> = <R_B R_A^T, ...>, at least 0 of one with itself.

    Through orthogonal factors, B = Q R and A^T = Q' R', so that no update of M by K numbers is ever made.
    """
    if first.b_MR is None or second.b_MR is None:
        return float((first.a_RK * second.a_RK).sum())
    if first is second:
        (_, r_b), (_, r_a) = torch.linalg.qr(first.b_MR), torch.linalg.qr(first.a_RK.T)
        return float((r_b @ r_a.T).square().sum())
    return float(((first.b_MR.T @ second.b_MR) * (first.a_RK @ second.a_RK.T)).sum())


def _shape(change: _Change) -> tuple[int, ...]:
    if change.b_MR is None:
        return tuple(change.a_RK.shape)
    return len(change.b_MR), change.a_RK.shape[1]


def _notes(first: Path, second: Path) -> list[str]:
    notes = []
    if any(saved.lora_settings(folder).use_dora for folder in (first, second)):
        notes.append("With DoRA the weights also change by their magnitudes, which are listed apart.")
    for folder in (first, second):
        try:
            seal.read(folder)
        except LoraFtError as why:
            notes.append(f"The seal says nothing of this: {why}")
    return notes

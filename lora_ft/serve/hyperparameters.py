"""What a job is trained with: what the request may say, and what `auto` comes to once the rows are counted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_ft.config import DataConfig, LoraConfig, PreferConfig, TrainConfig
from lora_ft.serve.refusals import RequestError, bad

AUTO = "auto"
NAMES = ("n_epochs", "batch_size", "learning_rate_multiplier")
RANGES = {"n_epochs": (1, 50), "batch_size": (1, 256)}
SUPERVISED, DPO = "supervised", "dpo"
METHODS = {SUPERVISED: NAMES, DPO: (*NAMES, "beta")}
"""Names of the hyperparameters of a method; those of a job say which it is."""
MOST_BETA = 2.0
# Of replies that are compared a step moves the adapter further: the rate of a LoRA adapter in DPO.
DPO_LEARNING_RATE = 5e-5

NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{0,18})?(e[+-]?[0-9]{1,2})?", re.ASCII | re.IGNORECASE)

# The rule that OpenAI's cookbook gives for `auto` epochs.
TARGET_EPOCHS, MIN_EXAMPLES, MAX_EXAMPLES, MAX_EPOCHS = 3, 100, 25_000, 25
# 0.2% of the rows, as OpenAI's guide had it.
BATCH_SHARE, MAX_BATCH = 0.002, 256

# Beyond OpenAI's own, under the names that Nebius' service takes from the same client.
EXTENSIONS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "learning_rate": ((int, float), "train.lr"),
    "warmup_ratio": ((int, float), "train.warmup"),
    "weight_decay": ((int, float), "train.weight_decay"),
    "max_grad_norm": ((int, float), "train.clip"),
    "lora_r": (int, "lora.rank"),
    "lora_alpha": ((int, float), "lora.alpha"),
    "lora_dropout": ((int, float), "lora.dropout"),
    "context_length": (int, "data.max_length"),
    "packing": (bool, "data.packing"),
}
# Rows that go through the model at a time on a processor or a small GPU.
MICRO_BATCH = 4
CONTEXT = 2048


@dataclass(frozen=True)
class Asked:
    """The hyperparameters of a request, checked."""

    values: dict[str, Any]
    """OpenAI's own, each a number or `auto`."""
    extensions: dict[str, Any]


def method_of(values: Mapping[str, Any]) -> str:
    """Returns the method whose hyperparameters these are."""
    return next(method for method, names in METHODS.items() if set(names) == set(values))


def read(given: Mapping[str, Any], place: str, method: str = SUPERVISED) -> Asked:
    """Returns what a request asks for.

    Args:
        place: where it stands in the request, such as `hyperparameters`.

    Raises:
        RequestError: names the field, the value and the range.
    """
    names = METHODS[method]
    values: dict[str, Any] = dict.fromkeys(names, AUTO)
    extensions = {}
    for name, value in given.items():
        if name in names:
            values[name] = _number(name, value, f"{place}.{name}")
        elif name in EXTENSIONS:
            if value is not None:
                extensions[name] = _extension(name, value, f"{place}.{name}")
        elif name == "lora" and value is True:
            continue  # it is never anything else here
        else:
            known = ", ".join((*names, *EXTENSIONS))
            raise bad(
                f"{place}.{name}"[:128], f"{name[:64]} is no hyperparameter; known are {known}.", "unknown_parameter"
            )
    _refuse_out_of_range(extensions, place)
    if method == DPO and extensions.get("packing"):
        raise bad(f"{place}.packing", "packing fills a row with several examples, which preferences cannot share.")
    return Asked(values, extensions)


def resolve(values: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Returns the hyperparameters with numbers for `auto`, by the rules of the hosted service."""
    auto = {
        "n_epochs": auto_epochs(rows),
        "batch_size": max(1, min(MAX_BATCH, round(BATCH_SHARE * rows))),
        "learning_rate_multiplier": 1.0,
        "beta": PreferConfig().beta,
    }
    return {name: auto[name] if value == AUTO else value for name, value in values.items()}


def auto_epochs(rows: int) -> int:
    """Returns the passes over `rows` that `auto` stands for: 3, more for few rows, fewer for very many."""
    if rows * TARGET_EPOCHS < MIN_EXAMPLES:
        return min(MAX_EPOCHS, MIN_EXAMPLES // rows)
    if rows * TARGET_EPOCHS > MAX_EXAMPLES:
        return max(1, MAX_EXAMPLES // rows)
    return TARGET_EPOCHS


def learning_rate(values: Mapping[str, Any], extensions: Mapping[str, Any]) -> float:
    """Returns the peak learning rate: the multiplier times the library's own default for a LoRA adapter."""
    usual = DPO_LEARNING_RATE if method_of(values) == DPO else TrainConfig().lr
    own: float = extensions.get("learning_rate", usual)
    return float(own) * float(values["learning_rate_multiplier"])


def micro_batch(batch_size: int) -> tuple[int, int]:
    """Returns the rows of a forward pass and how many passes make a step: together exactly `batch_size` rows."""
    size = max(size for size in range(1, MICRO_BATCH + 1) if batch_size % size == 0)
    return size, batch_size // size


def configs(values: Mapping[str, Any], extensions: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the options of the library that resolved hyperparameters stand for, by section."""
    size, accumulate = micro_batch(values["batch_size"])
    sections: dict[str, dict[str, Any]] = {
        "lora": {},
        "data": {"max_length": CONTEXT},
        "train": {
            "batch_size": size,
            "accumulate": accumulate,
            "epochs": float(values["n_epochs"]),
            "lr": learning_rate(values, extensions),
        },
    }
    for name, value in extensions.items():
        section, _, option = EXTENSIONS[name][1].partition(".")
        if option != "lr":
            sections[section][option] = value
    return sections


def _number(name: str, value: Any, place: str) -> Any:
    if value is None or value == AUTO:
        return AUTO
    value = _read_text(value)
    if name == "learning_rate_multiplier":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise bad(place, f'{name} is {_told(value)}; give "auto" or a number above 0.')
        return float(value)
    if name == "beta":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST_BETA:
            raise bad(place, f'beta is {_told(value)}; give "auto" or a number above 0 and at most {MOST_BETA:g}.')
        return float(value)
    low, high = RANGES[name]
    # Some clients send whole numbers with a point.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad(place, f'{name} is {_told(value)}; give "auto" or a whole number from {low} to {high}.')
    return value


def _read_text(value: Any) -> Any:
    """Returns the number that a text is, as old scripts send them; what is none as it is."""
    if not isinstance(value, str) or not NUMBER.fullmatch(value):
        return value
    return int(value) if value.isdigit() else float(value)


def _extension(name: str, value: Any, place: str) -> Any:
    kinds, _ = EXTENSIONS[name]
    value = _read_text(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        rule = {bool: "true or false", int: "a whole number"}.get(kinds, "a number")  # type: ignore[arg-type]
        raise bad(place, f"{name} is {_told(value)}; give {rule}.")
    if isinstance(value, int | float) and not math.isfinite(value):
        raise bad(place, f"{name} is {_told(value)}; give a finite number.")
    return value


def _refuse_out_of_range(extensions: Mapping[str, Any], place: str) -> None:
    """Holds the extensions to the ranges of the library's own options."""
    made: dict[str, dict[str, Any]] = {"lora": {}, "data": {}, "train": {}}
    names = {}
    for name, value in extensions.items():
        section, _, option = EXTENSIONS[name][1].partition(".")
        made[section][option] = value
        names[f"{section}.{option.replace('_', '-')}"] = name
    try:
        LoraConfig(**made["lora"]), DataConfig(**made["data"]), TrainConfig(**made["train"])
    except (ValueError, OverflowError) as error:
        told = str(error)
        field = next((own for option, own in names.items() if option in told), None)
        where = f"{place}.{field}" if field else place
        raise bad(where, told) from None


def _told(value: Any) -> str:
    """Returns a value of a request as it may stand in an answer."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def unsupported(method: str) -> RequestError:
    """Returns the refusal of a method that nothing here trains."""
    reasons = {
        "dpo": "dpo takes its loss from TRL, which is not installed on the server (pip install 'lora-ft[prefer]')",
        "reinforcement": "reinforcement is not trained here",
    }
    reason = reasons.get(method, f"{method[:40]!r} is no method")
    supported = " and ".join(name for name in METHODS if name != method)
    return bad("method.type", f"{reason}; supported here: {supported}.", "unsupported_method")

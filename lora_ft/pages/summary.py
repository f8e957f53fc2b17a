"""What a run did, as plain data, and that data in words: what card, page and comparison all read.

`summary.json` keeps it in the adapter folder, beside the record, which says what the run was made with and on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from lora_ft.errors import AdapterError
from lora_ft.foreign.files import MB, object_of
from lora_ft.pages import damage
from lora_ft.pages.curves import number
from lora_ft.proof import recorded
from lora_ft.scoring.class_metrics import TABLES
from lora_ft.system import atomicio
from lora_ft.system.redaction import portable

FILE = "summary.json"
# Confusion matrices of many classes are the most there is in one.
MAX_BYTES = 64 * MB
# What the record of the run says already.
RECORDED = ("base", "environment", "data")

# Metrics of which less is better; of all others more is.
FALLING = ("loss", "perplexity", "error", "kl", "wer", "cer", "ter", "brier", "mse", "mae")
# What is measured on general text, and not on held-out rows.
DRIFT = "drift."
# Settings that say where a run wrote or how it was called, not what it did.
NOT_SETTINGS = ("task", "base", "out", "resume", "dry_run", "twin")


@dataclass(frozen=True)
class Summary:
    """What a run hands over when it ends, as plain data."""

    title: str
    task: str
    base: dict[str, Any]
    """The `base` record of environment.json: name, source, repo, revision, origin, weights_sha256."""
    config: dict[str, Any]
    """`settings.plain` of the run's configuration."""
    environment: dict[str, Any]
    data: dict[str, Any]
    """`train` and `eval` (or None), each with name, rows and sha256."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Metrics of `base` and `adapter`; empty without held-out rows.

    `NAME_change_interval` beside an adapter's `NAME` is the 95% interval of its change from the base.
    """
    fit: dict[str, Any] = field(default_factory=dict)
    """steps, tokens, seconds, tokens_per_s, peak_bytes."""
    seal: dict[str, Any] = field(default_factory=dict)
    """kl_effect in nats and rows; kl_live in nats and passed where the saved files were loaded and replayed."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """prompt, expected, before and after."""
    combined: dict[str, Any] = field(default_factory=dict)
    """Of an adapter that was combined and not trained: method, rank, and `parts`, `combine.Kept` of each."""
    adapter_bytes: int = 0
    files: dict[str, str] = field(default_factory=dict)
    """Name and sha256 of the files of the adapter folder."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """What `layers.measured` says of each layer that was adapted."""
    plan: dict[str, Any] = field(default_factory=dict)
    """What a step was planned to hold at its peak, as `planned.plan` tells it; empty where no plan was made."""


KINDS: dict[str, Any] = {
    f.name: {"str": str, "int": int}.get(str(f.type), list if str(f.type).startswith("list") else dict)
    for f in dataclasses.fields(Summary)
    if f.name not in RECORDED
}


def write(folder: Path, summary: Summary) -> None:
    """Writes `summary.json`, without what the record of the run says; what is not a number is null in it."""
    atomicio.write_json(folder / FILE, kept(summary))


def kept(summary: Summary) -> dict[str, Any]:
    """Returns what `summary.json` holds."""
    return {key: _finite(value) for key, value in dataclasses.asdict(summary).items() if key not in RECORDED}


def read(folder: Path) -> Summary:
    """Returns what `write` wrote into an adapter folder. Raises AdapterError where it is missing or of another kind."""
    path = folder / FILE
    if not folder.is_dir():
        raise AdapterError(f"{folder}: there is no such folder.")
    if not path.is_file():
        raise AdapterError(
            f"{folder}: there is no {FILE}, so the run has not ended, or an earlier version of lora-ft made it: go on "
            "with it by --resume, or train again."
        )
    found, record = object_of(path, AdapterError, MAX_BYTES), recorded.read(folder)
    problems = recorded.unlike(found, KINDS)
    # A combined adapter was trained on no rows of its own.
    problems += recorded.unlike({"data": {}, **record}, {"task": dict, "data": dict})
    problems += [f"{key} is none of its keys" for key in found.keys() - KINDS.keys()]
    problems = problems or damage.of(found, record)
    if problems:
        raise AdapterError(f"{path}: {'; '.join(problems[:8])}: the file was damaged.")
    return Summary(**found, base=record["base"], environment=record, data=record.get("data", {}))


def view(summary: Summary) -> dict[str, Any]:
    """Returns what the templates of card and page both read."""
    environment = summary.environment
    measured = list(evaluated(summary.metrics))
    evaluation = [row for row in measured if not row["name"].startswith(DRIFT)]
    data = {kind: {**rows, "name": portable(str(rows["name"]))} for kind, rows in summary.data.items() if rows}
    if "eval" in data and re.fullmatch(r"0?\.\d+", data["eval"]["name"]):
        data["eval"]["name"] = f"{100 * float(data['eval']['name']):g}% of {data['train']['name']}"
    return {
        "title": summary.title,
        "task": summary.task,
        "base": {**summary.base, "name": portable(str(summary.base["name"]))},
        "device": environment.get("device"),
        "dtype": environment.get("dtype"),
        "system": environment.get("task", {}).get("system"),
        "versions": environment.get("versions", {}),
        "init_from": environment.get("init_from"),
        "quant": summary.config["quant"],
        "data": data,
        "held_out": data.get("eval"),
        "fit": summary.fit,
        "seal": {"passed": None, "kl_live": None, **summary.seal} if summary.seal else {},
        # What a combined adapter was made by; no training of the rest made it.
        "settings": dict(settings({k: v for k, v in summary.combined.items() if k != "parts"} or summary.config)),
        "parts": summary.combined.get("parts", []),
        "max_length": summary.config["data"].get("max_length"),
        "variants": variants(summary.metrics),
        "evaluation": evaluation,
        "drift": [row for row in measured if row["name"].startswith(DRIFT)],
        "loss": next((row for row in evaluation if row["name"] == "loss" and row["change"]), None),
        "unsure": [r["name"] for r in evaluation if r["interval"] and not r["verdict"]],
        "unit": _unit(summary),
        "classes": _weakest(summary.metrics),
        "has_matrix": "confusion_matrix" in summary.metrics.get("adapter", {}),
        "adapter_bytes": summary.adapter_bytes,
        "files": dict(sorted(summary.files.items())),
    }


def problem_type(summary: Summary) -> str:
    """Returns what a classifier learned; the record of an early one does not say it."""
    return str(summary.environment.get("task", {}).get("problem_type", damage.PROBLEM_TYPES[0]))


def evaluated(metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields one row for each metric: its value in every variant, the adapter's change and its interval."""
    names = variants(metrics)
    flat = {name: flattened({k: v for k, v in metrics[name].items() if k not in TABLES}) for name in names}
    order = dict.fromkeys(
        key for name in names for key in flat[name] if not key.endswith("_interval") and key != "rows"
    )
    for key in order:
        cells = [number(flat[name][key]) if key in flat[name] else "" for name in names]
        row = {"name": key, "cells": cells, "change": "", "interval": "", "verdict": ""}
        before, after = (flat.get(name, {}).get(key) for name in ("base", "adapter"))
        if isinstance(before, int | float) and isinstance(after, int | float):
            row["change"] = number(after - before, signed=True)
        interval = flat.get("adapter", {}).get(f"{key}_change_interval")
        if interval and None not in interval:
            low, high = interval
            row["interval"] = f"{number(low, signed=True)} to {number(high, signed=True)}"
            if low > 0 or high < 0:
                row["verdict"] = "better" if (high < 0) == is_falling(key) else "worse"
        if any(cells):
            yield row


def is_falling(metric: str) -> bool:
    """Returns whether less of a metric is better."""
    return any(word in FALLING for word in re.split(r"[_.\s]", metric))


def variants(metrics: Mapping[str, Any]) -> list[str]:
    """Returns the names of what was evaluated, the base first."""
    return [name for name in ("base", "adapter") if metrics.get(name)]


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns numbers, texts and intervals by dotted name; other lists are for programs, not for a table."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{key}."))
        elif key.endswith("_interval") if isinstance(value, list | tuple) else value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields each setting that is set by its dotted name, as it would be typed, and its value in words."""
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", "-")
        if (prefix == "" and key in NOT_SETTINGS) or value is None or value in ((), [], {}):
            continue
        if isinstance(value, Mapping) and prefix == "":
            yield from settings(value, f"{key}.")
        elif isinstance(value, Mapping):
            yield name, ", ".join(f"{k}={portable(str(v))}" for k, v in value.items())
        elif isinstance(value, list | tuple):
            yield name, ", ".join(portable(str(item)) for item in value)
        else:
            yield name, ("yes" if value else "no") if isinstance(value, bool) else portable(str(value))


def cut(sample: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """Returns a sample whose texts have `limit` characters at most, and end in how many more there were."""
    texts = {}
    for key in ("prompt", "expected", "before", "after"):
        value = sample.get(key)
        text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text = clean(text)
        texts[key] = text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"
    return texts


def size(count: float) -> str:
    """Returns a number of bytes in words."""
    for unit, bytes_each in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= bytes_each:
            return f"{count / bytes_each:.{2 if count < 10 * bytes_each else 1}f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Returns seconds in words, to about three digits."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def clean(text: str) -> str:
    """Returns text that UTF-8, HTML and Markdown can all hold: one kind of line end, no control characters."""
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", "\ufffd", text)


def templates(*, escaped: bool, **filters: Any) -> jinja2.Environment:
    """Returns the templates of card and pages, with numbers, sizes and times in words among their filters."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_ft.pages"),
        autoescape=escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, size=size, duration=duration, **filters)
    return environment


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unit(summary: Summary) -> str:
    if summary.task == "prefer":
        units = {"ipo": "squared nats per token, in the mean over rows", "kto": "of at most 1 per row"}
        return units.get(summary.config["prefer"]["loss"], "nats per row")
    if summary.task == "embed":
        scored = "spearman" in summary.metrics.get("adapter", {})
        return "squared differences of cosine and score" if scored else "nats per text"
    if summary.task != "classify":
        return "nats per scored token"
    if problem_type(summary) == "regression":
        return "squared units of the label, in the mean"
    return "nats per row" if problem_type(summary) == "single_label_classification" else "nats per row and label"


def _weakest(metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """Returns what there is to say of each class, those with the lowest F1 first."""
    found = metrics.get("adapter", {}).get("per_class", {})
    # Of a class without a held-out row nothing is known.
    order = sorted(found, key=lambda label: (found[label]["support"] == 0, found[label]["f1"] or 0))
    return [(label, {key: number(value) for key, value in found[label].items()}) for label in order]

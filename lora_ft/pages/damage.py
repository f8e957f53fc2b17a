"""What is wrong with the summary of a run, or with its record, that card, page and comparison could not tell of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from lora_ft.config import Quant, TaskName
from lora_ft.foreign.strictjson import shown
from lora_ft.proof import recorded
from lora_ft.scoring.class_metrics import TABLES

NUMBER = int | float
# What is read of its parts, and of which type each must be.
PARTS: dict[str, dict[str, Any]] = {
    "config": {"quant": str, "lora": dict, "data": dict, "train": dict},
    "fit": {"steps": int, "tokens": int, "seconds": NUMBER, "tokens_per_s": NUMBER, "peak_bytes": int},
    "seal": {"kl_effect": NUMBER, "rows": int},
    "plan": {"bytes": dict, "rows": int, "tokens": int, "measured_rows": bool},
    "samples": {"prompt": str, "expected": str, "before": str, "after": str},
    "layers": {"name": str, "norm": NUMBER | None, "effective_rank": NUMBER | None},
}
MEASURED = NUMBER | None
# What is read within those, by the dotted name of the part; of `metrics` the tables of classes.
WITHIN: dict[str, dict[str, Any]] = {
    "config.lora": {"rank": int, "dora": bool, "init": str, "rank_pattern": dict},
    "config.data": {"special_tokens": list, "max_length": int},
    "config.train": {"seed": int},
}
ROWS: dict[str, Any] = {"name": str, "rows": int | None, "sha256": str | None}
CLASS: dict[str, Any] = {"precision": MEASURED, "recall": MEASURED, "f1": MEASURED, "support": int}
COMBINED: dict[str, Any] = {
    "number": int, "weight": NUMBER, "adapter_sha256": str, "data": list, "loss": dict,
    "effect_kept": MEASURED, "gain_kept": MEASURED,
    "rows": dict,
}  # fmt: skip
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
THREE = ("base", "alone", "combined")


def of(found: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Returns what is wrong within the parts of a summary, whose own kinds are right, and of the record beside it."""
    return list(_unlike_parts(found)) or [*_unlike_within(found), *_unlike_record(record)]


def _unlike_parts(found: dict[str, Any]) -> Iterator[str]:
    """Yields what is wrong within the parts of a summary, whose own kinds are right."""
    for name, wanted in PARTS.items():
        held = found[name] if isinstance(found[name], list) else [found[name]] if found[name] else []
        for part in held:
            yield from (
                recorded.unlike(part, wanted, f"{name}.") if isinstance(part, dict) else [f"{name} holds {part!r}"]
            )
    for name, part in found["metrics"].items():
        if not isinstance(part, dict):
            yield f"metrics.{name} is no object"
    for kind, count in found["plan"].get("bytes", {}).items():
        if type(count) is not int:
            yield f"plan.bytes.{kind} is no number of bytes"


def _unlike_within(found: dict[str, Any]) -> Iterator[str]:
    """Yields what is wrong deeper in the parts of a summary."""
    config = found["config"]
    for place, wanted in WITHIN.items():
        yield from _unlike(config.get(place.partition(".")[2]), wanted, place)
    for place, value, allowed in (
        ("task", found["task"], get_args(TaskName)),
        ("config.quant", config.get("quant"), get_args(Quant)),
    ):
        if value not in allowed:
            yield f"{place} is {shown(value)}, not one of {', '.join(allowed)}"
    if found["task"] == "prefer":
        yield from _unlike(config.get("prefer"), {"loss": str}, "config.prefer")
    lora = config["lora"] if isinstance(config.get("lora"), dict) else {}
    pattern = lora.get("rank_pattern")
    for name, rank in pattern.items() if isinstance(pattern, dict) else ():
        if type(rank) is not int:
            yield f"config.lora.rank_pattern.{name} is {shown(rank)}, not a rank"
    for name in ("save_modules", "train_tokens"):
        if not isinstance(lora.get(name, []), list):
            yield f"config.lora.{name} is {shown(lora[name])}, not a list"
    for name, measured in found["metrics"].items():
        if isinstance(measured, dict):
            yield from _unlike_metrics(measured, f"metrics.{name}")
    parts = found["combined"].get("parts", [])
    if not isinstance(parts, list):
        yield f"combined.parts is {shown(parts)}, not a list"
        return
    asked = any(isinstance(part, dict) and part.get("rows") for part in parts)
    for part in parts:
        yield from _unlike(part, COMBINED, "combined.parts")
        if isinstance(part, dict):
            yield from _unlike(part.get("loss"), dict.fromkeys(THREE, MEASURED), "combined.parts.loss")
            if asked:
                yield from _unlike(part.get("rows"), dict.fromkeys(THREE, dict), "combined.parts.rows")


def _unlike(held: Any, wanted: dict[str, Any], place: str) -> list[str]:
    return recorded.unlike(held, wanted, f"{place}.") if isinstance(held, dict) else [f"{place} is no object"]


def _unlike_metrics(measured: dict[str, Any], place: str) -> Iterator[str]:
    """Yields what is wrong with intervals, and with what is said of each class."""
    for key, value in measured.items():
        if key.endswith("_interval") and not (_is_list_of(value, MEASURED) and len(value) == 2):
            yield f"{place}.{key} is {shown(value)}, not two numbers"
        elif isinstance(value, dict) and key not in TABLES:
            yield from _unlike_metrics(value, f"{place}.{key}")
    classes, counts = measured.get("per_class", {}), measured.get("confusion_matrix", [])
    if not isinstance(classes, dict):
        yield f"{place}.per_class is no object"
        return
    for label, told in classes.items():
        yield from _unlike(told, CLASS, f"{place}.per_class.{label}")
    sizes = [len(row) for row in counts if _is_list_of(row, int)] if isinstance(counts, list) else [-1]
    if counts and sizes != [len(classes)] * len(classes):
        yield f"{place}.confusion_matrix is no row of whole numbers for each class"


def _unlike_record(record: dict[str, Any]) -> Iterator[str]:
    """Yields what of the record of the run the card and the page could not say."""
    data = record.get("data", {})
    if data and not data.get("train"):
        yield "data.train is missing"
    for kind, rows in data.items():
        if kind not in ("train", "eval"):
            yield f"data.{kind} is of no rows that a run has"
        elif rows is not None:
            yield from _unlike(
                rows,
                {**ROWS, **({"cut_rows": int} if isinstance(rows, dict) and "rows_read" in rows else {})},
                f"data.{kind}",
            )
    if record.get("init_from") is not None:
        yield from _unlike(record["init_from"], {"sha256": str}, "init_from")
    if not isinstance(record.get("device"), str | None):
        yield f"device is {shown(record['device'])}, not a string"
    if not all(isinstance(name, str) for name in record["left_whole"]):
        yield "left_whole holds what is no name"
    told = record["task"]
    if not isinstance(told.get("system"), str | None):
        yield f"task.system is {shown(told['system'])}, not a string"
    if told.get("labels") is not None and not _is_list_of(told["labels"], str):
        yield f"task.labels is {shown(told['labels'])}, not a list of strings"
    if told.get("problem_type", PROBLEM_TYPES[0]) not in PROBLEM_TYPES:
        yield f"task.problem_type is {shown(told['problem_type'])}, not one of {', '.join(PROBLEM_TYPES)}"


def _is_list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)

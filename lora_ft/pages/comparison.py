"""Runs side by side: what each was, what came of it, and in which settings they differ."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from lora_ft.pages import curves, summary
from lora_ft.pages.curves import number
from lora_ft.pages.summary import Summary
from lora_ft.system import atomicio
from lora_ft.system.redaction import redacted
from lora_ft.training import logged


@dataclass(frozen=True)
class Run:
    """One of the runs."""

    name: str
    """Its folder's name, with as much of the path as tells it from the others."""
    told: Summary
    lines: list[dict[str, Any]]
    """Of its `metrics.jsonl`."""


def read(folders: Sequence[Path]) -> list[Run]:
    """Returns the runs of adapter folders. Raises AdapterError where one is none of a run that has ended."""
    parts = [folder.resolve().parts for folder in folders]
    most = max(map(len, parts))
    # Two runs are often called the same, in folders that are not.
    deep = next((n for n in range(1, most) if len({part[-n:] for part in parts}) == len(set(parts))), most)
    names = ["/".join(part[-deep:]) for part in parts]
    return [
        Run(name, summary.read(folder), logged.read(folder / logged.FILE))
        for name, folder in zip(names, folders, strict=True)
    ]


def known(run: Run) -> dict[str, Any]:
    """Returns what is known of a run, as JSON holds it."""
    told = dataclasses.asdict(run.told)
    return {"name": run.name} | {key: told[key] for key in ("task", "base", "data", "config", "fit", "metrics", "seal")}


def rows(runs: Sequence[Run]) -> Iterator[tuple[str, list[str]]]:
    """Yields what there is to compare: its name, and what each run has of it, in words."""
    views = [summary.view(run.told) for run in runs]
    yield "task", [run.told.task for run in runs]
    yield "base", [view["base"]["name"] for view in views]
    yield "device", [str(view["device"] or "") for view in views]
    yield "training rows", [_of_rows(view["data"].get("train")) for view in views]
    for key, name, words in (
        ("steps", "steps", number),
        ("tokens", "tokens", number),
        ("seconds", "time", summary.duration),
        ("tokens_per_s", "tokens/s", number),
        ("peak_bytes", "peak memory", summary.size),
    ):
        yield name, [words(run.told.fit[key]) if key in run.told.fit else "" for run in runs]
    yield "adapter", [summary.size(run.told.adapter_bytes) for run in runs]
    yield "held-out rows", [_of_rows(view["held_out"]) for view in views]
    tables = [{row["name"]: row for row in [*view["evaluation"], *view["drift"]]} for view in views]
    for metric in dict.fromkeys(name for table in tables for name in table):
        yield (
            metric,
            [_measured(table.get(metric), view["variants"]) for table, view in zip(tables, views, strict=True)],
        )
    yield "seal, nats from the base", [number(run.told.seal.get("kl_effect")) for run in runs]
    settings = [view["settings"] for view in views]
    for name in dict.fromkeys(name for told in settings for name in told):
        cells = [told.get(name, "") for told in settings]
        if len(set(cells)) > 1 and name not in ("data.train", "data.eval"):
            yield name, cells


def warnings(runs: Sequence[Run]) -> Iterator[str]:
    """Yields what stands against comparing these runs."""
    held_out = {(run.told.data.get("eval") or {}).get("sha256") for run in runs}
    if len(held_out) > 1:
        yield "The runs were not measured on the same held-out rows: their metrics say nothing of which is better."
    unproven = [run.name for run in runs if run.told.seal.get("passed") is not True]
    if unproven:
        yield f"Not proven: {', '.join(unproven)}."


def page(runs: Sequence[Run]) -> str:
    """Returns one HTML file that loads nothing else."""
    drawn = list(curves.compared([(run.name, run.lines) for run in runs]))
    return _templates().get_template("comparison.html.jinja").render(
        names=[run.name for run in runs], rows=list(rows(runs)), warnings=list(warnings(runs)), curves=drawn
    )  # fmt: skip


def write(path: Path, runs: Sequence[Run]) -> None:
    """Writes the page. Raises StorageError."""
    atomicio.write(path, redacted(page(runs)).encode("utf-8", errors="replace"))


def _of_rows(rows_of: dict[str, Any] | None) -> str:
    if not rows_of:
        return ""
    return f"{number(rows_of['rows'])} of {rows_of['name']}" if rows_of["rows"] else str(rows_of["name"])


def _measured(row: dict[str, Any] | None, variants: Sequence[str]) -> str:
    """Returns what a run's adapter measures, its change from the base, and the interval of that."""
    if row is None:
        return ""
    value = dict(zip(variants, row["cells"], strict=True)).get("adapter", "")
    change = f" ({row['change']}" + (f", {row['interval']}" if row["interval"] else "") + ")" if row["change"] else ""
    return value + change


@functools.cache
def _templates() -> jinja2.Environment:
    return summary.templates(escaped=True)

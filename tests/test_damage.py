"""Summaries, records and lines of metrics that were damaged: one clear error, or what is left, and no traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_ft import report
from lora_ft.errors import AdapterError
from lora_ft.pages import card as cards
from lora_ft.pages import comparison, summary
from lora_ft.training import logged
from tests.test_report import summary as made


def _places(tree: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from _places(value, *path, key)


def _damaged(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    made = copy.deepcopy(tree)
    held = made
    for key in path[:-1]:
        held = held[key]
    if value is GONE:
        del held[path[-1]]
    else:
        held[path[-1]] = value
    return made


GONE = object()
DRAWN = ("metrics", "layers", "samples", "fit")
CLASSES = {name: {"precision": 0.5, "recall": None, "f1": 0.5, "support": 3} for name in ("a", "b")}
COMBINED = {"method": "cat", "rank": 8, "parts": [{
    "number": 1, "weight": 1.0, "adapter_sha256": "ab" * 32, "data": ["rows.jsonl"], "effect_kept": 0.5,
    "gain_kept": None,
    "loss": {"base": 2.0, "alone": 1.0, "combined": 1.5},
    "rows": {name: {"loss": 1.0} for name in ("base", "alone", "combined")},
}]}  # fmt: skip
MEASURED = {
    "base": {"loss": 2.0, "f1": 0.2},
    "adapter": {
        "loss": 1.0, "loss_change_interval": [-1.2, -0.8], "per_class": CLASSES, "confusion_matrix": [[1, 2], [0, 3]],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "told",
    [
        made(task="classify", metrics=MEASURED, layers=[{"name": "a.0.b", "norm": 1.0, "effective_rank": 2.0}]),
        made(combined=COMBINED, data={}),
    ],
    ids=["trained", "combined"],
)
def test_a_damaged_summary_is_told_or_shown_and_never_a_traceback(told: Any, tmp_path: Path) -> None:
    """Each key in turn is taken away or replaced, in the summary and in the record beside it."""
    task = {"labels": ["a", "b"], "problem_type": "single_label_classification"} if told.task == "classify" else {}
    base = {**told.base, "weights_sha256": "ab" * 32}
    record = {
        **told.environment,
        "base": base,
        "data": told.data,
        "quant": "nf4",
        "task": task,
        "init_from": {"sha256": "x"},
    }
    whole = {"environment.json": record, summary.FILE: summary.kept(told)}

    def read(files: dict[str, Any], drawn: bool = True) -> bool:
        for name, held in files.items():
            (tmp_path / name).write_text(json.dumps(held))
        try:
            found = summary.read(tmp_path)
        except AdapterError:
            return False
        cards.card(found)
        list(comparison.rows([comparison.Run("one", found, []), comparison.Run("two", found, [])]))
        if drawn:
            report.page(found)
        return True

    assert read(whole)
    refused, wrong = 0, {}
    for file, tree in whole.items():
        # Most settings of a training are shown as they are, one as the other.
        for path in [path for path in _places(tree) if path[1:2] != ("train",) or path[-1] == "seed"]:
            for value in (GONE, None, [], 7):
                try:
                    refused += not read(
                        {**whole, file: _damaged(tree, path, value)}, drawn=path[0] in DRAWN and value is GONE
                    )
                except Exception as error:
                    wrong[(file, *path, "gone" if value is GONE else repr(value))] = repr(error)
    assert not wrong
    assert refused > 200


def test_a_line_of_metrics_that_is_none_is_left_out(tmp_path: Path) -> None:
    (tmp_path / logged.FILE).write_text('{"step": 1, "loss": 2.0}\n\n[3]\n{"loss": 1}\n{"step": 2, "lo')
    assert logged.read(tmp_path / logged.FILE) == [{"step": 1, "loss": 2.0}]
    assert logged.read(tmp_path / "none") == []


def test_a_line_of_metrics_that_is_nested_without_end_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / logged.FILE
    file.write_text('{"step": 1, "loss": 2.0}\n' + "[" * 200_000 + '\n{"step": 2, "lo')
    assert logged.read(file) == [{"step": 1, "loss": 2.0}]

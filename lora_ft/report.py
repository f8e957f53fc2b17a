"""What a run leaves for people: the card, `report.html`, and the data of both.

All are pure functions of a `Summary` and `metrics.jsonl`: the same run gives the same bytes.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from lora_ft.pages import card, summary
from lora_ft.pages.curves import by_layer, confusion, curves, picture
from lora_ft.pages.summary import Summary
from lora_ft.system import atomicio
from lora_ft.system.redaction import redacted
from lora_ft.training import logged

PAGE = "report.html"

# What is shown of each layer, and what it is called.
MAPS = {
    "norm": "Size of the change (Frobenius norm)",
    "effective_rank": "Directions it is spread over (effective rank)",
}
# A sample is there to be read; longer texts are cut, which also bounds the quadratic comparison of words.
SAMPLE_CHARS = 2400
# Share of words in common from which marking the others helps to read; below it the whole text would be tinted.
ALIKE = 0.35


def write(folder: Path, told: Summary) -> None:
    """Writes what there is to say of a run into its adapter folder: summary, page, card and the card's picture.

    The curves come from its `metrics.jsonl`.
    """
    lines = logged.read(folder / logged.FILE)
    summary.write(folder, told)
    drawn = picture(lines, told.metrics, told.fit.get("steps", 0))
    if drawn is not None:
        atomicio.write(folder / card.PICTURE, drawn)
    atomicio.write(folder / card.FILE, encoded(card.card(told, picture=drawn is not None)))
    write_page(folder, told)


def write_page(folder: Path, told: Summary) -> None:
    """Writes the page alone: the card may have been edited."""
    atomicio.write(folder / PAGE, encoded(page(told, logged.read(folder / logged.FILE))))


def encoded(text: str) -> bytes:
    """Returns the bytes of a card or a page, without any secrets in it."""
    return redacted(text).encode("utf-8", errors="replace")


def page(told: Summary, lines: Sequence[Mapping[str, Any]] = ()) -> str:
    """Returns one HTML file that loads nothing else.

    Args:
        lines: those of `metrics.jsonl`, in their order.
    """
    samples = [summary.cut(sample, SAMPLE_CHARS) for sample in told.samples]
    for sample in samples:
        sample["same"] = sample["expected"] != "" and sample["after"].strip() == sample["expected"].strip()
        sample["before"], sample["after"] = marked(sample["before"], sample["after"])
    measured = told.metrics.get("adapter", {})
    counts = measured.get("confusion_matrix")
    return _templates().get_template("report.html.jinja").render(
        **summary.view(told), curves=list(curves(lines, told.metrics, told.fit.get("steps", 0))), samples=samples,
        matrix=confusion(counts, list(measured["per_class"])) if counts else None,
        maps=[by_layer(told.layers, key, title) for key, title in MAPS.items()] if told.layers else [],
        plan=told.plan,
    )  # fmt: skip


def marked(before: str, after: str) -> tuple[Markup, Markup]:
    """Returns both texts as HTML, the words that only one of them has in `<del>` and `<ins>`.

    Where they have little in common nothing is marked: all of it would be.
    """
    old, new = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (before, after))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if matcher.ratio() < ALIKE:
        return escape(before), escape(after)
    left, right = Markup(""), Markup("")
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        gone, come = "".join(old[i1:i2]), "".join(new[j1:j2])
        left += Markup("<del>{}</del>").format(gone) if kind != "equal" and gone else escape(gone)
        right += Markup("<ins>{}</ins>").format(come) if kind != "equal" and come else escape(come)
    return left, right


@functools.cache
def _templates() -> jinja2.Environment:
    return summary.templates(escaped=True)

"""The curves of a run as drawings that fit a light page and a dark one, and numbers as people read them."""

from __future__ import annotations

import decimal
import io
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

# More points than this are finer than a pixel of the widest chart.
POINTS = 400

# Stand-ins that the drawing carries and the page's style sheet replaces, so that one SVG fits light and dark.
INK, RULE, ADAPTER, HELD_OUT, BASE, TEXT = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
STYLES = {INK: "--soft", RULE: "--rule", ADAPTER: "--adapter", HELD_OUT: "--held-out", BASE: "--base", TEXT: "--ink"}

# Of a confusion matrix: up to so many classes, the pixels of a cell and the size of its words.
CELLS = ((8, 48, 12), (24, 28, 11), (60, 16, 10), (10**9, 11, 9))
# Above it, cells have no room for numbers.
NUMBERED = 24
LABEL_CHARS, MIXED, EDGE = 28, 5, 8


@dataclass(frozen=True)
class Curve:
    """A chart for wide and one for narrow screens, as SVG, with its caption."""

    title: str
    caption: str
    legend: tuple[tuple[str, str], ...]
    """Style and name of each line, where there are several."""
    drawings: tuple[tuple[str, Markup], ...]
    """CSS class and SVG."""


def curves(
    lines: Sequence[Mapping[str, Any]], metrics: Mapping[str, Mapping[str, Any]], last_step: int
) -> Iterator[Curve]:
    """Yields a chart for each quantity that was logged, the loss first."""
    train, evaluated = _series(lines, "loss"), _series(lines, "eval_loss")
    losses = {name: metrics.get(name, {}).get("loss") for name in ("base", "adapter")}
    if losses["adapter"] is not None and last_step and not evaluated[0]:
        evaluated = [last_step], [losses["adapter"]]
    if train[0]:
        legend = [("adapter", "training")]
        legend += [("held-out", "held out")] if evaluated[0] else []
        legend += [("base", "base, held out")] if losses["base"] is not None else []
        parts = [f"{number(train[1][-1])} at the end"]
        parts += [f"held out {number(evaluated[1][-1])}"] if evaluated[0] else []
        drawings = tuple(
            (style, _draw(f"loss-{style}", size, [(ADAPTER, *train)], points=evaluated, level=losses["base"]))
            for style, size in (("wide", (820, 300)), ("narrow", (400, 260)))
        )
        yield Curve("Loss", ", ".join(parts), tuple(legend) if len(legend) > 1 else (), drawings)
    for key, title, scale, smooth in (
        ("learning_rate", "Learning rate", 1, False),
        ("grad_norm", "Gradient norm", 1, True),
        ("tokens_per_s", "Tokens per second", 1, False),
        ("peak_bytes", "Peak memory, GiB", 2**30, False),
    ):
        steps, values = _series(lines, key)
        values = [value / scale for value in values]
        if steps:
            svg = _draw(key, (400, 210), [(ADAPTER, steps, values)], smooth=smooth, from_zero=True)
            last = f"highest {number(max(values))}" if key == "learning_rate" else f"{number(values[-1])} at the end"
            yield Curve(title, last, (), (("", svg),))


@dataclass(frozen=True)
class Matrix:
    """How often each class was taken for each, as SVG in its own size, with its caption."""

    caption: str
    width: int
    """In CSS pixels: smaller than this, the names could not be read."""
    drawing: Markup


def confusion(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> Matrix:
    """Returns the drawing of a confusion matrix, with a row for each right class and a column for each answer.

    A cell is as strong as its share of the row; of few classes it holds its number.
    """
    from matplotlib.collections import PolyCollection

    size, names = len(labels), [_short(label) for label in labels]
    cell, font = next((px, pt) for most, px, pt in CELLS if size <= most)
    margin = int(0.62 * font * max(map(len, names))) + 16
    width = margin + size * cell + EDGE
    with _svg(f"confusion-{size}", (width, width)) as (figure, drawn):
        share = size * cell / width
        axes = figure.add_axes((margin / width, 1 - margin / width - share, share, share), facecolor="none")
        for colour, right in ((ADAPTER, True), (HELD_OUT, False)):
            cells = [
                (x, y, count / sum(row))
                for y, row in enumerate(counts)
                for x, count in enumerate(row)
                if count and (x == y) == right
            ]
            corners = [[(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)] for x, y, _ in cells]
            # The root, for a single confusion among many rows is to be seen too.
            axes.add_collection(
                PolyCollection(corners, facecolors=[(colour, 0.2 + 0.4 * part**0.5) for *_, part in cells])
            )
        for y, row in enumerate(counts if size <= NUMBERED else ()):
            for x, count in enumerate(row):
                if count:
                    axes.text(x + 0.5, y + 0.5, f"{count:,}", color=TEXT, fontsize=font, ha="center", va="center")
        axes.set(xlim=(0, size), ylim=(size, 0))
        middles, text = [place + 0.5 for place in range(size)], {"color": INK, "fontsize": font, "parse_math": False}
        axes.set_yticks(middles, names, **text)
        axes.set_xticks(middles, names, rotation=90, **text)
        axes.tick_params(length=0, pad=4, labeltop=True, labelbottom=False)
        axes.hlines(range(size + 1), 0, size, color=RULE, linewidth=0.5)
        axes.vlines(range(size + 1), 0, size, color=RULE, linewidth=0.5)
        axes.set_frame_on(False)
    wrong = [(count, y, x) for y, row in enumerate(counts) for x, count in enumerate(row) if count and x != y]
    most = [f"{names[y]} as {names[x]} ({count:,})" for count, y, x in sorted(wrong, key=lambda one: -one[0])[:MIXED]]
    told = f"taken for another most often: {'; '.join(most)}" if most else "no class was taken for another"
    return Matrix(f"{len(labels)} classes; {told}", width, drawn[0])


def _short(label: str) -> str:
    """Returns a label that fits beside a matrix, of characters that SVG can hold."""
    label = " ".join("".join(c if c.isprintable() else "\ufffd" for c in label).split())
    return label if len(label) <= LABEL_CHARS else f"{label[: LABEL_CHARS - 1]}…"


def _series(lines: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Returns the steps at which `key` was logged and its values; those that were not finite are null in the file."""
    last = {line["step"]: float(line[key]) for line in lines if line.get(key) is not None}
    return list(last), list(last.values())


def _draw(
    name: str,
    size: tuple[int, int],
    curves: Sequence[tuple[str, list[int], list[float]]],
    *,
    points: tuple[list[int], list[float]] = ([], []),
    level: float | None = None,
    smooth: bool = True,
    from_zero: bool = False,
) -> Markup:
    """Returns a chart as SVG for inlining: sizes in CSS pixels, colours by the page's style sheet, no two ids alike.

    Args:
        points: values drawn as dots on a thin line.
        level: height of a dashed line.
        smooth: draw the moving mean over a pale line of the values.
    """
    from matplotlib.ticker import MaxNLocator

    with _svg(name, size, layout="constrained") as (figure, drawn):
        axes = figure.add_subplot(facecolor="none")
        for colour, steps, values in curves:
            x, y = _thin(steps, values)
            mean = _moving_mean(y) if smooth else y
            if mean is not y:
                axes.plot(x, y, color=colour, alpha=0.3, linewidth=1)
            axes.plot(x, mean, color=colour, linewidth=1.8, marker="o" if len(x) < 3 else None, markersize=4)
        if points[0]:
            axes.plot(*points, color=HELD_OUT, linewidth=1.2, marker="o", markersize=4.5)
        if level is not None and math.isfinite(level):
            axes.axhline(level, color=BASE, linewidth=1.2, dashes=(4, 3))
        if from_zero:
            axes.set_ylim(0, 1.08 * max(max(values) for _, _, values in curves) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{decimal.Decimal(f'{value:.6g}'):,f}")
        axes.set_xlabel("step", loc="right", color=INK, fontsize=11)
        axes.tick_params(length=0, colors=INK, labelsize=11, pad=6)
        axes.grid(axis="y", color=RULE, linewidth=1)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set(visible=side == "bottom", color=RULE)
    return drawn[0]


@contextmanager
def _svg(name: str, size: tuple[int, int], **options: Any) -> Iterator[tuple[Any, list[Markup]]]:
    """Gives a figure to draw on and a list, which holds its SVG after the block; sizes in CSS pixels."""
    # Imported here because loading it takes half a second, which the card alone should not cost.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn: list[Markup] = []
    with matplotlib.rc_context():
        # A matplotlibrc of the user's must not show.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "lora-ft", "svg.fonttype": "none", "font.size": 11})
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, **options)
        figure.patch.set_visible(False)
        yield figure, drawn
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(stream, metadata=nothing)
        drawn.append(_inlined(stream.getvalue(), name))


def _thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns at most `POINTS` points, each the mean of its neighbours where there were more."""
    if len(steps) <= POINTS:
        return list(steps), list(values)
    cuts = [len(steps) * i // POINTS for i in range(POINTS + 1)]
    bins = [(i, j) for i, j in itertools.pairwise(cuts)]
    return [statistics.fmean(steps[i:j]) for i, j in bins], [statistics.fmean(values[i:j]) for i, j in bins]


def _moving_mean(values: list[float]) -> list[float]:
    """Returns the mean around each value, over a tenth of them; few values are returned as they are."""
    reach = len(values) // 20
    if reach == 0:
        return values
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _inlined(svg: str, name: str) -> Markup:
    """Returns matplotlib's SVG without what only a file needs, its colours and ids those of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    used = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg))
    kept = {one or other for one, other in used}
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in kept else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, style in STYLES.items():
        svg = svg.replace(colour, f"var({style})")
    return Markup(re.sub(r"\n\s*", "\n", svg).strip())


# Words, numbers and escapes


def number(value: Any, signed: bool = False) -> str:
    """Returns a number to about four digits, with a true minus sign; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    sign = "+" if signed else ""
    if isinstance(value, int) or not math.isfinite(value):
        text = f"{value:{sign},}"
    elif value == 0:
        text = "0"
    elif abs(value) < 0.001:
        text = f"{value:{sign}.3g}"
    else:
        text = (
            f"{value:{sign},.{0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 3 if abs(value) >= 1 else 4}f}"
        )
    return text.replace("-", "−", 1) if text.startswith("-") else text

"""The curves of a run as drawings that fit a light page and a dark one, and numbers as people read them.

A card can show pictures only, so the loss is also drawn as one, in colours that suit both.
"""

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
# Of runs side by side; with more of them the colours begin anew.
RUNS = tuple(f"#0707{number:02}" for number in range(1, 7))
STYLES |= {colour: f"--run-{number}" for number, colour in enumerate(RUNS, 1)}

# A picture has colours of its own.
PAPER = "#fdfcfa"
ON_PAPER = {
    INK: "#5d646d", RULE: "#e2ded6", ADAPTER: "#0d7a6f", HELD_OUT: "#b8560f", BASE: "#8b8479", TEXT: "#1d2126"
}  # fmt: skip
PICTURE_PX = (1000, 400)

# Of a confusion matrix: up to so many classes, the pixels of a cell and the size of its words.
CELLS = ((8, 48, 12), (24, 28, 11), (60, 16, 10), (10**9, 11, 9))
# Above it, cells have no room for numbers.
NUMBERED = 24
LABEL_CHARS, MIXED, EDGE = 28, 5, 8
# Rows of a map of layers; of more kinds of layers those with the same last name share one, as their mean.
KINDS = 40


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
    train, evaluated, level = _losses(lines, metrics, last_step)
    if train[0]:
        legend = [("adapter", "training")]
        legend += [("held-out", "held out")] if evaluated[0] else []
        legend += [("base", "base, held out")] if level is not None else []
        parts = [f"{number(train[1][-1])} at the end"]
        parts += [f"held out {number(evaluated[1][-1])}"] if evaluated[0] else []
        drawings = tuple(
            (style, _draw(f"loss-{style}", size, [(ADAPTER, *train)], points=evaluated, level=level))
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


def _losses(
    lines: Sequence[Mapping[str, Any]], metrics: Mapping[str, Mapping[str, Any]], last_step: int
) -> tuple[tuple[list[int], list[float]], tuple[list[int], list[float]], float | None]:
    """Returns steps and losses of training, those of the held-out rows, and the base's loss on them."""
    train, evaluated = _series(lines, "loss"), _series(lines, "eval_loss")
    losses = {name: metrics.get(name, {}).get("loss") for name in ("base", "adapter")}
    if losses["adapter"] is not None and last_step and not evaluated[0]:
        evaluated = [last_step], [losses["adapter"]]
    return train, evaluated, losses["base"]


def compared(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Iterator[Curve]:
    """Yields a chart of the training loss of several runs, and one of the held-out loss, where they were logged.

    Args:
        runs: the name of each, and the lines of its `metrics.jsonl`.
    """
    for key, title in (("loss", "Loss"), ("eval_loss", "Held-out loss")):
        drawn, legend = [], []
        for number_in, (name, lines) in enumerate(runs):
            steps, values = _series(lines, key)
            if steps:
                drawn.append((RUNS[number_in % len(RUNS)], steps, values))
                legend.append((f"run-{number_in % len(RUNS) + 1}", f"{name}: {number(values[-1])}"))
        if drawn:
            drawings = tuple(
                (style, _draw(f"{key}-{style}", size, drawn))
                for style, size in (("wide", (820, 300)), ("narrow", (400, 260)))
            )
            yield Curve(title, "at the end of each", tuple(legend), drawings)


def picture(
    lines: Sequence[Mapping[str, Any]], metrics: Mapping[str, Mapping[str, Any]], last_step: int
) -> bytes | None:
    """Returns the loss by step as a PNG file, with the same bytes every time; None where none was logged."""
    train, evaluated, level = _losses(lines, metrics, last_step)
    if not train[0]:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    with _figure(PICTURE_PX, layout="constrained") as figure:
        figure.patch.set(visible=True, facecolor=PAPER)
        axes = _plot(figure, [(ADAPTER, *train)], points=evaluated, level=level, colours=ON_PAPER)
        names = ["training"] + ["held out"] * bool(evaluated[0]) + ["base, held out"] * (level is not None)
        # The moving mean lies over the values, which are paler.
        drawn = [line for line in axes.get_lines() if line.get_alpha() is None]
        axes.legend(drawn, names, frameon=False, labelcolor=ON_PAPER[INK])
        FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()


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


def by_layer(layers: Sequence[Mapping[str, Any]], key: str, title: str) -> Matrix:
    """Returns a number of each adapted layer as a map: a row for each kind of layer, a column for each depth.

    Args:
        layers: each with its `name` in the model, and the number under `key`.
    """
    from matplotlib.collections import PolyCollection

    found: dict[tuple[str, int], list[float]] = {}
    several = len({_place(layer["name"])[0] for layer in layers}) > KINDS
    for layer in layers:
        kind, depth = _place(layer["name"])
        # Of a mixture of experts each would have a row of its own.
        found.setdefault((kind.rpartition(".")[2] if several else kind, depth), []).append(float(layer[key] or 0))
    placed = [(kind, depth, statistics.fmean(values)) for (kind, depth), values in found.items()]
    kinds = list(dict.fromkeys(kind for kind, _, _ in placed))
    deepest = max(depth for _, depth, _ in placed)
    most = max(value for *_, value in placed)
    cell = max(12, min(44, 640 // (deepest + 1)))
    names = [_short(kind) for kind in kinds]
    margin = int(0.6 * 11 * max(map(len, names))) + 16
    width, height = margin + cell * (deepest + 1) + EDGE, 24 * len(kinds) + 30
    with _svg(f"layers-{key.replace('_', '-')}", (width, height)) as (figure, drawn):
        wide, high = cell * (deepest + 1) / width, 24 * len(kinds) / height
        axes = figure.add_axes((margin / width, 1 - high - 4 / height, wide, high), facecolor="none")
        corners = [
            [(depth, row), (depth + 1, row), (depth + 1, row + 1), (depth, row + 1)]
            for row, depth in ((kinds.index(kind), depth) for kind, depth, _ in placed)
        ]
        shares = [value / most if most else 0.0 for *_, value in placed]
        axes.add_collection(PolyCollection(corners, facecolors=[(ADAPTER, 0.06 + 0.84 * share) for share in shares]))
        axes.set(xlim=(0, deepest + 1), ylim=(len(kinds), 0))
        every = max(1, math.ceil(26 / cell))
        shown = range(0, deepest + 1, every)
        text = {"color": INK, "fontsize": 11, "parse_math": False}
        axes.set_yticks([row + 0.5 for row in range(len(kinds))], names, **text)
        axes.set_xticks([depth + 0.5 for depth in shown], [str(depth) for depth in shown], **text)
        axes.tick_params(length=0, pad=4)
        axes.set_frame_on(False)
    largest = max(placed, key=lambda one: one[2])
    least = min(value for *_, value in placed)
    told = f"{number(least)} to {number(most)}, the largest in {names[kinds.index(largest[0])]} of layer {largest[1]}"
    return Matrix(f"{title}: {told}", width, drawn[0])


def _place(name: str) -> tuple[str, int]:
    """Returns the kind of a layer, and its depth: the first number in its name, 0 where there is none."""
    before, number_in, after = re.match(r"(.*?)(?:\.(\d+))?((?(2)(?:\..*)?$|$))", name).groups()  # type: ignore[union-attr]
    stack = next((part for part in ("encoder", "decoder") if f".{part}." in f".{before}."), "")
    if number_in is None:
        return before.rpartition(".")[2], 0
    return f"{stack} {after.lstrip('.')}".strip(), int(number_in)


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
    with _svg(name, size, layout="constrained") as (figure, drawn):
        _plot(figure, curves, points=points, level=level, smooth=smooth, from_zero=from_zero)
    return drawn[0]


def _plot(
    figure: Any,
    curves: Sequence[tuple[str, list[int], list[float]]],
    *,
    points: tuple[list[int], list[float]] = ([], []),
    level: float | None = None,
    smooth: bool = True,
    from_zero: bool = False,
    colours: Mapping[str, str] | None = None,
) -> Any:
    """Returns the axes of a chart put on a figure; arguments as of `_draw`, and what stand-ins of colours stand for."""
    from matplotlib.ticker import MaxNLocator

    ink, rule, held_out, base = ((colours or {}).get(name, name) for name in (INK, RULE, HELD_OUT, BASE))
    axes = figure.add_subplot(facecolor="none")
    for stand_in, steps, values in curves:
        colour = (colours or {}).get(stand_in, stand_in)
        x, y = _thin(steps, values)
        mean = _moving_mean(y) if smooth else y
        if mean is not y:
            axes.plot(x, y, color=colour, alpha=0.3, linewidth=1)
        axes.plot(x, mean, color=colour, linewidth=1.8, marker="o" if len(x) < 3 else None, markersize=4)
    if points[0]:
        axes.plot(*points, color=held_out, linewidth=1.2, marker="o", markersize=4.5)
    if level is not None and math.isfinite(level):
        axes.axhline(level, color=base, linewidth=1.2, dashes=(4, 3))
    if from_zero:
        axes.set_ylim(0, 1.08 * max(max(values) for _, _, values in curves) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{decimal.Decimal(f'{value:.6g}'):,f}")
    axes.set_xlabel("step", loc="right", color=ink, fontsize=11)
    axes.tick_params(length=0, colors=ink, labelsize=11, pad=6)
    axes.grid(axis="y", color=rule, linewidth=1)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set(visible=side == "bottom", color=rule)
    return axes


@contextmanager
def _svg(name: str, size: tuple[int, int], **options: Any) -> Iterator[tuple[Any, list[Markup]]]:
    """Gives a figure to draw on and a list, which holds its SVG after the block; sizes in CSS pixels."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    drawn: list[Markup] = []
    with _figure(size, **options) as figure:
        figure.patch.set_visible(False)
        yield figure, drawn
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(stream, metadata=nothing)
        drawn.append(_inlined(stream.getvalue(), name))


@contextmanager
def _figure(size: tuple[int, int], **options: Any) -> Iterator[Any]:
    """Gives a figure of so many pixels, whatever the user has set for figures."""
    # Imported here because loading it takes half a second, which a command that draws nothing should not cost.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        # A matplotlibrc of the user's must not show.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "lora-ft", "svg.fonttype": "none", "font.size": 11})
        yield Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, **options)


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

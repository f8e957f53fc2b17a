"""What the labels of rows are, decided from all of them, and which rows to hold out so that every class stays known."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from lora_ft.data.examples import Label, Labelled
from lora_ft.data.formats import NUMBER
from lora_ft.errors import DataError
from lora_ft.foreign.strictjson import shown

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
"""As `problem_type` in a model's configuration has it."""
SINGLE, MULTI, REGRESSION = get_args(Problem)
RULE = "give every row one class, or every row a list of classes, or every row a number"
# What the Trainer takes for a position without loss. A number to predict may be the same.
NO_LOSS = -100.0


def number(label: Label) -> float | None:
    """Returns the number that a label is or is written as, None where it is none."""
    if isinstance(label, str):
        label = float(label) if NUMBER.fullmatch(label) else math.nan
    return label if isinstance(label, float) and math.isfinite(label) else None


def problem_of(rows: Sequence[Labelled]) -> Problem:
    """Returns what the labels of the rows, one or more, are.

    Words are numbers where all of them are and one has a fraction, for a table has nothing but words; whole numbers
    name classes, unless one is written with a point where a file can tell the two apart.

    Raises:
        DataError: the rows are not of one kind; it names the first row that is unlike those before it.
    """
    lists = [isinstance(row.label, tuple) for row in rows]
    if any(lists):
        _refuse_mixture(rows, lists, "a list")
        return MULTI
    numbers = [number(row.label) for row in rows]
    written = [isinstance(row.label, float) for row in rows]
    if any(written):
        _refuse_mixture(rows, [value is not None for value in numbers], "a number", written.index(True))
        return REGRESSION
    known = [value for value in numbers if value is not None]
    return REGRESSION if len(known) == len(rows) and any(value % 1 for value in known) else SINGLE


def _refuse_mixture(rows: Sequence[Labelled], fits: Sequence[bool], what: str, first: int | None = None) -> None:
    """Raises DataError where some rows fit and some do not.

    Args:
        first: the row that says what all must be; unset, the first row that fits.
    """
    if all(fits):
        return
    one, other = rows[fits.index(True) if first is None else first], rows[fits.index(False)]
    count = len(fits) - sum(fits)
    more = f" (as in {count - 1} more rows)" if count > 1 else ""
    raise DataError([f"{other.where}: label is {shown(other.label)}{more}, but that of {one.where} is {what}; {RULE}."])


def of_row(label: Label) -> tuple[str, ...]:
    """Returns the classes of a row."""
    return label if isinstance(label, tuple) else (str(label),)


def unknown(rows: Sequence[Labelled], known: Sequence[str]) -> Iterator[str]:
    """Yields a problem for each row with a class that is not among those known."""
    names = set(known)
    few = f"{', '.join(map(shown, known[:8]))}{' ...' if len(known) > 8 else ''}"
    for row in rows:
        for label in of_row(row.label):
            if label not in names:
                yield f"{row.where}: label {shown(label)} is that of no training row; those have {few}."


def held_out(rows: Sequence[Labelled], fraction: float, seed: int) -> set[int]:
    """Returns the places of the rows to hold out: the same share of each class, and never its last row.

    Of rows with several classes each, and of numbers, those that the seed draws; a class keeps a row there too.

    Raises:
        DataError: no row can be held out.
    """
    return held_out_by([of_row(row.label) for row in rows], problem_of(rows), fraction, seed)


def held_out_by(classes: Sequence[tuple[str, ...]], problem: Problem, fraction: float, seed: int) -> set[int]:
    """Returns what `held_out` does, of rows whose classes are known.

    Raises:
        DataError: no row can be held out.
    """
    order = list(range(len(classes)))
    random.Random(seed).shuffle(order)
    wanted = max(1, round(fraction * len(order)))
    left = Counter(name for names in classes for name in names)
    room = _shares(left, fraction, wanted, seed) if problem == SINGLE else None
    chosen: set[int] = set()
    for place in order:
        names = classes[place]
        if len(chosen) == wanted:
            break
        if problem != REGRESSION and any(left[name] == 1 for name in names):
            continue
        if room is not None and room[names[0]] == 0:
            continue
        chosen.add(place)
        for name in names:
            left[name] -= 1
            if room is not None:
                room[name] -= 1
    if not chosen or len(chosen) == len(classes):
        raise DataError(
            [f"data.eval {fraction} of {len(classes)} rows leaves none to train on or to measure; give more rows."]
        )
    return chosen


def _shares(counts: Counter[str], fraction: float, wanted: int, seed: int) -> dict[str, int]:
    """Returns how many rows of each class to hold out, `wanted` in all where classes have so many to spare."""
    exact = {name: fraction * count for name, count in sorted(counts.items())}
    shares = {name: min(int(value), counts[name] - 1) for name, value in exact.items()}
    names = list(exact)
    random.Random(seed).shuffle(names)
    # What rounding down left over goes to those that lost the most by it.
    for name in sorted(names, key=lambda name: shares[name] - exact[name]):
        if sum(shares.values()) < wanted and shares[name] < counts[name] - 1:
            shares[name] += 1
    return shares

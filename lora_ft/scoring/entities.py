"""Entities among tags, and how many of them were found: as conlleval counts, and seqeval in its default mode.

An entity is a run of tags of one type. It begins at `B-`, and at an `I-` that stands after `O` or after another type;
it ends where the next one begins, or at `O`. It is found where a prediction has the same type at the same words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_ft.data.tagged import OUTSIDE


@dataclass(frozen=True)
class Count:
    """Entities in the references and in the predictions, and those in both."""

    wanted: int
    found: int
    right: int

    @property
    def precision(self) -> float:
        """Share of the entities predicted that are right, 0 where none was."""
        return self.right / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        """Share of the entities that were found, 0 where there is none."""
        return self.right / self.wanted if self.wanted else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall, 0 where both are."""
        return 2 * self.right / (self.found + self.wanted) if self.found + self.wanted else 0.0


def spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yields type, first word and the word after the last of each entity."""
    kind, start = "", 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        mark, _, here = tag.partition("-")
        if kind and not (mark == "I" and here == kind):
            yield kind, start, place
            kind = ""
        if mark != OUTSIDE and not kind:
            kind, start = here, place


def count(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, Count]:
    """Returns the counts of each type, by its name, over all rows.

    Raises:
        ValueError: a prediction has more or fewer tags than its reference.
    """
    wanted, found, right = Counter[str](), Counter[str](), Counter[str]()
    for said, meant in zip(predictions, references, strict=True):
        if len(said) != len(meant):
            raise ValueError(f"{len(said)} tags were predicted for {len(meant)} words")
        ours, theirs = set(spans(said)), set(spans(meant))
        for counter, entities in ((wanted, theirs), (found, ours), (right, ours & theirs)):
            counter.update(kind for kind, _, _ in entities)
    return {kind: Count(wanted[kind], found[kind], right[kind]) for kind in sorted(wanted | found)}


def total(counts: dict[str, Count]) -> Count:
    """Returns the sums over all types, of which the micro average is made."""
    held = counts.values()
    return Count(sum(c.wanted for c in held), sum(c.found for c in held), sum(c.right for c in held))

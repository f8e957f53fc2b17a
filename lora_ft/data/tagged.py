"""Words and their tags, out of lists or of spans of characters; what is wrong with them is noted.

Tags are `O`, `B-TYPE` for the first word of an entity and `I-TYPE` for those after it (IOB2). An `I-` with nothing of
its type before it begins an entity too, as older files (IOB1) have it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_ft.data.faults import MISSING, Faults, found
from lora_ft.foreign.strictjson import quoted

OUTSIDE = "O"
TAG = re.compile(r"O|[BI]-\S(.*\S)?")
RULE = "use O, B-TYPE or I-TYPE"
# A word is a run of letters and digits, or one sign that is neither.
WORD = re.compile(r"\w+|[^\w\s]")

Sentence = tuple[tuple[str, ...], tuple[str, ...]]
"""Words, and the tag of each."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Characters [start, end) of a text, and what they are."""

    place: str
    start: int
    end: int
    label: str


def sentence(words: Any, tags: Any, places: tuple[str, str], faults: Faults) -> Sentence:
    """Returns words with their tags as they stand in two lists; notes what is wrong with them in `faults`."""
    for value, place in zip((words, tags), places, strict=True):
        if not isinstance(value, list | tuple) or not value:
            faults.add(place, found(value), "give a list of strings, one or more")
            return (), ()
    if len(words) != len(tags):
        faults.add(places[1], f"is a list of {len(tags)}, but {places[0]} is one of {len(words)}", "tag each word once")
        return (), ()
    for index, (word, tag) in enumerate(zip(words, tags, strict=True)):
        faults.text(word, f"{places[0]}[{index}]", "give a word")
        if not is_tag(tag):
            faults.add(f"{places[1]}[{index}]", found(tag), RULE)
    return tuple(words), tuple(tags)


def places_of(text: str) -> tuple[tuple[int, int], ...]:
    """Returns where each word of a text begins and ends, in characters."""
    return tuple(word.span() for word in WORD.finditer(text))


def is_tag(value: Any) -> bool:
    """Returns whether a value is a tag of this form."""
    return isinstance(value, str) and TAG.fullmatch(value) is not None


def of_spans(text: str, spans: Any, place: str, faults: Faults) -> Sentence:
    """Returns the words of a text with the tags that its spans give them; notes what is wrong in `faults`.

    Args:
        spans: objects with `start` and `end`, in characters, and `label`; none of them is a text of `O` alone.
    """
    words = list(WORD.finditer(text))
    tags = [OUTSIDE] * len(words)
    before: _Span | None = None
    for span in sorted(_read(text, spans, place, faults), key=lambda span: (span.start, span.end)):
        inside = [i for i, word in enumerate(words) if word.start() < span.end and word.end() > span.start]
        if before is not None and span.start < before.end:
            faults.add(span.place, f"overlaps {before.place}", "give each character to one span")
        elif not inside:
            faults.add(span.place, "holds no word", "let it begin and end with words")
        elif words[inside[0]].start() < span.start or words[inside[-1]].end() > span.end:
            cut = words[inside[0] if words[inside[0]].start() < span.start else inside[-1]][0]
            faults.add(span.place, f"cuts the word {quoted(cut)}", "let it begin and end with words")
        else:
            for index in inside:
                tags[index] = f"{'B' if index == inside[0] else 'I'}-{span.label}"
        before = span if before is None or span.end > before.end else before
    return tuple(word[0] for word in words), tuple(tags)


def _read(text: str, spans: Any, place: str, faults: Faults) -> Sequence[_Span]:
    """Returns the spans that lie in the text and say what they are."""
    if not isinstance(spans, list):
        faults.add(place, found(spans), "give a list of objects with start, end and label")
        return []
    made = []
    for index, span in enumerate(spans):
        here = f"{place}[{index}]"
        if not isinstance(span, dict):
            faults.add(here, found(span), "give an object with start, end and label")
            continue
        start, end, label = (span.get(name, MISSING) for name in ("start", "end", "label"))
        strange = {name: value for name, value in (("start", start), ("end", end)) if not _is_count(value)}
        for name, value in strange.items():
            faults.add(f"{here}.{name}", found(value), "give a whole number of characters")
        if strange:
            continue
        if not start < end <= len(text):
            rule = f"the text has {len(text)} characters, and a span at least one of them"
            faults.add(here, f"goes from {start} to {end}", rule)
        elif not isinstance(label, str) or not is_tag(f"B-{label}"):
            faults.add(f"{here}.label", found(label), "give a name without space at its ends")
        else:
            made.append(_Span(here, start, end, label))
    return made


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

"""Entities among tags: where they begin and end, and how many of them were found."""

from __future__ import annotations

import random
import re

import pytest
from seqeval import metrics as scores

from lora_ft.scoring import metrics
from lora_ft.scoring.entities import Count, count, spans, total


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("", []),
        ("O O", []),
        ("B-A", [("A", 0, 1)]),
        ("B-A I-A O", [("A", 0, 2)]),
        ("O B-A I-A", [("A", 1, 3)]),
        # Of two beside each other, the second `B-` begins one, whatever the types.
        ("B-A B-A", [("A", 0, 1), ("A", 1, 2)]),
        ("B-A I-A B-A I-A", [("A", 0, 2), ("A", 2, 4)]),
        ("B-A B-B", [("A", 0, 1), ("B", 1, 2)]),
        # An `I-` with nothing of its type before it begins one too.
        ("I-A I-A", [("A", 0, 2)]),
        ("O I-A O", [("A", 1, 2)]),
        ("B-A O I-A", [("A", 0, 1), ("A", 2, 3)]),
        ("B-A I-B", [("A", 0, 1), ("B", 1, 2)]),
        ("B-A I-B I-B I-A", [("A", 0, 1), ("B", 1, 3), ("A", 3, 4)]),
        ("I-A B-A", [("A", 0, 1), ("A", 1, 2)]),
        ("B-a-b I-a-b I-a", [("a-b", 0, 2), ("a", 2, 3)]),
    ],
)
def test_where_entities_begin_and_end(tags: str, found: list[tuple[str, int, int]]) -> None:
    assert list(spans(tags.split())) == found


def test_they_are_those_of_the_old_script_for_any_tags() -> None:
    """By its own rules, read off pairs of tags: an entity ends before one place and begins at another."""
    rng = random.Random(0)
    for _ in range(2000):
        tags = rng.choices(["O", "B-A", "I-A", "B-B", "I-B"], k=rng.randrange(9))
        text = "".join(tag[0] + tag[-1] for tag in tags)
        # B or I of a type, then every I of the same type.
        wanted = [(m[1], m.start() // 2, m.end() // 2) for m in re.finditer(r"(?:B|I)([AB])(?:I\1)*", text)]
        assert list(spans(tags)) == wanted, tags


def test_counts_are_of_type_and_words() -> None:
    wanted = [["B-A", "I-A", "O", "B-B"], ["O", "B-A"], ["O"]]
    found = [["B-A", "O", "O", "B-B"], ["B-A", "B-A"], ["B-C"]]
    counts = count(found, wanted)
    assert counts == {"A": Count(2, 3, 1), "B": Count(1, 1, 1), "C": Count(0, 1, 0)}
    whole = total(counts)
    assert whole == Count(3, 5, 2)
    assert (whole.precision, whole.recall, whole.f1) == (2 / 5, 2 / 3, 0.5)
    values = metrics.compute("entities", found, wanted)
    assert values == {
        "entity_f1": 0.5,
        "entity_precision": 0.4,
        "entity_recall": pytest.approx(2 / 3),
        "entity_f1.A": pytest.approx(0.4),
        "entity_f1.B": 1.0,
        "entity_f1.C": 0.0,
    }


def test_the_same_words_in_another_row_are_no_hit() -> None:
    assert total(count([["B-A", "O"], ["O", "O"]], [["O", "O"], ["B-A", "O"]])) == Count(1, 1, 0)


def test_without_entities_all_is_0_and_nothing_fails() -> None:
    assert metrics.compute("entities", [["O"]], [["O"]]) == {
        "entity_f1": 0.0, "entity_precision": 0.0, "entity_recall": 0.0
    }  # fmt: skip


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="1 tags were predicted for 2 words"):
        count([["O"]], [["O", "O"]])


def test_they_are_those_of_seqeval() -> None:
    rng = random.Random(1)
    labels = ["O", "O", "B-A", "I-A", "B-B", "I-B"]
    wanted = [rng.choices(labels, k=rng.randrange(1, 12)) for _ in range(200)]
    found = [[tag if rng.random() < 0.7 else rng.choice(labels) for tag in tags] for tags in wanted]
    ours = total(count(found, wanted))
    assert ours.f1 == pytest.approx(scores.f1_score(wanted, found))
    assert ours.precision == pytest.approx(scores.precision_score(wanted, found))
    assert ours.recall == pytest.approx(scores.recall_score(wanted, found))

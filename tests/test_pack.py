"""Which examples share a row."""

import math
import random

import pytest

from lora_ft.data import pack


@pytest.mark.parametrize("seed", range(5))
def test_every_example_once_and_no_row_too_long(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randrange(1, 400) for _ in range(500)]
    rows = pack.fill(lengths, 512)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 512 for row in rows)
    # Nothing fits together that stands apart, and the bound of the algorithm holds.
    assert sorted(512 - sum(lengths[i] for i in row) for row in rows)[-2] < max(
        min(lengths[i] for i in row) for row in rows
    )
    assert len(rows) <= 11 / 9 * math.ceil(sum(lengths) / 512) + 4


def test_the_fullest_row_that_has_room_is_taken() -> None:
    assert pack.fill([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack.fill([10, 10, 10], 10) == [[0], [1], [2]]
    assert pack.fill([], 10) == []


def test_longer_than_the_budget_is_a_row_of_its_own() -> None:
    assert pack.fill([3, 15, 2], 10) == [[1], [0, 2]]


def test_many_examples_in_little_time() -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(20, 600) for _ in range(100_000)]
    rows = pack.fill(lengths, 2048)
    assert sum(lengths) / (2048 * len(rows)) > 0.99

"""The same run writes the same bytes, however Python orders its sets; and a difference would be noticed."""

from __future__ import annotations

import pytest

from tests.reliability import same_bytes
from tests.reliability.same_bytes import FILES, Made


def test_two_processes_write_the_same_bytes() -> None:
    made = same_bytes.run(2)
    assert made[0].hash_seed != made[1].hash_seed
    assert not same_bytes.differing(made)


@pytest.mark.slow
def test_six_processes_write_the_same_bytes() -> None:
    assert not same_bytes.differing(same_bytes.run(6))


@pytest.mark.parametrize("name", FILES)
def test_a_difference_is_noticed(name: str) -> None:
    same = dict.fromkeys(FILES, "a")
    assert same_bytes.differing([Made("1", same), Made("2", same), Made("3", {**same, name: "b"})]) == [name]

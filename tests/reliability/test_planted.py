"""Secrets stay where they are; and the search would find them."""

from __future__ import annotations

import pytest

from tests.reliability import planted


def test_planted_tokens_are_nowhere() -> None:
    found, searched, statuses = planted.run(24)
    assert not found
    assert searched > 20
    # It trained, was refused a base by hub and index alike, and went on.
    assert statuses == [0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("where", ["run/README.md", "stderr"])
def test_a_secret_that_got_out_is_found(where: str) -> None:
    secrets = planted.secrets(24)
    assert len({secret.value for secret in secrets}) == 24
    for secret in secrets:
        assert planted.search(secrets, {where: f"before {secret.value} after", "other": "text"}) == [
            f"{where} holds what was planted in {secret.place}"
        ]

"""Malformed data sets are told of in words, valid ones without any; and the count would notice."""

from __future__ import annotations

import pytest

from lora_ft.data import formats
from lora_ft.data.faults import Faults
from lora_ft.errors import DataError
from tests.reliability import malformed


def report(tally: malformed.Tally) -> str:
    return "\n".join([*tally.tracebacks, *tally.unclear, *tally.false_alarms])


def test_malformed_data_sets() -> None:
    tally = malformed.run(120)
    assert tally.files >= 120
    assert len(tally.by_kind) == len(malformed.KINDS)
    assert tally.faultless, report(tally)


@pytest.mark.slow
def test_a_thousand_malformed_data_sets() -> None:
    tally = malformed.run(1000)
    assert tally.files >= 1000
    assert tally.faultless, report(tally)


def test_a_reader_that_raises_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(self: Faults, *_: str) -> None:
        raise KeyError("role")

    monkeypatch.setattr(Faults, "add", add)
    assert malformed.run(40).tracebacks


def test_a_fault_that_is_not_told_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Faults, "add", lambda *_: None)
    assert any("as if nothing were wrong" in line for line in malformed.run(40).unclear)


def test_a_message_without_its_mend_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Faults, "add", lambda self, place, what, rule: self._lines.append(f"{self.where}: {what}."))
    assert malformed.run(40).unclear


def test_a_false_alarm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(source: str) -> None:
        raise DataError(["good.csv:1: is wrong; mend it."])

    monkeypatch.setattr(formats, "read", read)
    assert malformed.run(5).false_alarms

"""No hostile file loads, runs code or takes more than it may; and the harness would notice."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_ft import saved
from lora_ft.foreign import adapter, templates
from lora_ft.system import manifest
from tests.reliability import hostile
from tests.reliability.cases import Case, Good, change
from tests.reliability.corpus import MAKERS, cases
from tests.reliability.hostile import Outcome
from tests.reliability.hostile_runs import run_folders
from tests.reliability.hostile_weights import adapter_tensors
from tests.reliability.phrases import phrase_of


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def good(scratch: Path) -> Good:
    return hostile.prepare(scratch)


def faults(outcomes: list[Outcome]) -> list[str]:
    return [f"{o.case.kind}: {o.case.name}: {o.fault}\n{o.said}" for o in outcomes if o.fault]


def test_hostile_files_are_refused() -> None:
    assert not faults(hostile.run(24))


@pytest.mark.slow
def test_three_hundred_hostile_files_are_refused() -> None:
    outcomes = hostile.run(300)
    assert not faults(outcomes)
    assert len(outcomes) == 300


def test_the_cases_are_of_every_maker_and_none_is_made_twice(good: Good) -> None:
    made = cases(good, 300)
    assert len({(case.kind, case.name) for case in made}) > 280
    assert {case.kind for case in made} == {kind for kind, _ in MAKERS}


# Mutations: each takes away one guard, and the outcome says so.


def outcome(good: Good, scratch: Path, kind: str, make: Callable[[Path], object]) -> Outcome:
    return hostile.attempt(Case(kind, "one", make), good, scratch)


def test_a_good_file_counts_as_loaded(good: Good, scratch: Path) -> None:
    for kind in ("adapter", "base", "template", "run"):
        assert outcome(good, scratch, kind, lambda folder: None).ending == "loaded"


def test_code_that_runs_is_noticed(good: Good, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = good.canary.parent / "bomb.pt"
    monkeypatch.setitem(hostile.OPENERS, "base", lambda good, folder: pickle.loads(bomb.read_bytes()))
    found = outcome(good, scratch, "base", lambda folder: None)
    assert {"the canary", "os.system", "pickle.find_class"} <= set(found.ran)
    good.canary.unlink()


def test_a_refusal_for_another_reason_is_noticed(good: Good, scratch: Path) -> None:
    spoil = lambda folder: change(folder / "adapter_config.json", r=0)  # noqa: E731
    assert not hostile.attempt(Case("adapter", "one", spoil, "r is 0"), good, scratch).fault
    found = hostile.attempt(Case("adapter", "one", spoil, "not finite"), good, scratch)
    assert found.fault == "refused for another reason than 'not finite'"


def test_a_case_of_which_nothing_is_laid_down_is_noticed(good: Good) -> None:
    assert all(case.phrase for case in cases(good, 600))
    with pytest.raises(LookupError, match="nothing is laid down"):
        phrase_of("adapter", "something new")


def test_a_run_folder_would_write_over_files(good: Good, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil = next(make for name, _, make in run_folders(good, random.Random(0), 0) if "names a file outside" in name)
    assert not outcome(good, scratch, "run", spoil).ran
    monkeypatch.setattr(manifest, "refuse_way_out", lambda *_: None)
    assert "the canary" in outcome(good, scratch, "run", spoil).ran


def test_numbers_that_are_none_would_load(good: Good, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil = dict(adapter_tensors(good, random.Random(0), 0))["a tensor that is not a number"]
    assert not outcome(good, scratch, "adapter", spoil).fault
    monkeypatch.setattr(saved.torch, "isfinite", lambda tensor: tensor.new_ones(1))
    assert outcome(good, scratch, "adapter", spoil).fault.startswith("loaded")


def test_a_pattern_would_take_years(good: Good, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil = lambda folder: change(folder / "adapter_config.json", rank_pattern={"(.*)*(.*)*x": 4})  # noqa: E731
    assert not outcome(good, scratch, "adapter", spoil).fault
    monkeypatch.setattr(hostile, "PATIENCE_S", 4.0)
    monkeypatch.setattr(adapter, "refuse_patterns", lambda *_: None)
    assert outcome(good, scratch, "adapter", spoil).fault


def test_a_template_would_take_the_memory(good: Good, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "{{ bos_token }}{{ ('a' * 900000000)|length }}" + (good.base / "chat_template.jinja").read_text()
    spoil = lambda folder: (folder / "chat_template.jinja").write_text(text)  # noqa: E731
    assert not outcome(good, scratch, "template", spoil).fault

    class InProcess:
        def ask(self, question):
            return templates._render(question)

        def close(self) -> None:
            pass

    monkeypatch.setattr(templates._RENDERER, "cell", InProcess())
    assert "took 9" in outcome(good, scratch, "template", spoil).fault

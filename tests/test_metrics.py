"""Metrics on texts: those of the packages behind them, and those on the hub by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluate as stock
import pytest
import sacrebleu
import yaml
from rouge_score.rouge_scorer import RougeScorer

from lora_ft import evaluate, hub
from lora_ft.cli import main
from lora_ft.commands.options import EvaluateConfig
from lora_ft.config import METRICS, DataConfig, RunConfig
from lora_ft.errors import ConfigError, DataError, SourceError
from lora_ft.scoring import metrics
from lora_ft.settings import cli, from_yaml, to_yaml
from tests import tiny
from tests.test_cli import write_rows

WANTED = ["the cat sat on the mat .", "It rains.\nWe stay inside.", "no", "a b c d e f"]
FOUND = ["the cat is on the mat .", "We stay inside.\nIt rains.", "", "f e d c b a a b c d"]


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def test_every_name_that_a_run_may_ask_for_is_there() -> None:
    assert set(METRICS) <= metrics.METRICS.keys()


def test_rouge_is_that_of_its_package() -> None:
    found = metrics.compute("rouge", FOUND, WANTED)
    assert list(found) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(list(found))
    for name, value in found.items():
        rows = [scorer.score(want, said)[name].fmeasure for want, said in zip(WANTED, FOUND, strict=True)]
        assert value == pytest.approx(sum(rows) / len(rows))
    # By hand: of 7 words 6, all of 5 in another order, none, 6 of 10.
    assert found["rouge1"] == pytest.approx((5 / 6 + 1 + 0 + 2 * 6 / 16) / 4)
    # Sentences apart, their order does not matter.
    assert found["rougeLsum"] > found["rougeL"]


def test_rouge_says_that_it_reads_latin_letters_only() -> None:
    with pytest.raises(DataError, match=r"rouge: none of the references has a Latin letter or a digit.*use chrf"):
        metrics.compute("rouge", ["кот"], ["кот"])
    assert metrics.compute("rouge", ["?", "ja"], ["?", "ja"])["rouge1"] == 0.5


def test_calls_are_compared_by_what_they_call_and_with_what() -> None:
    right = '<tool_call>\n{"name": "rain", "arguments": {"place": "Rome", "days": [1, 2]}}\n</tool_call>'
    said = {
        right: (1, 1, 1),
        'Wait. {"arguments": "{\\"days\\": [1, 2], \\"place\\": \\"Rome\\"}", "name": "rain"}': (1, 1, 1),
        '[TOOL_CALLS] [{"name": "rain", "arguments": {"place": "Rome", "days": [2, 1]}}]': (1, 1, 0),
        f"{right}\n{right}": (1, 0, 0),
        right.replace("rain", "snow"): (1, 0, 0),
        '{"name": "rain", "arguments": {"place": "Rome"': (0, 0, 0),
        '{"name": "rain", "arguments": "Rome"}': (1, 1, 0),
        '{"name": ["rain"], "arguments": {}} {"a": {"b": 1}} ' + "{" * 5000: (0, 0, 0),
        "It rains.": (0, 0, 0),
    }
    for text, shares in said.items():
        found = metrics.compute("tool_calls", [text], [right])
        assert tuple(found.values()) == shares, text
    assert list(found) == ["tool_call_valid", "tool_call_name", "tool_call_match"]
    with pytest.raises(DataError, match=r"tool_calls: reference 2 of 2 holds no JSON with a name and arguments: 'No'"):
        metrics.compute("tool_calls", ["", ""], [right, "No"])


def test_calls_are_measured_alone() -> None:
    with pytest.raises(ValueError, match="tool_calls asks in the place of each call, others at the end of a row"):
        DataConfig(metrics=("tool_calls", "rouge"))
    with pytest.raises(ValueError, match="name it alone"):
        EvaluateConfig(adapter=Path("a"), data="b", metrics=("tool_calls", "exact_match"))


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_bleu_and_chrf_are_those_of_sacrebleu(name: str) -> None:
    wanted = getattr(sacrebleu, f"corpus_{name}")(FOUND, [WANTED]).score
    found = metrics.compute(name, FOUND, WANTED)
    assert found == {name: pytest.approx(wanted)}
    assert 0 < found[name] < 100
    # Of all rows together, not the mean over rows.
    alone = [metrics.compute(name, [said], [want])[name] for said, want in zip(FOUND, WANTED, strict=True)]
    assert found[name] != pytest.approx(sum(alone) / len(alone))
    assert metrics.compute(name, WANTED, WANTED)[name] == pytest.approx(100)


@pytest.mark.parametrize(("task", "architecture"), [("seq2seq", "t5"), ("complete", "llama")])
def test_replies_of_a_run_are_measured_as_the_packages_do(tmp_path: Path, task: str, architecture: str) -> None:
    from lora_ft.data.examples import Pair

    run = tiny.run(tmp_path / "adapter", tiny.model_folder(tmp_path / "base", architecture), task=task, quant="none")
    run.task.prepare(run.base.tokenizer, 64)
    rows = [Pair(f"a:{n}", f"w{n} w{n + 1}", f"w{n + 2} w{n + 3} w{n + 4}") for n in range(40, 47)]
    features = [run.task.features(row) for row in rows]
    done = evaluate.compare(run.task, run.model, rows, features, names=("rouge", "bleu", "chrf"))
    wanted = [row.completion for row in rows]
    for values, said in ((done.base, done.before), (done.adapter, done.after)):
        assert len(said) == len(rows)
        scorer = RougeScorer(["rougeL"])
        rouge = [scorer.score(w, s)["rougeL"].fmeasure for w, s in zip(wanted, said, strict=True)]
        assert values["rougeL"] == pytest.approx(sum(rouge) / len(rouge))
        assert values["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, [wanted]).score)
        assert values["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, [wanted]).score)


# Metrics on the hub


class StandIn:
    """A metric of others: what it gives, or raises."""

    def __init__(self, gives: Any) -> None:
        self.gives = gives

    def compute(self, *, predictions: list[str], references: list[str]) -> Any:
        if isinstance(self.gives, Exception):
            raise self.gives
        return self.gives(predictions, references)


def on_hub(monkeypatch: pytest.MonkeyPatch, gives: Any) -> list[str]:
    """Returns the names that the hub is asked for, as they come."""
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        if isinstance(gives, Exception):
            raise gives
        return StandIn(gives)

    monkeypatch.setattr(stock, "load", load)
    return asked


def test_a_metric_on_the_hub_gives_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(predictions: list[str], references: list[str]) -> Any:
        hits = sum(p == r for p, r in zip(predictions, references, strict=True))
        return {"meteor": hits / len(hits_of := predictions), "count": len(hits_of), "each": [1, 2], "fine": True}

    asked = on_hub(monkeypatch, same)
    assert metrics.compute("hub:org/meteor", ["a", "b"], ["a", "c"]) == {"meteor": 0.5, "meteor.count": 2.0}
    assert asked == ["org/meteor"]


@pytest.mark.parametrize(
    ("gives", "told"),
    [
        (
            FileNotFoundError("long story"),
            "hub:meteor cannot be fetched: neither the hub nor the local cache has it; ch",
        ),
        (
            ConnectionError("no route"),
            "hub:meteor cannot be fetched: neither the hub nor the local cache has it; check",
        ),
        (ImportError("you need nltk\nuse pip"), "hub:meteor cannot be fetched: you need nltk; check the name"),
        (lambda p, r: (_ for _ in ()).throw(TypeError("float() argument")), "it fails on texts: float() argument; use"),
        (lambda p, r: {"each": [1.0]}, "hub:meteor: it gives no number; use another metric"),
        (lambda p, r: None, "hub:meteor: it gives no number; use another metric"),
    ],
)
def test_a_metric_that_cannot_be_had_or_used_is_named(monkeypatch: pytest.MonkeyPatch, gives: Any, told: str) -> None:
    on_hub(monkeypatch, gives)
    with pytest.raises((SourceError, ConfigError)) as caught:
        metrics.compute("hub:meteor", ["a"], ["a"])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_here_is_not_taken_for_a_metric_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `evaluate` would run it."""
    asked = on_hub(monkeypatch, lambda p, r: {"meteor": 1.0})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meteor").mkdir()
    with pytest.raises(SourceError, match="meteor in the current folder would be taken for it"):
        metrics.compute("hub:meteor", ["a"], ["a"])
    assert not asked
    assert hub.metric("other").compute(predictions=[], references=[]) == {"meteor": 1.0}


@pytest.mark.parametrize("name", ["hub:", "hub:../evil", "hub:/tmp/evil", "hub:a/b/c", "hub:a b", "rogue", "entities"])
def test_other_names_are_refused(name: str) -> None:
    for make, place in (
        (DataConfig, "data.metrics"),
        (lambda **o: EvaluateConfig(adapter=Path(), data="a", **o), "metrics"),
    ):
        with pytest.raises(ValueError, match=rf"^{place} takes exact_match, .*, tool_calls or hub:NAME, got "):
            make(metrics=("rouge", name))


def test_a_file_alone_does_not_let_code_of_the_hub_run(tmp_path: Path) -> None:
    words = ["complete", "--base", "b", "--out", "o", "--data.metrics", "rouge", "hub:org/meteor"]
    config = cli(RunConfig, words)
    assert config.data.metrics == ("rouge", "hub:org/meteor")
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    assert yaml.safe_load(saved.read_text())["data"]["metrics"] == ["rouge", "hub:org/meteor"]
    with pytest.raises(
        ConfigError, match=r"names the metric hub:org/meteor, .* type --data\.metrics hub:org/meteor too"
    ):
        cli(RunConfig, ["--config", str(saved)])
    typed = ["--config", str(saved), "--data.metrics", "hub:org/meteor"]
    assert cli(RunConfig, typed).data.metrics == ("hub:org/meteor",)
    # To read what a run was is not to run it.
    assert from_yaml(RunConfig, saved) == config


def test_a_metric_that_cannot_be_fetched_ends_a_run_before_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_hub(monkeypatch, ConnectionError("no route"))
    base = tiny.model_folder(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 20)
    words = ["train", "chat", "--base", str(base), "--data.train", str(rows), "--out", str(tmp_path / "out")]
    assert main([*words, "--data.eval", "0.2", "--data.metrics", "hub:meteor"]) == 1
    assert "data.metrics hub:meteor cannot be fetched" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: {metrics: hub:org/evil}", "names the metric hub:org/evil"),
        ("data: {metrics: [rouge, hub:org/evil]}", "names the metric hub:org/evil"),
        ("lora: {targets: [q_proj, --data.metrics=hub:org/evil]}", "lora.targets holds .* read as an option"),
        ("data: {columns: {prompt: --data.metrics=hub:org/evil}}", "data.columns holds .* read as an option"),
        ("task: --data.metrics=hub:org/evil", "task holds .* read as an option"),
    ],
)
def test_a_file_alone_lets_no_code_of_the_hub_run(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "run.yaml").write_text(text if text.startswith("task") else f"task: complete\n{text}")
    typed = ["--base", "b", "--out", "o", "--config", str(tmp_path / "run.yaml")]
    with pytest.raises(ConfigError, match=told):
        cli(RunConfig, typed)
    if "metrics:" in text:
        cli(RunConfig, [*typed, "--data.metrics=hub:org/evil"])

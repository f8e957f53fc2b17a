"""`--init-from`: a training goes on from an adapter exactly as it is, on the base and with the classes that it has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_ft import memory, runs, saved, tasks
from lora_ft.cli import main
from lora_ft.commands.options import PlanConfig
from lora_ft.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_ft.data.examples import Example, Labelled, Pair
from lora_ft.errors import AdapterError, ConfigError, DataError
from lora_ft.model import modes
from lora_ft.proof import environment
from lora_ft.scoring import losses
from lora_ft.settings import from_yaml
from lora_ft.training import origin, started
from tests import tiny

# Weights stay as they are: so small a step is lost in rounding.
NO_STEP = 1e-30


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tiny.Run]:
    """Returns an adapter of a task, of rank 4 and alpha 16 unless said otherwise."""
    held: dict[str, tiny.Run] = {}

    def run(task: str, model: str, **more: Any) -> tiny.Run:
        key = f"{task} {model} {more}"
        if key not in held:
            there = tmp_path_factory.mktemp("made")
            # In training an encoder drops some of what it computes.
            sizes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if model == "bert" else {}
            base = tiny.model_folder(there / "base", model, **sizes)
            held[key] = tiny.run(there / "a", base, task=task, quant="none", steps=3, sealed=False, **more)
        return held[key]

    return run


def rows(task: str, count: int = 9) -> list[Example]:
    texts = [" ".join(f"w{(7 * i + j) % 290}" for j in range(3 + i % 5)) for i in range(count)]
    if task == "classify":
        return [Labelled(f"a:{i}", text, tiny.LABELS[i % 3]) for i, text in enumerate(texts)]
    return [Pair(f"a:{i}", text, f"w{i} w{i + 1}") for i, text in enumerate(texts)]


def config(run: tiny.Run, out: Path, *, lora: LoraConfig | None = None, lr: float = NO_STEP, **more: Any) -> RunConfig:
    given: dict[str, Any] = {"base": str(run.base_folder), "task": run.task.name, "init_from": run.folder, **more}
    return RunConfig(
        out=out,
        quant="none",
        lora=lora or LoraConfig(),
        train=TrainConfig(steps=1, lr=lr, batch_size=9, dtype="float32", warmup=0.0),
        **given,
    )


@pytest.mark.parametrize(
    ("task", "model", "more"),
    [
        ("classify", "bert", {"save_modules": ("embeddings.LayerNorm",)}),
        ("complete", "llama", {"dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}}),
        ("complete", "llama", {"init": "olora", "targets": ("q_proj", "down_proj")}),
        ("complete", "llama-untied", {"special_tokens": ("<tool>",), "rslora": True}),
    ],
)
def test_the_first_loss_is_that_of_the_adapter_and_without_a_step_the_weights_are_too(
    made: Callable[..., tiny.Run], tmp_path: Path, task: str, model: str, more: dict[str, Any]
) -> None:
    before = made(task, model, **more)
    run = runs.run(config(before, tmp_path / "on"), examples=rows(task))
    loaded = saved.load(before.folder)
    loaded.prepare_task()
    wanted = losses.of_rows(loaded.task, loaded.model, tasks.featurize(loaded.task, rows(task)), 9).mean
    first = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(wanted, rel=1e-5)
    with modes.without(loaded.model):
        base = losses.of_rows(loaded.task, loaded.model, tasks.featurize(loaded.task, rows(task)), 9).mean
    assert abs(base - wanted) > 1e-3

    was, now = (load_file(folder / saved.WEIGHTS) for folder in (before.folder, run.folder))
    assert was.keys() == now.keys()
    for name, tensor in was.items():
        torch.testing.assert_close(now[name], tensor, atol=1e-29, rtol=0)
    ours, theirs = (json.loads((folder / saved.CONFIG).read_text()) for folder in (run.folder, before.folder))
    assert {key: ours[key] for key in ours if ours[key] != theirs[key]} == {}
    # What it was, and nothing of where it lay.
    record = environment.read(run.folder)
    assert record["init_from"] == {"sha256": environment.file_sha256(before.folder / saved.WEIGHTS)}
    assert record["init_from"]["sha256"] in (run.folder / "README.md").read_text()
    assert record["init_from"]["sha256"] in (run.folder / "report.html").read_text()
    assert str(before.folder.parent) not in "".join(
        file.read_text() for file in run.folder.iterdir() if file.suffix in (".json", ".yaml", ".md", ".html")
    )


def test_it_learns_on_and_is_sealed_against_the_bare_base(made: Callable[..., tiny.Run], tmp_path: Path) -> None:
    before = made("complete", "llama")
    run = runs.run(config(before, tmp_path / "on", lr=1e-3), examples=rows("complete"), held_out=rows("complete")[3:6])
    bare = saved.load(before.folder)
    bare.prepare_task()
    with modes.without(bare.model):
        features = tasks.featurize(bare.task, rows("complete")[3:6])
        assert run.metrics["base"]["loss"] == pytest.approx(losses.of_rows(bare.task, bare.model, features, 3).mean)
    was, now = (load_file(folder / saved.WEIGHTS) for folder in (before.folder, run.folder))
    assert any(not torch.equal(was[name], now[name]) for name in was)
    run.prove()


def test_a_plain_peft_adapter_is_gone_on_from(made: Callable[..., tiny.Run], tmp_path: Path) -> None:
    before = made("complete", "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(before.base_folder)
    plain = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=r".*\.layers\.1\..*(q|up)_proj", task_type="CAUSAL_LM")
    )
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    plain.save_pretrained(tmp_path / "plain")
    run = runs.run(config(before, tmp_path / "on", init_from=tmp_path / "plain"), examples=rows("complete"))
    was, now = (load_file(folder / saved.WEIGHTS) for folder in (tmp_path / "plain", run.folder))
    assert was.keys() == now.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in was.items())
    assert json.loads((run.folder / saved.CONFIG).read_text())["r"] == 3

    settings = json.loads((tmp_path / "plain" / saved.CONFIG).read_text())
    settings["base_model_name_or_path"] = "somebody/another"
    (tmp_path / "plain" / saved.CONFIG).write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match=r'made on "somebody/another", and the base of this run is base'):
        runs.run(config(before, tmp_path / "no", init_from=tmp_path / "plain"), examples=rows("complete"))


def test_a_run_that_goes_on_is_planned_and_read_from_its_own_file(
    made: Callable[..., tiny.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = made("complete", "llama")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": r.prompt, "completion": r.completion}) + "\n" for r in rows("x")))
    words = ["train", "complete", "--base", str(before.base_folder), "--data.train", str(file), "--quant", "none"]
    words += ["--init-from", str(before.folder), "--train.steps", "1", "--train.dtype", "float32"]
    assert main([*words, "--out", str(tmp_path / "on"), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["lora"]["rank"] == 4
    assert main([*words, "--out", str(tmp_path / "on")]) == 0
    kept = from_yaml(RunConfig, tmp_path / "on" / "config.yaml")
    assert (kept.lora.rank, kept.lora.alpha, kept.lora.targets) == (4, 16.0, ("all-linear",))
    plan = PlanConfig(task="complete", base=str(before.base_folder), quant="none", init_from=before.folder)
    learned = sum(tensor.numel() for tensor in load_file(before.folder / saved.WEIGHTS).values())
    assert memory.plan(plan, "cpu").asked.bytes["adapters"] == 4 * learned


# What does not fit is refused before a weight is loaded


def refused(run: RunConfig, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> str:
    def load(*given: Any, **more: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(runs.bases, "load", load)
    with pytest.raises((AdapterError, ConfigError, DataError)) as caught:
        runs.run(run, examples=examples)
    return str(caught.value)


def test_an_adapter_of_another_base_is_refused_by_both_names(
    made: Callable[..., tiny.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = made("complete", "llama")
    other = tiny.model_folder(tmp_path / "stranger", "llama", seed=1)
    told = refused(config(before, tmp_path / "on", base=str(other)), rows("complete"), monkeypatch)
    assert "This adapter belongs to base (" in told
    assert "but stranger (" in told
    words = ["train", "complete", "--base", str(other), "--init-from", str(before.folder), "--out", str(tmp_path / "n")]
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2"}\n')
    assert main([*words, "--data.train", str(tmp_path / "rows.jsonl")]) == 1


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        (LoraConfig(rank=8), "lora.rank is 8, the adapter's is 4"),
        (LoraConfig(alpha=8.0), "lora.alpha is 8.0, the adapter's is 16.0"),
        (LoraConfig(targets=("q_proj",)), "lora.targets is q_proj, the adapter's is all-linear"),
        (LoraConfig(dora=True), "lora.dora is True, the adapter's is False"),
        (LoraConfig(rslora=True), "lora.rslora is True, the adapter's is False"),
        (LoraConfig(save_modules=("norm",)), "lora.save-modules is norm, the adapter's is none"),
        (LoraConfig(train_tokens=("w1",)), "lora.train-tokens is w1, the adapter's is none"),
    ],
)
def test_another_shape_is_refused(
    made: Callable[..., tiny.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: LoraConfig, told: str
) -> None:
    assert told in refused(config(made("complete", "llama"), tmp_path / "on", lora=lora), rows("complete"), monkeypatch)


def test_the_adapters_own_shape_may_be_asked_for(made: Callable[..., tiny.Run], tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, alpha=16.0, rslora=False, dropout=0.1)
    adopted, _ = origin.adopted(config(made("complete", "llama"), tmp_path / "on", lora=lora))
    assert (adopted.lora.rank, adopted.lora.dropout) == (4, 0.1)


def test_classes_must_be_those_that_the_head_has(
    made: Callable[..., tiny.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = made("classify", "bert")
    new = [Labelled("a:1", "w1", "good"), Labelled("a:2", "w2", "great")]
    told = refused(config(before, tmp_path / "on"), new, monkeypatch)
    assert told.startswith("a:2: label 'great' is not one the adapter knows: bad, good, plain")
    many = [Labelled("a:1", "w1", ("good",)), Labelled("a:2", "w2", ("bad", "plain"))]
    told = refused(config(before, tmp_path / "on"), many, monkeypatch)
    assert "problem_type is 'single_label_classification' in the adapter" in told or "problem_type is" in told
    told = refused(config(before, tmp_path / "on", task="complete"), rows("complete"), monkeypatch)
    assert 'the adapter\'s task_type is "SEQ_CLS", and the task complete needs CAUSAL_LM' in told


def test_fewer_classes_than_the_head_has_keep_its_order(made: Callable[..., tiny.Run], tmp_path: Path) -> None:
    two = [row for row in rows("classify") if isinstance(row, Labelled) and row.label != "good"]
    balanced = DataConfig(class_weights="balanced")
    run = runs.run(config(made("classify", "bert"), tmp_path / "on", data=balanced), examples=two)
    assert run.task.facts()["labels"] == list(tiny.LABELS)
    assert run.task.weights == (1.0, 0.0, 1.0)  # type: ignore[attr-defined]


def test_a_damaged_or_hostile_folder_is_refused(
    made: Callable[..., tiny.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = made("complete", "llama")
    broken = tmp_path / "broken"
    shutil.copytree(before.folder, broken)
    settings = json.loads((broken / saved.CONFIG).read_text())
    (broken / saved.CONFIG).write_text(json.dumps(settings | {"auto_mapping": {"parent_library": "os"}}))
    told = refused(config(before, tmp_path / "on", init_from=broken), rows("complete"), monkeypatch)
    assert "auto_mapping names a class to import" in told
    (broken / saved.CONFIG).write_text(json.dumps(settings | {"lora_bias": True}))
    told = refused(config(before, tmp_path / "on", init_from=broken), rows("complete"), monkeypatch)
    assert "lora_bias cannot be trained on here" in told
    (broken / saved.CONFIG).write_text(json.dumps(settings | {"init_lora_weights": "pissa_niter_4"}))
    told = refused(config(before, tmp_path / "on", init_from=broken), rows("complete"), monkeypatch)
    assert 'init_lora_weights is "pissa_niter_4", which moved the weights of its base' in told
    told = refused(config(before, tmp_path / "on", init_from=tmp_path / "nowhere"), rows("complete"), monkeypatch)
    assert "there is no such folder" in told
    (broken / saved.CONFIG).write_text(json.dumps(settings | {"r": 5}))
    monkeypatch.undo()
    with pytest.raises(AdapterError, match="does not fit its base"):
        runs.run(config(before, tmp_path / "on", init_from=broken), examples=rows("complete"))


def test_a_resumed_run_goes_on_from_the_same_adapter(made: Callable[..., tiny.Run], tmp_path: Path) -> None:
    before = made("complete", "llama")
    asked = config(before, tmp_path / "on")
    facts, base = {"train": {"sha256": "a"}}, {"weights_sha256": "b"}
    started.keep_or_compare(asked, facts, "t", base, {"sha256": "one"})
    again = replace(asked, resume=True, init_from=Path("elsewhere"))
    started.keep_or_compare(again, facts, "t", base, {"sha256": "one"})
    with pytest.raises(ConfigError, match=r"init_from\.sha256 was one, is two"):
        started.keep_or_compare(again, facts, "t", base, {"sha256": "two"})
    with pytest.raises(ConfigError, match=r"init_from\.sha256 was one, is None"):
        started.keep_or_compare(replace(again, init_from=None), facts, "t", base)


def test_a_start_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="goes on with one: leave one of them out"):
        RunConfig(task="complete", base="b", out=tmp_path, init_from=tmp_path, lora=LoraConfig(init="eva"))

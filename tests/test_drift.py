"""Drift: what an adapter forgot of general text, against a reference in float64; nothing where it changes nothing."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_ft import adapters, base, evaluate, report, tasks
from lora_ft.cli import main
from lora_ft.config import LoraConfig
from lora_ft.pages import card
from lora_ft.scoring import drift
from tests import tiny
from tests.stock_templates import tokenizer_of


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    def made(architecture: str = "llama", quant: str = "none", dtype: str = "float32", **lora: Any) -> Any:
        folder = tiny.model_folder(tmp_path_factory.mktemp("base") / "base", architecture)
        task = tasks.get("complete")
        loaded = base.load(str(folder), quant=quant, model_class=task.model_class, dtype=dtype, device="cpu")
        return loaded, adapters.attach(loaded, LoraConfig(rank=4, **lora), peft_task=task.peft_task)

    return made


def damage(model: Any, std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapters.trained(model).items():
        if "lora_B" in name:
            parameter.data.normal_(0, std, generator=generator)


def varied(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    """Puts words of the tiny tokenizer in place of the text, of which it knows none; passages of 2 to 23 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def passages(tokenizer: Any, max_length: int) -> list[tasks.Features]:
        made = []
        for length in range(2, 24):
            ids = torch.randint(6, tiny.VOCAB, (length,), generator=generator).tolist()[:max_length]
            made.append({"input_ids": ids, "labels": ids})
        return made

    monkeypatch.setattr(drift, "passages", passages)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_loss_and_kl_are_those_of_a_plain_pass_in_float64(
    load: Callable[..., Any], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, model = load(architecture)
    damage(model, 0.05)
    varied(monkeypatch)
    rows = drift.passages(loaded.tokenizer, 512)
    monkeypatch.setattr(drift, "passages", lambda tokenizer, longest: rows)
    before, after = drift.measure(model, loaded.tokenizer)

    exact = copy.deepcopy(model).double().eval()
    kl = base_nll = nll = count = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            with exact.disable_adapter():
                logp = exact(input_ids=ids).logits[0, :-1].log_softmax(-1)
            logq = exact(input_ids=ids).logits[0, :-1].log_softmax(-1)
            kl += float(torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="sum"))
            base_nll += float(torch.nn.functional.nll_loss(logp, ids[0, 1:], reduction="sum"))
            nll += float(torch.nn.functional.nll_loss(logq, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    assert before == {"drift.loss": pytest.approx(base_nll / count, rel=1e-6), "drift.kl": 0.0}
    assert after["drift.loss"] == pytest.approx(nll / count, rel=1e-6)
    assert after["drift.kl"] == pytest.approx(kl / count, rel=1e-4)
    assert after["drift.kl"] > 1e-3
    for name in ("drift.loss", "drift.kl"):
        low, high = after[f"{name}_change_interval"]
        assert low < after[name] - before[name] < high
    assert after["drift.kl_change_interval"][0] > 0


def test_kl_of_two_like_distributions_over_many_words() -> None:
    """The plain sum of p * log p/q in float32 is off by more than it is here."""
    generator = torch.Generator().manual_seed(0)
    base_NV = 5 * torch.randn(20, 50_000, generator=generator)
    adapter_NV = base_NV + 1e-4 * torch.randn(20, 50_000, generator=generator)
    logq, logp = (logits.double().log_softmax(-1) for logits in (adapter_NV, base_NV))
    wanted = float(torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="sum"))
    *_, found, count = drift._of_row(base_NV, adapter_NV, torch.zeros(20, 1).long()[:, 0])
    plain = float((base_NV.log_softmax(-1).exp() * (base_NV.log_softmax(-1) - adapter_NV.log_softmax(-1))).sum())
    assert found == pytest.approx(wanted, rel=1e-3)
    assert abs(plain - wanted) > wanted
    assert count == 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_an_adapter_that_does_nothing_has_no_drift_at_all(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, quant: str, dtype: str
) -> None:
    varied(monkeypatch)
    loaded, model = load(quant=quant, dtype=dtype)
    before, after = drift.measure(model, loaded.tokenizer)
    assert after["drift.kl"] == 0.0
    assert after["drift.loss"] == before["drift.loss"]
    assert after["drift.kl_change_interval"] == after["drift.loss_change_interval"] == [0.0, 0.0]


def test_a_start_that_moves_the_base_is_compared_with_the_base_before_it(load: Callable[..., Any]) -> None:
    loaded, model = load(init="olora")
    _, after = drift.measure(model, loaded.tokenizer)
    assert 0 <= after["drift.kl"] < 1e-6


def test_damage_is_seen(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, model = load()
    varied(monkeypatch)
    rows = drift.passages(loaded.tokenizer, 512)
    monkeypatch.setattr(drift, "passages", lambda tokenizer, longest: rows)
    found = []
    for std in (0.001, 0.03, 1.0):
        damage(model, std)
        found.append(drift.measure(model, loaded.tokenizer)[1]["drift.kl"])
    assert found == sorted(found)
    assert found[0] < 0.05
    assert found[2] > 1.0


def test_each_stage_of_a_comparison_begins_with_the_memory_of_the_one_before(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, model = load()
    varied(monkeypatch)
    task, done = tasks.get("complete"), []
    task.prepare(loaded.tokenizer, 64)
    monkeypatch.setattr(evaluate.heap, "give_back", lambda: done.append("given back"))
    evaluate.compare(task, model, [], drift.passages(loaded.tokenizer, 64), note=done.append)
    stages = ("measuring the base", "measuring the adapter", "measuring the drift on general text")
    assert done == [said for stage in stages for said in ("given back", stage)]


def test_the_text_is_of_many_kinds_and_as_long_as_was_said() -> None:
    tokenizer = tokenizer_of("chatml")
    rows = drift.passages(tokenizer, 512)
    assert len(rows) == 41
    assert all(row["labels"] == row["input_ids"] for row in rows)
    cut = drift.passages(tokenizer, 10)
    assert [row["input_ids"] for row in cut] == [row["input_ids"][:10] for row in rows]


def test_a_tokenizer_that_knows_none_of_it_is_said(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded, model = load()
    monkeypatch.setattr(drift, "passages", lambda tokenizer, longest: [])
    with caplog.at_level(logging.WARNING):
        assert drift.measure(model, loaded.tokenizer) == ({}, {})
    assert "drift was not measured" in caplog.text


def test_it_is_in_the_summary_in_the_object_in_card_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_FT_HOME", str(tmp_path / "home"))
    tiny.model_folder(tmp_path / "base")
    rows = [{"prompt": f"w{40 + i} w{41 + i}", "completion": f"w{10 + i % 3}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "complete", "--base", str(tmp_path / "base"), "--data.train", str(tmp_path / "rows.jsonl")]
    words += ["--data.eval", "0.5", "--train.steps", "4", "--train.lr", "1e-2", "--lora.rank", "4"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert main(["evaluate", str(tmp_path / "a"), "--data", str(tmp_path / "rows.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["drift.kl"] > 0 == found["base"]["drift.kl"]
    assert len(found["drift.loss_change_interval"]) == 2
    assert f"drift.kl {found['drift.kl']:.3g}" in last
    for name in (card.FILE, report.PAGE):
        told = (tmp_path / "a" / name).read_text(encoding="utf-8")
        assert "What it forgot" in told
        assert "drift.kl" in told


def test_what_classifies_has_none(tmp_path: Path) -> None:
    task = tasks.get("classify", {"labels": list(tiny.LABELS)})
    folder = str(tiny.model_folder(tmp_path / "base", "bert"))
    loaded = base.load(folder, quant="none", model_class=task.model_class, dtype="float32", device="cpu",
                       config_changes=task.config_changes())  # fmt: skip
    task.prepare(loaded.tokenizer, 64)
    model = adapters.attach(loaded, LoraConfig(rank=4), peft_task=task.peft_task)
    found = evaluate.compare(task, model, [], tiny.rows("classify", 3)).adapter
    assert "loss" in found
    assert not any(name.startswith("drift") for name in found)

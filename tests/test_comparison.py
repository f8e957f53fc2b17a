"""Runs side by side, the plan beside what was measured, and what an adapter changed in each layer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from lora_ft import report
from lora_ft.cli import main
from lora_ft.errors import AdapterError
from lora_ft.model import layers
from lora_ft.pages import comparison, curves, summary
from tests import tiny
from tests.test_cli import train_words, write_rows
from tests.test_report import lines, rendered
from tests.test_report import summary as made


def test_norm_and_effective_rank_are_those_of_the_product() -> None:
    torch.manual_seed(0)
    a_RK, b_MR = torch.randn(3, 40), torch.randn(24, 3)
    norm, rank = layers.spectrum(a_RK, b_MR, 0.5)
    product = 0.5 * (b_MR @ a_RK).double()
    assert norm == pytest.approx(float(product.norm()), rel=1e-5)
    values = torch.linalg.svdvals(product)[:3]
    share = values / values.sum()
    assert rank == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-5)
    one = torch.ones(3, 40)
    assert layers.spectrum(one, b_MR, 1.0)[1] == pytest.approx(1, abs=1e-4)
    square = torch.linalg.qr(torch.randn(40, 3)).Q.T, torch.linalg.qr(torch.randn(24, 3)).Q
    assert layers.spectrum(*square, 2.0) == (pytest.approx(2 * 3**0.5), pytest.approx(3))
    assert layers.spectrum(a_RK, torch.zeros(24, 3), 1.0) == (0.0, 0.0)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_each_layer_of_a_run_is_measured_against_what_it_does_to_its_base(tmp_path: Path, init: str) -> None:
    run = tiny.run(
        tmp_path / "run", tiny.model_folder(tmp_path / "base"), quant="none", steps=4, init=init, sealed=False
    )
    found = {layer["name"]: layer for layer in layers.measured(run.model)}
    assert len(found) == 14
    inner = run.model.get_base_model()
    for name, layer in found.items():
        module = inner.get_submodule(name)
        change = module.get_delta_weight("default")
        start = getattr(run.model, "start", {})
        if start:
            key = f"base_model.model.{name}.lora_{{}}.weight"
            change = change - module.scaling["default"] * (start[key.format("B")] @ start[key.format("A")])
        assert layer["norm"] == pytest.approx(float(change.norm()), rel=1e-3)
        assert 1 <= layer["effective_rank"] <= (8 if start else 4) + 1e-6


def test_a_map_has_a_cell_for_each_layer_and_says_where_the_largest_is() -> None:
    told = [
        {"name": f"model.layers.{i}.{kind}", "norm": 1.0 + i + 10 * (kind == "b")} for i in range(4) for kind in "ab"
    ]
    drawn = curves.by_layer(told, "norm", "Size")
    assert drawn.caption == "Size: 1.000 to 14.000, the largest in b of layer 3"
    assert drawn.drawing.count("var(--adapter)") == 8
    for text in (">a<", ">b<", ">3<"):
        assert text in drawn.drawing
    assert curves.by_layer([{"name": "embed_tokens", "norm": 0.0}], "norm", "Size").width > 0
    experts = [
        {"name": f"layers.{i}.experts.{j}.{kind}", "norm": float(j)}
        for i in range(2)
        for j in range(64)
        for kind in "ab"
    ]
    many = curves.by_layer(experts, "norm", "Size")
    assert many.drawing.count("var(--adapter)") == 4
    assert "31.500 to 31.500" in many.caption


def runs(*changes: dict[str, object]) -> list[comparison.Run]:
    return [comparison.Run(f"run-{i}", made(**change), lines()) for i, change in enumerate(changes)]


def test_runs_are_compared_in_what_they_measured_and_where_their_settings_differ() -> None:
    config = made().config
    other = {**config, "lora": {**config["lora"], "rank": 64}}
    told = dict(comparison.rows(runs({}, {"config": other})))
    assert told["loss"] == ["1.213 (−1.128, −1.210 to −1.046)"] * 2
    assert told["lora.rank"] == ["16", "64"]
    assert "train.lr" not in told
    assert told["peak memory"] == ["1.71 GiB"] * 2
    assert list(comparison.warnings(runs({}, {}))) == []


def test_what_cannot_be_compared_is_said() -> None:
    rows = {**made().data, "eval": {"name": "other.jsonl", "rows": 3, "sha256": "99" * 32}}
    warned = list(
        comparison.warnings(runs({}, {"data": rows}, {"seal": {"kl_effect": 1.0, "rows": 2, "passed": False}}))
    )
    assert warned == [
        "The runs were not measured on the same held-out rows: their metrics say nothing of which is better.",
        "Not proven: run-2.",
    ]
    assert all(text in comparison.page(runs({}, {"data": rows})) for text in warned[:1])


def test_the_page_of_runs_holds_hostile_names_as_text() -> None:
    from tests.test_report import HOSTILE, Page

    page = Page(comparison.page([comparison.Run(HOSTILE, made(), lines())] * 2))
    assert not page.tags & {"script", "img", "link"}


def test_a_summary_is_read_as_it_was_written(tmp_path: Path) -> None:
    told = made(layers=[{"name": "a", "norm": float("nan"), "effective_rank": 1.0}])
    record = {**told.environment, "base": {**told.base, "weights_sha256": "ab" * 32}, "data": told.data, "quant": "nf4"}
    (tmp_path / "environment.json").write_text(json.dumps(record))
    summary.write(tmp_path, told)
    again = summary.read(tmp_path)
    assert again.layers[0]["norm"] is None
    assert dataclasses.replace(again, layers=told.layers, environment=told.environment) == told
    text = (tmp_path / summary.FILE).read_text()
    for change, problem in (('"samples": [', '"samples": 3, "x": ['), ('"title": "Meetings"', '"title": 3')):
        (tmp_path / summary.FILE).write_text(text.replace(change, problem))
        with pytest.raises(AdapterError, match=r"summary\.json: .*the file was damaged"):
            summary.read(tmp_path)


def test_the_command_compares_runs_and_draws_one_anew_with_its_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.model_folder(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", 16)
    write_rows(tmp_path / "held_out.jsonl", 6, seed=1)
    for name, rank in (("one", "4"), ("two", "8")):
        assert main(train_words(tmp_path, tmp_path / name, "--train.steps", "4", "--lora.rank", rank)) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    card = (tmp_path / "one" / "README.md").read_bytes() + b"\nEdited by hand.\n"
    (tmp_path / "one" / "README.md").write_bytes(card)
    assert main(["report", "one"]) == 0
    page = (tmp_path / "one" / report.PAGE).read_text()
    assert "the longest of the training rows" in page or "as long as rows may be" in page
    assert "<h2>Plan</h2>" in page
    assert (tmp_path / "one" / "README.md").read_bytes() == card
    assert rendered(card.decode()).open == []
    capsys.readouterr()
    assert main(["report", "one", "two", "--out", "both.html"]) == 0
    said = capsys.readouterr().out
    assert "lora.rank" in said
    assert "both.html" in said
    assert "one" in (tmp_path / "both.html").read_text()
    assert main(["report", "one", "two", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["config"]["lora"]["rank"] for run in found] == [4, 8]
    assert str(tmp_path) not in json.dumps(found)
    assert main(["report", "base"]) == 1
    assert "no summary.json" in capsys.readouterr().err

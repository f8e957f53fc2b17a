"""The quickstart on real weights: small in every test run, whole and held to its targets in the slow ones."""

import json

import pytest

from lora_ft import base, cli, generate, train
from lora_ft.commands import quickstart
from lora_ft.data import meetings
from lora_ft.errors import ConfigError, Interrupted


def results(folder):
    """Returns exact matches on the held-out rows, of base and of adapter, as the run's card has them."""
    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    line = next(line for line in card.splitlines() if line.startswith("| `json_match` |"))
    return [float(cell) for cell in line.split("|")[2:4]]


def test_a_small_quickstart_ends_proven_and_merged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "TRAIN_ROWS", 12)
    monkeypatch.setattr(quickstart, "HELD_OUT_ROWS", 3)
    monkeypatch.setattr(quickstart, "SHOTS", 1)
    quickstart.quickstart(tmp_path / "run")
    out = capsys.readouterr().out
    for word in ("whole JSON", *meetings.FIELDS, "before", "after", "tokens/s", "peak", "MiB", "merged onto", "Next:"):
        assert word in out
    assert json.loads((tmp_path / "run" / "merged" / "merge_report.json").read_text())["onto"]
    assert "Proven" in (tmp_path / "run" / "adapter" / "report.html").read_text(encoding="utf-8")
    # Its own first sentence, asked with the system turn of the training or without.
    folder, question = str(tmp_path / "run" / "adapter"), meetings.rows(1, "held_out")[0].messages[1]["content"]
    asked = []
    monkeypatch.setattr(generate, "generate", lambda model, tokenizer, prompts, **_: asked.extend(prompts) or ["{}"])
    for more in ([], ["--system", ""], ["--system", "Be brief."]):
        assert cli.main(["chat", folder, "--prompt", question, *more]) == 0
    tokenizer = base.load_tokenizer(tmp_path / "run" / "adapter")
    taught, bare, brief = (tokenizer.decode(ids) for ids in asked)
    assert meetings.INSTRUCTION in taught
    assert meetings.INSTRUCTION not in bare + brief
    assert "Be brief." in brief
    card = (tmp_path / "run" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f'{{"role": "system", "content": {json.dumps(meetings.INSTRUCTION)}}}' in card
    rows = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 12


def digests(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["train.jsonl", "held_out.jsonl", "adapter/mine.txt", "merged/mine.txt"])
def test_what_lies_in_the_folder_is_not_touched(tmp_path, name):
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    before = digests(tmp_path)
    with pytest.raises(ConfigError, match="choose another --out"):
        quickstart.quickstart(tmp_path / "run")
    assert digests(tmp_path) == before


@pytest.mark.slow
def test_stopped_while_merging_it_goes_on_to_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "TRAIN_ROWS", 8)
    monkeypatch.setattr(quickstart, "HELD_OUT_ROWS", 2)
    monkeypatch.setattr(quickstart, "SHOTS", 1)

    def stopped(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(quickstart.seal, "load_merged", stopped)
        with pytest.raises(Interrupted, match="To go on"):
            quickstart.quickstart(tmp_path / "run")
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    quickstart.quickstart(tmp_path / "run", resume=True)
    assert "Next:" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_another_quickstart_takes_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(quickstart._free_folder(resume=False)) == "runs/quickstart"
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    assert str(quickstart._free_folder(resume=False)) == "runs/quickstart-2"
    assert str(quickstart._free_folder(resume=True)) == "runs/quickstart"


@pytest.mark.slow
def test_the_quickstart_meets_its_targets(tmp_path, capsys):
    quickstart.quickstart(tmp_path / "run")
    out = capsys.readouterr().out
    print(out)
    base, adapter = results(tmp_path / "run")
    assert base < 0.10
    assert adapter > 0.80
    whole = next(line for line in out.splitlines() if "whole JSON" in line)
    shown = [int(cell.strip().rstrip("%")) for cell in whole.split("│")[2:-1]]
    assert abs(shown[-1] - shown[-2]) <= 2  # merged against adapter, in rows of a hundred
    import torch

    assert train.peak_bytes(torch.device("cpu")) < 2.5e9

"""`selftest`: each check passes on a sound library, and fails alone where its fault is planted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_ft import adapters, cli, train
from lora_ft.config import DataConfig, LoraConfig, PreferConfig, RunConfig
from lora_ft.data.render import IGNORE, ChatRenderer
from lora_ft.model import attention
from lora_ft.proof import selftest
from lora_ft.settings import to_yaml
from lora_ft.tasks import causal, pad
from lora_ft.training import trainers
from tests import tiny

NAMES = ["batch", "packing", "padding", "layers", "tokens", "seed"]


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A configuration of `chat` on a tiny base, with rows that have a system turn and answers of several lengths."""
    there = tmp_path_factory.mktemp("selftest")
    base = tiny.model_folder(there / "base")
    lines = []
    for n in range(9):
        turns = {"system": "w40", "user": f"w{50 + n}", "assistant": " ".join(f"w{60 + i}" for i in range(n % 4 + 1))}
        lines.append({"messages": [{"role": role, "content": text} for role, text in turns.items()]})
    (there / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(train=str(there / "rows.jsonl"), max_length=64)
    return RunConfig(task="chat", base=str(base), out=there / "out", quant="none", data=data, lora=LoraConfig(rank=4))


def failed(run: RunConfig) -> list[str]:
    found = selftest.check(run)
    assert sorted(answer.name for answer in found.answers) == sorted(NAMES)
    assert not run.out.exists()
    return [answer.name for answer in found.answers if answer.status == selftest.FAIL]


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_sound_configuration_passes_every_check(run: RunConfig, quant: Any) -> None:
    found = selftest.check(dataclasses.replace(run, quant=quant, lora=LoraConfig(rank=4, dropout=0.3)))
    assert {answer.name: answer.status for answer in found.answers} == dict.fromkeys(NAMES, selftest.PASS)
    figures = {answer.name: answer.figure for answer in found.answers}
    assert all(0 < figures[name] < 1e-5 for name in ("batch", "packing"))  # type: ignore[operator]
    assert found.rows == selftest.ROWS


@pytest.mark.parametrize("name", ["embed", "kto", "prefer", "reason"])
def test_every_task_passes_on_a_twin(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "ROWS", selftest.FEWEST_ROWS)
    if name != "embed":
        pytest.importorskip("trl")
    chosen: Any = {"prefer": PreferConfig(loss="kto")} if name == "kto" else {}
    task: Any = "prefer" if name == "kto" else name
    settings = RunConfig(
        task=task, base="nobody/none", out=tmp_path / "out", quant="none", lora=LoraConfig(rank=2), **chosen
    )
    found = {answer.name: answer for answer in selftest.check(settings, twin=True).answers}
    assert {answer.status for answer in found.values()} == {selftest.PASS, selftest.OTHER}
    others = {"packing"} if name != "reason" else {"packing", "batch"}
    assert {answer.name for answer in found.values() if answer.status == selftest.OTHER} == others


def test_a_loss_averaged_over_each_pass_fails_batch(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    right = trainers.TaskLoss.compute_loss

    def averaged(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        own = (inputs["labels"] != IGNORE).sum()
        return right(self, model, inputs, return_outputs, own) / self.args.gradient_accumulation_steps

    monkeypatch.setattr(trainers.TaskLoss, "compute_loss", averaged)
    assert failed(run) == ["batch"]


def test_packed_rows_that_see_each_other_fail_packing(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(task: Any) -> Any:
        def together(packs: Any) -> Any:
            batch = task.end_to_end([row for members in packs for row in members])
            return batch | {"attention_mask": attention.bounds([batch["input_ids"].shape[1]])}

        return together

    monkeypatch.setattr(train, "_end_to_end_of_packs", leaking)
    assert failed(run) == ["packing"]


def test_padding_that_is_scored_fails_padding(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "pad", lambda rows, value: pad(rows, 0 if value == IGNORE else value))
    assert failed(run) == ["padding"]


def test_a_layer_that_is_cut_off_fails_layers(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    right = adapters.attach

    def cut(*args: Any, **kwargs: Any) -> Any:
        model = right(*args, **kwargs)
        for name, parameter in model.named_parameters():
            if "layers.1.mlp.up_proj.lora_" in name:
                parameter.requires_grad_(False)
        return model

    monkeypatch.setattr(adapters, "attach", cut)
    assert failed(run) == ["layers"]


@pytest.mark.parametrize("fault", ["unseeded", "another seed is not heeded"])
def test_a_start_that_the_seed_does_not_cover_fails_seed(
    run: RunConfig, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = (lambda seed: torch.seed()) if fault == "unseeded" else (lambda seed: transformers.set_seed(0))
    monkeypatch.setattr(adapters, "set_seed", drawn)
    assert failed(run) == ["seed"]


@pytest.mark.parametrize("fault", ["no system turn", "another end"])
def test_other_tokens_in_serving_fail_tokens(run: RunConfig, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "no system turn":
        right = ChatRenderer.prompt
        monkeypatch.setattr(ChatRenderer, "prompt", lambda self, said, tools=(): right(self, said[1:], tools))
    else:
        monkeypatch.setattr("lora_ft.generate.end_ids", lambda model, tokenizer: [5])
        monkeypatch.setattr("lora_ft.tasks.chat.Chat.end_ids", lambda self: [])
    assert failed(run) == ["tokens"]


def test_the_command_names_what_failed(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run.yaml"
    place.write_text(to_yaml(RunConfig(task="classify", base="minilm", out=Path("o"), lora=LoraConfig(rank=4))))
    assert cli.main(["selftest", str(place)]) == 2
    assert "data.train is missing" in capsys.readouterr().err
    assert cli.main(["selftest", str(place), "--twin"]) == 0
    shown = capsys.readouterr().out
    assert "not for this task  packing: several rows cannot share one: rows of the task classify cannot" in shown
    assert shown.count("PASS  ") == 5
    monkeypatch.setattr(adapters, "set_seed", lambda seed: torch.seed())
    assert cli.main(["selftest", str(place), "--twin", "--json"]) == 3
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert (found["passed"], found["failed"]) == (False, ["seed"])
    assert "Failed: seed (" in told.err
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    place.write_text(place.read_text().replace("train: null", f"train: {rows}"))
    assert cli.main(["selftest", str(place), "--twin"]) == 1
    assert "2 rows are too few to check; give 3" in capsys.readouterr().err

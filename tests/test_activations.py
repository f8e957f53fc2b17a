"""What a training keeps for the backward pass: everything, inputs of layers here or elsewhere, as the plan says."""

import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.autograd.graph import saved_tensors_hooks

from lora_ft import adapters, base, memory, runs, sources, tasks
from lora_ft.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_ft.model import activations
from lora_ft.proof import environment
from lora_ft.system import devices
from tests import tiny

LAYERS, HIDDEN = 2, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("kept") / "base", num_hidden_layers=LAYERS)


def gradients(folder: Path, how, away=nullcontext) -> dict[str, torch.Tensor]:
    task = tasks.get("complete")
    loaded = base.load(str(folder), quant="none", dtype="float32", device="cpu")
    model = adapters.attach(loaded, LoraConfig(rank=4), peft_task=task.peft_task).train()
    task.tokenizer = loaded.tokenizer
    for name, parameter in adapters.trained(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    with activations.kept(model, how, away=away):
        task.loss(model, task.collate(tiny.rows("complete")[:3])).backward()
    return {name: parameter.grad for name, parameter in adapters.trained(model).items()}


def test_inputs_of_layers_alone_go_away_and_gradients_stay(folder):
    sent, fetched = [], []

    def away():
        def put(tensor):
            sent.append(tuple(tensor.shape))
            return tensor.numpy(force=True).copy()

        def fetch(array):
            fetched.append(array.shape)
            return torch.from_numpy(array)

        return saved_tensors_hooks(put, fetch)

    whole, again, moved = gradients(folder, "off"), gradients(folder, "on"), gradients(folder, "offload", away)
    assert len(sent) == len(fetched) == LAYERS
    assert len(set(sent)) == 1
    assert sent[0][-1] == HIDDEN
    for name, gradient in whole.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
        assert torch.equal(moved[name], again[name])


def test_inputs_that_come_back_wrong_spoil_the_gradient(folder):
    wrong = gradients(folder, "offload", lambda: saved_tensors_hooks(lambda x: x, torch.zeros_like))
    whole = gradients(folder, "off")
    assert any(not torch.allclose(wrong[name], gradient) for name, gradient in whole.items())


def asked(folder: Path, out: Path = Path("unused"), *, length: int = 256, rows: str | None = None, **changes):
    settings = {"dtype": "float32", "batch_size": 4, "steps": 2, "lr": 1e-2, "warmup": 0.0, **changes}
    return RunConfig(
        task="complete",
        base=str(folder),
        out=out,
        quant="none",
        lora=LoraConfig(rank=4),
        data=DataConfig(train=rows, max_length=length),
        train=TrainConfig(**settings),
    )


def test_offloading_leaves_the_inputs_of_a_layer_or_two_on_the_gpu(tmp_path):
    """Of many layers, for what a single one computes is the most of what is left."""
    layers, length = 6, 512
    folder = tiny.model_folder(tmp_path / "base", num_hidden_layers=layers)
    config, task, source = asked(folder, length=length), tasks.get("complete"), sources.describe(str(folder))
    card = devices.Device("a GPU", "cuda", 2**34, "float32")
    planner = memory.Planner(config, task, source, card, [[memory._longest(config, task, source)]])
    again, away = (planner.step(2, 1, how, "off").peak_bytes for how in ("on", "offload"))
    inputs = 2 * length * HIDDEN * 4
    assert (layers - 3) * inputs <= again - away <= layers * inputs


@pytest.fixture
def rows(tmp_path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "w{n}", "completion": "{"w2 " * 60}"}}\n' for n in range(8)))
    return str(file)


def trained(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(runs.run(config).folder / "adapter_model.safetensors")


def leave(usable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run find a machine with so much memory."""
    found = devices.Device("a machine", "cpu", usable, "float32")
    monkeypatch.setattr(devices, "find", lambda name: found)


def test_a_run_makes_the_passes_that_fit_and_learns_the_same(folder, rows, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        whole = trained(asked(folder, tmp_path / "whole", rows=rows))
    assert "memory is not planned: a step takes about 0.47 GiB" in caplog.text
    assert environment.read(tmp_path / "whole")["plan"] is None
    of_one = memory.plan(asked(folder, rows=rows, batch_size=1, accumulate=4), "cpu").asked.peak_bytes
    again = memory.plan(asked(folder, rows=rows, batch_size=1, accumulate=4, checkpoint_activations=True), "cpu")
    for name, usable, wanted in (("parts", of_one, (1, "off")), ("again", again.asked.peak_bytes, (1, "on"))):
        leave(usable, monkeypatch)
        with caplog.at_level(logging.WARNING):
            found = trained(asked(folder, tmp_path / name, rows=rows))
        assert f"{usable / 2**30:.2f} are free: each batch is made in 4 passes" in caplog.text
        record = environment.read(tmp_path / name)["plan"]
        assert (record["rows"], record["checkpointing"]) == wanted
        assert record["peak_bytes"] == sum(record["bytes"].values()) == usable
        for key, value in whole.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=key)
    assert "activations are computed again" in caplog.text
    leave(1000, monkeypatch)
    config, task, source = asked(folder, rows=rows), tasks.get("complete"), sources.describe(str(folder))
    found = memory.rows.prepare(config, task, source, *memory.rows.read(config))
    assert memory.of_training(config, task, source, found).peak_bytes == again.asked.peak_bytes
    assert "which comes closest" in caplog.text


def test_a_model_that_asks_for_numbers_is_trained_without_a_plan(folder, rows, tmp_path, monkeypatch, caplog):
    def asks(*args):
        raise DataDependentOutputException(torch.ops.aten._local_scalar_dense.default)

    leave(1000, monkeypatch)
    monkeypatch.setattr(memory.Planner, "asked", asks)
    with caplog.at_level(logging.INFO):
        trained(asked(folder, tmp_path / "run", rows=rows))
    assert "memory is not planned" in caplog.text
    assert environment.read(tmp_path / "run")["plan"] is None

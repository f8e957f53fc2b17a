"""The optimizers of a run: 8 bits learn as 32 do, resume exactly, keep to their own run, and say where they lack."""

import dataclasses
import json
import logging
import math
import signal
from pathlib import Path

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from lora_ft import checkpoints, train
from lora_ft.config import TrainConfig
from lora_ft.errors import AdapterError
from lora_ft.training import logged, optimizer, trainers
from tests import tiny
from tests.test_train import StopAt, fit, same

NARROW = ["adamw-8bit", "adamw-paged-8bit"]
# Of this rank most matrices of the tiny model have 4096 elements or more, and B of keys and values half as many.
WIDE = {"rank": 64, "alpha": 64.0, "rslora": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.INFO, logger="lora_ft")


class Look(TrainerCallback):
    """Keeps the state of the optimizer after each step, by the names of the parameters, and its groups."""

    def __init__(self) -> None:
        self.states: list[dict[str, dict]] = []
        self.groups: list[dict] = []

    def on_step_end(self, args, state, control, **kwargs):
        names = {id(p): name for name, p in kwargs["model"].named_parameters()}
        held = kwargs["optimizer"].optimizer
        self.groups = [dict(group, params=[names[id(p)] for p in group["params"]]) for group in held.param_groups]
        self.states.append(
            {
                names[id(p)]: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in of.items()}
                for p, of in held.state.items()
            }
        )


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / logged.FILE).read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("plus_ratio", [None, 16.0])
@pytest.mark.parametrize("name", NARROW)
def test_a_run_with_8_bits_resumes_bit_for_bit(tmp_path, folder, name, plus_ratio):
    rows = tiny.rows("complete", 12)
    settings = {"steps": 6, "batch_size": 4, "optimizer": name, "weight_decay": 0.1, "lr": 1e-3}
    settings["lora"] = {**WIDE, "dropout": 0.2, "plus_ratio": plus_ratio}
    whole, again = Look(), Look()
    _, wanted = fit(tmp_path / "whole", folder, rows, callbacks=[whole], **settings)
    fit(tmp_path / "run", folder, rows, callbacks=[StopAt(2, signal.SIGINT)], **settings)
    place = checkpoints.newest(tmp_path / "run" / train.CHECKPOINTS)
    kept = load_file(place / optimizer.TENSORS)
    assert {key.rpartition(".")[2] for key in kept} == {"state1", "state2", "absmax1", "absmax2"}
    assert {tensor.dtype for key, tensor in kept.items() if "state" in key} == {torch.uint8, torch.float32}
    _, weights = fit(tmp_path / "run", folder, rows, resume=True, callbacks=[again], **settings)
    assert same(weights, wanted)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name, state in whole.states[-1].items():
        assert state.keys() == again.states[-1][name].keys()
        for key, value in state.items():
            other = again.states[-1][name][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, (name, key)
    assert {state["step"] for state in again.states[-1].values()} == {6}


def test_a_resume_that_forgot_a_scale_would_show(tmp_path, folder, monkeypatch):
    rows = tiny.rows("complete", 12)
    settings = {"steps": 6, "batch_size": 4, "optimizer": "adamw-8bit", "lr": 1e-3, "lora": WIDE}
    _, wanted = fit(tmp_path / "whole", folder, rows, **settings)
    fit(tmp_path / "run", folder, rows, callbacks=[StopAt(2, signal.SIGINT)], **settings)
    read = optimizer.tensors_of
    spoilt = lambda file: {k: v * 0.999 if "absmax1" in k else v for k, v in read(file).items()}  # noqa: E731
    monkeypatch.setattr(optimizer, "tensors_of", spoilt)
    _, weights = fit(tmp_path / "run", folder, rows, resume=True, **settings)
    assert not same(weights, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_8_bits_learn_as_32_do(tmp_path, folder, dtype):
    rows = tiny.rows("complete", 16)
    settings = {"steps": 30, "batch_size": 8, "lr": 2e-3, "lora": WIDE, "dtype": dtype}
    _, wide = fit(tmp_path / "wide", folder, rows, **settings)
    _, narrow = fit(tmp_path / "narrow", folder, rows, optimizer="adamw-8bit", **settings)
    of_wide, of_narrow = losses(tmp_path / "wide"), losses(tmp_path / "narrow")
    assert of_wide[-1] < 0.7 * of_wide[0]  # else there is nothing to compare
    assert of_narrow[-1] == pytest.approx(of_wide[-1], rel=0.03)
    assert not same(wide, narrow)


def test_the_first_step_is_that_of_32_bits_and_decays_what_it_decays(tmp_path, folder):
    """Before it the moments are zero, which 8 bits hold as well; so each group and each option has to be the same."""
    rows, plain, narrow = tiny.rows("complete", 4), Look(), Look()
    settings = {"steps": 1, "batch_size": 4, "lr": 1e-2, "weight_decay": 5.0, "lora": WIDE}
    _, wanted = fit(tmp_path / "a", folder, rows, callbacks=[plain], **settings)
    _, found = fit(tmp_path / "b", folder, rows, callbacks=[narrow], optimizer="adamw-8bit", **settings)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    same_in_both = ("params", "lr", "betas", "eps", "weight_decay", "initial_lr")
    assert [[group[key] for key in same_in_both] for group in narrow.groups] == [
        [group[key] for key in same_in_both] for group in plain.groups
    ]
    assert [group["weight_decay"] for group in plain.groups if group["params"]] == [5.0]


@pytest.mark.parametrize("name", NARROW)
def test_lora_plus_trains_b_faster_in_8_bits_and_leaves_nothing_in_the_process(tmp_path, folder, name):
    look = Look()
    settings = {"steps": 1, "optimizer": name, "lora": {**WIDE, "plus_ratio": 16.0}}
    fit(tmp_path / "run", folder, tiny.rows("complete", 4), callbacks=[look], **settings)
    rates = {"lora_B" in p: group["initial_lr"] for group in look.groups for p in group["params"]}
    assert rates[True] == pytest.approx(16 * rates[False])
    assert torch.uint8 in {state["state1"].dtype for state in look.states[0].values()}
    manager = GlobalOptimManager.get_instance()
    assert (manager.module_weight_config_triple, manager.pid2config, manager.index2config) == ([], {}, {})


def test_what_another_put_into_the_manager_of_the_process_changes_nothing(monkeypatch):
    manager = GlobalOptimManager.get_instance()
    weight = nn.Parameter(torch.zeros(64, 64))
    monkeypatch.setattr(manager, "pid2config", {id(weight): {"optim_bits": 32}})
    monkeypatch.setattr(manager, "index2config", {(0, 0): {"optim_bits": 32}})
    made = optimizer.BlockwiseAdamW([weight], lr=1e-3)
    weight.grad = torch.ones_like(weight)
    made.step()
    assert made.state[weight]["state1"].dtype == torch.uint8
    assert made.in_8_bits() == 1


def test_embeddings_and_small_tensors_keep_32_bits(tmp_path, folder, caplog):
    look = Look()
    lora = {**WIDE, "targets": ("q_proj", "k_proj"), "save_modules": ("embed_tokens",)}
    fit(
        tmp_path / "run", folder, tiny.rows("complete", 4), callbacks=[look], steps=1, optimizer="adamw-8bit", lora=lora
    )
    (state,) = look.states
    bits = {name: of["state1"].dtype for name, of in state.items()}
    sizes = {name: of["state1"].numel() for name, of in state.items()}
    assert {dtype for name, dtype in bits.items() if "embed_tokens" in name} == {torch.float32}
    assert max(size for name, size in sizes.items() if "embed_tokens" in name) > optimizer.LEAST
    others = {name: dtype for name, dtype in bits.items() if "embed_tokens" not in name}
    assert {name: dtype == torch.uint8 for name, dtype in others.items()} == {
        name: sizes[name] >= optimizer.LEAST for name in others
    }
    narrow = sum(dtype == torch.uint8 for dtype in bits.values())
    assert f"moments are of 8 bits in {narrow} of {len(bits)} tensors" in caplog.text
    assert 0 < narrow < len(bits)


def test_a_step_that_is_skipped_leaves_moments_of_8_bits_alone(tmp_path, folder, monkeypatch):
    look, calls = Look(), []
    real = trainers.AdapterTrainer.compute_loss

    def compute(self, *args, **kwargs):
        calls.append(1)
        # The first is the trial of the longest batch.
        return real(self, *args, **kwargs) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(trainers.AdapterTrainer, "compute_loss", compute)
    settings = {"steps": 3, "batch_size": 4, "optimizer": "adamw-8bit", "lora": WIDE}
    fit(tmp_path / "run", folder, tiny.rows("complete", 12), callbacks=[look], **settings)
    first, skipped, third = look.states
    for name in first:
        for key in first[name]:
            assert torch.equal(torch.as_tensor(first[name][key]), torch.as_tensor(skipped[name][key])), (name, key)
    assert {state["step"] for state in third.values()} == {2}


# Where it cannot be had


def test_paging_is_for_a_gpu_and_its_absence_is_told_once(tmp_path, folder, caplog, recwarn):
    settings = {"steps": 2, "batch_size": 4, "lora": WIDE}
    _, paged = fit(tmp_path / "a", folder, tiny.rows("complete"), optimizer="adamw-paged-8bit", **settings)
    assert caplog.text.count("adamw-paged-8bit pages the memory of a GPU, and this is none: adamw-8bit takes its") == 1
    _, plain = fit(tmp_path / "b", folder, tiny.rows("complete"), optimizer="adamw-8bit", **settings)
    assert same(paged, plain)
    assert not [one for one in recwarn if "aged" in str(one.message)]


def test_a_processor_without_8_bits_takes_adamw_and_says_why(tmp_path, folder, caplog, monkeypatch):
    def lacking(self, closure=None):
        raise NotImplementedError("there is no such operation.\nmore of it")

    settings = {"steps": 2, "batch_size": 4, "lora": WIDE}
    _, wanted = fit(tmp_path / "a", folder, tiny.rows("complete"), **settings)
    monkeypatch.setattr(optimizer.BlockwiseAdamW, "step", lacking)
    _, found = fit(tmp_path / "b", folder, tiny.rows("complete"), optimizer="adamw-paged-8bit", **settings)
    assert same(found, wanted)
    reason = r"cannot step here (there is no such operation): adamw takes its place"
    assert caplog.text.count(reason) == 1
    assert caplog.text.count("adamw-8bit takes its place") == 1


def test_a_gpu_gets_what_is_asked_for():
    for name, kind, options in [
        ("adamw", torch.optim.AdamW, {"fused": True}),
        ("adamw-8bit", optimizer.BlockwiseAdamW, {"paged": False}),
        ("adamw-paged-8bit", optimizer.BlockwiseAdamW, {"paged": True}),
    ]:
        assert optimizer.choose(name, "cuda") == (name, [])
        made, given = optimizer.made_of(dataclasses.replace(TrainConfig(), optimizer=name), "cuda")
        assert (made, {key: given[key] for key in options}) == (kind, options)


def test_paged_moments_are_read_back_into_paged_memory(monkeypatch):
    """Without a GPU a buffer of the library's own stands for its paged memory."""
    buffers = []

    def buffer(self, p, dtype=torch.float32):
        buffers.append(torch.zeros_like(p, dtype=dtype))
        return buffers[-1]

    def made(paged: bool) -> tuple[nn.Parameter, optimizer.BlockwiseAdamW]:
        weight = nn.Parameter(torch.linspace(-1, 1, 2**17).view(256, 512))
        return weight, optimizer.BlockwiseAdamW([weight], lr=1e-3, paged=paged)

    weight, first = made(False)
    weight.grad = weight.detach().clone()
    first.step()
    monkeypatch.setattr(optimizer.BlockwiseAdamW, "get_state_buffer", buffer)
    copy, second = made(True)
    second.load_state_dict(first.state_dict())
    held = second.state[copy]
    assert all(held[key] is place for key, place in zip(optimizer.MOMENTS, buffers, strict=True))
    assert all(torch.equal(held[key], value) for key, value in first.state[weight].items() if key != "step")
    assert [id(moments) for moments in second.paged()] == [id(place) for place in buffers]
    assert first.paged() == []


# Another one


@pytest.mark.parametrize(("before", "now"), [("adamw", "adamw-8bit"), ("adamw-8bit", "adamw")])
def test_the_state_of_another_optimizer_is_refused(tmp_path, folder, before, now):
    rows, settings = tiny.rows("complete", 12), {"steps": 6, "batch_size": 4, "lora": WIDE}
    fit(tmp_path / "run", folder, rows, optimizer=before, callbacks=[StopAt(2, signal.SIGINT)], **settings)
    message = (
        r"checkpoint-3: its optimizer was \w+, and this run's is \w+, which cannot go on from the state of another"
    )
    with pytest.raises(AdapterError, match=message):
        fit(tmp_path / "run", folder, rows, optimizer=now, resume=True, **settings)


def test_a_run_may_go_on_paged_or_no_longer_paged(tmp_path, folder):
    rows, settings = tiny.rows("complete", 12), {"steps": 6, "batch_size": 4, "lora": WIDE}
    _, wanted = fit(tmp_path / "whole", folder, rows, optimizer="adamw-8bit", **settings)
    fit(tmp_path / "run", folder, rows, optimizer="adamw-8bit", callbacks=[StopAt(2, signal.SIGINT)], **settings)
    _, found = fit(tmp_path / "run", folder, rows, optimizer="adamw-paged-8bit", resume=True, **settings)
    assert same(found, wanted)

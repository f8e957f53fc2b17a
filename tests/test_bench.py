"""The checks of `lora-ft bench kernels` see a wrong kernel; its clock is fair; what it measured is used."""

import json
import time

import pytest
import torch

from lora_ft import bench, cli, tuning
from lora_kernels import dispatch, reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FT_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "_measured", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operation_is_as_good_as_its_twin(dtype):
    found = list(bench.check(CPU, dtype))
    assert {one.op.split(",")[0] for one in found} >= {"nf4_dequant", "lora_linear", "rope", "linear_cross_entropy"}
    assert all(one.passed for one in found), found


def test_a_wrong_operation_is_caught_and_nothing_is_tuned(monkeypatch, capsys):
    right = reference.rope
    monkeypatch.setattr(bench, "rope", lambda q, k, cos, sin: (right(q, k, cos, sin)[0], k))
    monkeypatch.setattr(
        bench, "linear", lambda m, n, k, *rest: bench.Timed(m, (n, k), "float32", 1.0, 0.5, {"peft": 2.0})
    )
    monkeypatch.setattr(bench, "matmul_rate", lambda dtype, on: 1.0)
    assert cli.main(["bench", "kernels", "--json"]) == 3
    shown = capsys.readouterr()
    assert "rope: further from float64" in shown.err
    found = json.loads(shown.out)
    assert [one["op"] for one in found["checks"] if one["error"] > 0.1] == ["rope"]
    assert found["tuned"] is None


def test_runs_take_turns_and_the_median_counts():
    order: list[str] = []

    def run(name, seconds):
        def it():
            order.append(name)
            time.sleep(seconds)

        return it

    found = bench.times({"slow": run("slow", 0.02), "quick": run("quick", 0.002)}, CPU, seconds=0.1)
    assert order[:6] == ["slow", "quick"] * 3
    assert found["slow"] > 3 * found["quick"]


def test_a_layer_is_timed_against_its_rivals_on_the_same_numbers():
    made = bench.layers(48, 64, torch.float32, CPU)
    x = torch.randn(5, 64)
    torch.testing.assert_close(made["fused"](x), made["peft"](x))
    assert type(made["fused"].get_submodule("base_model.model.0")) is not type(
        made["peft"].get_submodule("base_model.model.0")
    )
    found = bench.linear(5, 48, 64, torch.float32, CPU, 1e9)
    assert set(found.rivals) == {"peft", "one by one"}
    assert found.ratio("peft") == found.rivals["peft"] / found.seconds


def test_what_was_measured_is_kept_by_card_and_forgotten_with_another_torch(monkeypatch):
    card = dispatch.Gpu("NVIDIA GeForce RTX 4090", "sm_89", 128)
    ways = {dispatch.shape_key(512, 4096, 4096, True, torch.bfloat16): "triton_4bit"}
    file = tuning.keep(card.name, ways)
    assert file.name == "nvidia-geforce-rtx-4090.json"
    dispatch._measured.clear()
    assert tuning.recall(card.name)
    assert dispatch.choose(300, 4096, 4096, card, packed=True, dtype=torch.bfloat16) == "triton_4bit"
    assert not tuning.recall("another card")
    record = json.loads(file.read_text())
    for damaged in ({**record, "torch": "2.0.0"}, {**record, "ways": {"1x1x1": "fast"}}, {"ways": 3}, [1]):
        dispatch._measured.clear()
        file.write_text(json.dumps(damaged))
        assert not tuning.recall(card.name)
        assert not dispatch._measured

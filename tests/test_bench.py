"""The checks of `lora-ft bench kernels` see a wrong kernel; its clock is fair; what it measured is used."""

import json
import time

import pytest
import torch

from lora_ft import cli
from lora_ft.speed import bench, rates, tuning, twins
from lora_kernels import dispatch, reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FT_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "_measured", {})


OPERATIONS = {
    *("lora_down", "lora_linear, dequant", "lora_group, dequant", "rms_norm_lora", "swiglu_lora", "rope"),
    *("packed_attention", "linear_cross_entropy"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_operation_and_its_gradients_are_as_good_as_its_twin(dtype):
    found = list(twins.check(CPU, dtype))
    names = {"nf4_dequant", "lora_bwd_up", *OPERATIONS, *(f"{name}, gradients" for name in OPERATIONS)}
    assert {one.op for one in found} == names
    assert all(one.passed for one in found), found


def tf32(x):
    """Returns float32 numbers as matrix instructions read them, with 10 bits of mantissa, and lets gradients pass."""
    rounded = ((x.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return x + (rounded - x.detach())


def test_rounded_products_a_wrong_scale_and_a_wrong_gradient_are_caught(monkeypatch):
    down, dequantize, turned = twins.lora_down, twins.nf4_dequant, twins.rope
    monkeypatch.setattr(twins, "lora_down", lambda x, a: down(tf32(x), tf32(a)))
    assert wrong() == {"lora_down", "lora_down, gradients"}
    monkeypatch.setattr(twins, "lora_down", down)

    weights = []

    def off_by_a_thousandth(weight, dtype):
        weights.append(dequantize(weight, dtype))
        return weights[0] * 1.0009

    monkeypatch.setattr(twins, "nf4_dequant", off_by_a_thousandth)
    assert "nf4_dequant" in wrong()
    monkeypatch.setattr(twins, "nf4_dequant", dequantize)

    def with_another_gradient(q, k, cos, sin):
        q_out, k_out = turned(q, k, cos, sin)
        return q_out, k_out + 0.01 * (k - k.detach())

    monkeypatch.setattr(twins, "rope", with_another_gradient)
    assert wrong() == {"rope, gradients"}


def wrong() -> set[str]:
    return {one.op for one in twins.check(CPU, torch.float32) if not one.passed}


def test_every_shape_up_to_the_largest_is_tuned():
    """Whatever the rows, the key that they are looked up by was measured."""
    keys = {dispatch.shape_key(m, 64, 64, True, torch.bfloat16) for m in bench.TUNED_ROWS}
    assert {dispatch.shape_key(m, 64, 64, True, torch.bfloat16) for m in range(1, 8193)} == keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_tuned_packed_and_dense_by_the_ways_there_are(dtype, monkeypatch):
    tried = []

    def times(runs, on, **_):
        tried.append(tuple(runs))
        return {way: -i for i, way in enumerate(runs)}

    monkeypatch.setattr(bench, "times", times)
    best = bench.tune((3,), ((48, 64),), dtype, CPU)
    assert tried == [dispatch.ways(True, dtype), dispatch.ways(False, dtype)]
    keys = [dispatch.shape_key(3, 48, 64, packed, dtype) for packed in (True, False)]
    assert best == {key: ways[-1] for key, ways in zip(keys, tried, strict=True)}


def test_a_wrong_operation_is_caught_and_nothing_is_tuned(monkeypatch, capsys):
    right = reference.rope
    monkeypatch.setattr(twins, "rope", lambda q, k, cos, sin: (right(q, k, cos, sin)[0], k))
    monkeypatch.setattr(
        bench, "linear", lambda m, n, k, *rest: bench.Timed(m, (n, k), "float32", 1.0, 0.5, {"peft": 2.0})
    )
    monkeypatch.setattr(bench, "matmul_rate", lambda dtype, on: 1.0)
    monkeypatch.setattr(bench, "bandwidth", lambda on: 1.0)
    monkeypatch.setattr(bench, "operations", lambda *_: [rates.Rated("rope", 1.0, 1.0, 1.0, 1.0, {"peft": 2.0})])
    assert cli.main(["bench", "kernels", "--json"]) == 3
    shown = capsys.readouterr()
    assert "rope, rope, gradients: further from float64" in shown.err
    found = json.loads(shown.out)
    assert [one["op"] for one in found["checks"] if one["error"] > 0.1] == ["rope", "rope, gradients"]
    assert found["tuned"] is None


def test_runs_take_turns_and_the_median_counts():
    order: list[str] = []

    def run(name, seconds):
        def it():
            order.append(name)
            time.sleep(seconds)

        return it

    found = rates.times({"slow": run("slow", 0.02), "quick": run("quick", 0.002)}, CPU, seconds=0.1)
    assert order[:6] == ["slow", "quick"] * 3
    assert found["slow"] > 3 * found["quick"]


SMALL = twins.Sizes(32, 64, 64, 100, (2, 1), (0, 10, 32))


def test_every_operation_is_timed_against_its_rivals_and_the_roofline(monkeypatch):
    monkeypatch.setattr(rates, "ON_CPU", SMALL)
    ran = []

    def times(runs, on, **_):
        for run in runs.values():
            run()
        ran.append(tuple(runs))
        return {name: 2.0 if name == "ours" else 3.0 for name in runs}

    monkeypatch.setattr(rates, "times", times)
    found = {one.op: one for one in rates.operations(CPU, torch.float32, flops_per_s=4e3, bytes_per_s=1e3)}
    assert found.keys() == {"nf4_dequant", "lora_bwd_up", *OPERATIONS}
    assert all(one.seconds == 2 and one.ratio("peft") == 1.5 for one in found.values())
    assert found["lora_bwd_up"].ratio("one by one") == 1.5
    assert found["lora_group, dequant"].ratio("one by one") == 1.5
    assert found["rope"].ratio("one by one") is None
    # x [32, 64] and a [16, 64] are read, x @ a.T [32, 16] is written; backwards as much, and dx and da.
    down, moved = found["lora_down"], 4 * (2 * (32 * 64 + 16 * 64 + 32 * 16) + 32 * 64 + 16 * 64)
    assert down.gigabytes_per_s == pytest.approx(moved / 2 / 1e9)
    assert down.teraflops == pytest.approx(3 * 2 * 32 * 64 * 16 / 2 / 1e12)
    assert down.share == pytest.approx(max(moved / 1e3, 6 * 32 * 64 * 16 / 4e3) / 2)
    # The weight counts with its 4 bits, not as the twin is given it.
    layer = found["lora_linear, dequant"]
    sent = 32 * 64 + 64 + 16 * 64 + 64 * 16
    moved = 2 * (4 * (sent + 32 * 64) + 64 * 64 // 2 + 64) + 4 * sent
    assert layer.gigabytes_per_s == pytest.approx(moved / 2 / 1e9)


def test_copying_is_timed(monkeypatch):
    monkeypatch.setattr(rates, "COPIED_BYTES", 2**22)
    assert 1e8 < rates.bandwidth(CPU) < 1e13


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

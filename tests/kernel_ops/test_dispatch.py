"""Ways are chosen by the table, before it by what was measured on the card, before all by what a test forces."""

import pytest
import torch

from lora_kernels import dispatch
from lora_kernels.dispatch import Gpu

RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "sm_89", 128)
CARDS = [
    ("sm_80", 108),
    ("sm_86", 82),
    ("sm_89", 128),
    ("sm_90", 132),
    ("sm_100", 148),
    ("sm_120", 170),
    ("sm_200", 99),
]
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("rows", "outputs", "way"),
    [
        (256, 3 * 128 * 64, "gemm_4bit"),
        (257, 3 * 128 * 64, "dequant"),
        (128, 3 * 128 * 64 - 64, "gemm_4bit"),
        (129, 3 * 128 * 64 - 64, "dequant"),
        (8, 64, "gemm_4bit"),
        (9, 64, "dequant"),
    ],
)
def test_the_table_goes_by_rows_and_by_waves(rows, outputs, way):
    assert dispatch.choose(rows, outputs, 4096, RTX_4090, packed=True, dtype=BF16) == way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("arch", "multiprocessors"), CARDS)
@pytest.mark.parametrize("outputs", [64, 4096, 14336, 128256])
def test_up_to_four_rows_every_card_multiplies_by_the_packed_weight(arch, multiprocessors, outputs, dtype):
    card = Gpu("a card", arch, multiprocessors)
    for rows in range(1, 5):
        assert dispatch.choose(rows, outputs, 4096, card, packed=True, dtype=dtype) == "gemm_4bit"
    assert dispatch.choose(257, outputs, 4096, card, packed=True, dtype=dtype) == "dequant"


def test_no_rows_are_no_case_for_a_kernel(monkeypatch):
    key = dispatch.shape_key(0, 64, 64, packed=True, dtype=BF16)
    monkeypatch.setattr(dispatch, "_measured", {RTX_4090.name: {key: "gemm_4bit"}})
    assert dispatch.choose(0, 64, 64, RTX_4090, packed=True, dtype=BF16) == "dequant"


@pytest.mark.parametrize(
    ("arch", "multiprocessors", "outputs", "rows"),
    [
        # Of each tier its first weight, and the last of the tier below.
        ("sm_80", 100, 300 * 64, 128),
        ("sm_80", 100, 299 * 64, 32),
        ("sm_80", 100, 100 * 64, 32),
        ("sm_80", 100, 99 * 64, 4),
        ("sm_90", 100, 100 * 64, 32),
        ("sm_90", 100, 75 * 64, 16),
        ("sm_90", 100, 74 * 64, 4),
        ("sm_100", 100, 300 * 64, 32),
        ("sm_100", 100, 299 * 64, 4),
    ],
)
def test_the_tiers_are_those_of_bitsandbytes(arch, multiprocessors, outputs, rows):
    card = Gpu("a card", arch, multiprocessors)
    assert dispatch.most_rows(outputs, card, BF16) == rows
    # Without matrix instructions for float32 its kernel falls back sooner.
    assert dispatch.most_rows(outputs, card, torch.float32) == 7


def test_a_dense_weight_an_unknown_card_and_a_processor_multiply_densely():
    assert dispatch.choose(1, 4096, 4096, RTX_4090, packed=False, dtype=BF16) == "dequant"
    assert dispatch.choose(5, 4096, 4096, Gpu("new", "sm_200", 100), packed=True, dtype=BF16) == "dequant"
    assert dispatch.gpu(torch.device("cpu")) is None
    assert dispatch.choose(1, 4096, 4096, None, packed=True, dtype=BF16) == "dequant"


def test_what_was_measured_on_the_card_goes_before_the_table(monkeypatch):
    monkeypatch.setattr(dispatch, "_measured", {})
    dispatch.use_measured(RTX_4090.name, {dispatch.shape_key(1000, 4096, 4096, True, BF16): "triton_4bit"})
    assert dispatch.choose(600, 4096, 4096, RTX_4090, packed=True, dtype=BF16) == "triton_4bit"
    assert dispatch.choose(512, 4096, 4096, RTX_4090, packed=True, dtype=BF16) == "dequant"
    assert dispatch.choose(600, 4096, 4096, RTX_4090, packed=False, dtype=BF16) == "dequant"
    assert dispatch.choose(600, 4096, 4096, RTX_4090, packed=True, dtype=torch.float16) == "dequant"
    with pytest.raises(ValueError, match="'fast' is no way"):
        dispatch.use_measured(RTX_4090.name, {"1x1x1": "fast"})


def test_what_cannot_be_is_not_chosen_whoever_measured_it(monkeypatch):
    monkeypatch.setattr(dispatch, "_measured", {})
    float32, dense = torch.float32, dispatch.shape_key(512, 4096, 4096, False, BF16)
    ways = {dispatch.shape_key(512, 4096, 4096, True, float32): "triton_4bit", dense: "gemm_4bit"}
    dispatch.use_measured(RTX_4090.name, ways)
    assert dispatch.choose(512, 4096, 4096, RTX_4090, packed=True, dtype=float32) == "dequant"
    assert dispatch.choose(512, 4096, 4096, RTX_4090, packed=False, dtype=BF16) == "dequant"
    assert dispatch.ways(True, float32) == ("gemm_4bit", "dequant")
    assert dispatch.ways(True, BF16) == ("gemm_4bit", "dequant", "triton", "triton_4bit")
    assert dispatch.ways(False, BF16) == ("dequant", "triton")
    dispatch.use_measured(RTX_4090.name, {dense: "triton"})
    assert dispatch.choose(512, 4096, 4096, RTX_4090, packed=False, dtype=BF16) == "triton"


def test_what_is_forced_goes_before_everything():
    with dispatch.forced("triton"):
        assert dispatch.choose(1, 4096, 4096, RTX_4090, packed=True, dtype=BF16) == "triton"
    assert dispatch.choose(1, 4096, 4096, RTX_4090, packed=True, dtype=BF16) == "gemm_4bit"


def test_every_crossover_falls_with_its_waves_and_says_where_it_comes_from():
    assert dispatch.table()["source"]
    for arch, entries in dispatch.table()["most_rows"].items():
        assert arch.startswith("sm_")
        waves, rows = [entry["waves"] for entry in entries], [entry["rows"] for entry in entries]
        assert waves == sorted(waves, reverse=True)
        assert waves[-1] == 0
        assert rows == sorted(rows, reverse=True)

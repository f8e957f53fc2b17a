"""Ways are chosen by the table, before it by what was measured on the card, before all by what a test forces."""

import pytest
import torch

from lora_kernels import dispatch
from lora_kernels.dispatch import Gpu

RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "sm_89", 128)


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
    assert dispatch.choose(rows, outputs, 4096, RTX_4090, packed=True) == way


def test_a_dense_weight_an_unknown_card_and_a_processor_multiply_densely():
    assert dispatch.choose(1, 4096, 4096, RTX_4090, packed=False) == "dequant"
    assert dispatch.choose(1, 4096, 4096, Gpu("new", "sm_200", 100), packed=True) == "dequant"
    assert dispatch.gpu(torch.device("cpu")) is None
    assert dispatch.choose(1, 4096, 4096, None, packed=True) == "dequant"


def test_what_was_measured_on_the_card_goes_before_the_table(monkeypatch):
    monkeypatch.setattr(dispatch, "_measured", {})
    dispatch.use_measured(RTX_4090.name, {dispatch.shape_key(1000, 4096, 4096, True): "triton_4bit"})
    assert dispatch.choose(600, 4096, 4096, RTX_4090, packed=True) == "triton_4bit"
    assert dispatch.choose(512, 4096, 4096, RTX_4090, packed=True) == "dequant"
    assert dispatch.choose(600, 4096, 4096, RTX_4090, packed=False) == "dequant"
    with pytest.raises(ValueError, match="'fast' is no way"):
        dispatch.use_measured(RTX_4090.name, {"1x1x1": "fast"})


def test_what_is_forced_goes_before_everything():
    with dispatch.forced("triton"):
        assert dispatch.choose(1, 4096, 4096, RTX_4090, packed=True) == "triton"
    assert dispatch.choose(1, 4096, 4096, RTX_4090, packed=True) == "gemm_4bit"


def test_every_crossover_falls_with_its_waves_and_says_where_it_comes_from():
    assert dispatch.table()["source"]
    for arch, entries in dispatch.table()["most_rows"].items():
        assert arch.startswith("sm_")
        waves, rows = [entry["waves"] for entry in entries], [entry["rows"] for entry in entries]
        assert waves == sorted(waves, reverse=True)
        assert waves[-1] == 0
        assert rows == sorted(rows, reverse=True)

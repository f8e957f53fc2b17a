"""What the other tests leave open: each of these was written for mutants of `mutate` that none of them noticed."""

from types import SimpleNamespace

import pytest
import torch

from lora_kernels import backend, dispatch
from lora_kernels.dispatch import Gpu


def test_what_a_card_tells_about_itself(monkeypatch):
    told = SimpleNamespace(name="card", major=8, minor=9, multi_processor_count=128)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: told)
    # Without the cache, which would keep it for the tests that follow.
    assert dispatch.gpu.__wrapped__(torch.device("cuda")) == Gpu("card", "sm_89", 128)


@pytest.mark.parametrize("way", ["gemm_4bit", "dequant", "triton", "triton_4bit"])
def test_every_way_may_have_been_measured_and_outputs_are_not_inputs(way, monkeypatch):
    monkeypatch.setattr(dispatch, "_measured", {})
    card = Gpu("card", "sm_89", 128)
    dispatch.use_measured("card", {"512x256x1024-4bit": way})
    assert dispatch.choose(300, 256, 1024, card, packed=True) == way
    # What has outputs and inputs the other way round was not measured, and goes by the table.
    assert dispatch.choose(1, 1024, 256, card, packed=True) == "gemm_4bit"
    assert dispatch.choose(300, 1024, 256, card, packed=True) == "dequant"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_instructions_for_the_dtype_make_a_cpu_multiply_in_it(dtype, monkeypatch):
    names = {
        torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"},
        torch.float16: {"avx512_fp16", "amx_fp16", "fp16_arith"},
    }
    for name in {"avx2", *names[torch.bfloat16], *names[torch.float16]}:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True}, raising=False)
        assert backend._cpu_multiplies.__wrapped__(dtype) == (name in names[dtype])
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not backend._cpu_multiplies.__wrapped__(dtype)

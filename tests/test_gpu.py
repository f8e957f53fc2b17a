"""What only a GPU can tell: kernels launch there, agree with their twins, do not race, and train an adapter."""

import pytest
import torch

from lora_ft import bench, seal, twins
from lora_kernels import Frozen, dispatch, lora_linear, nf4_dequant, rms_norm_lora, swiglu_lora
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_operation_is_as_good_as_its_twin(dtype):
    found = list(twins.check(bench.device(), dtype))
    assert all(one.passed for one in found), found


@pytest.mark.parametrize("way", dispatch.ways(True, torch.bfloat16))
@pytest.mark.parametrize("rows", [1, 7, 64, 130, 1000])
def test_the_same_bits_every_time_and_the_plain_way_within_rounding(way, rows):
    """A race would show as bits that change: no kernel adds in an order of its own."""
    made = bench.layers(192, 256, torch.bfloat16, bench.device())
    x_MK = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy_MN = torch.randn(rows, 192, device="cuda", dtype=torch.bfloat16)
    seen = []
    for _ in range(20):
        with dispatch.forced(way):
            made["fused"].zero_grad()
            bench.step(made["fused"], x_MK, dy_MN)
        seen.append([x_MK.grad, *(p.grad for p in made["fused"].parameters() if p.grad is not None)])
    for other in seen[1:]:
        assert all(torch.equal(one, same) for one, same in zip(seen[0], other, strict=True))
    bench.step(made["peft"], x_MK, dy_MN)
    torch.testing.assert_close(seen[0][0].float(), x_MK.grad.float(), rtol=3e-2, atol=3e-1)


def test_dropout_is_the_same_mask_forward_and_backward():
    """With W zero and A and B chosen so, the gradient of x shows the mask that the output was made with."""
    x_MK = torch.ones(33, 64, device="cuda", requires_grad=True)
    weight = Frozen.of(torch.zeros(64, 64, device="cuda"))
    eye = torch.eye(64, device="cuda")
    y_MN = lora_linear(x_MK, weight, None, eye, eye, scaling=1.0, dropout=0.5, seed=7)
    y_MN.sum().backward()
    assert 0.4 < float((y_MN == 0).float().mean()) < 0.6
    assert torch.equal(y_MN == 0, x_MK.grad == 0)


def test_more_than_two_to_the_31_elements():
    gate = torch.ones(2**16, 2**15 + 64, device="cuda", dtype=torch.bfloat16)
    h = swiglu_lora(gate, gate, None)
    assert torch.equal(h[0], h[-1])
    normed, _ = rms_norm_lora(gate, None, gate[0], None, 1e-5)
    assert torch.equal(normed[0], normed[-1])


def test_a_run_on_the_gpu_is_proven(tmp_path):
    made = tiny.run(tmp_path / "adapter", tiny.model_folder(tmp_path / "base", "llama"), quant="nf4")
    assert made.base.device.type == "cuda"
    assert seal.verify(made.folder).passed


def test_a_weight_is_dequantized_on_the_stream_in_use():
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(torch.randn(4096, 4096, device="cuda"), quant_type="nf4")
    with torch.cuda.stream(torch.cuda.Stream()):
        found = nf4_dequant(Frozen.of(packed, state), torch.bfloat16)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(found, bnb.dequantize_4bit(packed, state).bfloat16())

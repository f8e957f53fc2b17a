"""What only a GPU can tell: kernels launch there, agree with their twins, do not race, and train an adapter."""

import time

import pytest
import torch

from lora_ft import seal
from lora_ft.model import attention, blocks, modes
from lora_ft.speed import bench, rates, tuning, twins
from lora_kernels import Frozen, dispatch, lora_linear, nf4_dequant, reference, rms_norm_lora, swiglu_lora
from tests import tiny
from tests.kernel_ops.accuracy import assert_as_good, error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_operation_is_as_good_as_its_twin(dtype):
    assert [one for one in twins.check(bench.device(), dtype) if not one.passed] == []


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
    """Rows repeat after seven, so that a place that is read or written too early or too late shows."""
    rows, columns = 2**16, 2**15 + 64
    seven = (torch.arange(7, device="cuda")[:, None] + torch.arange(columns, device="cuda")) % 11 - 5
    seven = seven.bfloat16()
    gate = seven[torch.arange(rows, device="cuda") % 7]
    assert gate.numel() > 2**31
    h = swiglu_lora(gate, gate, None)
    wanted = swiglu_lora(seven, seven, None)
    assert all(torch.equal(h[i::7], wanted[i].expand(len(h[i::7]), -1)) for i in range(7))
    del h  # or a card of 12 GB is too small
    weight = torch.linspace(0.5, 2, columns, device="cuda", dtype=torch.bfloat16)
    normed, _ = rms_norm_lora(gate, None, weight, None, 1e-5)
    wanted, _ = rms_norm_lora(gate[: 7 * 1024], None, weight, None, 1e-5)  # as many rows in a program
    assert all(torch.equal(normed[i::7], wanted[i].expand(len(normed[i::7]), -1)) for i in range(7))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoder_layers_computed_whole_train_as_their_parts_do(dtype, checkpointing, tmp_path):
    base = tiny.model_folder(tmp_path / "base", "llama")
    model = tiny.run(tmp_path / "adapter", base, dtype=dtype, device="cuda", sealed=False).model
    assert set(blocks.paths(model)) == {"whole"}
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    whole = logits_and_gradients(model)
    for layer in model.modules():
        if isinstance(layer, blocks._Whole):
            layer.unproven = "a test wants it so"
    parts = logits_and_gradients(model)
    assert whole.keys() == parts.keys()
    if dtype == "float32":
        assert {name: off for name in whole if (off := error(whole[name], parts[name])) > 1e-4} == {}
        return
    for layer in model.float().modules():
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = torch.float32
    exact = logits_and_gradients(model)
    off, allowed = (sum(error(one[name], exact[name]) for name in exact) for one in (whole, parts))
    assert off <= 1.1 * allowed


def logits_and_gradients(model) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    torch.manual_seed(3)
    ids = torch.arange(6, 6 + 3 * 9, device="cuda").view(3, 9)
    with modes.mixed_precision(model):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_run_is_timed_without_the_launching_of_it():
    x = torch.zeros(2**20, device="cuda")

    def launched_slowly():
        for _ in range(5):
            time.sleep(0.002)
            x.add_(1)

    found = rates.times({"run": launched_slowly}, bench.device(), seconds=0.1)
    assert 0 < found["run"] < 0.002


def test_what_is_tuned_is_kept_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FT_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "_measured", {})
    found = bench.tune((1, 64), ((192, 256),), torch.bfloat16, bench.device())
    assert found.keys() == {
        dispatch.shape_key(m, 192, 256, packed, torch.bfloat16) for m in (1, 64) for packed in (True, False)
    }
    name = torch.cuda.get_device_name()
    tuning.keep(name, found)
    dispatch._measured.clear()
    assert tuning.recall(name)
    card = dispatch.gpu(torch.device("cuda"))
    key = dispatch.shape_key(64, 192, 256, True, torch.bfloat16)
    assert dispatch.choose(64, 192, 256, card, True, torch.bfloat16) == found[key]


@pytest.mark.parametrize(
    ("quant", "dtype", "packing"),
    [
        ("nf4", "float32", False),
        ("nf4", "float32", True),
        ("nf4", "bfloat16", True),
        # Not packed: which columns LLM.int8 leaves in 16 bits goes by all rows, so that one changes its neighbours.
        ("int8", "float16", False),
    ],
)
def test_a_run_on_the_gpu_is_proven(quant, dtype, packing, tmp_path):
    base = tiny.model_folder(tmp_path / "base", "llama")
    made = tiny.run(tmp_path / "adapter", base, quant=quant, dtype=dtype, device="cuda", packing=packing)
    assert made.base.device.type == "cuda"
    assert seal.verify(made.folder).passed


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_examples_of_a_row_attend_to_themselves_alone(dtype, window):
    """By torch's flash kernel, with fewer heads of keys than of queries, there and back."""
    lengths = (7, 33, 1, 150)
    ends, width = attention.bounds(lengths).cuda(), 64
    inputs = [torch.randn(heads, sum(lengths), width, device="cuda", dtype=dtype) for heads in (6, 2, 2)]
    upstream = torch.randn(6, sum(lengths), width, device="cuda", dtype=dtype)

    def outputs_and_gradients(attend, precision):
        leaves = [x.detach().to(precision).requires_grad_() for x in inputs]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(precision))]

    def by_flash(q, k, v):
        assert attention._has_flash(q.device)
        return attention._attend(None, q[None], k[None], v[None], ends, sliding_window=window)[0][0].transpose(0, 1)

    def by_mask(q, k, v):
        bounds = ends.flatten().tolist()
        return reference.packed_attention(q, k, v, bounds, scale=width**-0.5, window=window)

    exact = outputs_and_gradients(by_mask, torch.float64)
    plain, found = outputs_and_gradients(by_mask, dtype), outputs_and_gradients(by_flash, dtype)
    for one in zip(found, plain, exact, strict=True):
        assert_as_good(*one)


def test_a_weight_is_dequantized_on_the_stream_in_use():
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(torch.randn(4096, 4096, device="cuda"), quant_type="nf4")
    with torch.cuda.stream(torch.cuda.Stream()):
        found = nf4_dequant(Frozen.of(packed, state), torch.bfloat16)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(found, bnb.dequantize_4bit(packed, state).bfloat16())

"""SwiGLU with the down projection after it, against its twin."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import lora_kernels
from lora_kernels import backend, reference
from lora_kernels.cpu import loops
from tests.kernel_ops import forms
from tests.kernel_ops.compare import assert_like_its_twin, outputs_and_gradients
from tests.kernel_ops.gaps import memory_is_no_number

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# M, N, R, dtype: each off the tile of 16 rows, 128 (in float32 64) columns and 16 to 64 ranks somewhere.
CASES = [
    (1, 130, 64, BF16),
    (130, 200, 4, FP32),
    (63, 257, 1, BF16),
    (7, 96, 8, FP16),
    (7, 64, 16, BF16),
    (63, 128, 40, FP32),
    (7, 320, 128, BF16),
    (63, 129, 256, FP32),
    (130, 300, 0, BF16),
    (130, 304, 16, BF16),
    (200, 80, 16, FP16),
]


@pytest.fixture(params=forms.ALL, autouse=True)
def _form(request):
    with forms.computed_by(request.param):
        yield


def inputs(m, n, r, dtype):
    """Returns gate and up, which are the halves of one product, and a. Some gates are far into either tail."""
    both = torch.cat([4 * torch.randn(m, n), torch.randn(m, n)], dim=1).to(dtype)
    a = (torch.randn(r, n) / n**0.5).to(dtype).requires_grad_() if r else None
    return both[:, :n].requires_grad_(), both[:, n:].requires_grad_(), a


def split(function, n):
    """Returns `function` with the low-rank columns as an output of their own, lest h hides them."""
    return lambda *tensors: function(*tensors).tensor_split([n], dim=-1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case):
    n = case[1]
    assert_like_its_twin(split(lora_kernels.swiglu_lora, n), split(reference.swiglu_lora, n), inputs(*case))


def test_it_is_what_llama_does_between_its_products():
    mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=130))
    x = torch.randn(7, 64)
    h = lora_kernels.swiglu_lora(mlp.gate_proj(x), mlp.up_proj(x), None)
    torch.testing.assert_close(mlp.down_proj(h), mlp(x))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("block", [2**21, 10 * 130 * 4])
def test_torch_rounds_where_transformers_does(dtype, block, monkeypatch):
    """The kernels round once, and the loops all but the gradient of gates as torch does (`test_loops`)."""
    monkeypatch.setattr(backend, "_forced", False)
    monkeypatch.setattr(loops, "takes", lambda *tensors: False)
    monkeypatch.setattr("lora_kernels.slabs.BLOCK", block)
    with torch.device("cpu"):
        gate, up, _ = inputs(63, 130, 0, dtype)
        upstream = [torch.linspace(-2, 2, 130, dtype=dtype).expand(63, 130)]
    found, wanted = (
        outputs_and_gradients(function, (gate, up), upstream)
        for function in (
            lambda *both: lora_kernels.swiglu_lora(*both, None),
            lambda gate, up: torch.nn.functional.silu(gate) * up,
        )
    )
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", [(7, 130, 16, FP32), (130, 130, 16, BF16), (130, 130, 16, FP16)], ids=str)
@pytest.mark.parametrize("rows", [0, 2, 33])
def test_a_cpu_takes_a_block_of_rows_at_a_time(rows, case, monkeypatch):
    monkeypatch.setattr("lora_kernels.slabs.BLOCK", rows * 130 * case[-1].itemsize)
    assert_like_its_twin(lora_kernels.swiglu_lora, reference.swiglu_lora, inputs(*case))


def test_rows_may_stand_apart():
    gate, up = torch.randn(7, 150).bfloat16()[:, :130], torch.randn(7, 160).bfloat16()[:, :130]
    a, upstream = (torch.randn(20, 170) / 11).bfloat16()[:, :130], torch.randn(7, 180).bfloat16()[:, :150]
    tensors = [tensor.requires_grad_() for tensor in (gate, up, a)]
    assert_like_its_twin(lora_kernels.swiglu_lora, reference.swiglu_lora, tensors, [upstream])


def test_any_layout_and_leading_dimensions():
    gate = torch.randn(2, 3, 260).bfloat16()[..., ::2].requires_grad_()
    up = torch.randn(3, 2, 140).bfloat16().transpose(0, 1)[..., :130].requires_grad_()
    a = (torch.randn(130, 16) / 11).bfloat16().t().requires_grad_()
    assert_like_its_twin(lora_kernels.swiglu_lora, reference.swiglu_lora, (gate, up, a))


def test_gradients_of_stride_zero():
    upstream = [torch.ones(1, 1).expand(7, 146)]
    assert_like_its_twin(lora_kernels.swiglu_lora, reference.swiglu_lora, inputs(7, 130, 16, BF16), upstream)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_a_gate_may_be_as_large_as_its_dtype():
    gate = torch.tensor([[-3e38, -1e4, -90.0, 0.0, 90.0, 3e38]]).bfloat16().requires_grad_()
    up = torch.ones(1, 6).bfloat16().requires_grad_()
    h = lora_kernels.swiglu_lora(gate, up, None)
    dgate, dup = torch.autograd.grad(h, (gate, up), torch.ones_like(h))
    assert torch.equal(h, gate.clamp_min(0))
    assert torch.equal(dgate, torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 1.0]]).bfloat16())
    assert torch.equal(dup, h)


def test_master_weights_get_gradients_of_their_own_dtype():
    gate, up, a = inputs(7, 130, 16, BF16)
    wide = a.detach().float().requires_grad_()
    h, h_wide = lora_kernels.swiglu_lora(gate, up, a), lora_kernels.swiglu_lora(gate, up, wide)
    upstream = torch.randn_like(h)
    (da,) = torch.autograd.grad(h, a, upstream)
    (da_wide,) = torch.autograd.grad(h_wide, wide, upstream)
    assert torch.equal(h, h_wide)
    assert da_wide.dtype == FP32
    assert torch.equal(da_wide.bfloat16(), da)
    assert not torch.equal(da_wide.bfloat16().float(), da_wide)


def test_nothing_is_read_that_was_not_written():
    tensors = inputs(130, 100, 16, BF16)
    wanted = lora_kernels.swiglu_lora(*tensors)
    with memory_is_no_number():
        found = lora_kernels.swiglu_lora(*tensors)
    torch.testing.assert_close(found, wanted)


def test_autocast_changes_nothing_inside():
    tensors, upstream = inputs(7, 130, 16, FP32), [torch.randn(7, 146)]
    plain = outputs_and_gradients(lora_kernels.swiglu_lora, tensors, upstream)
    with torch.autocast(upstream[0].device.type, BF16):
        inside = outputs_and_gradients(lora_kernels.swiglu_lora, tensors, upstream)
    assert all(torch.equal(one, other) for one, other in zip(inside, plain, strict=True))


def test_the_operators_keep_the_rules_of_torch_library():
    ops = torch.ops.lora_kernels
    gate, up, a = inputs(7, 64, 16, FP32)
    torch.library.opcheck(ops.swiglu_lora.default, (gate, up, a))
    torch.library.opcheck(ops.swiglu_lora.default, (gate, up, None))
    gate, up, a = gate.detach(), up.detach(), a.detach()
    torch.library.opcheck(ops.swiglu_lora_backward.default, (torch.randn(7, 80), gate, up, a))
    torch.library.opcheck(ops.swiglu_lora_backward.default, (torch.randn(7, 64), gate, up, None))


def test_the_kernels_write_their_columns_and_no_others():
    from lora_kernels.gpu import swiglu

    gate, up, a = (tensor.detach() for tensor in inputs(7, 130, 40, BF16))
    nan = [torch.full((7, width), float("nan"), dtype=BF16) for width in (200, 150, 160, 170)]
    swiglu.forward_into(nan[0][:, :170], gate, up, a)
    dh = torch.randn(7, 170).bfloat16()
    swiglu.backward_into(*(buffer[:, :130] for buffer in nan[1:]), dh, gate, up, a)
    leaves = [tensor.requires_grad_() for tensor in (gate, up, a)]
    wanted = reference.swiglu_lora(*leaves)
    wanted = [wanted, *torch.autograd.grad(wanted, leaves[:2], dh), wanted[:, :130]]
    for buffer, tensor in zip(nan, wanted, strict=True):
        columns = tensor.shape[1]
        torch.testing.assert_close(buffer[:, :columns], tensor.detach(), atol=0.03, rtol=0.03)
        assert buffer[:, columns:].isnan().all()


def test_the_twin_has_the_gradients_of_what_it_computes():
    gate, up, a = (tensor.detach().double().requires_grad_() for tensor in inputs(3, 5, 2, FP32))
    assert torch.autograd.gradcheck(reference.swiglu_lora, (gate, up, a))


def test_shapes_that_do_not_meet_are_refused():
    gate, up, a = inputs(7, 130, 16, BF16)
    with pytest.raises(ValueError, match=r"gate is \[7, 130\] and up \[1, 130\]; they must be alike"):
        lora_kernels.swiglu_lora(gate, up[:1], a)

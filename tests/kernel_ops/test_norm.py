"""RMS norm with the residual before it and the down projection after it, against its twin and LlamaRMSNorm."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lora_kernels
from lora_kernels import backend, reference
from lora_kernels.cpu import loops
from tests.kernel_ops import forms
from tests.kernel_ops.compare import assert_like_its_twin, outputs_and_gradients
from tests.kernel_ops.gaps import memory_is_no_number

EPS = 1e-5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# M, K, R, dtype: each off the tile of 16 rows, 128 (in float32 64) columns and 16 to 64 ranks somewhere.
CASES = [
    (1, 130, 64, BF16),
    (130, 200, 4, FP32),
    (63, 257, 1, BF16),
    (7, 96, 8, FP16),
    (7, 64, 16, BF16),
    (63, 128, 40, FP32),
    (7, 320, 128, BF16),
    (63, 129, 256, FP32),
    (130, 65, 0, BF16),
]


@pytest.fixture(params=forms.ALL, autouse=True)
def _form(request):
    with forms.computed_by(request.param):
        yield


def inputs(m, k, r, dtype, residual=True, train_weight=True):
    """Returns x, residual, weight and a, with magnitudes that differ by row."""
    x = (torch.randn(m, k) * torch.logspace(-1, 1, m)[:, None]).to(dtype).requires_grad_()
    weight = (1 + torch.randn(k) / 4).to(dtype).requires_grad_(train_weight)
    a = (torch.randn(r, k) / k**0.5).to(dtype).requires_grad_() if r else None
    return x, torch.randn(m, k).to(dtype).requires_grad_() if residual else None, weight, a


def op(*tensors):
    return lora_kernels.rms_norm_lora(*tensors, EPS)


def twin(*tensors):
    return reference.rms_norm_lora(*tensors, EPS)


def split(function, k):
    """Returns `function` with the low-rank columns as an output of their own, lest the norm hides them."""

    def apart(*tensors):
        y, h = function(*tensors)
        return y[..., :k], y[..., k:], h

    return apart


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case):
    m, k, r, dtype = case
    tensors = inputs(*case, residual=(m + k) % 2 == 1, train_weight=r != 40)
    assert_like_its_twin(split(op, k), split(twin, k), tensors)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("residual", [False, True])
def test_it_rounds_where_llamas_norm_does(dtype, residual):
    x, residual, weight, a = inputs(63, 320, 16, dtype, residual)
    llama = LlamaRMSNorm(320, EPS)
    llama.weight = torch.nn.Parameter(weight.detach())
    wanted_h = x if residual is None else residual + x
    y, h = op(x, residual, weight, a)
    assert torch.equal(h, wanted_h)
    differ = y[:, :320] != llama(wanted_h)
    # Kernel and loop sum squares in another order, which moves the last bit of 1 / rms in float32.
    in_torch = not (backend.is_triton(x) or loops.takes(x))
    assert not differ.any() if in_torch else differ.float().mean() < 1e-3


@pytest.mark.parametrize("used", ["y", "h"])
def test_only_one_output_may_be_used(used):
    x, residual, weight, a = inputs(7, 130, 16, BF16)
    upstream = [torch.randn(7, 146), None] if used == "y" else [None, torch.randn(7, 130)]
    tensors = (x, residual, weight, a) if used == "y" else (x, residual, weight.detach(), a.detach())
    assert_like_its_twin(op, twin, tensors, upstream)


@pytest.mark.parametrize("rows", [0, 2, 3])
def test_a_cpu_takes_a_block_of_rows_at_a_time(rows, monkeypatch):
    monkeypatch.setattr("lora_kernels.slabs.BLOCK", rows * 130 * FP32.itemsize)
    assert_like_its_twin(op, twin, inputs(7, 130, 16, FP32))


def test_rows_may_stand_apart():
    x, residual = torch.randn(7, 150).bfloat16()[:, :130], torch.randn(7, 160).bfloat16()[:, :130]
    weight, a = torch.randn(260).bfloat16()[::2], (torch.randn(20, 170) / 11).bfloat16()[:, :130]
    upstream = [torch.randn(7, 180).bfloat16()[:, :150], torch.randn(7, 190).bfloat16()[:, :130]]
    assert_like_its_twin(op, twin, [tensor.requires_grad_() for tensor in (x, residual, weight, a)], upstream)


def test_any_layout_and_leading_dimensions():
    x = torch.randn(2, 3, 260).bfloat16()[..., ::2].requires_grad_()
    residual = torch.randn(3, 2, 140).bfloat16().transpose(0, 1)[..., :130].requires_grad_()
    _, _, weight, a = inputs(1, 130, 16, BF16)
    a = a.detach().t().contiguous().t().requires_grad_()
    assert_like_its_twin(op, twin, (x, residual, weight, a))


def test_gradients_of_stride_zero():
    tensors = inputs(7, 130, 16, BF16)
    upstream = [torch.ones(1, 1).expand(7, 146), torch.ones(1, 130).expand(7, 130)]
    assert_like_its_twin(op, twin, tensors, upstream)


def test_master_weights_get_gradients_of_their_own_dtype():
    x, residual, weight, a = inputs(7, 130, 16, BF16)
    wide = a.detach().float().requires_grad_()
    y, _ = op(x, residual, weight, a)
    y_wide, _ = op(x, residual, weight, wide)
    upstream = torch.randn_like(y)
    (da,) = torch.autograd.grad(y, a, upstream)
    (da_wide,) = torch.autograd.grad(y_wide, wide, upstream)
    assert torch.equal(y, y_wide)
    assert da_wide.dtype == FP32
    assert torch.equal(da_wide.bfloat16(), da)
    assert not torch.equal(da_wide.bfloat16().float(), da_wide)


def test_nothing_is_read_that_was_not_written():
    tensors = inputs(130, 100, 16, BF16)
    wanted = op(*tensors)
    with memory_is_no_number():
        found = op(*tensors)
    torch.testing.assert_close(found, wanted)


def test_autocast_changes_nothing_inside():
    tensors = inputs(7, 130, 16, FP32)
    upstream = [torch.randn(7, 146), torch.randn(7, 130)]
    plain = outputs_and_gradients(op, tensors, upstream)
    with torch.autocast(upstream[0].device.type, BF16):
        inside = outputs_and_gradients(op, tensors, upstream)
    assert all(torch.equal(one, other) for one, other in zip(inside, plain, strict=True))


def test_a_residual_of_another_dtype_is_refused():
    x, residual, weight, a = inputs(7, 130, 16, BF16)
    with pytest.raises(ValueError, match=r"x is torch.bfloat16 and residual torch.float32"):
        op(x, residual.float(), weight, a)


def test_the_operators_keep_the_rules_of_torch_library():
    ops = torch.ops.lora_kernels
    for residual in (False, True):
        tensors = inputs(7, 64, 16, FP32, residual)
        torch.library.opcheck(ops.rms_norm_lora.default, (*tensors, EPS))
    x, _, weight, a = (tensor.detach() for tensor in tensors)
    y, h, rstd = ops.rms_norm_lora(x, x, weight, a, EPS)
    torch.library.opcheck(ops.rms_norm_lora_backward.default, (y, h, y, h, rstd, weight, a, True))
    torch.library.opcheck(ops.rms_norm_lora_backward.default, (y[:, :64], None, y, h, rstd, weight, None, False))


def test_the_kernel_writes_its_columns_and_no_others():
    from lora_kernels.gpu import norm

    x, residual, weight, a = (tensor.detach() for tensor in inputs(7, 130, 40, BF16))
    buffer = torch.full((7, 200), float("nan"), dtype=BF16)
    h, rstd = torch.full_like(x, float("nan")), torch.full((7,), float("nan"))
    norm.forward_into(buffer[:, :170], h, rstd, x, residual, weight, a, EPS)
    wanted, wanted_h = twin(x, residual, weight, a)
    assert torch.equal(buffer[:, :130], wanted[:, :130])
    torch.testing.assert_close(buffer[:, 130:170], wanted[:, 130:], atol=0.01, rtol=0.01)
    assert torch.equal(h, wanted_h)
    assert buffer[:, 170:].isnan().all()
    assert not rstd.isnan().any()


def test_the_twin_has_the_gradients_of_what_it_computes():
    x, residual, weight, a = (tensor.detach().double().requires_grad_() for tensor in inputs(3, 5, 2, FP32))
    assert torch.autograd.gradcheck(twin, (x, residual, weight, a))
    assert torch.autograd.gradcheck(lambda x, weight: twin(x, None, weight, None), (x, weight))


def test_rows_may_have_any_shape_without_a_residual():
    x, _, weight, a = inputs(6, 96, 8, FP32, residual=False)
    y, h = op(x.view(2, 3, 96), None, weight, a)
    flat_y, flat_h = op(x, None, weight, a)
    assert torch.equal(y, flat_y.view(2, 3, -1))
    assert torch.equal(h, flat_h.view(2, 3, -1))


@pytest.mark.parametrize("wrong", ["residual", "weight"])
def test_shapes_that_do_not_meet_are_refused(wrong):
    x, residual, weight, a = inputs(7, 130, 16, BF16)
    residual, weight = (residual[:1], weight) if wrong == "residual" else (residual, weight[:1])
    with pytest.raises(
        ValueError, match=r"x, weight and residual must be \[\.\.\., K\], \[K\] and as x, got \[\[7, 130\]"
    ):
        op(x, residual, weight, a)

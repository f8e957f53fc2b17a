"""Cross entropy of a linear head, against its twin and `torch.nn.functional.cross_entropy`."""

from unittest import mock

import pytest
import torch

import lora_kernels
from lora_kernels import backend, cross_entropy, reference
from tests.kernel_ops import forms
from tests.kernel_ops.accuracy import assert_as_good
from tests.kernel_ops.compare import outputs_and_gradients
from tests.kernel_ops.gaps import memory_is_no_number

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# T, V, K, dtype, options: words that fill no vector and no block of 4096, chunks that leave a rest.
CASES = [
    (60, 50, 64, BF16, {}),
    (130, 131, 130, FP32, {"chunk_rows": 50}),
    (60, 131, 64, BF16, {"chunk_rows": 7, "scale": 0.25, "softcap": 3.0}),
    (60, 5001, 130, FP32, {"scale": 0.5}),
    (60, 4098, 16, BF16, {"softcap": 2.0}),
    (60, 96, 130, FP16, {"scale": 0.5}),
]


@pytest.fixture(params=forms.ALL, autouse=True)
def _form(request):
    with forms.computed_by(request.param):
        yield


def inputs(t, v, k, dtype, trained_head=True, bias=True):
    """Returns h, weight and bias, and labels of which a third is ignored and one is the last word."""
    h = torch.randn(t, k).to(dtype).requires_grad_()
    weight = (2 * torch.randn(v, k) / k**0.5).to(dtype).requires_grad_(trained_head)
    labels = torch.randint(v, (t,))
    labels[1::3] = -100
    labels[0] = v - 1
    return h, weight, torch.randn(v).to(dtype).requires_grad_(trained_head) if bias else None, labels


def loss_function(function, labels, options):
    return lambda h, weight, bias: function(h, weight, labels, bias=bias, **options)


def assert_like_the_twin(tensors, labels, options, upstream=0.3):
    op = loss_function(lora_kernels.linear_cross_entropy, labels, options)
    options = {name: option for name, option in options.items() if name != "chunk_rows"}
    twin = loss_function(reference.linear_cross_entropy, labels, options)
    dloss = [torch.tensor(upstream), None]
    found = outputs_and_gradients(op, tensors, dloss)
    plain = outputs_and_gradients(twin, tensors, dloss)
    exact = outputs_and_gradients(twin, tensors, dloss, torch.float64)
    # One number may be nearly right by chance, so the sum is held against its terms.
    assert torch.equal(found[0], found[1].sum())
    for three in list(zip(found, plain, exact, strict=True))[1:]:
        assert_as_good(*three)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case):
    *shape, dtype, options = case
    *tensors, labels = inputs(*shape, dtype, bias="softcap" not in options)
    assert_like_the_twin(tensors, labels, options)


def test_nothing_is_read_that_was_not_written():
    h, weight, bias, labels = inputs(130, 100, 64, BF16)
    op, upstream = loss_function(lora_kernels.linear_cross_entropy, labels, {}), [torch.tensor(0.3), None]
    wanted = outputs_and_gradients(op, (h, weight, bias), upstream)
    with memory_is_no_number():
        found = outputs_and_gradients(op, (h, weight, bias), upstream)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_changes_nothing_inside():
    *tensors, labels = inputs(7, 130, 16, FP32)
    op, upstream = loss_function(lora_kernels.linear_cross_entropy, labels, {}), [torch.tensor(0.3), None]
    plain = outputs_and_gradients(op, tensors, upstream)
    with torch.autocast(labels.device.type, BF16):
        inside = outputs_and_gradients(op, tensors, upstream)
    assert all(torch.equal(one, other) for one, other in zip(inside, plain, strict=True))


@pytest.mark.parametrize("needed", ["h", "weight", "bias"])
def test_each_gradient_alone(needed):
    h, weight, bias, labels = inputs(7, 50, 64, BF16)
    tensors = [x if name == needed else x.detach() for name, x in (("h", h), ("weight", weight), ("bias", bias))]
    assert_like_the_twin(tensors, labels, {})


@pytest.mark.parametrize("tokens", [1, 30])
def test_it_is_torchs_cross_entropy(tokens):
    h, weight, bias, labels = inputs(tokens, 130, 40, FP32)
    logits = torch.nn.functional.linear(h, weight, bias)
    wanted = torch.nn.functional.cross_entropy(logits, labels)
    loss, nll = lora_kernels.linear_cross_entropy(h, weight, labels, bias=bias)
    mean = loss / (labels != -100).sum()
    torch.testing.assert_close(mean, wanted)
    torch.testing.assert_close(nll, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    for found, gradient in zip(
        torch.autograd.grad(mean, (h, weight, bias)), torch.autograd.grad(wanted, (h, weight, bias)), strict=True
    ):
        torch.testing.assert_close(found, gradient)


def test_a_soft_cap_is_exact_to_float32_from_either_end():
    h, weight, bias, labels = inputs(12, 130, 40, FP32)
    for softcap in (0.3, 4.0, 50.0):
        results = []
        for function in (lora_kernels.linear_cross_entropy, reference.linear_cross_entropy):
            loss, nll = function(h, weight, labels, bias=bias, softcap=softcap)
            results.append([nll, *torch.autograd.grad(loss, (h, weight, bias))])
        torch.testing.assert_close(*results)


def test_no_labels_are_no_loss_and_no_gradient():
    h, weight, bias, labels = inputs(7, 50, 64, BF16)
    loss, nll = lora_kernels.linear_cross_entropy(h, weight, torch.full_like(labels, -100), bias=bias)
    assert loss == 0.0
    assert torch.equal(nll, torch.zeros(7))
    for gradient in torch.autograd.grad(loss, (h, weight, bias)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_another_label_may_be_the_one_ignored():
    h, weight, bias, labels = inputs(7, 50, 64, FP32)
    marked = labels.where(labels != -100, 3)
    marked[0] = 3
    wanted = lora_kernels.linear_cross_entropy(h, weight, marked.where(marked != 3, -100), bias=bias)
    found = lora_kernels.linear_cross_entropy(h, weight, marked, bias=bias, ignore=3)
    assert torch.equal(found[1], wanted[1])
    assert found[1][0] == 0.0


def test_a_chunk_at_a_time_is_the_same_as_all_at_once():
    h, weight, bias, labels = inputs(12, 131, 64, FP32)
    results = []
    for rows in (1, 7, None):
        loss, nll = lora_kernels.linear_cross_entropy(h, weight, labels, bias=bias, chunk_rows=rows)
        results.append([nll, *torch.autograd.grad(loss, (h, weight, bias))])
    for one, seven, all_rows in zip(*results, strict=True):
        torch.testing.assert_close(one, all_rows)
        torch.testing.assert_close(seven, all_rows)


def test_logits_are_computed_for_labelled_rows_alone_and_never_all_at_once():
    h, weight, _, labels = inputs(30, 131, 64, FP32, bias=False)
    chunks = []

    def noted(rows_CP, *rest):
        chunks.append(len(rows_CP))
        return real(rows_CP, *rest)

    real = cross_entropy._differentiate_logits
    with mock.patch.object(cross_entropy, "_differentiate_logits", noted):
        lora_kernels.linear_cross_entropy(h, weight, labels, chunk_rows=8)
        assert chunks == [8, 8, 4]
        chunks.clear()
        with mock.patch.object(cross_entropy, "FEWEST_ROWS", 2):
            lora_kernels.linear_cross_entropy(h, weight, labels)
    # 20 labelled rows of 64 columns are as large as 10 rows of 131 logits.
    assert chunks == [10, 10]


def test_nothing_is_differentiated_where_no_gradient_is_needed():
    h, weight, bias, labels = inputs(7, 50, 64, FP32)
    wanted = lora_kernels.linear_cross_entropy(h, weight, labels, bias=bias)
    with torch.no_grad(), mock.patch.object(cross_entropy, "matmul_float32", side_effect=AssertionError):
        found = lora_kernels.linear_cross_entropy(h, weight, labels, bias=bias)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert not wanted[1].requires_grad


def test_the_backward_pass_may_run_twice():
    h, weight, bias, labels = inputs(7, 50, 64, BF16)
    loss, _ = lora_kernels.linear_cross_entropy(h, weight, labels, bias=bias)
    first = torch.autograd.grad(2.0 * loss, h, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(2.0 * loss, h)[0])


def test_any_layout_and_leading_dimensions():
    h = torch.randn(15, 2, 128).bfloat16().transpose(0, 1)[..., ::2].requires_grad_()
    _, weight, _, _ = inputs(1, 50, 64, BF16)
    weight = weight.detach().t().contiguous().t().requires_grad_()
    labels = torch.randint(50, (15, 2)).t()
    labels[0, 3] = -100
    assert_like_the_twin([h, weight, None], labels, {"chunk_rows": 20})


def test_masked_and_huge_logits():
    h, weight, bias, labels = inputs(7, 5001, 16, FP32)
    bias = bias.detach()
    bias[:4500] = float("-inf")
    bias[4600] = 1e30
    labels[labels != -100] = 4600
    loss, nll = lora_kernels.linear_cross_entropy(h, weight, labels, bias=bias)
    assert torch.equal(nll, torch.zeros(7))
    (dh,) = torch.autograd.grad(loss, h)
    assert torch.equal(dh, torch.zeros_like(dh))


def test_the_operator_keeps_the_rules_of_torch_library():
    op = torch.ops.lora_kernels.linear_cross_entropy.default
    h, weight, bias, labels = inputs(5, 33, 16, FP32)
    torch.library.opcheck(op, (h, weight, bias, labels, 0.5, 2.0, -100, 2, True, True, True))
    frozen = (h, weight.detach(), None, labels, 1.0, 0.0, -100, None, True, False, False)
    torch.library.opcheck(op, frozen, test_utils=("test_schema", "test_faketensor"))


def test_the_kernel_is_not_moved_by_what_lies_behind_the_last_word():
    from lora_kernels.gpu.cross_entropy import differentiate_logits

    rows, labels = torch.full((3, 144), float("nan")), torch.tensor([0, 64, 129])
    rows[:, :130] = torch.randn(3, 130)
    logits = rows[:, :130].clone().requires_grad_()
    nll = differentiate_logits(rows, 130, labels, 1.0, 0.0, True)
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(nll, wanted.detach())
    torch.testing.assert_close(rows[:, :130], torch.autograd.grad(wanted.sum(), logits)[0])
    rows[:, :130] = logits.detach()
    before = rows.clone()
    assert torch.equal(nll, differentiate_logits(rows, 130, labels, 1.0, 0.0, False))
    assert torch.equal(rows[:, :130], before[:, :130])


def test_the_twin_has_the_gradients_of_what_it_computes():
    *tensors, labels = inputs(4, 5, 3, FP32)
    tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    options = {"scale": 0.7, "softcap": 2.0}
    assert torch.autograd.gradcheck(
        lambda *three: loss_function(reference.linear_cross_entropy, labels, options)(*three)[0], tensors
    )


def test_in_16_bits_a_cpu_meets_few_shapes(monkeypatch):
    """How many tokens are labelled is another number every time, and each new shape of a product is compiled."""
    if backend.is_triton(torch.empty(0)):
        pytest.skip("shapes are no matter to the kernels")
    monkeypatch.setattr(backend, "_cpu_multiplies", lambda dtype: True)
    shapes = set()
    for labelled in range(33, 65):
        h, weight, bias, _ = inputs(labelled, 50, 64, BF16, trained_head=True)

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if "mm" in str(function):
                    shapes.update(tuple(x.shape) for x in args if isinstance(x, torch.Tensor) and x.ndim == 2)
                return function(*args, **(kwargs or {}))

        options = (1.0, 0.0, -100, None, True, True, True)
        with Watch(), torch.no_grad():
            cross_entropy._linear_cross_entropy._function(h, weight, bias, torch.zeros(labelled).long(), *options)
    assert shapes == {(64, 64), (64, 50), (50, 64)}

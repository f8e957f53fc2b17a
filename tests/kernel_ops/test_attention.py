"""Attention of examples that share a row, against its twin, which masks the whole row."""

import functools
from itertools import pairwise

import pytest
import torch

import lora_kernels
from lora_kernels import attention, backend, reference
from tests.kernel_ops import forms
from tests.kernel_ops.compare import assert_like_its_twin

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Heads of queries and of keys, width, examples, dtype, options: one token, a block more and less, grouped heads or not.
CASES = [
    (3, 1, 8, [1], FP32, {}),
    (4, 2, 16, [1, 7, 63, 1], BF16, {}),
    (9, 3, 64, [127, 130, 128], BF16, {}),
    (2, 2, 20, [300, 5], FP32, {"scale": 0.31}),
    (4, 1, 16, [150, 260], FP32, {"window": 9}),
    (4, 2, 16, [40, 300], BF16, {"window": 128}),
    (4, 2, 16, [5, 40], BF16, {"window": 40}),
    (4, 2, 16, [5, 200], FP32, {"softcap": 2.0}),
    (6, 2, 12, [131, 30], FP16, {"softcap": 1.5, "window": 50}),
]


@pytest.fixture(params=forms.ON_CPU, autouse=True)
def _form(request):
    with forms.computed_by(request.param):
        yield


def inputs(heads, key_heads, width, lengths, dtype):
    """Returns q, k and v as the projections leave them, heads inside tokens."""
    tokens = sum(lengths)
    return [
        torch.randn(tokens, n, width).to(dtype).transpose(0, 1).requires_grad_() for n in (heads, key_heads, key_heads)
    ]


def bounds_of(lengths):
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case):
    heads, key_heads, width, lengths, dtype, options = case
    options = {"bounds": bounds_of(lengths), "scale": width**-0.5, **options}
    op, twin = (functools.partial(f, **options) for f in (lora_kernels.packed_attention, reference.packed_attention))
    assert_like_its_twin(op, twin, inputs(heads, key_heads, width, lengths, dtype))


def test_products_wider_than_the_numbers(monkeypatch):
    """Of a processor without instructions for 16 bits."""
    monkeypatch.setattr(backend, "_cpu_multiplies", lambda dtype: False)
    op, twin = (
        functools.partial(f, bounds=[0, 20, 150], scale=0.25)
        for f in (lora_kernels.packed_attention, reference.packed_attention)
    )
    assert_like_its_twin(op, twin, inputs(4, 2, 16, [20, 130], BF16))


def test_gradients_of_keys_that_several_blocks_see_are_the_same_with_any_number_of_threads():
    q, k, v = inputs(4, 2, 32, [700, 300], BF16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = lora_kernels.packed_attention(q, k, v, [0, 700, 1000], scale=0.25, window=100)
            found.append(torch.autograd.grad(out.sum(), (q, k, v)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_blocks_that_are_differentiated_together_are_of_different_examples():
    ends = [0, 700, 1000]
    batches = attention._alike(ends, 100, torch.empty(4, 1000, 16))
    for batch in batches:
        assert len({queries.start < 700 for queries, _ in batch}) == len(batch)
    assert sum(map(len, batches)) == len(list(attention._blocks(ends, 100, FP32)))


@pytest.mark.parametrize("lengths", [[20, 30, 10], [200, 150], [20, 120, 10]], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_an_example_is_computed_as_if_alone(lengths, dtype):
    q, k, v = inputs(4, 2, 16, lengths, dtype)
    ends = bounds_of(lengths)
    whole = lora_kernels.packed_attention(q, k, v, ends, scale=0.25)
    upstream = torch.randn_like(whole)
    gradients = torch.autograd.grad(whole, (q, k, v), upstream)
    for a, b in pairwise(ends):
        parts = [x[:, a:b].detach().requires_grad_() for x in (q, k, v)]
        alone = lora_kernels.packed_attention(*parts, [0, b - a], scale=0.25)
        assert torch.equal(alone, whole[:, a:b])
        for one, all_of_them in zip(torch.autograd.grad(alone, parts, upstream[:, a:b]), gradients, strict=True):
            assert torch.equal(one, all_of_them[:, a:b])


def test_gradients_of_stride_zero():
    lengths = [7, 20]
    op = functools.partial(lora_kernels.packed_attention, bounds=bounds_of(lengths), scale=0.25)
    twin = functools.partial(reference.packed_attention, bounds=bounds_of(lengths), scale=0.25)
    assert_like_its_twin(op, twin, inputs(4, 2, 16, lengths, BF16), [torch.randn(()).expand(4, 27, 16)])


@pytest.mark.parametrize("bounds", [[0, 5], [1, 9], [0, 4, 4, 9], [0, 6, 3, 9], [0, 10]], ids=str)
def test_bounds_that_are_none(bounds):
    with pytest.raises(ValueError, match=r"bounds must go up from 0 to 9, the tokens; got \["):
        lora_kernels.packed_attention(*inputs(2, 1, 8, [9], FP32), bounds, scale=1.0)


def test_the_operator_keeps_the_rules_of_torch_library():
    for options in ((0.25, 0, 0.0), (0.25, 4, 2.0)):
        arguments = (*inputs(4, 2, 8, [5, 9], FP32), [0, 5, 14], *options)
        torch.library.opcheck(torch.ops.lora_kernels.packed_attention.default, arguments)


def test_results_lie_in_memory_alike_however_the_inputs_do():
    given = [x.detach() for x in inputs(4, 2, 8, [5, 9], FP32)]
    for q, k, v in (given, [x.contiguous() for x in given]):
        out = attention._packed_attention._function(q, k, v, [0, 5, 14], 0.25, 0, 0.0)
        found = [out, *attention._packed_attention_backward._function(out, q, k, v, [0, 5, 14], 0.25, 0, 0.0)]
        assert [x.stride() for x in found] == [(8, 32, 1), (8, 32, 1), (8, 16, 1), (8, 16, 1)]


@pytest.mark.parametrize("softcap", [0.0, 1.0])
def test_no_more_memory_than_a_block_needs(softcap):
    """Not one tensor as large as the scores of the longest example is made."""
    sizes, whole = [], 2 * 1000 * 1000

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    q, k, v = (x.detach() for x in inputs(2, 1, 8, [1000, 24], FP32))
    with Watch():
        out = attention._packed_attention._function(q, k, v, [0, 1000, 1024], 0.25, 0, softcap)
        attention._packed_attention_backward._function(out, q, k, v, [0, 1000, 1024], 0.25, 0, softcap)
    assert max(sizes) <= 2 * attention.BLOCK * 1000 < whole


def test_the_twin_has_the_gradients_of_what_it_computes():
    q, k, v = (x.detach().double().requires_grad_() for x in inputs(2, 1, 3, [2, 4], FP32))
    twin = functools.partial(reference.packed_attention, bounds=[0, 2, 6], scale=0.4, window=2, softcap=1.5)
    assert torch.autograd.gradcheck(twin, (q, k, v))

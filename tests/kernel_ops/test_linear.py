"""A frozen layer and its adapter in one operation, every way: against float64, and as good as plain torch."""

import bitsandbytes.functional as bnb
import pytest
import torch

import lora_kernels
from lora_kernels import Frozen, backend, linear, reference
from tests.kernel_ops.accuracy import assert_as_good
from tests.kernel_ops.gaps import rows_apart

WAYS = ["cpu", "dequant", "gemm_4bit", "triton", "triton_4bit"]
BY_EVERY_WAY = pytest.mark.parametrize("way", WAYS)
CASES = [
    # Rows, outputs, inputs, rank, dtype, dropout, nested: off the tiles, and over them.
    (1, 300, 64, 16, torch.bfloat16, 0.0, True),  # scales in two groups
    (7, 33, 128, 4, torch.float32, 0.3, True),
    (63, 130, 64, 1, torch.float16, 0.0, False),
    (130, 70, 64, 8, torch.bfloat16, 0.3, True),
    (20, 64, 192, 40, torch.bfloat16, 0.0, False),
    (130, 32, 64, 64, torch.float16, 0.3, False),
    (40, 65, 64, 128, torch.float32, 0.0, True),
    (7, 64, 64, 256, torch.bfloat16, 0.3, True),
]
OFF_THE_BLOCK = [
    # Blocks cross rows, so that kernels which read packed weights leave them to others.
    (7, 66, 65, 4, torch.bfloat16, 0.0, True),
    (63, 113, 130, 8, torch.float32, 0.3, False),  # errors of a gradient of few numbers go by chance
]


pytestmark = pytest.mark.usefixtures("by_its_way")


def quantized(outputs, inputs, nested=True, **options):
    """Returns a random weight in 4 bits, and the same in float64."""
    dense = torch.randn(outputs, inputs) / inputs**0.5
    packed, state = bnb.quantize_4bit(dense, **({"quant_type": "nf4", "compress_statistics": nested} | options))
    return Frozen.of(packed, state), bnb.dequantize_4bit(packed, state).double()


def an_adapter(outputs, inputs, rank):
    """Returns float32 a and b, of which the product is about as large as the weight."""
    return torch.randn(rank, inputs) / inputs**0.5, torch.randn(outputs, rank) / rank**0.5


def assert_right(x, weight, w, bias, a, b, *, dropout=0.0, dy=None, scaling=0.7):
    """`lora_linear` and its four gradients are as near to float64 as plain torch is, which rounds after each step."""
    keep = lora_kernels.keep_mask(x, dropout, 9) if dropout else None
    dy = rows_apart(len(x), len(w), x.dtype) if dy is None else dy

    def run(function, leaves, dy):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))

    def fused(x, a, b, *bias):
        options = {"scaling": scaling, "dropout": dropout, "seed": 9}
        return lora_kernels.lora_linear(x, weight, *(bias or [None]), a, b, **options)

    def plain(x, a, b, *bias):
        a, b, bias = a.to(x.dtype), b.to(x.dtype), [part.to(x.dtype) for part in bias]
        return reference.lora_linear(x, w.to(x.dtype), *(bias or [None]), a, b, scaling, dropout, keep)

    leaves = [x, a, b] if bias is None else [x, a, b, bias]
    closed = [leaf.contiguous() for leaf in leaves]
    found, eager = run(fused, leaves, dy), run(plain, closed, dy.contiguous())
    exact = run(plain, [leaf.double() for leaf in leaves], dy)
    assert found[0].dtype == x.dtype
    for one, other, true, leaf in zip(found[1:], eager[1:], exact[1:], leaves, strict=True):
        assert one.dtype == leaf.dtype
        assert_as_good(one, other, true)
    assert_as_good(found[0], eager[0], exact[0])


@BY_EVERY_WAY
@pytest.mark.parametrize(("rows", "outputs", "inputs", "rank", "dtype", "dropout", "nested"), CASES)
def test_output_and_gradients(rows, outputs, inputs, rank, dtype, dropout, nested, way):
    weight, w = quantized(outputs, inputs, nested)
    bias = torch.randn(outputs) if nested else None
    x = rows_apart(rows, inputs, dtype)
    assert_right(x, weight, w, bias, *an_adapter(outputs, inputs, rank), dropout=dropout)


@pytest.mark.parametrize("way", ["cpu", "gemm_4bit", "triton", "triton_4bit"])
@pytest.mark.parametrize(("rows", "outputs", "inputs", "rank", "dtype", "dropout", "nested"), OFF_THE_BLOCK)
def test_blocks_that_cross_rows(rows, outputs, inputs, rank, dtype, dropout, nested, way):
    weight, w = quantized(outputs, inputs, nested)
    x = rows_apart(rows, inputs, dtype)
    assert_right(x, weight, w, torch.randn(outputs), *an_adapter(outputs, inputs, rank), dropout=dropout)


@BY_EVERY_WAY
@pytest.mark.parametrize(("kind", "blocksize"), [("fp4", 64), ("nf4", 32), ("nf4", 128), ("fp4", 4096)])
def test_any_code_and_block(kind, blocksize, way):
    weight, w = quantized(64, 128, quant_type=kind, blocksize=blocksize)
    assert_right(torch.randn(7, 128).bfloat16(), weight, w, None, *an_adapter(64, 128, 4))


@pytest.mark.parametrize("way", ["cpu", "dequant", "triton", "triton_4bit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dense_weight_either_way_round(dtype, way):
    """Conv1D of GPT-2 keeps its weight as [K, N]."""
    w = (torch.randn(33, 65) / 8).to(dtype)
    a, b = an_adapter(33, 65, 4)
    assert_right(rows_apart(7, 65, dtype), Frozen.of(w), w.double(), torch.randn(33), a, b, dropout=0.3)
    turned = Frozen.of(w.t().contiguous().t())
    assert turned.data.stride() == (1, 33)
    assert_right(rows_apart(7, 65, dtype), turned, w.double(), None, a, b)


@pytest.mark.parametrize("way", ["cpu", "triton"])
def test_a_weight_of_another_dtype(way):
    w = torch.randn(33, 64) / 8
    assert_right(torch.randn(7, 64).bfloat16(), Frozen.of(w), w.double(), None, *an_adapter(33, 64, 4))


@BY_EVERY_WAY
def test_gradients_of_sums_have_no_strides(way):
    weight, w = quantized(33, 64)
    dy = torch.ones(()).bfloat16().expand(7, 33)
    assert_right(torch.randn(7, 64).bfloat16(), weight, w, torch.randn(33), *an_adapter(33, 64, 4), dy=dy)


@BY_EVERY_WAY
def test_columns_may_stand_apart(way):
    weight, w = quantized(33, 64)
    a, b = an_adapter(33, 64, 4)
    wide, bias = torch.randn(64, 7).bfloat16().t(), torch.randn(33, 2)[:, 1]
    assert_right(wide, weight, w, bias, a.t().contiguous().t(), b.t().contiguous().t(), dy=torch.randn(33, 7).t())


@pytest.mark.parametrize("way", ["cpu", "dequant", "triton_4bit"])
def test_leading_dimensions_and_no_rows_at_all(way):
    weight, w = quantized(33, 64)
    a, b = an_adapter(33, 64, 4)
    x = torch.randn(2, 5, 3, 64)
    y = lora_kernels.lora_linear(x[:, 1:], weight, None, a, b, scaling=1.0)
    torch.testing.assert_close(y, x[:, 1:] @ w.float().t() + x[:, 1:] @ a.t() @ b.t())
    empty = torch.randn(0, 64, requires_grad=True)
    a.requires_grad_()
    y = lora_kernels.lora_linear(empty, weight, torch.ones(33), a, b, scaling=1.0, dropout=0.5)
    y.sum().backward()
    assert y.shape == (0, 33)
    assert empty.grad.shape == (0, 64)
    assert a.grad.eq(0).all()


@pytest.mark.parametrize("way", ["cpu", "dequant", "triton"])
def test_an_input_without_gradient_costs_no_product(way, monkeypatch):
    weight, w = quantized(33, 64)
    a, b = (part.requires_grad_() for part in an_adapter(33, 64, 4))
    x = torch.randn(7, 64)
    y = lora_kernels.lora_linear(x, weight, None, a, b, scaling=1.0)

    def never(*_):
        raise AssertionError("the weight was asked for")

    monkeypatch.setattr(linear, "dense", never)
    monkeypatch.setattr(linear, "dense_slabs", never)
    da, db = torch.autograd.grad(y.sum(), (a, b))
    torch.testing.assert_close(da, b.sum(0)[:, None] * x.sum(0))
    torch.testing.assert_close(db, (x @ a.t()).sum(0).expand(33, 4))


@pytest.mark.parametrize("way", ["cpu", "dequant", "triton"])
def test_neither_weight_nor_mask_is_kept(way):
    weight, _ = quantized(128, 64)
    a, b = (part.requires_grad_() for part in an_adapter(128, 64, 4))
    given = {part.data_ptr() for part in weight.flat() if isinstance(part, torch.Tensor)}
    kept = []
    x = torch.randn(32, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_kernels.lora_linear(x, weight, None, a, b, scaling=1.0, dropout=0.5)
    given |= {part.data_ptr() for part in (x, a, b)}
    assert sum(t.numel() for t in kept if t.data_ptr() not in given) == 32 * 4


def test_a_weight_in_several_slabs(monkeypatch):
    monkeypatch.setattr("lora_kernels.slabs.SLAB", 4000)
    for outputs, inputs, nested in [(70, 64, True), (70, 66, False), (130, 34, True)]:
        weight, w = quantized(outputs, inputs, nested)
        parts = list(linear.dense_slabs(weight, torch.float32))
        assert len(parts) > 1
        assert torch.equal(torch.cat([part for _, part in parts]).double(), w)
        assert_right(torch.randn(7, inputs), weight, w, torch.randn(outputs), *an_adapter(outputs, inputs, 4))
    dense = (torch.randn(33, 65) / 8).bfloat16()
    assert len(list(linear.dense_slabs(Frozen.of(dense), torch.float32))) == 3
    assert_right(torch.randn(7, 65), Frozen.of(dense), dense.double(), None, *an_adapter(33, 65, 4))


@pytest.mark.parametrize("way", ["cpu", "dequant"])
def test_autocast_changes_nothing_inside(way):
    weight, _ = quantized(33, 64)
    a, b = (part.requires_grad_() for part in an_adapter(33, 64, 4))
    x = torch.randn(7, 64, requires_grad=True)

    def run():
        y = lora_kernels.lora_linear(x, weight, None, a, b, scaling=0.7)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, a, b))

    plain = run()
    with torch.autocast(x.device.type, torch.bfloat16):
        inside = run()
    for one, other in zip(inside, plain, strict=True):
        assert torch.equal(one, other)


def test_a_second_gradient_is_refused():
    weight, _ = quantized(33, 64)
    a, b = an_adapter(33, 64, 4)
    y = lora_kernels.lora_linear(torch.randn(7, 64, requires_grad=True), weight, None, a, b, scaling=1.0)
    with pytest.raises(NotImplementedError, match="lora_linear_backward has no gradient"):
        y.sum().backward(create_graph=True)


def test_a_graph_is_compiled_around_it():
    weight, _ = quantized(33, 64)
    a, b = an_adapter(33, 64, 4)

    def layer(x):
        return lora_kernels.lora_linear(x, weight, None, a, b, scaling=1.0).relu()

    x = torch.randn(7, 64, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).sum(), x)
    found = torch.autograd.grad(torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum(), x)
    assert torch.equal(found[0], wanted[0])


@pytest.mark.parametrize("way", ["cpu", "dequant"])
def test_operators_keep_the_rules_of_torch_library(way):
    ops = torch.ops.lora_kernels
    weight, _ = quantized(33, 64)
    a, b = (part.requires_grad_() for part in an_adapter(33, 64, 4))
    x = torch.randn(7, 64, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(33, requires_grad=True)
    torch.library.opcheck(ops.lora_linear.default, (x, *weight.flat(), bias, a, b, 0.5, 0.5, 3))
    xa = torch.randn(7, 4, dtype=backend.product_dtype(x))
    need_dx = way == "dequant"
    arguments = (torch.randn(7, 33).bfloat16(), x, *weight.flat(), a, b, xa, 0.5, 0.5, 3, need_dx)
    arguments = [part.detach() if isinstance(part, torch.Tensor) else part for part in arguments]
    torch.library.opcheck(ops.lora_linear_backward.default, arguments)


def test_the_twin_differentiates():
    sizes = ((5, 6), (4,), (3, 6), (4, 3))
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    w, keep = torch.randn(4, 6, dtype=torch.float64), torch.rand(5, 6) > 0.5
    assert torch.autograd.gradcheck(
        lambda x, bias, a, b: reference.lora_linear(x, w, bias, a, b, 0.7, 0.5, keep), leaves
    )

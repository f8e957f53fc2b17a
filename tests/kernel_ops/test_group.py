"""Layers that share an input, in one operation: as near to float64 as plain torch is, by every way."""

import bitsandbytes.functional as bnb
import pytest
import torch

import lora_kernels
from lora_kernels import Frozen, Projection, dispatch, group, lora, reference
from tests.kernel_ops.accuracy import assert_as_good, error
from tests.kernel_ops.gaps import memory_is_no_number, rows_apart

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WAYS = ["cpu", "dequant", "gemm_4bit", "triton", "triton_4bit"]
BY_EVERY_WAY = pytest.mark.parametrize("way", WAYS)
BY_BOTH_FORMS = pytest.mark.parametrize("way", ["cpu", "dequant"])
CASES = [
    # Rows, outputs, inputs, ranks, dtype, dropout: off the tiles, and outputs few and many for the inputs, so that
    # the gradient of x is one product, and one of each weight.
    (1, (33,), 64, (16,), BF16, 0.0),
    (7, (48, 16, 17), 64, (4, 8, 1), FP32, 0.0),
    (63, (48, 16, 17), 64, (4, 8, 1), BF16, 0.3),
    (20, (33,), 64, (16,), BF16, 0.0),
    (130, (130, 65), 64, (8, 40), FP16, 0.0),
    (20, (64, 32, 32), 192, (64, 64, 64), BF16, 0.0),
    (7, (130, 70), 64, (1, 1), FP32, 0.3),
]


pytestmark = pytest.mark.usefixtures("by_its_way")


class Case:
    """Layers that share an input, packed or dense, the same in float64, and what to differentiate."""

    def __init__(self, outputs, inputs, ranks, packed=True, biased=True):
        self.inputs, self.ranks = inputs, ranks
        self.weights, self.w = [], []
        for n in outputs:
            dense = torch.randn(n, inputs) / inputs**0.5
            if packed:
                found = bnb.quantize_4bit(dense, quant_type="nf4", compress_statistics=n % 2 == 0)
                self.weights.append(Frozen.of(*found))
                self.w.append(bnb.dequantize_4bit(*found).double())
            else:
                self.weights.append(Frozen.of(dense.bfloat16()))
                self.w.append(dense.bfloat16().double())
        self.a = [torch.randn(r, inputs) / inputs**0.5 for r in ranks]
        self.b = [torch.randn(n, r) / r**0.5 for n, r in zip(outputs, ranks, strict=True)]
        self.bias = [torch.randn(n) if biased and i != 1 else None for i, n in enumerate(outputs)]
        self.scaling = [0.7 - 0.2 * i for i in range(len(outputs))]

    def projections(self, b, bias):
        return [Projection(*parts) for parts in zip(self.weights, bias, b, self.scaling, strict=True)]

    def layers(self, b, bias, dtype):
        return [(w.to(dtype), *rest) for w, *rest in zip(self.w, bias, b, self.scaling, strict=True)]

    def leaves(self, x):
        return [x, *self.a, *self.b, *(one for one in self.bias if one is not None)]

    def parted(self, leaves):
        """Returns x, every a, every b, every bias."""
        n = len(self.w)
        rest = iter(leaves[1 + 2 * n :])
        bias = [None if one is None else next(rest) for one in self.bias]
        return leaves[0], leaves[1 : 1 + n], leaves[1 + n : 1 + 2 * n], bias

    def judged(self, gradients):
        """Returns them with those of every a as one: how a rank of one column is rounded is a matter of luck."""
        n = len(self.w)
        return [gradients[0], torch.cat(gradients[1 : 1 + n]), *gradients[1 + n :]]

    def assert_right(self, x, *, dropout=0.0, dys=None, brought=False):
        """Outputs and every gradient are as near to float64 as plain torch's, which rounds after each step.

        `brought`: x comes with x @ a.T behind it, made by an operation of its own.
        """
        keep = lora_kernels.keep_mask(x, dropout, 9) if dropout else None
        if dys is None:
            dys = [rows_apart(len(x), len(w), x.dtype) for w in self.w]

        def run(function, as_given=torch.Tensor.contiguous):
            leaves = [as_given(leaf).detach().requires_grad_() for leaf in self.leaves(x)]
            ys = function(*self.parted(leaves))
            gradients = torch.autograd.grad(ys, leaves, [as_given(dy) for dy in dys])
            return [y.detach() for y in ys], gradients, leaves

        def grouped(x, a, b, bias):
            a = lora_kernels.stacked(a)
            if brought:
                x, a = torch.cat([x, x @ a.t().to(x.dtype)], dim=1), None
            return lora_kernels.lora_group(x, a, self.projections(b, bias), dropout=dropout, seed=9)

        def plain(x, a, b, bias):
            a, b = [one.to(x.dtype) for one in a], [one.to(x.dtype) for one in b]
            bias = [None if one is None else one.to(x.dtype) for one in bias]
            # Where x @ a.T is brought it is the same product for both: of two columns alone it would be summed
            # otherwise.
            a = lora_kernels.stacked(a) if brought else torch.cat(a)
            return reference.lora_group(x, a, self.layers(b, bias, x.dtype), dropout, keep)

        found, eager, exact = run(grouped, lambda leaf: leaf), run(plain), run(plain, torch.Tensor.double)
        for one, other, true in zip(found[0], eager[0], exact[0], strict=True):
            assert_as_good(one, other, true)
        for one, leaf in zip(found[1], found[2], strict=True):
            assert one.dtype == leaf.dtype
        for three in zip(*(self.judged(gradients) for gradients in (found[1], eager[1], exact[1])), strict=True):
            assert_as_good(*three)


@BY_EVERY_WAY
@pytest.mark.parametrize(("rows", "outputs", "inputs", "ranks", "dtype", "dropout"), CASES)
def test_outputs_and_gradients(rows, outputs, inputs, ranks, dtype, dropout, way):
    Case(outputs, inputs, ranks).assert_right(rows_apart(rows, inputs, dtype), dropout=dropout)


@BY_EVERY_WAY
@pytest.mark.parametrize(("rows", "outputs", "inputs", "ranks", "dtype", "dropout"), CASES)
def test_with_the_low_rank_image_behind_the_input(rows, outputs, inputs, ranks, dtype, dropout, way):
    Case(outputs, inputs, ranks).assert_right(rows_apart(rows, inputs, dtype), brought=True)


@pytest.mark.parametrize("way", ["cpu", "dequant", "triton"])
@pytest.mark.parametrize("brought", [False, True])
def test_dense_weights(way, brought):
    case = Case((48, 16, 17), 64, (4, 8, 1), packed=False)
    case.assert_right(rows_apart(63, 64, BF16), brought=brought)
    case.assert_right(rows_apart(7, 64, FP32), brought=brought)


@BY_BOTH_FORMS
def test_packed_beside_dense(way):
    case, dense = Case((48, 17), 64, (4, 8)), Case((48, 17), 64, (4, 8), packed=False)
    case.weights[1], case.w[1] = dense.weights[1], dense.w[1]
    case.assert_right(rows_apart(63, 64, BF16), brought=True)


@BY_BOTH_FORMS
def test_blocks_that_cross_rows(way):
    Case((66, 17), 65, (4, 8)).assert_right(rows_apart(7, 65, BF16))


@BY_EVERY_WAY
def test_gradients_of_sums_have_no_strides(way):
    dys = [torch.ones(()).bfloat16().expand(7, n) for n in (48, 17)]
    case = Case((48, 17), 64, (4, 8))
    case.assert_right(torch.randn(7, 64).bfloat16(), dys=dys)
    case.assert_right(torch.randn(7, 64).bfloat16(), dys=dys, brought=True)


@BY_BOTH_FORMS
def test_columns_may_stand_apart(way):
    case = Case((48, 17), 64, (4, 8))
    case.a = [one.t().contiguous().t() for one in case.a]
    case.b = [one.t().contiguous().t() for one in case.b]
    case.bias = [torch.randn(48, 2)[:, 1], None]
    case.assert_right(torch.randn(64, 7).bfloat16().t(), dys=[torch.randn(n, 7).bfloat16().t() for n in (48, 17)])


@BY_BOTH_FORMS
def test_it_is_what_a_layer_at_a_time_computes(way):
    """In float32, and with the mask of dropout that one seed gives."""
    case = Case((48, 16, 17), 64, (4, 8, 1))
    a, b = [[one.requires_grad_() for one in part] for part in (case.a, case.b)]
    x = torch.randn(2, 5, 64, requires_grad=True)
    options = {"dropout": 0.4, "seed": 3}
    ys = lora_kernels.lora_group(x, lora_kernels.stacked(a), case.projections(b, case.bias), **options)
    layers = zip(case.weights, case.bias, a, b, case.scaling, strict=True)
    apart = [lora_kernels.lora_linear(x, *layer, scaling=scaling, **options) for *layer, scaling in layers]
    dys = [torch.randn_like(y) for y in ys]
    found, wanted = (torch.autograd.grad(each, [x, *a, *b], dys) for each in (ys, apart))
    for one, other in zip([*ys, *found], [*apart, *wanted], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@BY_BOTH_FORMS
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_no_rows_at_all(dtype, way):
    case = Case((48, 17), 64, (4, 8))
    for brought in (False, True):
        x = torch.randn(0, 64 + 16 * brought, dtype=dtype, requires_grad=True)
        a = None if brought else lora_kernels.stacked(case.a).requires_grad_()
        ys = lora_kernels.lora_group(x, a, case.projections(case.b, case.bias))
        assert [y.shape for y in ys] == [(0, 48), (0, 17)]
        sum(y.sum() for y in ys).backward()
        assert x.grad.shape == x.shape
        assert a is None or a.grad.eq(0).all()


def test_a_seed_is_drawn_only_for_dropout():
    case = Case((48,), 64, (4,))
    x, a, projections = torch.randn(7, 64), lora_kernels.stacked(case.a), case.projections(case.b, case.bias)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    plain = lora_kernels.lora_group(x, a, projections)
    assert torch.equal(torch.get_rng_state(), before)
    dropped = [lora_kernels.lora_group(x, a, projections, dropout=0.5)[0] for _ in range(2)]
    assert not torch.equal(*dropped)
    assert not torch.equal(dropped[0], plain[0])


def test_ranks_are_filled_up_with_zeros_to_a_multiple_of_sixteen():
    a = [torch.randn(3, 5), torch.randn(6, 5)]
    found = lora_kernels.stacked(a)
    assert torch.equal(found[:9], torch.cat(a))
    assert found.shape == (16, 5)
    assert found[9:].eq(0).all()
    full = [torch.randn(7, 5), torch.randn(9, 5)]
    assert torch.equal(lora_kernels.stacked(full), torch.cat(full))


@pytest.mark.parametrize(
    ("columns", "rank", "dropout", "said"),
    [
        (63, 16, 0.0, "x has 63 columns, but the weights have 64 inputs and the adapters a rank of 12 together, of 16"),
        (64, 11, 0.0, "a rank of 12 together, of 11 in a"),
        (75, None, 0.0, "x has 75 columns, but the weights have 64 inputs and the adapters a rank of 12 together.$"),
        (80, None, 0.1, "nothing can be dropped before it"),
    ],
)
def test_what_does_not_fit_is_refused(columns, rank, dropout, said):
    case = Case((48, 17), 64, (4, 8))
    a = None if rank is None else torch.randn(rank, 64)
    with pytest.raises(ValueError, match=said):
        lora_kernels.lora_group(torch.randn(7, columns), a, case.projections(case.b, case.bias), dropout=dropout)


@BY_BOTH_FORMS
def test_what_norm_and_activation_put_behind_their_results_is_taken(way):
    """The half of a decoder layer behind attention: norm, gate and up, activation, down."""
    above, below = Case((130, 130), 64, (4, 8), biased=False), Case((64,), 130, (5,), biased=False)
    x, residual, weight = torch.randn(7, 64), torch.randn(7, 64), 1 + torch.randn(64) / 4
    leaves = [x, residual, weight, *above.a, *above.b, *below.a, *below.b]

    def run(ops, group, dtype):
        given = [leaf.to(dtype).detach().requires_grad_() for leaf in leaves]
        x, residual, weight, *ab, a, b = given
        y, h = ops.rms_norm_lora(x, residual, weight, lora_kernels.stacked(ab[:2]), 1e-5)
        gate, up = group(above, y, ab[2:])
        (down,) = group(below, ops.swiglu_lora(gate, up, lora_kernels.stacked([a])), [b])
        return [h + down, *torch.autograd.grad((h + down).square().sum(), given)]

    def grouped(case, y, b):
        return lora_kernels.lora_group(y, None, case.projections(b, case.bias))

    def plain(case, y, b):
        return reference.lora_group(y, None, case.layers(b, case.bias, y.dtype))

    found, exact = run(lora_kernels, grouped, FP32), run(reference, plain, torch.float64)
    assert all(error(one, true) < 2e-6 for one, true in zip(found, exact, strict=True))


@pytest.mark.parametrize("outputs", [(60, 34, 33), (60, 34, 34)], ids=["joint", "one by one"])
@pytest.mark.parametrize("ranks", [(4, 8, 1), (16, 16, 16)], ids=str)
def test_nothing_is_read_that_was_not_written(outputs, ranks, triton_anywhere):
    case, columns = Case(outputs, 64, ranks), 64 + sum(ranks)
    with dispatch.forced("dequant"), memory_is_no_number():
        x = torch.zeros(20, 64 + len(lora_kernels.stacked(case.a))).bfloat16()
        x[:, :columns] = torch.randn(20, columns)
        x, b = x.requires_grad_(), [one.requires_grad_() for one in case.b]
        ys = lora_kernels.lora_group(x, None, case.projections(b, case.bias))
        dx, *dbs = torch.autograd.grad(ys, [x, *b], [torch.randn_like(y) for y in ys])
    assert all(one.isfinite().all() for one in (*ys, dx, *dbs))
    assert dx[:, columns:].eq(0).all()


# What it costs.

JOINT = ("_joint_backward", "_joint_input_gradient")


@pytest.mark.parametrize("way", ["cpu", "dequant", "triton"])
def test_x_is_read_once_and_the_image_it_brings_is_not_made_again(way, monkeypatch):
    case, seen, down = Case((48, 16, 17), 64, (4, 8, 1)), [], lora.down
    monkeypatch.setattr(lora, "down", lambda *args: seen.append(args) or down(*args))
    projections = case.projections(case.b, case.bias)
    lora_kernels.lora_group(torch.randn(7, 64), lora_kernels.stacked(case.a), projections)
    assert len(seen) == 1
    lora_kernels.lora_group(torch.randn(7, 80), None, projections)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("outputs", "brought", "joint"),
    [((60, 34, 33), True, True), ((60, 34, 34), True, False), ((95, 96), False, False), ((63, 64), False, True)],
)
@pytest.mark.parametrize("way", ["dequant", "gemm_4bit", "triton", "cpu"])
def test_the_gradient_of_x_is_one_product_where_that_moves_less(outputs, brought, joint, way, monkeypatch):
    """By `dequant` only, as the others do not write the weight out."""
    case, seen = Case(outputs, 64, (4,) * len(outputs)), []
    for name in JOINT:
        whole = getattr(group, name)
        monkeypatch.setattr(group, name, lambda *args, whole=whole: seen.append(args) or whole(*args))
    case.assert_right(torch.randn(7, 64), brought=brought)
    assert len(seen) == (joint and way == "dequant")


@BY_BOTH_FORMS
def test_with_dropout_the_gradient_of_x_is_not_one_product(way, monkeypatch):
    for name in JOINT:
        monkeypatch.setattr(group, name, None)
    Case((16, 16), 64, (4, 4)).assert_right(torch.randn(7, 64), dropout=0.5)


@pytest.mark.parametrize("way", ["cpu", "dequant", "triton"])
def test_an_input_without_gradient_costs_no_product(way, monkeypatch):
    case = Case((48, 17), 64, (4, 8))
    a, b = [[one.requires_grad_() for one in part] for part in (case.a, case.b)]
    x = torch.randn(7, 64)
    ys = lora_kernels.lora_group(x, lora_kernels.stacked(a), case.projections(b, [None, None]))

    def never(*_):
        raise AssertionError("the weight was asked for")

    for name in ("_add_products", "_backward_one_by_one", *JOINT):
        monkeypatch.setattr(group, name, never)
    da, db = torch.autograd.grad(sum(y.sum() for y in ys), (a[1], b[1]))
    torch.testing.assert_close(da, 0.5 * b[1].sum(0)[:, None] * x.sum(0))
    torch.testing.assert_close(db, 0.5 * (x @ a[1].t()).sum(0).expand(17, 8))


@BY_BOTH_FORMS
def test_neither_weight_nor_mask_nor_wide_columns_of_what_is_brought_are_kept(way):
    case = Case((48, 17), 64, (4, 8))
    a, b = lora_kernels.stacked(case.a).requires_grad_(), [one.requires_grad_() for one in case.b]
    for brought in (False, True):
        x, kept = torch.randn(32, 80 if brought else 64, requires_grad=True), []
        given = [*(part for weight in case.weights for part in weight.flat() if isinstance(part, torch.Tensor)), a, *b]
        given += [] if brought else [x]
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            dropout = {} if brought else {"dropout": 0.5}
            lora_kernels.lora_group(x, None if brought else a, case.projections(b, case.bias), **dropout)
        known = {part.untyped_storage().data_ptr() for part in given}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        assert sum(size for place, size in storages.items() if place not in known) == 32 * 16 * 4


@BY_BOTH_FORMS
def test_autocast_changes_nothing_inside(way):
    case = Case((48, 17), 64, (4, 8))
    a, b = lora_kernels.stacked(case.a).requires_grad_(), [one.requires_grad_() for one in case.b]
    x = torch.randn(7, 64, requires_grad=True)

    def run():
        ys = lora_kernels.lora_group(x, a, case.projections(b, case.bias))
        return *(y.detach() for y in ys), *torch.autograd.grad(sum(y.square().sum() for y in ys), (x, a, *b))

    plain = run()
    with torch.autocast(x.device.type, BF16):
        inside = run()
    for one, other in zip(inside, plain, strict=True):
        assert torch.equal(one, other)


def test_a_second_gradient_is_refused():
    case = Case((48, 17), 64, (4, 8))
    x = torch.randn(7, 64, requires_grad=True)
    y, _ = lora_kernels.lora_group(x, lora_kernels.stacked(case.a), case.projections(case.b, case.bias))
    with pytest.raises(NotImplementedError, match="lora_group_backward has no gradient"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_graph_is_compiled_around_it():
    case = Case((48, 17), 64, (4, 8))
    a = lora_kernels.stacked(case.a)

    def layer(x):
        return sum(y.relu().sum() for y in lora_kernels.lora_group(x, a, case.projections(case.b, case.bias)))

    x = torch.randn(7, 64, requires_grad=True)
    wanted = torch.autograd.grad(layer(x), x)
    found = torch.autograd.grad(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), x)
    assert torch.equal(found[0], wanted[0])


@BY_BOTH_FORMS
@pytest.mark.parametrize("brought", [False, True])
def test_operators_keep_the_rules_of_torch_library(way, brought):
    ops, case = torch.ops.lora_kernels, Case((48, 17), 64, (4, 8))
    flat = [list(part) for part in zip(*(weight.flat() for weight in case.weights), strict=True)]
    x = torch.randn(7, 80 if brought else 64, dtype=BF16, requires_grad=True)
    a = None if brought else lora_kernels.stacked(case.a).requires_grad_()
    b, bias = [one.requires_grad_() for one in case.b], [case.bias[0].requires_grad_(), None]
    dropout = 0.0 if brought else 0.5
    torch.library.opcheck(ops.lora_group.default, (x, a, b, bias, case.scaling, *flat, dropout, 3))
    *ys, xa = ops.lora_group.default(x, a, b, bias, case.scaling, *flat, dropout, 3)
    dys = [torch.randn_like(y) for y in ys]
    plain = [None if part is None else part.detach() for part in (None if brought else x, a)]
    b = [one.detach() for one in b]
    for need_dx in (True, False):
        arguments = (xa.detach(), dys, *plain, b, case.scaling, *flat, dropout, 3, need_dx)
        torch.library.opcheck(ops.lora_group_backward.default, arguments)


def test_the_twin_differentiates():
    case = Case((5, 4), 6, (2, 3), packed=False)
    leaves = [one.double().requires_grad_() for one in case.leaves(torch.randn(3, 6))]
    keep = torch.rand(3, 6) > 0.5

    def twin(*leaves):
        x, a, b, bias = case.parted(leaves)
        return tuple(reference.lora_group(x, torch.cat(a), case.layers(b, bias, torch.float64), 0.5, keep))

    assert torch.autograd.gradcheck(twin, leaves)

"""The narrow products and their gradients, against float64 and as good as the same in plain torch."""

import pytest
import torch

import lora_kernels
from lora_kernels import reference
from tests.kernel_ops.accuracy import assert_as_good
from tests.kernel_ops.gaps import rows_apart

BOTH = pytest.mark.parametrize("implementation", ["triton", "cpu"])
DOWN = [
    # Rows, inputs, rank, dtype, dropout: off every tile, and over the rows and ranks that a program takes.
    (1, 64, 8, torch.float32, 0.0),
    (7, 65, 4, torch.bfloat16, 0.3),
    (63, 130, 1, torch.float16, 0.0),
    (130, 129, 16, torch.bfloat16, 0.0),
    (63, 66, 40, torch.float32, 0.3),
    (33, 100, 64, torch.bfloat16, 0.3),
    (40, 70, 128, torch.float16, 0.3),
    (17, 64, 256, torch.bfloat16, 0.0),
    (1100, 36, 8, torch.bfloat16, 0.0),
]


@pytest.fixture(autouse=True)
def _implementation(request):
    if "triton" in request.node.name:
        request.getfixturevalue("triton_anywhere")


def with_gradients(function, inputs, dy):
    """Returns what `function` makes of the inputs, then the gradients of the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))


@BOTH
@pytest.mark.parametrize(("rows", "inputs", "rank", "dtype", "dropout"), DOWN)
def test_down_and_its_gradients(rows, inputs, rank, dtype, dropout, implementation):
    x, a = rows_apart(rows, inputs, dtype), torch.randn(rank, inputs)
    dxa = rows_apart(rows, rank, dtype)
    keep = lora_kernels.keep_mask(x, dropout, 9) if dropout else None

    def plain(x, a):
        return reference.lora_down(x, a.to(x.dtype), dropout, keep)

    found = with_gradients(lambda x, a: lora_kernels.lora_down(x, a, dropout=dropout, seed=9), (x, a), dxa)
    eager = with_gradients(plain, (x.contiguous(), a), dxa.contiguous())
    exact = with_gradients(plain, (x.double(), a.double()), dxa.double())
    for one, other, true in zip(found, eager, exact, strict=True):
        assert_as_good(one, other, true)


UP = [
    # Rows, outputs, rank, dtype: off every tile, and over the columns that a program takes.
    (1, 65, 16, torch.bfloat16),
    (7, 64, 4, torch.bfloat16),
    (63, 130, 1, torch.float16),
    (130, 65, 16, torch.bfloat16),
    (20, 70, 40, torch.float32),
    (7, 40, 256, torch.bfloat16),
    (3, 1100, 16, torch.bfloat16),
    (9, 1104, 24, torch.bfloat16),
]


@BOTH
@pytest.mark.parametrize(("rows", "outputs", "rank", "dtype"), UP)
def test_up_goes_back(rows, outputs, rank, dtype, implementation):
    dy, xa = rows_apart(rows, outputs, dtype), rows_apart(rows, rank, dtype)
    b = torch.randn(outputs, rank).to(dtype)
    ds, db = lora_kernels.lora_bwd_up(dy, b, xa, 0.7)
    plain = reference.lora_bwd_up(dy.contiguous(), b, xa.contiguous(), 0.7)
    exact = reference.lora_bwd_up(dy.double(), b.double(), xa.double(), 0.7)
    assert_as_good(ds, plain[0], exact[0])
    assert_as_good(db, plain[1].float(), exact[1])
    assert db.dtype == torch.float32


@BOTH
def test_gradients_of_sums_have_no_strides(implementation):
    x, a = torch.randn(7, 3, 64, requires_grad=True), torch.randn(4, 64, requires_grad=True)
    dx, da = torch.autograd.grad(lora_kernels.lora_down(x, a).sum(), (x, a))
    torch.testing.assert_close(dx, a.sum(0).expand_as(x))
    torch.testing.assert_close(da, x.sum((0, 1)).expand_as(a))
    one = torch.ones(()).expand(5, 33)
    for found, wanted in zip(
        lora_kernels.lora_bwd_up(one, torch.ones(33, 2), torch.ones(5, 2), 1.0), (33, 5), strict=True
    ):
        assert (found == wanted).all()


@BOTH
def test_columns_may_stand_apart(implementation):
    x, a = torch.randn(64, 7).t(), torch.randn(64, 4).t()
    torch.testing.assert_close(lora_kernels.lora_down(x, a), x @ a.t())
    dy, b = torch.randn(33, 7).t(), torch.randn(4, 33).t()
    torch.testing.assert_close(lora_kernels.lora_bwd_up(dy, b, torch.randn(4, 7).t(), 1.0)[0], dy @ b)


@BOTH
def test_no_rows_are_no_rows(implementation):
    x, a = torch.zeros(0, 64, requires_grad=True), torch.randn(4, 64, requires_grad=True)
    xa = lora_kernels.lora_down(x, a, dropout=0.5, seed=1)
    assert xa.shape == (0, 4)
    xa.sum().backward()
    assert a.grad.eq(0).all()
    ds, db = lora_kernels.lora_bwd_up(torch.zeros(0, 33), torch.zeros(33, 4), torch.zeros(0, 4), 1.0)
    assert ds.shape == (0, 4)
    assert db.eq(0).all()


@BOTH
def test_operators_keep_the_rules_of_torch_library(implementation):
    ops = torch.ops.lora_kernels
    x, a = torch.randn(7, 64, requires_grad=True), torch.randn(4, 64, requires_grad=True)
    torch.library.opcheck(ops.lora_down.default, (x, a, 0.0 if implementation == "triton" else 0.5, 3))
    need_dx = implementation == "triton"
    torch.library.opcheck(ops.lora_down_backward.default, (torch.randn(7, 4), x.detach(), a.detach(), 0.5, 3, need_dx))
    torch.library.opcheck(ops.lora_bwd_up.default, (torch.randn(7, 33), torch.randn(33, 4), torch.randn(7, 4), 0.5))


def test_the_twins_differentiate():
    x, a = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((5, 6), (3, 6)))
    keep = torch.rand(5, 6) > 0.5
    assert torch.autograd.gradcheck(lambda x, a: reference.lora_down(x, a, 0.5, keep), (x, a))
    # What lora_bwd_up gives is the gradient of scaling * xa @ b.T.
    xa, b = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((5, 3), (4, 3)))
    dy = torch.randn(5, 4, dtype=torch.float64)
    wanted = torch.autograd.grad(0.7 * xa @ b.T, (xa, b), dy)
    for one, other in zip(reference.lora_bwd_up(dy, b, xa, 0.7), wanted, strict=True):
        torch.testing.assert_close(one, other)

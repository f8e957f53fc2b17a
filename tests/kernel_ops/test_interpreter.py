"""The mended interpreter computes in bfloat16 what torch computes, and refuses what a GPU would refuse.

Every check here is also run on the interpreter as Triton ships it, and fails there.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from tests.kernel_ops import interpreter
from tests.kernel_ops.accuracy import error

# Casting NaN and dividing by zero are part of the checks.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

REPOSITORY = Path(__file__).parents[2]
N = 1 << 16
"""Numbers in a block: as many as bfloat16 has."""


@triton.jit
def cast_kernel(p_x, p_y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, tl.load(p_x + o).to(p_y.dtype.element_ty))


@triton.jit
def rounding_kernel(p_x, p_y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, tl.load(p_x + o).to(tl.bfloat16, fp_downcast_rounding="rtne"))


@triton.jit
def binary_kernel(p_x, p_y, p_out, OP: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    b_x, b_y = tl.load(p_x + o), tl.load(p_y + o)
    if OP == "add":
        b_out = b_x + b_y
    elif OP == "sub":
        b_out = b_x - b_y
    elif OP == "mul":
        b_out = b_x * b_y
    elif OP == "div":
        b_out = b_x / b_y
    elif OP == "neg":
        b_out = -b_x
    elif OP == "lt":
        b_out = b_x < b_y
    elif OP == "eq":
        b_out = b_x == b_y
    elif OP == "constant":
        b_out = b_x * 0.3 + 1.0
    elif OP == "maximum":
        b_out = tl.maximum(b_x, b_y)
    else:
        tl.static_assert(OP == "where")
        b_out = tl.where(b_x < b_y, b_x, b_y)
    tl.store(p_out + o, b_out)


@triton.jit
def fma_kernel(p_x, p_y, p_z, p_out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + o, tl.fma(tl.load(p_x + o), tl.load(p_y + o), tl.load(p_z + o)))


@triton.jit
def function_kernel(p_x, p_exp, p_rsqrt, N: tl.constexpr):
    o = tl.arange(0, N)
    b_x = tl.load(p_x + o).to(tl.float32)
    tl.store(p_exp + o, tl.exp(b_x))
    tl.store(p_rsqrt + o, tl.rsqrt(b_x))


@triton.jit
def dot_kernel(p_x, p_y, p_out, K: tl.constexpr, PRECISION: tl.constexpr):
    o, o_k = tl.arange(0, 16), tl.arange(0, K)
    b_x = tl.load(p_x + o[:, None] * K + o_k[None, :])
    b_y = tl.load(p_y + o_k[:, None] * 16 + o[None, :])
    b_out = tl.dot(b_x, b_y, input_precision=PRECISION)
    tl.store(p_out + o[:, None] * 16 + o[None, :], b_out)


@triton.jit
def sum_kernel(p_x, p_out, N: tl.constexpr):
    tl.store(p_out, tl.sum(tl.load(p_x + tl.arange(0, N))))


@triton.jit
def assert_kernel(p_x, N: tl.constexpr):
    tl.device_assert(tl.load(p_x + tl.arange(0, N)) > 0)


@triton.jit
def overflow_kernel(p_x, stride, N: tl.constexpr):
    tl.store(p_x + tl.arange(0, N), tl.arange(0, N) * stride)


def all_bfloat16():
    return torch.arange(-(N // 2), N // 2, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def shuffled():
    return all_bfloat16()[torch.randperm(N, generator=torch.Generator().manual_seed(0))]


def assert_same(found, wanted):
    """Equal to the bit, zeros and infinities too; any NaN is as good as another."""
    assert found.dtype == wanted.dtype
    assert torch.equal(found.isnan(), wanted.isnan())
    found, wanted = found.nan_to_num(nan=0.0, posinf=None), wanted.nan_to_num(nan=0.0, posinf=None)
    assert torch.equal(found, wanted)
    assert torch.equal(found.signbit(), wanted.signbit())


def run_binary(op, x, y, dtype=torch.bfloat16):
    out = torch.empty(N, dtype=dtype)
    binary_kernel[(1,)](x, y, out, op, N)
    return out


def check_float32_is_rounded_to_the_nearest_even():
    bits = torch.arange(-(N // 2), N // 2, dtype=torch.int32) << 16
    # The numbers themselves, all ties between two, either side of each tie, and any that come.
    any_bits = torch.randint(-(2**31), 2**31, (N,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    for below in (bits, bits | 0x8000, bits | 0x7FFF, bits | 0x8001, any_bits):
        x, y = below.view(torch.float32), torch.empty(N, dtype=torch.bfloat16)
        for kernel in (cast_kernel, rounding_kernel):
            kernel[(1,)](x, y, N)
            assert_same(y, x.to(torch.bfloat16))


def check_other_numbers_become_bfloat16():
    halves = all_bfloat16().view(torch.float16)
    doubles = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    integers = torch.arange(-N, N, 2, dtype=torch.int32) * 12345
    for x in (halves, doubles, integers):
        y = torch.empty(N, dtype=torch.bfloat16)
        cast_kernel[(1,)](x, y, N)
        assert_same(y, x.to(torch.bfloat16))


def check_bfloat16_becomes_other_numbers():
    x = all_bfloat16()
    for dtype in (torch.float32, torch.float64, torch.float16, torch.int32):
        if not dtype.is_floating_point:
            x = x.nan_to_num().clamp(-(2.0**30), 2.0**30)
        y = torch.empty(N, dtype=dtype)
        cast_kernel[(1,)](x, y, N)
        assert_same(y.double(), x.to(dtype).double())


def check_arithmetic():
    x, y = all_bfloat16(), shuffled()
    for op in ("add", "sub", "mul", "div"):
        assert_same(run_binary(op, x, y), getattr(torch, op)(x, y))
    # Triton's minus is 0 - x, which leaves no -0.
    assert_same(run_binary("neg", x, y), 0 - x)
    # Every step is rounded.
    assert_same(run_binary("constant", x, y), x * torch.tensor(0.3, dtype=torch.bfloat16) + 1)


def check_comparisons():
    x, y = all_bfloat16(), shuffled()
    y[::7] = x[::7]
    assert torch.equal(run_binary("lt", x, y, torch.bool), x < y)
    assert torch.equal(run_binary("eq", x, y, torch.bool), x == y)
    assert_same(run_binary("where", x, y), torch.where(x < y, x, y))
    x, y = x.nan_to_num(), y.nan_to_num()
    assert torch.equal(run_binary("maximum", x, y), torch.maximum(x, y))


def check_fma_rounds_once():
    x, y, z = torch.randn(3, N, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    out = torch.empty(N, dtype=torch.bfloat16)
    fma_kernel[(1,)](x, y, z, out, N)
    assert_same(out, (x.double() * y.double() + z.double()).to(torch.bfloat16))


def check_functions_through_float32():
    x = shuffled().abs()
    exp, rsqrt = torch.empty(2, N, dtype=torch.bfloat16)
    function_kernel[(1,)](x, exp, rsqrt, N)
    for found, wanted in ((exp, x.double().exp()), (rsqrt, x.double().rsqrt())):
        # NumPy's float32 functions are off in the last place or two, which may tip a tie over.
        ulp = found.view(torch.int16).int() - wanted.to(torch.bfloat16).view(torch.int16).int()
        assert ulp[~wanted.isnan()].abs().max() <= 1
        assert (ulp[~wanted.isnan()] != 0).float().mean() < 1e-3


def check_dot():
    x, y = torch.randn(2, 64 * 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x, y = x.view(16, 64), y.view(64, 16)
    exact = x.double() @ y.double()
    for dtype, allowed in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)):
        out = torch.empty(16, 16, dtype=dtype)
        dot_kernel[(1,)](x, y, out, 64, "tf32")
        assert error(out, exact) < allowed


def check_dot_of_float32_is_tf32_unless_ieee():
    x, y = torch.randn(2, 64 * 16, generator=torch.Generator().manual_seed(0))
    x, y, out = x.view(16, 64), y.view(64, 16), torch.empty(16, 16)
    for precision, least, most in (("ieee", 0, 1e-6), ("tf32", 1e-4, 1e-3)):
        dot_kernel[(1,)](x, y, out, 64, precision)
        assert least <= error(out, x.double() @ y.double()) < most
    # 10 bits of mantissa stay: 1 + 2^-10 does, and 1 + 2^-11 is a tie, which goes away from zero.
    one, found = torch.eye(16), torch.empty(16, 16)
    for kept, wanted in ((1 + 2.0**-10, 1 + 2.0**-10), (-1 - 2.0**-11, -1 - 2.0**-10), (1 + 2.0**-12, 1.0)):
        dot_kernel[(1,)](one * kept, one, found, 16, "tf32")
        assert torch.equal(found, one * wanted)


def check_refused(kernel, *args, message):
    with pytest.raises(triton.runtime.errors.InterpreterError, match=message):
        kernel[(1,)](*args)


def check_sum_is_refused():
    check_refused(sum_kernel, torch.ones(16, dtype=torch.bfloat16), torch.empty(1), 16, message="reduction of bfloat16")


def check_assert_raises():
    assert_kernel[(1,)](torch.ones(16), 16)
    check_refused(assert_kernel, torch.arange(16), 16, message="AssertionError")


def check_overflow_raises():
    out = torch.empty(16, dtype=torch.int32)
    overflow_kernel[(1,)](out, 2**27, 16)
    check_refused(overflow_kernel, out, 2**28, 16, message="overflow")


def check_short_dot_is_refused():
    x = torch.ones(8 * 16)
    check_refused(dot_kernel, x, x, torch.empty(16, 16), 8, "ieee", message="K >= 16")


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_") and name != "check_refused"}


@pytest.mark.parametrize("check", CHECKS)
def test_mended(check):
    CHECKS[check]()


def test_mending_twice_changes_nothing():
    before = dict(vars(InterpreterBuilder))
    interpreter.make_bfloat16_exact()
    assert dict(vars(InterpreterBuilder)) == before


STOCK = f"""
import pytest
from {__name__} import CHECKS
for name, check in CHECKS.items():
    try:
        check()
    except (AssertionError, pytest.fail.Exception):
        continue
    print(name)
"""


def test_the_stock_interpreter_passes_no_check():
    done = subprocess.run([sys.executable, "-c", STOCK], cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr

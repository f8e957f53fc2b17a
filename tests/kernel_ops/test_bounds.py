"""No kernel touches what lies outside its tensors, and none loses count beyond 2^31 elements.

`python -m tests.kernel_ops.test_bounds` runs every case in a process of its own, forked, and prints how each ended: one
that reaches out of bounds dies of SIGSEGV.
"""

import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import triton
import triton.language as tl
from torch.utils._pytree import tree_leaves

import lora_kernels
from lora_kernels import Frozen, backend, dispatch
from lora_kernels.frozen import Blocks
from lora_kernels.gpu import linear as product
from lora_kernels.gpu import lora, nf4_linear, norm, rope, swiglu
from lora_kernels.gpu.cross_entropy import differentiate_logits
from lora_kernels.nf4 import dequantize_into
from tests.kernel_ops import guard, interpreter

REPOSITORY = Path(__file__).parents[2]
FAR = 2**31
"""Elements that 32 bits, one of them the sign, cannot tell apart from negative places."""
SIDES: tuple[guard.Side, ...] = ("start", "end")


@triton.jit
def wild_kernel(p_x, p_y, columns, first, STORES: tl.constexpr, BLOCK: tl.constexpr):
    """Copies a row with the mask forgotten, where it is read or where it is written."""
    o = first + tl.arange(0, BLOCK)
    m = (o >= 0) & (o < columns)
    if STORES:
        tl.store(p_y + o, tl.load(p_x + o, mask=m))
    else:
        tl.store(p_y + o, tl.load(p_x + o), mask=m)


@triton.jit
def last_row_kernel(p_x, p_out, rows, stride, BITS: tl.constexpr):
    """Takes the first element of the last row by a product of so many bits."""
    o_row = rows - 1
    if BITS == 64:
        o_row = o_row.to(tl.int64)
    tl.store(p_out, tl.load(p_x + o_row * stride))


def wild(first: int, stores: bool) -> None:
    wild_kernel[(1,)](torch.ones(30), torch.empty(30), 30, first, stores, 32)


def last_row(bits: int) -> None:
    x = far(4, 1, torch.float32)
    x[3] = 1.0
    out = torch.zeros(1)
    last_row_kernel[(1,)](x, out, 4, x.stride(0), bits)
    assert out == 1.0


# --- In bounds: every tensor of every launch is fenced, on shapes that fill no tile.


def quantized(rows: int, columns: int, nested: bool = True) -> Frozen:
    return Frozen.of(*bnb.quantize_4bit(torch.randn(rows, columns), quant_type="nf4", compress_statistics=nested))


def apart(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Returns random rows with a gap after each."""
    return torch.randn(*shape[:-1], shape[-1] + 7).to(dtype)[..., : shape[-1]]


def differentiated(run: Callable[..., Any], *tensors: torch.Tensor | None, **options: Any) -> None:
    """Runs an operation forwards, and backwards from whatever it gives that has a gradient."""
    leaves = [tensor if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    outputs = [output for output in tree_leaves(run(*leaves, **options)) if output.requires_grad]
    torch.autograd.backward(outputs, [apart(1, *output.shape, dtype=output.dtype)[0] for output in outputs])


def linear(path: dispatch.Path, weight: Frozen, rows: int, rank: int, dropout: float) -> None:
    def run(x: torch.Tensor, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lora_kernels.lora_linear(x, weight, bias, a, b, scaling=2.0, dropout=dropout, seed=1)

    outputs, inputs = weight.shape
    with dispatch.forced(path):
        differentiated(run, apart(rows, inputs), apart(outputs), apart(rank, inputs), apart(outputs, rank))


def group(path: dispatch.Path, outputs: list[int], inputs: int, brought: bool) -> None:
    """Ranks of 3 and then 4, so that no part of x @ a.T is aligned."""

    def run(x: torch.Tensor, a: torch.Tensor | None, *b: torch.Tensor) -> list[torch.Tensor]:
        projections = [lora_kernels.Projection(*parts, 2.0) for parts in zip(weights, biases, b, strict=True)]
        return lora_kernels.lora_group(x, a, projections)

    weights, biases = [quantized(n, inputs) for n in outputs], [apart(n) for n in outputs]
    rank = 3 + 4 * (len(outputs) - 1)
    x, a = (apart(7, inputs + rank), None) if brought else (apart(7, inputs), apart(rank, inputs))
    with dispatch.forced(path):
        differentiated(run, x, a, *(apart(n, 3 if i == 0 else 4) for i, n in enumerate(outputs)))


def cross_entropy(softcap: float) -> None:
    labels = torch.tensor([0, -100, 128, 5, 64, -100, 1])

    def run(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return lora_kernels.linear_cross_entropy(h, weight, labels, softcap=softcap, chunk_rows=3)[0]

    differentiated(run, apart(7, 33), apart(129, 33))


IN_BOUNDS: dict[str, Callable[[], object]] = {
    "nf4": lambda: lora_kernels.nf4_dequant(quantized(3, 65, nested=False), torch.bfloat16),
    "nf4 nested": lambda: lora_kernels.nf4_dequant(quantized(130, 192), torch.float32),
    "nf4 rows apart": lambda: dequantize_into(torch.empty(7, 150)[:, :130], quantized(7, 130)),
    "lora_down": lambda: differentiated(lora_kernels.lora_down, apart(7, 130), apart(5, 130), dropout=0.5, seed=1),
    "lora_down wide": lambda: differentiated(lora_kernels.lora_down, apart(33, 66), apart(72, 66)),
    "lora_bwd_up": lambda: lora_kernels.lora_bwd_up(apart(130, 70), apart(70, 9), apart(130, 9), 2.0),
    "linear": lambda: linear("dequant", quantized(65, 130), rows=7, rank=4, dropout=0.5),
    "linear triton": lambda: linear("triton", Frozen.of(apart(65, 131)), rows=7, rank=4, dropout=0.5),
    "linear triton rows": lambda: linear("triton", Frozen.of(apart(66, 33).t()), rows=130, rank=72, dropout=0.0),
    "linear 4-bit": lambda: linear("triton_4bit", quantized(65, 192), rows=7, rank=4, dropout=0.5),
    "linear 4-bit rows": lambda: linear("triton_4bit", quantized(67, 128, nested=False), rows=63, rank=16, dropout=0.0),
    "group": lambda: group("dequant", [65, 33, 17], 130, brought=True),
    "group one by one": lambda: group("dequant", [130, 65], 65, brought=True),
    "group joint": lambda: group("dequant", [33, 17], 130, brought=False),
    "group 4-bit": lambda: group("triton_4bit", [65, 33], 192, brought=True),
    "keep_mask": lambda: lora_kernels.keep_mask(apart(7, 130), 0.5, 1),
    "rms_norm_lora": lambda: differentiated(
        lora_kernels.rms_norm_lora, apart(7, 130), apart(7, 130), apart(130), apart(20, 130), eps=1e-5
    ),
    "rms_norm_lora alone": lambda: differentiated(
        lora_kernels.rms_norm_lora, apart(17, 65), None, apart(65), None, eps=1e-5
    ),
    "swiglu_lora": lambda: differentiated(lora_kernels.swiglu_lora, apart(7, 130), apart(7, 130), apart(20, 130)),
    "swiglu_lora alone": lambda: differentiated(lora_kernels.swiglu_lora, apart(17, 65), apart(17, 65), None),
    "rope": lambda: differentiated(
        lambda q, k: lora_kernels.rope(q, k, apart(1, 5, 6), apart(1, 5, 6)), apart(2, 3, 5, 6), apart(2, 1, 5, 6)
    ),
    "cross_entropy": lambda: cross_entropy(softcap=0.0),
    "cross_entropy softcap": lambda: cross_entropy(softcap=5.0),
}


# --- Far out: more than 2^31 elements of address space, of which a few pages are touched.


def far(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Returns random rows of which the second begins before element 2^31, and the third beyond it."""
    stride = FAR // 4 * 3
    rows_far_apart = torch.empty((rows - 1) * stride + columns, dtype=dtype).as_strided((rows, columns), (stride, 1))
    return rows_far_apart.copy_(torch.randn(rows, columns))


def tall(columns: int) -> torch.Tensor:
    """Returns more than 2^31 elements in dense rows: random in the last 64, never touched before them."""
    rows = torch.empty(FAR // columns + 64, columns, dtype=torch.bfloat16)
    rows[-64:] = torch.randn(64, columns)
    return rows


def assert_far(run: Callable[..., Any], *args: Any) -> None:
    """What `run` returns, or writes into its arguments, does not hang on how far apart their rows are."""
    near = [arg.clone(memory_format=torch.contiguous_format) if isinstance(arg, torch.Tensor) else arg for arg in args]
    found, wanted = run(*args), run(*near)
    if found is None:
        found, wanted = args, near
    for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert not isinstance(one, torch.Tensor) or torch.equal(one, other)


def assert_tall(run: Callable[[torch.Tensor], torch.Tensor], columns: int = 64, last: int = 32) -> None:
    """The last rows come out as they do where there are no others before them."""
    rows = tall(columns)
    wanted = run(rows[-64:].clone())
    assert torch.equal(run(rows)[-last:], wanted[-last:])


def nf4_far() -> None:
    """The last of 2^31 + 2^20 weights come out as they should."""
    rows, columns = FAR // 4096 + 256, 4096
    packed = torch.empty(rows * columns // 2, dtype=torch.uint8)
    absmax, code = torch.empty(rows * columns // 64), torch.linspace(-1, 1, 16)
    packed[-1], absmax[-1] = 0x2F, 2.0
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    dequantize_into(out, Frozen(packed, (rows, columns), Blocks(absmax, code, 64, None)))
    assert torch.equal(out[-1, -2:], (2 * code[[2, 15]]).to(out.dtype))


def product_4bit_far() -> None:
    """The outputs of the last of 2^31 + 2^12 weights."""
    x, small = apart(3, 64), quantized(64, 64, nested=False)
    outputs, blocks = FAR // 64 + 64, small.packed()
    packed, absmax = torch.empty(outputs * 32, dtype=torch.uint8), torch.empty(outputs)
    packed[-64 * 32 :], absmax[-64:] = small.data, blocks.absmax
    large = Frozen(packed, (outputs, 64), Blocks(absmax, blocks.code, 64, None))
    found, wanted = (
        nf4_linear.adapted_product(x, weight, apart(3, 4) * 0, up.t(), None, 1.0, forward=True)
        for weight, up in ((large, torch.empty(outputs, 4, dtype=torch.bfloat16)), (small, apart(64, 4)))
    )
    assert torch.equal(found[:, -64:], wanted)


def product_4bit_backward_far() -> None:
    """The gradients of the last inputs of 130 outputs, of which the last begins beyond weight 2^31."""
    dy, small = apart(3, 130), quantized(130, 64, nested=False)
    inputs, blocks = FAR // 128, small.packed()
    packed, absmax = torch.empty(130, inputs // 2, dtype=torch.uint8), torch.empty(130, inputs // 64)
    packed[:, -32:], absmax[:, -1] = small.data.view(130, 32), blocks.absmax
    large = Frozen(packed.view(-1), (130, inputs), Blocks(absmax.view(-1), blocks.code, 64, None))
    found, wanted = (
        nf4_linear.adapted_product(dy, weight, apart(3, 4) * 0, up, None, 1.0, forward=False)
        for weight, up in ((large, torch.empty(4, inputs, dtype=torch.bfloat16)), (small, apart(4, 64)))
    )
    assert torch.equal(found[:, -64:], wanted)


def keep_mask_far() -> None:
    last = lora_kernels.keep_mask(torch.empty(FAR // 64 + 16, 64), 0.5, 1)[-1]
    assert last.any()
    assert not last.all()


def product_4bit_tall() -> None:
    weight = quantized(64, 64)

    def run(x: torch.Tensor) -> torch.Tensor:
        return nf4_linear.adapted_product(x, weight, x[:, :5], x[-5:], None, 1.0, forward=False)

    assert_tall(run)


def norm_forward(x: torch.Tensor) -> torch.Tensor:
    y, h = torch.empty_like(x), torch.empty_like(x)
    norm.forward_into(y, h, torch.empty(len(x)), x, x, torch.ones(64, dtype=x.dtype), None, 1e-5)
    return y


def norm_backward(x: torch.Tensor) -> torch.Tensor:
    rstd = torch.empty(len(x))
    rstd[-64:] = 0.5
    return norm.backward(x, x, x, x, rstd, torch.ones(64, dtype=x.dtype), None, False)[0]


def swiglu_forward(x: torch.Tensor) -> torch.Tensor:
    h = torch.empty_like(x)
    swiglu.forward_into(h, x, x, None)
    return h


def rotated(x: torch.Tensor) -> torch.Tensor:
    q_out, k_out = torch.empty_like(x), torch.empty_like(x)
    rope.rotate_into(q_out[None, None], k_out[None, None], x[None, None], x[None, None], x[None], x[None], False)
    return q_out


def cross_entropy_gradient(x: torch.Tensor) -> torch.Tensor:
    differentiate_logits(x, 4000, torch.zeros(len(x), dtype=torch.int64), 1.0, 0.0, True)
    return x


def rotate_far_heads(q: torch.Tensor) -> torch.Tensor:
    out = far(4, 64)[None, :, None]
    rope.rotate_into(
        out, torch.empty(1, 1, 1, 64), q[None, :, None], q[None, :1, None], q[None, :1], q[None, :1], False
    )
    return out.contiguous()


# What programs leave to be summed takes 2^31 elements only where there are more rows than fit: here all are one row.
MANY_ROWS = FAR // 2 + 9


def alike(columns: int) -> torch.Tensor:
    return torch.randn(1, columns).expand(MANY_ROWS, columns)


def parts_of_up_backward() -> None:
    """The last of three splits of the columns, and the last block of rows, of which 9 are there."""
    dy, xa, b = alike(320), alike(1), torch.randn(320, 1)
    blocks = triton.cdiv(MANY_ROWS, 128)
    ds, db = torch.empty(3, MANY_ROWS, 1), torch.empty(blocks, 320, 1)
    sizes = {"RANK": 1, "SPLIT": 128, "BM": 128, "BR": 16, "BN": 32}
    lora.lora_up_backward_kernel[(blocks, 3, 1)](dy, b, xa, ds, db, MANY_ROWS, 320, 0, 1, 0, 2.0, **sizes)
    torch.testing.assert_close(ds[2, -9:], 2 * dy[:9, 256:] @ b[256:])
    torch.testing.assert_close(db[-1, 256:], 2 * 9 * dy[:1, 256:].t() @ xa[:1])


def parts_of_down_weight() -> None:
    ds, x, splits = alike(1), alike(64), triton.cdiv(MANY_ROWS, 32)
    da = torch.empty(splits, 1, 64)
    sizes = {"RANK": 1, "DROPOUT": False, "SPLIT": 32, "BM": 32, "BR": 16, "BK": 64}
    lora.lora_down_weight_kernel[(1, splits, 1)](ds, x, da, MANY_ROWS, 64, 0, 0, 0, 0, 2.0, **sizes)
    torch.testing.assert_close(da[-1], 2 * 9 * ds[:1].t() @ x[:1])


def parts_of_norm_weight() -> None:
    dy, h, rstd, weight = alike(64), alike(64), torch.empty(MANY_ROWS), torch.ones(64)
    rstd[-9:] = 0.5
    programs = triton.cdiv(MANY_ROWS, 16)
    dweight, dx = torch.empty(programs, 64), torch.empty(1, 64)
    sizes = {"RESIDUAL": False, "RANK": 0, "WEIGHT": True, "ROWS": 16, "COLUMNS": 64, "RANKS": 16}
    tensors = (dy, dy, dy, h, rstd, weight, dy, dx, dweight)
    norm.rms_norm_lora_backward_kernel[(programs,)](*tensors, MANY_ROWS, 64, *[0] * 6, **sizes)
    torch.testing.assert_close(dweight[-1], (9 * 0.5 * dy[0] * h[0]))


FAR_OUT: dict[str, Callable[[], None]] = {
    "nf4": nf4_far,
    "nf4 rows apart": lambda: assert_far(dequantize_into, far(4, 64), quantized(4, 64)),
    "lora_down": lambda: assert_far(lora.down, far(4, 64), far(4, 64), 0.5, 1),
    "lora_down tall": lambda: assert_tall(lambda x: lora.down(x, x[-5:], 0.0, 0)),
    "lora_down tall outputs": lambda: assert_tall(lambda x: lora.down(x, x[-16:], 0.0, 0), columns=16),
    "lora_bwd_up": lambda: assert_far(lora.up_backward, far(4, 32), apart(32, 5), far(4, 5), 2.0),
    "lora_down dA": lambda: assert_far(lora.down_weight_gradient, far(4, 5), far(4, 64), 0.5, 1),
    "lora_down dx": lambda: assert_far(lora.down_input_gradient, far(4, 4), far(4, 64), 0.5, 1),
    # So small a share that nothing is dropped: what is hangs on the row.
    "lora_down dx tall": lambda: assert_tall(lambda x: lora.down_input_gradient(x[:, :5], x[-5:], 1e-9, 0)),
    "lora_bwd_up b": lambda: assert_far(lora.up_backward, apart(3, 4), far(4, 5), apart(3, 5), 2.0),
    "lora_bwd_up parts": parts_of_up_backward,
    "lora_down dA parts": parts_of_down_weight,
    "rms_norm_lora dweight parts": parts_of_norm_weight,
    "product": lambda: assert_far(product.adapted_product, far(4, 8), apart(8, 64), far(4, 5), apart(5, 64), None, 2.0),
    "product columns": lambda: assert_far(
        product.adapted_product, apart(3, 8), far(4, 8).t(), apart(3, 5), far(4, 5).t(), None, 2.0
    ),
    "product inner": lambda: assert_far(
        product.adapted_product, apart(3, 4), far(4, 64), apart(3, 4), far(4, 64), None, 2.0
    ),
    "product tall": lambda: assert_tall(
        lambda x: product.adapted_product(x, x[-64:].t(), x[:, :5], x[-64:, :5].t(), None, 1.0)
    ),
    "product 4-bit": product_4bit_far,
    "product 4-bit dx": product_4bit_backward_far,
    "product 4-bit tall": product_4bit_tall,
    "keep_mask": keep_mask_far,
    "rms_norm_lora": lambda: assert_far(
        norm.forward_into,
        *(far(4, 68), far(4, 64), torch.empty(4), far(4, 64), far(4, 64), apart(64), apart(4, 64), 1e-5),
    ),
    "rms_norm_lora tall": lambda: assert_tall(norm_forward, last=16),
    "rms_norm_lora backward": lambda: assert_far(
        norm.backward,
        *(far(4, 68), far(4, 64), far(4, 68), far(4, 64), torch.ones(4), apart(64), apart(4, 64), True),
    ),
    "rms_norm_lora backward tall": lambda: assert_tall(norm_backward, last=16),
    "swiglu_lora": lambda: assert_far(swiglu.forward_into, far(4, 68), far(4, 64), far(4, 64), apart(4, 64)),
    "swiglu_lora tall": lambda: assert_tall(swiglu_forward, last=16),
    "swiglu_lora backward": lambda: assert_far(
        swiglu.backward_into, *(far(4, columns) for columns in (64, 64, 64, 68, 64, 64)), apart(4, 64)
    ),
    "rope": lambda: assert_far(rotate_far_heads, far(4, 64)),
    "rope tall": lambda: assert_tall(rotated, last=1),
    "cross_entropy tall": lambda: assert_tall(cross_entropy_gradient, columns=4096, last=1),
    "64-bit product": lambda: last_row(64),
}

BROKEN: dict[str, tuple[Callable[[], None], guard.Side]] = {
    "reads behind": (lambda: wild(0, stores=False), "end"),
    "writes behind": (lambda: wild(0, stores=True), "end"),
    "reads before": (lambda: wild(-2, stores=False), "start"),
    "writes before": (lambda: wild(-2, stores=True), "start"),
}


def outcome(run: Callable[[], None]) -> str:
    """Returns how a process forked to `run` ends: "done", "raised" or the name of the signal it died of."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return "raised" if os.WEXITSTATUS(status) else "done"


def fenced(run: Callable[[], None], side: guard.Side) -> str:
    def inside() -> None:
        with guard.fenced_launches(side) as launched:
            run()
        print(*launched, flush=True)

    return outcome(inside)


def main() -> None:
    interpreter.make_bfloat16_exact()
    faulthandler.enable()
    torch.manual_seed(0)
    found = {}
    with backend.triton_anywhere():
        for case, run in IN_BOUNDS.items():
            for side in SIDES:
                found[f"{case} {side}"] = fenced(run, side)
        for case, (run, side) in BROKEN.items():
            found[case] = fenced(run, side)
        with guard.last_program_only():
            for case, run in FAR_OUT.items():
                found[f"{case} far"] = outcome(run)
            found["32-bit product"] = outcome(lambda: last_row(32))
    print(json.dumps(found))


@pytest.fixture(scope="module")
def printed() -> list[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", __name__]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Shown with what fails.
    print(done.stderr)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def found(printed) -> dict[str, str]:
    """How each case ended."""
    return json.loads(printed[-1])


def test_every_kernel_is_run(printed):
    sources = (REPOSITORY / "kernels/lora_kernels/gpu").glob("*.py")
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M)}
    assert kernels <= set(" ".join(printed[:-1]).split())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", IN_BOUNDS)
def test_nothing_outside_the_tensors_is_touched(case, side, found):
    assert found[f"{case} {side}"] == "done"


@pytest.mark.parametrize("case", FAR_OUT)
def test_places_beyond_32_bits_are_reached(case, found):
    assert found[f"{case} far"] == "done"


@pytest.mark.parametrize("case", BROKEN)
def test_a_forgotten_mask_is_fatal(case, found):
    assert found[case] == "SIGSEGV"


def test_a_32_bit_product_is_caught(found):
    assert found["32-bit product"] == "raised"


if __name__ == "__main__":
    main()

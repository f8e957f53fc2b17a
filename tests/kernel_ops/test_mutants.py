"""What the other tests leave open: each of these was written for mutants of `mutate` that none of them noticed."""

from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch
import triton
import triton.language as tl
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels
from lora_kernels import Frozen, backend, dispatch, linear, lora
from lora_kernels import cross_entropy as cross_entropy_on_cpu
from lora_kernels.dispatch import Gpu
from lora_kernels.frozen import Blocks, Nested
from lora_kernels.gpu import cross_entropy, nf4, philox, rope
from lora_kernels.gpu import linear as product
from lora_kernels.gpu.tile import rank_tile, rows_apart
from lora_kernels.matmul import matmul_float32
from lora_kernels.slabs import dense_slabs
from tests.fake_gpu import fake_gpu
from tests.kernel_ops import guard

# --- Which code runs.


def test_kernels_take_no_cpu_tensors_unless_told_to():
    assert not backend.is_triton(torch.empty(1, device="cpu"))
    with backend.triton_anywhere():
        assert backend.is_triton(torch.empty(1, device="cpu"))
    assert not backend.is_triton(torch.empty(1, device="cpu"))


@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_multiplies_in_float32_what_it_has_no_instructions_for(dtype, has, monkeypatch):
    monkeypatch.setattr(backend, "_cpu_multiplies", lambda _: has)
    narrow, wide = torch.empty(1, dtype=dtype, device="cpu"), torch.empty(1, dtype=torch.float64, device="cpu")
    assert backend.product_dtype(narrow) == (dtype if has else torch.float32)
    assert backend.product_dtype(wide) == torch.float64
    with backend.triton_anywhere():
        assert backend.product_dtype(narrow) == dtype


def test_without_instructions_for_it_bfloat16_is_computed_as_float32_and_rounded_once(monkeypatch):
    monkeypatch.setattr(backend, "_cpu_multiplies", lambda _: False)
    q, k, v = (torch.randn(heads, 9, 16).bfloat16() for heads in (4, 2, 2))
    h, w, bias = torch.randn(5, 24).bfloat16(), torch.randn(40, 24).bfloat16(), torch.randn(40).bfloat16()
    labels = torch.tensor([3, 0, 39, -100, 7])

    def both(dtype):
        tensors = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v, h)]
        out = lora_kernels.packed_attention(*tensors[:3], [0, 4, 9], scale=0.3)
        loss, _ = lora_kernels.linear_cross_entropy(tensors[3], w.to(dtype), labels, bias=bias.to(dtype))
        (out.float().sum() + loss).backward()
        return [loss, out, *(x.grad for x in tensors)]

    for narrow, wide in zip(both(torch.bfloat16), both(torch.float32), strict=True):
        assert torch.equal(narrow, wide.to(narrow.dtype))


def test_a_way_is_chosen_for_a_weight_as_it_is_stored(monkeypatch, triton_anywhere):
    asked = []
    monkeypatch.setattr(dispatch, "gpu", lambda device: Gpu("a card", "sm_89", 128))
    monkeypatch.setattr(
        dispatch, "choose", lambda m, n, k, card, packed, dtype: asked.append((m, n, k, packed)) or "dequant"
    )
    x = torch.randn(7, 64, device="cpu")
    for weight in (
        Frozen.of(*bnb.quantize_4bit(torch.randn(33, 64), quant_type="nf4")),
        Frozen.of(torch.randn(33, 64)),
    ):
        assert linear.choose_path(x, weight) == "dequant"
    assert asked == [(7, 33, 64, True), (7, 33, 64, False)]


def test_whoever_watches_torch_sees_an_operator():
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    x, a = torch.randn(3, 8, device="cpu"), torch.randn(2, 8, device="cpu")
    wanted = lora_kernels.lora_down(x, a)
    assert not seen
    with Mode():
        found = lora_kernels.lora_down(x, a)
    assert torch.ops.lora_kernels.lora_down.default in seen
    seen.clear()
    of_own = lora_kernels.lora_down(x.as_subclass(Own), a)
    assert torch.ops.lora_kernels.lora_down.default in seen
    assert torch.equal(found, wanted)
    assert torch.equal(of_own.as_subclass(torch.Tensor), wanted)


def test_few_rows_of_16_bits_meet_an_adapter_in_float32(monkeypatch):
    monkeypatch.setattr(backend, "_cpu_multiplies", lambda _: True)
    rows = {
        (lora.FEW, torch.bfloat16): torch.float32,
        (1, torch.float16): torch.float32,
        (lora.FEW + 1, torch.bfloat16): torch.bfloat16,
        (1, torch.float64): torch.float64,
    }
    assert {key: lora.product_dtype(torch.empty(key[0], 4, dtype=key[1])) for key in rows} == rows
    with backend.triton_anywhere():
        assert lora.product_dtype(torch.empty(1, 4, dtype=torch.bfloat16)) == torch.bfloat16


def test_rows_are_copied_where_oneDNN_would_read_between_them_and_nowhere_else():
    for columns in (13, 80, 304):
        apart = torch.randn(3, 400).bfloat16()[:, :columns]
        assert backend.readable(apart).stride(0) == columns
    for left in (
        apart.float(),
        torch.randn(3, 400).bfloat16()[:, :96],
        torch.randn(3, 400).bfloat16()[:, :64],
        torch.randn(3, 40).bfloat16()[:, :16],
        torch.randn(3, 40).bfloat16()[:, :8],
        torch.randn(3, 13).bfloat16(),
    ):
        assert backend.readable(left) is left


def test_a_product_of_16_bits_is_rounded_by_the_processor_alone():
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.randn(3, 64).to(dtype), torch.randn(64, 5).to(dtype)
        exact, plain = left.float() @ right.float(), torch.mm(left, right).float()
        assert torch.equal(cross_entropy_on_cpu._product(left, right), plain)
        with backend.triton_anywhere():
            assert torch.equal(cross_entropy_on_cpu._product(left, right), exact)
        assert torch.equal(plain, exact) == (dtype == torch.float32)


LAUNCHED = {
    ("dequant", 64): ({"nf4_dequant"}, {"nf4_dequant", "lora_down_input"}),
    ("gemm_4bit", 64): (set(), {"nf4_dequant", "lora_down_input"}),
    ("triton", 64): ({"nf4_dequant", "adapted_product"}, {"nf4_dequant", "adapted_product"}),
    ("triton_4bit", 64): ({"adapted_product_4bit"}, {"adapted_product_4bit"}),
    # Rows that do not hold whole blocks of 64.
    ("gemm_4bit", 66): ({"nf4_dequant"}, {"nf4_dequant", "lora_down_input"}),
    ("triton_4bit", 66): ({"nf4_dequant"}, {"nf4_dequant", "lora_down_input"}),
}
"""What each way launches besides the narrow products, forwards and backwards."""


@pytest.mark.parametrize(("way", "inputs"), LAUNCHED)
def test_every_way_launches_its_own_kernels(way, inputs, triton_anywhere):
    weight = Frozen.of(*bnb.quantize_4bit(torch.randn(33, inputs), quant_type="nf4"))
    x, a, b = torch.randn(3, inputs, requires_grad=True), torch.randn(4, inputs), torch.randn(33, 4)
    forward, backward = ({f"{name}_kernel" for name in names} for names in LAUNCHED[way, inputs])
    with dispatch.forced(way):
        dequantizes = "nf4_dequant_kernel" in forward and way != "triton"
        assert linear.choose_path(x, weight) == ("dequant" if dequantizes else way)
        with guard.fenced_launches("end") as launched:
            y = lora_kernels.lora_linear(x, weight, None, a, b, scaling=1.0, dropout=0.5)
        assert launched == forward | {"lora_down_kernel"}
        with guard.fenced_launches("end") as launched:
            y.sum().backward()
        assert launched == backward | {"lora_down_weight_kernel"}


def attention(x, a):
    q = x[:, None, None, :16]
    return lora_kernels.rope(q, q, x[:, None, :16].detach(), x[:, None, :16].detach())[0]


LABELS = torch.tensor([0, 3, -100])
OPERATIONS = {
    "lora_down": (
        lambda x, a: lora_kernels.lora_down(x, a, dropout=0.5),
        {"lora_down", "lora_down_weight", "lora_down_input"},
    ),
    "lora_bwd_up": (
        lambda x, a: lora_kernels.lora_bwd_up(x.detach().half(), a.t(), x.detach()[:, :4].half(), 1.0),
        {"lora_up_backward"},
    ),
    "rms_norm_lora": (
        lambda x, a: lora_kernels.rms_norm_lora(x, None, x.detach()[0], a, 1e-5)[0],
        {"rms_norm_lora", "rms_norm_lora_backward"},
    ),
    "swiglu_lora": (lambda x, a: lora_kernels.swiglu_lora(x, x, a), {"swiglu_lora", "swiglu_lora_backward"}),
    "rope": (attention, {"rope"}),
    "linear_cross_entropy": (
        lambda x, a: lora_kernels.linear_cross_entropy(x, a, LABELS)[0],
        {"differentiate_logits"},
    ),
    "keep_mask": (lambda x, a: lora_kernels.keep_mask(x, 0.5, 0), {"keep_mask"}),
}
"""Each operation, and what it launches forwards and backwards."""


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_are_launched_where_they_are_wanted_and_nowhere_else(operation, forced, monkeypatch):
    monkeypatch.setattr(backend, "_forced", forced)
    run, names = OPERATIONS[operation]
    with guard.fenced_launches("end") as launched:
        found = run(torch.randn(3, 32, device="cpu", requires_grad=True), torch.randn(4, 32, device="cpu"))
        if isinstance(found, torch.Tensor) and found.requires_grad:
            found.sum().backward()
    assert launched == ({f"{name}_kernel" for name in names} if forced else set())


def test_a_slab_is_no_larger_than_it_must_be(monkeypatch):
    monkeypatch.setattr("lora_kernels.slabs.SLAB", 1)
    # A block of 64 begins with a row of 24 once in 8.
    four_bits = Frozen.of(*bnb.quantize_4bit(torch.randn(20, 24), quant_type="nf4"))
    for weight, rows in ((four_bits, 8), (Frozen.of(torch.randn(3, 24)), 1)):
        slabs = [slab for slab, _ in dense_slabs(weight, torch.float16)]
        assert {slab.stop - slab.start for slab in slabs[:-1]} == {rows}
        assert [slab.start for slab in slabs[1:]] == [slab.stop for slab in slabs[:-1]]
        assert (slabs[0].start, slabs[-1].stop) == (0, weight.shape[0])


def test_bitsandbytes_multiplies_whole_blocks_with_scales_in_groups_of_256():
    def weight(inputs, blocksize, group):
        nested = Nested(torch.ones(1), torch.ones(256), torch.ones(()), group) if group else None
        return Frozen(torch.ones(1), (2, inputs), Blocks(torch.ones(1), torch.ones(16), blocksize, nested))

    assert linear._gemm_4bit_takes(weight(128, 64, None))
    assert linear._gemm_4bit_takes(weight(64, 64, 256))
    assert not linear._gemm_4bit_takes(weight(64, 64, 128))
    assert not linear._gemm_4bit_takes(weight(96, 64, 256))
    assert not linear._gemm_4bit_takes(weight(64, 128, None))
    assert not linear._gemm_4bit_takes(Frozen.of(torch.ones(2, 64)))


@pytest.mark.parametrize(("blocksize", "wanted"), [(64, True), (128, True), (32, False)])
def test_four_bits_are_multiplied_where_a_tile_has_one_scale(blocksize, wanted):
    from lora_kernels.gpu import nf4_linear

    dense = torch.randn(16, 256)
    weight = Frozen.of(*bnb.quantize_4bit(dense, quant_type="nf4", blocksize=blocksize))
    assert nf4_linear.takes(weight) == wanted
    assert not nf4_linear.takes(Frozen.of(dense))


@pytest.mark.parametrize("way", ["dequant", "triton", "triton_4bit"])
def test_what_drops_nothing_draws_no_numbers(way, triton_anywhere, monkeypatch):
    def never(*_):
        raise AssertionError("Philox was asked")

    monkeypatch.setattr(philox, "keep", never)
    weight = Frozen.of(*bnb.quantize_4bit(torch.randn(33, 64), quant_type="nf4"))
    x, a, b = torch.randn(3, 64, requires_grad=True), torch.randn(4, 64, requires_grad=True), torch.randn(33, 4)
    with dispatch.forced(way):
        lora_kernels.lora_linear(x, weight, None, a, b, scaling=1.0).sum().backward()


class Products(TorchDispatchMode):
    """Notes the dtype of what is multiplied within the block."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.mm:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_the_product_itself_widens(dtype):
    with fake_gpu(), torch.device("cuda"), Products() as products:
        found = matmul_float32(torch.empty(3, 5, dtype=dtype), torch.empty(5, 4, dtype=dtype))
        assert found.shape == (3, 4)
        assert found.dtype == torch.float32
    assert products.dtypes == [dtype]


# --- What is copied.


class Launched:
    """Stands in for a kernel, and notes what it would be given."""

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        self.args, self.options = args, kwargs


def test_dense_heads_and_angles_are_read_where_they_are(monkeypatch):
    kernel = Launched()
    monkeypatch.setattr(rope, "rope_kernel", kernel)
    q, k = torch.randn(2, 5, 3, 16).transpose(1, 2), torch.randn(2, 5, 1, 16).transpose(1, 2)
    cos, sin = torch.randn(1, 5, 20)[..., :16], torch.randn(1, 5, 18)[..., :16]
    rope.rotate_into(torch.empty_like(q), torch.empty_like(k), q, k, cos, sin, False)
    assert [x.data_ptr() for x in kernel.args[:4]] == [x.data_ptr() for x in (q, k, cos, sin)]


def test_scales_are_rounded_before_the_offset_is_added(monkeypatch):
    """As bitsandbytes does it. Only a compiler fuses the two, so that what it is told is looked at."""
    kernel = Launched()
    monkeypatch.setattr(nf4, "nf4_dequant_kernel", kernel)
    nf4.dequantize_into(torch.empty(2, 64), Frozen.of(*bnb.quantize_4bit(torch.randn(2, 64), quant_type="nf4")))
    assert kernel.options["enable_fp_fusion"] is False


def test_only_rows_may_stand_apart():
    rows, columns = torch.randn(3, 9)[:, :5], torch.randn(3, 10)[:, ::2]
    assert rows_apart(rows) is rows
    for tensor in (columns, rows.t(), rows[0].expand(4, 5).t()):
        assert rows_apart(tensor).is_contiguous()
        assert torch.equal(rows_apart(tensor), tensor)


def test_a_gradient_with_columns_apart_is_made_dense_once(monkeypatch):
    given = []
    up_backward = linear.lora.up_backward
    monkeypatch.setattr(linear.lora, "up_backward", lambda dy, *rest: given.append(dy) or up_backward(dy, *rest))
    x, a, b = torch.randn(7, 16), torch.randn(2, 16, requires_grad=True), torch.randn(8, 2)
    for dy in (torch.randn(8, 7).t(), torch.ones(1, 1).expand(7, 8), torch.randn(7, 12)[:, :8]):
        lora_kernels.lora_linear(x, Frozen.of(torch.randn(8, 16)), None, a, b, scaling=1.0).backward(dy)
        assert given[-1].stride(1) == 1
        assert torch.equal(given[-1], dy)
    # Rows may stay apart.
    assert given[-1].data_ptr() == dy.data_ptr()


def test_what_nobody_asks_for_is_empty():
    ops = torch.ops.lora_kernels
    x, a, weight, labels = torch.randn(3, 8), torch.randn(2, 8), torch.randn(5, 8), torch.tensor([0, 4, -100])
    for asked in range(3):
        needed = [number == asked for number in range(3)]
        found = ops.linear_cross_entropy(x, weight, torch.zeros(5), labels, 1.0, 0.0, -100, None, *needed)[2:]
        assert [part.numel() for part in found] == [size * need for size, need in zip((24, 40, 5), needed, strict=True)]
    flat, s = Frozen.of(weight).flat(), torch.randn(3, 2)
    dx = ops.lora_linear_backward(torch.randn(3, 5), x, *flat, a, torch.randn(5, 2), s, 1.0, 0.5, 1, False)[0]
    assert dx.numel() == ops.lora_down_backward(s, x, a, 0.5, 1, False)[0].numel() == 0
    _, da, dweight = ops.rms_norm_lora_backward(x, None, x, x, torch.ones(3), x[0], None, False)
    assert da.numel() == dweight.numel() == ops.swiglu_lora_backward(x, x, x, None)[2].numel() == 0
    assert ops.rms_norm_lora(x, None, x[0], None, 1e-5)[1].numel() == 0


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def test_no_gradient_stays_none():
    x, weight, a = (torch.randn(size, requires_grad=True) for size in ((3, 8), (5, 8), (2, 8)))
    loss, _ = lora_kernels.linear_cross_entropy(x, weight, torch.tensor([0, 4, -100]))
    NoGradient.apply(loss).backward()
    assert x.grad is None
    assert weight.grad is None
    norm_weight = torch.ones(8, requires_grad=True)
    _, h = lora_kernels.rms_norm_lora(x, torch.ones(3, 8), norm_weight, a, 1e-5)
    h.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))
    assert norm_weight.grad is None
    assert a.grad is None


@pytest.mark.parametrize(("words", "aligned"), [(121, 128), (130, 144)])
def test_logits_have_rows_of_whole_vectors_and_no_room_to_spare(words, aligned, monkeypatch):
    given = []
    differentiate = cross_entropy_on_cpu._differentiate_logits
    monkeypatch.setattr(
        cross_entropy_on_cpu,
        "_differentiate_logits",
        lambda rows, *rest: given.append(rows) or differentiate(rows, *rest),
    )
    h, labels = torch.randn(9, 8), torch.tensor([1, -100, 2, 3, 4, 5, 6, 7, 8])
    for chunk_rows, rows in ((3, 3), (100, 8), (None, 8)):
        lora_kernels.linear_cross_entropy(h, torch.randn(words, 8), labels, chunk_rows=chunk_rows)
        assert given[-1].stride(0) == aligned
        assert given[-1].untyped_storage().nbytes() == rows * aligned * 4


# --- Seeds.


def test_seeds_take_62_bits():
    seeds = [lora_kernels.new_seed() for _ in range(64)]
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert max(seeds) >= 2**61


@pytest.mark.parametrize("forced", [False, True])
def test_the_mask_is_bool_and_a_seed_left_out_is_zero(forced, monkeypatch):
    monkeypatch.setattr(backend, "_forced", forced)
    x = torch.randn(9, 33)
    mask = lora_kernels.keep_mask(x, 0.5, 0)
    assert mask.dtype == torch.bool
    found = lora_kernels.lora_down(x, torch.eye(33), dropout=0.5)
    torch.testing.assert_close(found, 2 * x * mask)
    torch.testing.assert_close(lora_kernels.lora_down(x, torch.eye(33)), x)


# --- Dtypes.


def activated(gate, up, dy):
    h = lora_kernels.swiglu_lora(gate, up, None)
    return h.detach(), *torch.autograd.grad(h, (gate, up), dy)


def norm_backward(x, residual, dy):
    y, _ = lora_kernels.rms_norm_lora(x, residual, x.detach()[0], None, 1e-5)
    return torch.autograd.grad(y, (x, residual), dy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("operation", "forced"), [(activated, True), (norm_backward, False), (norm_backward, True)])
def test_sixteen_bits_are_what_float32_gives_rounded_once(operation, dtype, forced, monkeypatch):
    monkeypatch.setattr(backend, "_forced", forced)
    # Halves, so that the sum of two is exact.
    narrow = [(torch.randn(7, 40) * 8).round().div(2).to(dtype) for _ in range(3)]
    found, wanted = (
        operation(*(part.to(wider).requires_grad_() for part in narrow)) for wider in (dtype, torch.float32)
    )
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))


@pytest.mark.parametrize("forced", [False, True])
def test_gradients_have_the_dtypes_of_what_they_are_of(forced, monkeypatch):
    monkeypatch.setattr(backend, "_forced", forced)
    ops, (x, wide) = torch.ops.lora_kernels, (torch.randn(3, 8).bfloat16(), torch.randn(2, 8))
    y = torch.randn(3, 10).bfloat16()
    dx, da, dweight = ops.rms_norm_lora_backward(y, None, y, x, torch.ones(3), wide[0], wide, True)
    assert (dx.dtype, da.dtype, dweight.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert [part.dtype for part in ops.swiglu_lora_backward(y, x, x, wide)] == [x.dtype, x.dtype, wide.dtype]
    s = torch.randn(3, 2).bfloat16()
    assert [part.dtype for part in ops.lora_down_backward(s, x, wide, 0.5, 1, True)] == [x.dtype, wide.dtype]
    assert [part.dtype for part in ops.lora_bwd_up(x, wide.t(), s, 1.0)] == [x.dtype, torch.float32]
    flat, xa = Frozen.of(torch.randn(5, 8)).flat(), s.to(backend.product_dtype(x))
    found = ops.lora_linear_backward(y[:, :5], x, *flat, wide, torch.randn(5, 2), xa, 1.0, 0.5, 1, True)
    assert [part.dtype for part in found] == [x.dtype, wide.dtype, torch.float32]
    assert lora_kernels.lora_down(x, wide).dtype == x.dtype


# --- Kernels.


def test_a_tile_holds_16_to_64_ranks():
    tiles = {0: 16, 1: 16, 16: 16, 17: 32, 33: 64, 64: 64, 65: 64, 256: 64}
    assert {rank: rank_tile(rank, torch.bfloat16) for rank in tiles} == tiles
    assert {rank: rank_tile(rank, torch.float32) for rank in tiles} == {r: min(t, 32) for r, t in tiles.items()}


@triton.jit
def tanh_kernel(p_x, p_tanh, p_slope, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    b_tanh, b_slope = cross_entropy.tanh(tl.load(p_x + o))
    tl.store(p_tanh + o, b_tanh)
    tl.store(p_slope + o, b_slope)


def test_tanh_is_exact_to_the_last_places():
    x = torch.cat([torch.linspace(-0.3, 0.3, 1536), torch.linspace(-20, 20, 510), torch.tensor([1e-20, -1e-20])])
    tanh, slope = torch.empty_like(x), torch.empty_like(x)
    tanh_kernel[(1,)](x, tanh, slope, 2048)
    wanted = x.double().tanh()
    assert ((tanh.double() - wanted) / wanted).abs().max() < 4 * torch.finfo(torch.float32).eps
    # 1 - tanh^2, of which tanh alone keeps nothing where it is 1.
    wanted = 1 / x.double().cosh() ** 2
    assert ((slope.double() - wanted) / wanted).abs().max() < 1e-5


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_a_number_added_to_all_logits_changes_nothing(shift, forced, monkeypatch):
    monkeypatch.setattr(backend, "_forced", forced)
    h, weight = torch.randn(5, 16, requires_grad=True), torch.randn(33, 16)
    labels, bias = torch.tensor([0, 32, 5, -100, 7]), torch.zeros(33)
    results = []
    for number in (0.0, shift):
        loss, nll = lora_kernels.linear_cross_entropy(h, weight, labels, bias=bias + number, scale=2.0)
        results.append([nll, *torch.autograd.grad(loss, h)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    wanted = torch.nn.functional.cross_entropy(2 * (h @ weight.t()), labels, reduction="none")
    torch.testing.assert_close(results[0][0], wanted)


@pytest.mark.parametrize("four_bits", [False, True])
def test_every_block_is_computed_by_a_program_in_whichever_group_of_rows(four_bits):
    """19 blocks of rows, in groups of 8, by 3 of columns."""
    from lora_kernels.gpu import nf4_linear

    x, narrow, up = torch.randn(300, 64), torch.randn(300, 3), torch.randn(3, 130)
    weight, state = bnb.quantize_4bit(torch.randn(130, 64), quant_type="nf4")
    dense = bnb.dequantize_4bit(weight, state)
    tile = product.Tile(16, 64, 64, 4, 3)
    if four_bits:
        options = {"forward": True, "tile": tile}
        found = nf4_linear.adapted_product(x, Frozen.of(weight, state), narrow, up, None, 2.0, **options)
    else:
        found = product.adapted_product(x, dense.t(), narrow, up, None, 2.0, tile=tile)
    torch.testing.assert_close(found, x @ dense.t() + 2 * narrow @ up, rtol=1e-4, atol=1e-4)


# --- Dispatch.


def test_what_a_card_tells_about_itself(monkeypatch):
    told = SimpleNamespace(name="card", major=8, minor=9, multi_processor_count=128)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: told)
    # Without the cache, which would keep it for the tests that follow.
    assert dispatch.gpu.__wrapped__(torch.device("cuda")) == Gpu("card", "sm_89", 128)


@pytest.mark.parametrize("way", ["gemm_4bit", "dequant", "triton", "triton_4bit"])
def test_every_way_may_have_been_measured_and_outputs_are_not_inputs(way, monkeypatch):
    monkeypatch.setattr(dispatch, "_measured", {})
    card = Gpu("card", "sm_89", 128)
    dispatch.use_measured("card", {"512x256x1024-bfloat16-4bit": way})
    assert dispatch.choose(300, 256, 1024, card, packed=True, dtype=torch.bfloat16) == way
    # What has outputs and inputs the other way round was not measured, and goes by the table.
    assert dispatch.choose(1, 1024, 256, card, packed=True, dtype=torch.bfloat16) == "gemm_4bit"
    assert dispatch.choose(300, 1024, 256, card, packed=True, dtype=torch.bfloat16) == "dequant"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_instructions_for_the_dtype_make_a_cpu_multiply_in_it(dtype, monkeypatch):
    names = {
        torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16"},
        torch.float16: {"avx512_fp16", "amx_fp16", "fp16_arith"},
    }
    for name in {"avx2", *names[torch.bfloat16], *names[torch.float16]}:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True}, raising=False)
        assert backend._cpu_multiplies.__wrapped__(dtype) == (name in names[dtype])
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not backend._cpu_multiplies.__wrapped__(dtype)

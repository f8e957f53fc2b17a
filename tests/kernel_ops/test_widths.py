"""Operators in 16 bits on a processor without such products: computed in float32, and rounded to what was told."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lora_kernels import (
    Frozen,
    Projection,
    backend,
    linear_cross_entropy,
    lora_bwd_up,
    lora_down,
    lora_group,
    lora_linear,
    packed_attention,
    rms_norm_lora,
    rope,
    swiglu_lora,
)

HALF, FLOAT = torch.bfloat16, torch.float32
ROWS = {"few rows": (2, 3), "many rows": (2, 40)}


class AsTold(TorchDispatchMode):
    """Compares what each operator gives with what its shape function tells."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function.namespace == "lora_kernels":
            told = function(*tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, args))
            for one, other in zip(tree_leaves(found), tree_leaves(told), strict=True):
                assert (one.shape, one.dtype) == (other.shape, other.dtype), function
        return found


def draw(*shape: int, at: int = 0) -> torch.Tensor:
    """Returns random numbers that bfloat16 holds, in float32."""
    generator = torch.Generator().manual_seed(at + sum(shape))
    return (torch.randn(shape, generator=generator) / 4).to(HALF).float()


def nf4(n: int, k: int) -> Frozen:
    return Frozen.of(*bnb.quantize_4bit(draw(n, k), quant_type="nf4"))


def linear(leading, half, adapter, weight, **options):
    tensors = [draw(*leading, 64).to(half), draw(4, 64).to(adapter), draw(48, 4).to(adapter), draw(48).to(adapter)]
    return tensors, lambda x, a, b, bias: lora_linear(x, weight, bias, a, b, scaling=2.0, **options)


def group(leading, half, adapter, brought):
    tensors = [draw(*leading, 64 + 8 * brought).to(half), draw(24, 4).to(adapter), draw(40, 4, at=1).to(adapter)]
    tensors += [draw(24).to(adapter)] + ([] if brought else [draw(8, 64).to(adapter)])

    def op(x, b, other, bias, a=None):
        projections = [Projection(nf4(24, 64), bias, b, 2.0), Projection(nf4(40, 64), None, other, 0.5)]
        return lora_group(x, a, projections)

    return tensors, op


def attention(half):
    tensors = [draw(4, 9, 16).to(half), draw(2, 9, 16).to(half), draw(2, 9, 16, at=1).to(half)]
    return tensors, lambda q, k, v: packed_attention(q, k, v, [0, 4, 9], scale=0.3, window=3, softcap=2.0)


def cross_entropy(half):
    labels = torch.tensor([[3, 0, 39], [-100, 7, 1]])
    tensors = [draw(2, 3, 24).to(half), draw(40, 24).to(half), draw(40).to(half)]
    return tensors, lambda h, w, bias: linear_cross_entropy(h, w, labels, bias=bias, scale=0.5, softcap=3.0)


def rotated(half):
    angles = [draw(1, 5, 16).to(half), draw(1, 5, 16, at=1).to(half)]
    return [draw(2, 4, 5, 16).to(half), draw(2, 2, 5, 16).to(half)], lambda q, k: rope(q, k, *angles)


def norm(leading, half, adapter):
    tensors = [
        draw(*leading, 48).to(half),
        draw(*leading, 48, at=1).to(half),
        draw(48).to(half),
        draw(4, 48).to(adapter),
    ]
    return tensors, lambda x, residual, weight, a: rms_norm_lora(x, residual, weight, a, 1e-6)


CASES = {
    "lora_linear, NF4": lambda leading, half, adapter: linear(leading, half, adapter, nf4(48, 64)),
    "lora_linear, dense": lambda leading, half, adapter: linear(
        leading, half, adapter, Frozen.of(draw(48, 64).to(half))
    ),
    "lora_linear, dropout": lambda leading, half, adapter: linear(
        leading, half, adapter, nf4(48, 64), dropout=0.5, seed=3
    ),
    "lora_group": lambda leading, half, adapter: group(leading, half, adapter, brought=False),
    "lora_group, x @ a.T there": lambda leading, half, adapter: group(leading, half, adapter, brought=True),
    "lora_down": lambda leading, half, adapter: (
        [draw(*leading, 64).to(half), draw(4, 64).to(adapter)],
        lambda x, a: lora_down(x, a, dropout=0.25, seed=1),
    ),
    "rms_norm_lora": norm,
    "swiglu_lora": lambda leading, half, adapter: (
        [draw(*leading, 48).to(half), draw(*leading, 48, at=1).to(half), draw(4, 48).to(adapter)],
        swiglu_lora,
    ),
    "packed_attention": lambda leading, half, adapter: attention(half),
    "linear_cross_entropy": lambda leading, half, adapter: cross_entropy(half),
    "rope": lambda leading, half, adapter: rotated(half),
}
# Their first output is read by what follows in 16 bits, and rounded before it is multiplied.
ROUNDED_WITHIN = {"rms_norm_lora", "swiglu_lora", "lora_group, x @ a.T there"}


def outcome(case, leading, half, adapter):
    """Returns outputs and gradients, the upstream gradients being such as bfloat16 holds."""
    tensors, op = case(leading, half, adapter)
    tensors = [x.clone().requires_grad_() for x in tensors]
    found = op(*tensors)
    outputs = [x for x in (found if isinstance(found, tuple | list) else [found]) if x.requires_grad]
    upstream = [draw(*x.shape, at=7).to(x.dtype) for x in outputs]
    return outputs, torch.autograd.grad(outputs, tensors, upstream, allow_unused=True)


@pytest.mark.parametrize("has", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("adapter", [FLOAT, HALF], ids=["float32 adapter", "bfloat16 adapter"])
@pytest.mark.parametrize("leading", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", CASES)
def test_what_comes_out_is_what_was_told(name, leading, adapter, has, monkeypatch):
    monkeypatch.setattr(backend, "_cpu_multiplies", lambda _: has)
    with AsTold():
        outcome(CASES[name], leading, HALF, adapter)


@pytest.mark.parametrize("adapter", [FLOAT, HALF], ids=["float32 adapter", "bfloat16 adapter"])
@pytest.mark.parametrize("leading", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", [name for name in CASES if name not in ROUNDED_WITHIN])
def test_without_instructions_it_is_computed_in_float32_and_rounded_once(name, leading, adapter, monkeypatch):
    monkeypatch.setattr(backend, "_cpu_multiplies", lambda _: False)
    found, wanted = (outcome(CASES[name], leading, half, adapter) for half in (HALF, FLOAT))
    for narrow, wide in zip([*found[0], *found[1]], [*wanted[0], *wanted[1]], strict=True):
        assert torch.equal(narrow, wide.to(narrow.dtype))


@pytest.mark.parametrize("name", ["rms_norm_lora", "swiglu_lora"])
def test_what_is_put_behind_is_the_product_of_what_lies_before_it(name, monkeypatch):
    monkeypatch.setattr(backend, "_cpu_multiplies", lambda _: False)
    tensors, op = CASES[name]((2, 40), HALF, FLOAT)
    found = op(*tensors)
    y = found[0] if isinstance(found, tuple) else found
    product = y[..., :48].float() @ tensors[-1].to(HALF).float().T
    assert torch.equal(y[..., 48:], product.to(HALF))


def test_both_gradients_of_the_way_up_are_those_of_float32(monkeypatch):
    monkeypatch.setattr(backend, "_cpu_multiplies", lambda _: False)
    for rows in (3, 80):
        dy, b, xa = draw(rows, 24), draw(24, 4), draw(rows, 4)
        found, wanted = lora_bwd_up(dy.to(HALF), b.to(HALF), xa.to(HALF), 0.7), lora_bwd_up(dy, b, xa, 0.7)
        assert torch.equal(found[0], wanted[0].to(HALF))
        assert torch.equal(found[1], wanted[1])
        assert found[1].dtype == FLOAT
        assert found[1].is_contiguous()

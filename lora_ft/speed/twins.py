"""Every operation of `lora_kernels` held against its naive twin, outputs and gradients, on the device at hand.

Shapes: M rows of activations, N outputs and K inputs of a weight, R the rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import bitsandbytes as bnb
import torch

from lora_kernels import (
    Frozen,
    Projection,
    dispatch,
    linear_cross_entropy,
    lora_bwd_up,
    lora_down,
    lora_group,
    lora_linear,
    nf4_dequant,
    packed_attention,
    reference,
    rms_norm_lora,
    rope,
    swiglu_lora,
)

WORST = 1.1
"""Largest error allowed, over that of the twin in the same dtype; both against the twin in float64. It is enough on a
GPU too, as the tensors here have thousands of numbers; `tests/kernel_ops/accuracy.py` has smaller ones."""
RANK = 16


@dataclass(frozen=True)
class Checked:
    """An operation, or the gradients of one, and its error beside that of its twin."""

    op: str
    error: float
    plain: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True)
class Sizes:
    """Of the tensors that operations are run on."""

    m: int
    n: int
    k: int
    words: int
    heads: tuple[int, int]
    """Of queries, and of keys and values, 64 wide."""
    bounds: tuple[int, ...]
    """Where examples of packed attention begin, and its tokens: `m`."""


ODD = Sizes(130, 192, 256, 1000, (4, 2), (0, 40, 41, 130))
"""Off every tile."""


@dataclass(frozen=True)
class Case:
    """An operation, its twin, and what to run both on."""

    name: str
    op: Callable[..., Any]
    twin: Callable[..., Any]
    inputs: tuple[Any, ...]
    learned: tuple[int, ...]
    """The inputs that have a gradient."""
    flops: float
    """Of matrix products, forwards and backwards."""
    layers: int = 0
    """Those that have the frozen weight, which is the second of the inputs: dense, for the twin alone."""
    way: dispatch.Path | None = None


def check(on: torch.device, dtype: torch.dtype) -> Iterator[Checked]:
    """Yields each operation beside its twin, then its gradients, on numbers drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    quantized = bnb.functional.quantize_4bit(torch.randn(192, 256, generator=generator).to(on, dtype), quant_type="nf4")
    weight = Frozen.of(*quantized)
    yield Checked("nf4_dequant", _error(nf4_dequant(weight, dtype), reference.nf4_dequant(weight, dtype)), 0.0, 0.0)
    for case in cases(on, dtype, ODD):
        with nullcontext() if case.way is None else dispatch.forced(case.way):
            yield from _compared(case)


def cases(on: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """Yields every operation with a twin, those with a frozen weight by each way that the device has."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(on, dtype)

    m, n, k = sizes.m, sizes.n, sizes.k
    x_MK, dy_MN, xa_MR, a_RK, b_NR = draw(m, k), draw(m, n), draw(m, RANK), draw(RANK, k), draw(n, RANK)
    weight = Frozen.of(*bnb.functional.quantize_4bit(draw(n, k), quant_type="nf4", compress_statistics=True))
    w_NK, bias_N, narrow = nf4_dequant(weight, dtype), draw(n), 2.0 * m * k * RANK
    yield Case("lora_down", lora_down, reference.lora_down, (x_MK, a_RK), (0, 1), 3 * narrow)
    up = (dy_MN, b_NR, xa_MR, 0.5)
    yield Case("lora_bwd_up", lora_bwd_up, reference.lora_bwd_up, up, (), 4.0 * m * n * RANK)

    def adapted(x_MK: Any, w_NK: Any, *rest: Any) -> torch.Tensor:
        return lora_linear(x_MK, weight, *rest[:3], scaling=rest[3])

    def grouped(x_MK: Any, w_NK: Any, a_RK: Any, *b: Any) -> tuple[torch.Tensor, ...]:
        return tuple(lora_group(x_MK, a_RK, [Projection(weight, bias_N, b_NR, 0.5) for b_NR in b]))

    def its_twin(x_MK: Any, w_NK: Any, a_RK: Any, *b: Any) -> tuple[torch.Tensor, ...]:
        layers = [(w_NK, bias_N.to(x_MK.dtype), b_NR, 0.5) for b_NR in b]
        return tuple(reference.lora_group(x_MK, a_RK, layers))

    one, both = (x_MK, w_NK, bias_N, a_RK, b_NR, 0.5), (x_MK, w_NK, a_RK, *b_NR.split(RANK // 2, dim=1))
    flops, learned, adapter = 4.0 * m * n * k, (0, 2, 3, 4), 6.0 * m * RANK * (n + k)
    for way in dispatch.ways(True, dtype) if on.type == "cuda" else ("dequant",):
        alone = reference.lora_linear
        yield Case(f"lora_linear, {way}", adapted, alone, one, learned, flops + adapter, 1, way)
        yield Case(f"lora_group, {way}", grouped, its_twin, both, learned, 2 * flops + adapter, 2, way)
    normed = (x_MK, draw(m, k), draw(k), a_RK, 1e-5)
    yield Case("rms_norm_lora", rms_norm_lora, reference.rms_norm_lora, normed, (0, 1, 2, 3), 3 * narrow)
    gated = (x_MK, draw(m, k), a_RK)
    yield Case("swiglu_lora", swiglu_lora, reference.swiglu_lora, gated, (0, 1, 2), 3 * narrow)
    queries, keys = sizes.heads
    turned = (draw(1, queries, m, 64), draw(1, keys, m, 64), draw(1, m, 64), draw(1, m, 64))
    yield Case("rope", rope, reference.rope, turned, (0, 1), 0.0)

    def attention(op: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda q, k, v: op(q, k, v, list(sizes.bounds), scale=0.125)

    qkv = (draw(queries, m, 64), draw(keys, m, 64), draw(keys, m, 64))
    # Of each product half, as no token sees those after it; two forwards, and five backwards.
    seen = 7.0 * queries * 64 * sum((end - begin) ** 2 for begin, end in pairwise(sizes.bounds))
    both_ways = attention(packed_attention), attention(reference.packed_attention)
    yield Case("packed_attention", *both_ways, qkv, (0, 1, 2), seen)
    labels = torch.randint(0, sizes.words, (m,), generator=generator).to(on)
    labels[::3] = -100
    head = (x_MK, draw(sizes.words, k) / 16, labels)
    flops = 6.0 * int((labels >= 0).sum()) * sizes.words * k
    twin = reference.linear_cross_entropy
    yield Case("linear_cross_entropy", linear_cross_entropy, twin, head, (0, 1), flops)


def _compared(case: Case) -> Iterator[Checked]:
    """Yields the worst of what an operation gives, then of the gradients, if it has any."""
    exact_inputs = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in case.inputs]
    dtype, learned = case.inputs[0].dtype, case.learned
    found = _outputs_and_gradients(case.op, case.inputs, learned, dtype)
    plain = _outputs_and_gradients(case.twin, case.inputs, learned, dtype)
    exact = _outputs_and_gradients(case.twin, exact_inputs, learned, dtype)
    for suffix, *parts in zip(("", ", gradients"), found, plain, exact, strict=True):
        each = [_judged(case.name + suffix, *three) for three in zip(*parts, strict=True)]
        if each:
            yield max(each, key=lambda one: one.error / one.allowed)


def _outputs_and_gradients(
    function: Callable[..., Any], inputs: Sequence[Any], learned: Sequence[int], dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The upstream gradients are the same numbers of `dtype` always; of cross entropy only the sum has one, which is 1.

    (Another would round the gradients of a CPU in 16 bits a second time.)
    """
    leaves = [a.detach().requires_grad_() if i in learned else a for i, a in enumerate(inputs)]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not learned:
        return outputs, []
    wanted = [leaves[i] for i in learned]
    if outputs[0].ndim == 0:
        return [y.detach() for y in outputs], list(torch.autograd.grad(outputs[0], wanted))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(dtype).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, wanted, upstream)
    return [y.detach() for y in outputs], list(gradients)


def _judged(name: str, found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> Checked:
    """Half a unit in the last place of a 16-bit dtype is always allowed, and two of float32: the order of its sums.

    On a GPU three: its exponential and reciprocal root are good to two themselves.
    """
    units = 3.0 if found.is_cuda else 2.0
    if found.dtype != torch.float32:
        units = 1 / 4
    error, twin = _error(found, exact), _error(plain, exact)
    return Checked(name, error, twin, max(WORST * twin, units * torch.finfo(found.dtype).eps))


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())

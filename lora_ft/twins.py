"""Every operation of `lora_kernels` held against its naive twin, outputs and gradients, on the device at hand.

Shapes: M rows of activations, N outputs and K inputs of a weight, R the rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
"""Largest error allowed, over that of the twin in the same dtype; both against the twin in float64."""
M, N, K, WORDS = 130, 192, 256, 1000
RANK = 16
BOUNDS = (0, 40, 41, 130)
"""Where examples of packed attention begin, and its tokens."""


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


def check(on: torch.device, dtype: torch.dtype) -> Iterator[Checked]:
    """Yields each operation beside its twin, then its gradients, on numbers drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(on, dtype)

    x_MK, dy_MN, xa_MR, a_RK, b_NR = draw(M, K), draw(M, N), draw(M, RANK), draw(RANK, K), draw(N, RANK)
    weight = Frozen.of(*bnb.functional.quantize_4bit(draw(N, K), quant_type="nf4", compress_statistics=True))
    w_NK, bias_N = nf4_dequant(weight, dtype), draw(N)
    yield Checked("nf4_dequant", _error(w_NK, reference.nf4_dequant(weight, dtype)), 0.0, 0.0)
    yield from _compared("lora_down", lora_down, reference.lora_down, (x_MK, a_RK), (0, 1))
    yield from _compared("lora_bwd_up", lora_bwd_up, reference.lora_bwd_up, (dy_MN, b_NR, xa_MR, 0.5), ())
    for way in dispatch.ways(True, dtype) if on.type == "cuda" else ("dequant",):
        # Only the twin is given the weight dense: in float64 there is no other.
        def adapted(x_MK: Any, w_NK: Any, *rest: Any) -> torch.Tensor:
            return lora_linear(x_MK, weight, *rest[:3], scaling=rest[3])

        def grouped(x_MK: Any, w_NK: Any, a_RK: Any, *b: Any) -> tuple[torch.Tensor, ...]:
            return tuple(lora_group(x_MK, a_RK, [Projection(weight, bias_N, b_NR, 0.5) for b_NR in b]))

        def its_twin(x_MK: Any, w_NK: Any, a_RK: Any, *b: Any) -> tuple[torch.Tensor, ...]:
            layers = [(w_NK, bias_N.to(x_MK.dtype), b_NR, 0.5) for b_NR in b]
            return tuple(reference.lora_group(x_MK, a_RK, layers))

        halves = b_NR.split(RANK // 2, dim=1)
        with dispatch.forced(way):
            inputs = (x_MK, w_NK, bias_N, a_RK, b_NR, 0.5)
            yield from _compared(f"lora_linear, {way}", adapted, reference.lora_linear, inputs, (0, 2, 3, 4))
            yield from _compared(f"lora_group, {way}", grouped, its_twin, (x_MK, w_NK, a_RK, *halves), (0, 2, 3, 4))
    normed = (x_MK, draw(M, K), draw(K), a_RK, 1e-5)
    yield from _compared("rms_norm_lora", rms_norm_lora, reference.rms_norm_lora, normed, (0, 1, 2, 3))
    yield from _compared("swiglu_lora", swiglu_lora, reference.swiglu_lora, (x_MK, draw(M, K), a_RK), (0, 1, 2))
    heads = (draw(2, 4, 33, 64), draw(2, 2, 33, 64), draw(1, 33, 64), draw(1, 33, 64))
    yield from _compared("rope", rope, reference.rope, heads, (0, 1))

    def attention(op: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda q, k, v: op(q, k, v, list(BOUNDS), scale=0.125)

    qkv = (draw(4, M, 64), draw(2, M, 64), draw(2, M, 64))
    both = attention(packed_attention), attention(reference.packed_attention)
    yield from _compared("packed_attention", *both, qkv, (0, 1, 2))
    labels = torch.randint(0, WORDS, (M,), generator=generator).to(on)
    labels[::3] = -100
    head = (x_MK, draw(WORDS, K) / 16, labels)
    yield from _compared("linear_cross_entropy", linear_cross_entropy, reference.linear_cross_entropy, head, (0, 1))


def _compared(
    name: str, op: Callable[..., Any], twin: Callable[..., Any], inputs: Sequence[Any], learned: Sequence[int]
) -> Iterator[Checked]:
    """Yields the worst of what `op` gives, then of the gradients of the `learned` inputs, if there are any."""
    exact_inputs = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in inputs]
    dtype = inputs[0].dtype
    found = _outputs_and_gradients(op, inputs, learned, dtype)
    plain = _outputs_and_gradients(twin, inputs, learned, dtype)
    exact = _outputs_and_gradients(twin, exact_inputs, learned, dtype)
    for suffix, *parts in zip(("", ", gradients"), found, plain, exact, strict=True):
        each = [_judged(name + suffix, *three) for three in zip(*parts, strict=True)]
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
    """Half a unit in the last place of a 16-bit dtype is always allowed, and two of float32: the order of its sums."""
    units = 2 if found.dtype == torch.float32 else 1 / 4
    error, twin = _error(found, exact), _error(plain, exact)
    return Checked(name, error, twin, max(WORST * twin, units * torch.finfo(found.dtype).eps))


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())

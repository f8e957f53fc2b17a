"""An operation beside its twin: outputs and every gradient, from the same inputs and upstream gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.kernel_ops.accuracy import assert_as_good

Function = Callable[..., Any]
Inputs = Sequence[torch.Tensor | None]


def outputs_and_gradients(
    function: Function, inputs: Inputs, upstream: Inputs, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Returns the outputs of `function`, computed in `dtype`, and the gradients of the inputs that require one."""
    leaves = [
        None if x is None else x.detach().to(dtype or x.dtype).requires_grad_(x.requires_grad)  # keeps the strides
        for x in inputs
    ]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    given = [(y, g.to(y.dtype)) for y, g in zip(outputs, upstream, strict=True) if g is not None]
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    gradients = torch.autograd.grad([y for y, _ in given], wanted, [g for _, g in given])
    return [y.detach() for y in outputs] + list(gradients)


def assert_like_its_twin(op: Function, twin: Function, inputs: Inputs, upstream: Inputs | None = None) -> None:
    """Fails where an output or a gradient of `op` is worse than that of `twin` in the same dtype, or not a number.

    The upstream gradients are random unless given; None among them is an output that nobody uses.
    """
    if upstream is None:
        outputs = twin(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.randn_like(y, memory_format=torch.contiguous_format) for y in outputs]
    found = outputs_and_gradients(op, inputs, upstream)
    plain = outputs_and_gradients(twin, inputs, upstream)
    exact = outputs_and_gradients(twin, inputs, upstream, torch.float64)
    for *three, which in zip(found, plain, exact, range(len(found)), strict=True):
        try:
            assert_as_good(*three)
        except AssertionError as problem:
            raise AssertionError(f"result {which} of {len(found)}: {problem}") from None

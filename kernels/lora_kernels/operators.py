"""Operators of torch that cost little to call.

`torch.library.custom_op` looks through the whole schema for each of its arguments when gradients are wanted: with the
seventeen of `lora_linear`, that is longer than multiplying one row by a small weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

_library = torch.library.Library("lora_kernels", "FRAGMENT")


class Operator:
    """An operator that changes none of its inputs, registered as by `torch.library.custom_op` and with its methods.

    Its first argument is a tensor. Others may be lists; their gradients are lists of the same lengths. What it gives is
    a tensor, a tuple of them, or a list. It computes in the dtypes it is given, inside autocast as outside.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._name, self._function = function.__name__.removeprefix("_"), function
        self._differentiable: type[torch.autograd.Function] | None = None
        schema = torch.library.infer_schema(function, mutates_args=())
        arguments, _, result = schema.partition(" -> ")
        self._takes_lists, self._gives_list = "[]" in arguments, result == "Tensor[]"
        _library.define(self._name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self._name, self._compute, "CompositeExplicitAutograd")
        _library.impl(self._name, self._record, "Autograd")
        self._call = getattr(torch.ops.lora_kernels, self._name).default

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Registers what shapes and dtypes come out, for tensors without data."""
        torch.library.register_fake(f"lora_kernels::{self._name}", fake, lib=_library)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Registers how gradients go back, and what of the inputs and outputs is kept for that."""
        below_autograd = self._below_autograd

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *spread: Any) -> Any:
                *inputs, ctx.lengths = spread
                inputs = inputs if ctx.lengths is None else _gathered(inputs, ctx.lengths)
                output = below_autograd(*inputs)
                setup_context(ctx, tuple(inputs), output)
                return tuple(output) if isinstance(output, list) else output

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                found = backward(ctx, *gradients)
                return (*(found if ctx.lengths is None else _spread(found)), None)

        self._differentiable = Differentiable

    def _record(self, *inputs: Any) -> Any:
        spread = _spread(inputs) if self._takes_lists else inputs
        wanted = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in spread)
        if not wanted:
            return self._below_autograd(*inputs)
        if self._differentiable is None:
            raise NotImplementedError(f"lora_kernels::{self._name} has no gradient, nor its caller a second one.")
        # A function of autograd sees no tensor inside a list.
        lengths = [len(x) if isinstance(x, list) else None for x in inputs] if self._takes_lists else None
        output = self._differentiable.apply(*spread, lengths)
        return list(output) if self._gives_list else output

    def _below_autograd(self, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self._call(*inputs)

    def _compute(self, *inputs: Any) -> Any:
        device = inputs[0].device.type
        if not torch.is_autocast_enabled(device):
            return self._function(*inputs)
        with torch.autocast(device, enabled=False):
            return self._function(*inputs)


def _spread(inputs: Sequence[Any]) -> list[Any]:
    """Returns the inputs with those of a list one by one."""
    return [part for x in inputs for part in (x if isinstance(x, list) else (x,))]


def _gathered(spread: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    """Returns what `_spread` was given; `lengths` holds those of the lists, and None for what was none."""
    rest = iter(spread)
    return [next(rest) if length is None else list(itertools.islice(rest, length)) for length in lengths]

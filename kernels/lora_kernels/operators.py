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


bodies: dict[str, Callable[..., Any]] = {}
"""What each operator runs, by its name: for a mode that is to see the operations inside."""

# What an operator is given whose computing nothing but torch itself can look at.
_PLAIN = {torch.Tensor, torch.nn.Parameter, int, float, bool, type(None), torch.dtype}


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
        bodies[self._name] = self._compute
        self._call = getattr(torch.ops.lora_kernels, self._name).default

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Registers what shapes and dtypes come out, for tensors without data."""
        torch.library.register_fake(f"lora_kernels::{self._name}", fake, lib=_library)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Registers how gradients go back, and what of the inputs and outputs is kept for that."""

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *spread: Any) -> Any:
                *inputs, ctx.lengths, compute = spread
                inputs = inputs if ctx.lengths is None else _gathered(inputs, ctx.lengths)
                output = compute(*inputs)
                setup_context(ctx, tuple(inputs), output)
                return tuple(output) if isinstance(output, list) else output

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                found = backward(ctx, *gradients)
                return (*(found if ctx.lengths is None else _spread(found)), None, None)

        self._differentiable = Differentiable

    def __call__(self, *inputs: Any) -> Any:
        """Returns what the operator gives.

        The dispatcher, which takes as long as multiplying a row by a small matrix, is asked where somebody watches it
        only (a mode, a transform, the profiler, a tensor of a class of its own, `torch.compile`), or where there are no
        numbers to compute with.
        """
        spread = self._spread(inputs)
        if inputs[0].is_meta or _dispatcher_is_watched() or not _PLAIN.issuperset(map(type, spread)):
            return self._call(*inputs)
        return self._recorded(inputs, spread, self._compute)

    def _record(self, *inputs: Any) -> Any:
        return self._recorded(inputs, self._spread(inputs), self._below_autograd)

    def _recorded(self, inputs: Sequence[Any], spread: Sequence[Any], compute: Callable[..., Any]) -> Any:
        wanted = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in spread)
        if not wanted:
            return compute(*inputs)
        if self._differentiable is None:
            raise NotImplementedError(f"lora_kernels::{self._name} has no gradient, nor its caller a second one.")
        # A function of autograd sees no tensor inside a list.
        lengths = [len(x) if isinstance(x, list) else None for x in inputs] if self._takes_lists else None
        output = self._differentiable.apply(*spread, lengths, compute)
        return list(output) if self._gives_list else output

    def _spread(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return _spread(inputs) if self._takes_lists else inputs

    def _below_autograd(self, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self._call(*inputs)

    def _compute(self, *inputs: Any) -> Any:
        device = inputs[0].device
        if device.type == "cuda" and torch.cuda.is_initialized() and device.index != torch.cuda.current_device():
            # Triton launches where torch currently is, wherever the tensors are.
            with torch.cuda.device(device):
                return self._compute(*inputs)
        if not torch.is_autocast_enabled(device.type):
            return self._function(*inputs)
        with torch.autocast(device.type, enabled=False):
            return self._function(*inputs)


def _dispatcher_is_watched() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _spread(inputs: Sequence[Any]) -> list[Any]:
    """Returns the inputs with those of a list one by one."""
    return [part for x in inputs for part in (x if isinstance(x, list) else (x,))]


def _gathered(spread: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    """Returns what `_spread` was given; `lengths` holds those of the lists, and None for what was none."""
    rest = iter(spread)
    return [next(rest) if length is None else list(itertools.islice(rest, length)) for length in lengths]

"""Operators of torch that cost little to call.

`torch.library.custom_op` looks through the whole schema for each of its arguments when gradients are wanted: with the
seventeen of `lora_linear`, that is longer than multiplying one row by a small weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("lora_kernels", "FRAGMENT")


class Operator:
    """An operator that changes none of its inputs, registered as by `torch.library.custom_op` and with its methods.

    Its first argument is a tensor. It computes in the dtypes it is given, inside autocast as outside.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._name, self._function = function.__name__.removeprefix("_"), function
        self._differentiable: type[torch.autograd.Function] | None = None
        schema = torch.library.infer_schema(function, mutates_args=())
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
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = below_autograd(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                return backward(ctx, *gradients)

        self._differentiable = Differentiable

    def _record(self, *inputs: Any) -> Any:
        wanted = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
        if not wanted:
            return self._below_autograd(*inputs)
        if self._differentiable is None:
            raise NotImplementedError(f"lora_kernels::{self._name} has no gradient, nor its caller a second one.")
        return self._differentiable.apply(*inputs)

    def _below_autograd(self, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self._call(*inputs)

    def _compute(self, *inputs: Any) -> Any:
        device = inputs[0].device.type
        if not torch.is_autocast_enabled(device):
            return self._function(*inputs)
        with torch.autocast(device, enabled=False):
            return self._function(*inputs)

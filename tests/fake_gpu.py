"""A GPU that is not there: fake tensors on `cuda` go through the real code of layers, operators and their gradients.

A build of torch for CPUs has no guard for the device, and its autograd engine asks for streams of it: so a guard that
does nothing is put in place, and the graph is walked here, in Python.
"""

import copy
import ctypes
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState
from torch import nn
from torch._library.simple_registry import singleton
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.runtime.interpreter import InterpretedFunction

from lora_kernels import dispatch
from lora_kernels.frozen import Blocks

CARD = dispatch.Gpu("a card", "sm_89", 128)
# Of c10/core/DeviceType.h. The guard of meta tensors does nothing.
CUDA, META, DEVICE_TYPES = 1, 14, 22


@contextmanager
def fake_gpu() -> Iterator[list[str]]:
    """Makes new tensors fake and operators run their bodies on them; gives the names of the kernels that would start.

    Of a kernel only the launch is left out: what it would be given is looked at.
    """
    names: list[str] = []

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        assert tensors, kernel.__name__
        assert all(isinstance(value, FakeTensor) and value.is_cuda for value in tensors), kernel.__name__
        assert all(size > 0 for size in grid), kernel.__name__
        assert set(kwargs) | set(kernel.arg_names[: len(args)]) >= set(kernel.arg_names), kernel.__name__
        names.append(kernel.__name__)

    with pytest.MonkeyPatch.context() as patch, _guard_of_nothing(), _bodies():
        patch.setattr(InterpretedFunction, "run", launch)
        patch.setattr(dispatch, "gpu", lambda device: CARD)
        # Or `torch.autocast` would switch itself off.
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        # Or each tensor that a checkpointed part kept would have it computed again: to torch no backward pass runs.
        patch.setattr(torch._C, "_current_graph_task_id", lambda: 1)
        # Values are not there to be looked at.
        patch.setattr(Blocks, "kind", "nf4")
        with FakeTensorMode(shape_env=ShapeEnv()):
            yield names


def move(model: nn.Module) -> None:
    """Replaces every tensor of a model by a fake one on the GPU, those that say how it is quantized too."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(like(parameter), requires_grad=parameter.requires_grad)
                vars(moved).update({key: _moved(value) for key, value in vars(parameter).items()})
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            module._buffers[name] = _moved(buffer)
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.state = _moved(module.state)


def _moved(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return like(value)
    if isinstance(value, QuantState | bnb.MatmulLtState):
        value = copy.copy(value)
        vars(value).update({key: _moved(part) for key, part in vars(value).items()})
    return value


def like(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a fake tensor on the GPU."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def backward(loss: torch.Tensor) -> None:
    """Accumulates the gradients of a loss as `loss.backward()` does."""
    edges = Counter(after for node in _nodes(loss.grad_fn) for after, _ in _inputs(node))
    gradients: dict[Any, dict[int, torch.Tensor]] = defaultdict(dict)
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        for (after, place), gradient in zip(_inputs(node), _call(node, gradients.pop(node, {})), strict=True):
            if gradient is not None:
                before = gradients[after].get(place)
                gradients[after][place] = gradient if before is None else before + gradient
            edges[after] -= 1
            if not edges[after]:
                ready.append(after)


def _nodes(root: Any) -> list[Any]:
    found, todo = {root: None}, [root]
    while todo:
        new = [after for after, _ in _inputs(todo.pop()) if after not in found]
        found |= dict.fromkeys(new)
        todo += dict.fromkeys(new)
    return list(found)


def _inputs(node: Any) -> list[tuple[Any, int]]:
    """Returns the edges to what a node sends gradients to."""
    return [edge for edge in node.next_functions if edge[0] is not None]


def _call(node: Any, given: dict[int, torch.Tensor]) -> list[torch.Tensor | None]:
    """Returns a gradient for each edge of `_inputs`."""
    outputs = node._input_metadata
    gradients = [given.get(i) for i in range(len(outputs))]
    for i, output in enumerate(outputs):
        if gradients[i] is not None:
            # What was broadcast is summed, what was cast is cast back, but nothing may change its device.
            assert gradients[i].device == output.device, node.name()
            gradients[i] = gradients[i].sum_to_size(output.shape).to(output.dtype)
    if not given:
        return [None] * len(_inputs(node))
    if hasattr(node, "variable"):
        (gradient,) = gradients
        assert gradient.dtype == node.variable.dtype
        before = node.variable.grad
        node.variable.grad = gradient.detach() if before is None else before + gradient
        return []
    with torch.no_grad():
        if not hasattr(node, "needs_input_grad"):
            found = node(*gradients)
            found = found if isinstance(found, tuple) else (found,)
            return [g for g, edge in zip(found, node.next_functions, strict=True) if edge[0] is not None]
        # A function written in Python answers for every argument, a tensor or not, and is not asked with None.
        for i, output in enumerate(outputs):
            if gradients[i] is None:
                gradients[i] = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
        found, needed = node.apply(*gradients), node.needs_input_grad
        # An operator of torch's own answers for each number of a list too, after its tensors and always with nothing.
        assert len(found) >= len(needed)
        assert all(gradient is None for gradient in found[len(needed) :])
        return [gradient for gradient, wanted in zip(found, needed, strict=False) if wanted]


@contextmanager
def _bodies() -> Iterator[None]:
    """Runs the bodies of the operators of `lora_kernels` where fake tensors would have their shape functions run."""
    on_gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    library = torch.library.Library("lora_kernels", "FRAGMENT")
    for name in torch._C._dispatch_get_all_op_names():
        space, _, op = name.partition("::")
        if space == "lora_kernels":
            body = functools.partial(getattr(torch.ops.lora_kernels, op).default.redispatch, on_gpu)
            shapes = singleton.find(name).fake_impl.kernel.func
            torch.library.register_fake(name, _checked(body, shapes), lib=library, allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _checked(body: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the body of an operator, which must give tensors like those that its shape function tells of."""

    def checked(*args: Any) -> Any:
        found, told = body(*args), shapes(*args)
        for one, other in zip(
            *(out if isinstance(out, tuple | list) else (out,) for out in (found, told)), strict=True
        ):
            assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return found

    return checked


@contextmanager
def _guard_of_nothing() -> Iterator[None]:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * DEVICE_TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[CUDA] = guards[CUDA], guards[CUDA] or guards[META]
    try:
        yield
    finally:
        guards[CUDA] = before

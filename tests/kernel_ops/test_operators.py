"""An operator called straight gives what the dispatcher gives, and whoever watches the dispatcher sees it."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels
from lora_kernels import Frozen, Projection
from tests.kernel_ops import conftest


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    pass


def layer(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return lora_kernels.lora_linear(x, Frozen.of(w), None, a, b, scaling=0.5, dropout=0.25, seed=3)


def group(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    stack = lora_kernels.stacked([a, a])
    return torch.cat(lora_kernels.lora_group(x, stack, [Projection(Frozen.of(w), None, b, 0.5)] * 2), dim=-1)


def gradients(function) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x, w, a, b = torch.randn(5, 24), torch.randn(12, 24), torch.randn(4, 24), torch.randn(12, 4)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    y = function(x, w, a, b)
    return [y, *torch.autograd.grad(y.square().sum(), (x, a, b))]


@pytest.mark.parametrize(("function", "name"), [(layer, "lora_linear"), (group, "lora_group")])
def test_called_straight_or_by_the_dispatcher_it_gives_the_same(function, name):
    straight = gradients(function)
    with Seen() as seen:
        dispatched = gradients(function)
    assert {f"lora_kernels::{name}", f"lora_kernels::{name}_backward"} <= set(seen.names)
    for one, other in zip(straight, dispatched, strict=True):
        assert torch.equal(one, other)


def test_the_profiler_sees_it():
    with torch.profiler.profile() as profile:
        gradients(layer)
    assert {"lora_kernels::lora_linear", "lora_kernels::lora_linear_backward"} <= {
        e.key for e in profile.key_averages()
    }


def test_a_tensor_of_a_class_of_its_own_keeps_it():
    a, b = torch.randn(4, 24), torch.randn(12, 4)
    y = layer(torch.randn(5, 24).as_subclass(Marked), torch.randn(12, 24), a, b)
    assert type(y) is Marked


def test_transforms_and_tracing_see_it():
    w, a, b = torch.randn(12, 24), torch.randn(4, 24), torch.randn(12, 4)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: layer(x, w, a, b))(torch.randn(5, 24))
    assert any("lora_kernels.lora_linear" in str(node.target) for node in traced.graph.nodes)


def test_no_data_no_computing():
    y = layer(*(torch.empty(shape, device="meta") for shape in ((5, 24), (12, 24), (4, 24), (12, 4))))
    assert y.is_meta
    assert y.shape == (5, 12)


def test_on_a_gpu_all_tests_of_kernels_run_there_but_those_of_the_interpreter(request):
    def named(name, folder=Path(__file__).parent):
        item = pytest.Function.from_parent(request.node.parent, name=request.node.name, callobj=lambda: None)
        item.path = folder / name
        return item

    items = [named(name) for name in ("test_norm.py", "test_mutants.py", "test_loops.py")]
    items.append(named("test_cli.py", Path(__file__).parents[1]))
    conftest.mark_for_gpu(items)
    kinds = [{mark.name for mark in item.own_markers} for item in items]
    assert kinds == [{"gpu"}, {"skip"}, set(), set()]
    for name in (*conftest.INTERPRETED, *conftest.ANYWHERE):
        assert (Path(__file__).parent / name).is_file()

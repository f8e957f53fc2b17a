"""Kernels run on the GPU where there is one, else on CPU tensors in Triton's interpreter (`tests/conftest.py`)."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from lora_kernels import backend, dispatch
from tests.kernel_ops import interpreter

HERE = Path(__file__).parent
ON_GPU = torch.cuda.is_available()
INTERPRETED = ("test_bounds.py", "test_interpreter.py", "test_launched.py", "test_mutants.py")
"""Files that look into Triton's interpreter, or hand kernels the memory of the processor."""
ANYWHERE = ("test_compiled.py", "test_loops.py", "test_widths.py")
"""Files that ask for no GPU where there is one: of GPUs that are not there, and of the processor."""
if not ON_GPU:
    interpreter.make_bfloat16_exact()


def mark_for_gpu(items: Iterable[pytest.Item]) -> None:
    """Marks the tests of this folder as they are where there is a GPU: `-m gpu` takes them.

    But for those of `INTERPRETED`, which are skipped, and of `ANYWHERE`.
    """
    for item in items:
        if item.path.parent == HERE and item.path.name in INTERPRETED:
            item.add_marker(
                pytest.mark.skip(reason="looks into Triton's interpreter, and on a GPU kernels are compiled")
            )
        elif item.path.parent == HERE and item.path.name not in ANYWHERE:
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU:
        mark_for_gpu(items)


@pytest.fixture(autouse=True)
def _seeded_on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device("cuda" if ON_GPU and request.path.name not in ANYWHERE else "cpu"):
        yield


@pytest.fixture
def triton_anywhere() -> Iterator[None]:
    """The test runs with the Triton kernels."""
    with backend.triton_anywhere():
        yield


@pytest.fixture
def by_its_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test runs by the way of a product that it is parametrized with, if any; `cpu` is the form for processors."""
    way = request.node.callspec.params.get("way", "cpu") if hasattr(request.node, "callspec") else "cpu"
    if way == "cpu":
        yield
        return
    request.getfixturevalue("triton_anywhere")
    with dispatch.forced(way):
        yield

"""Kernels run on the GPU where there is one, else on CPU tensors in Triton's interpreter (`tests/conftest.py`)."""

from collections.abc import Iterator

import pytest
import torch

from lora_kernels import backend, dispatch
from tests.kernel_ops import interpreter

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    interpreter.make_bfloat16_exact()


@pytest.fixture(autouse=True)
def _seeded_on_the_device() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device("cuda" if ON_GPU else "cpu"):
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

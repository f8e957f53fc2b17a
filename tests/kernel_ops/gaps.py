"""Inputs whose rows stand apart. An operation must not read between them; torch's own products on a CPU may."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def rows_apart(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns random rows with a gap after each, which is not a number."""
    wide = torch.full((rows, columns + 24), float("nan"), dtype=dtype)
    wide[:, :columns] = torch.randn(rows, columns)
    return wide[:, :columns]


@contextmanager
def memory_is_no_number() -> Iterator[None]:
    """New tensors that nobody has written to hold NaN in the block."""
    torch.use_deterministic_algorithms(True)  # torch fills them then, unless told otherwise
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)

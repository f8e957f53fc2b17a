"""How wrong a result may be: not much more than the same computed the plain way, both against float64."""

import torch

FACTOR = 1.1
"""Allowed over the error of the plain way: another order of summing is no error."""


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the relative error in the Frobenius norm."""
    assert found.shape == exact.shape
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_as_good(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Fails where `found` is further from `exact` than 1.1 times `plain` is; both have the same dtype.

    Where the plain way happens to be nearly exact, half a unit in the last place of a 16-bit dtype is allowed, and two
    units of float32, whose error is that of the order of the sum, which goes by the number of threads.
    """
    assert found.dtype == plain.dtype
    units = 2 if found.dtype == torch.float32 else 1 / 4
    allowed = max(FACTOR * error(plain, exact), units * torch.finfo(found.dtype).eps)
    off = error(found, exact)
    assert off <= allowed, f"off by {off:.3g}, allowed {allowed:.3g}"

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

    Where the plain way happens to be nearly exact, half a unit in the last place of the dtype is allowed.
    """
    assert found.dtype == plain.dtype
    allowed = max(FACTOR * error(plain, exact), torch.finfo(found.dtype).eps / 4)
    off = error(found, exact)
    assert off <= allowed, f"off by {off:.3g}, allowed {allowed:.3g}"

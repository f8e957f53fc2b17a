"""How wrong a result may be: not much more than the same computed the plain way, both against float64."""

import torch

FACTOR, FACTOR_ON_GPU = 1.1, 1.2
"""Allowed over the error of the plain way: another order of summing is no error. On an H200 `gemm_4bit` of bitsandbytes
reaches 1.16 on tensors of a few hundred numbers, and all else 1.11."""
UNITS, UNITS_ON_GPU = 2, 3
"""In the last place of float32, where the plain way happens to be nearly exact. A GPU's exponential and reciprocal root
are good to two themselves."""


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the relative error in the Frobenius norm."""
    assert found.shape == exact.shape
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_as_good(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Fails where `found` is further from `exact` than FACTOR times `plain` is; both have the same dtype.

    Where the plain way happens to be nearly exact, half a unit in the last place of a 16-bit dtype is allowed, and
    UNITS of float32, whose error is that of the order of the sum, which goes by the number of threads.
    """
    assert found.dtype == plain.dtype
    factor, units = (FACTOR_ON_GPU, UNITS_ON_GPU) if found.is_cuda else (FACTOR, UNITS)
    units = units if found.dtype == torch.float32 else 1 / 4
    allowed = max(factor * error(plain, exact), units * torch.finfo(found.dtype).eps)
    off = error(found, exact)
    assert off <= allowed, f"off by {off:.3g}, allowed {allowed:.3g}"

"""Passes over rows on a CPU, each of which torch would make several of; what they read is float32 or bfloat16.

M rows, N or K columns, J heads of keys with G heads of queries each, Q queries of a block, L keys.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensor

from lora_kernels.cpu.build import library

# Of fake tensors, whose memory somebody counts, nothing is computed.
_TAKEN = (torch.Tensor, torch.nn.Parameter, FakeTensor)


def takes(*tensors: torch.Tensor | None) -> bool:
    """Returns whether the loops read these tensors: all of one dtype that they know, each row of them dense."""
    given = [x for x in tensors if x is not None]
    dtype = given[0].dtype
    return not isinstance(library(dtype), str) and all(
        type(x) in _TAKEN and x.is_cpu and x.dtype == dtype and x.stride(-1) == 1 and not x.is_neg() for x in given
    )


def differentiate_logits_(
    logits_MN: torch.Tensor, labels_M: torch.Tensor, scale: float, need_gradient: bool
) -> torch.Tensor:
    """Returns -log softmax(scale * logits) at the labels, [M] float32, and puts its gradient in the logits' place.

    The labels are int64, the scale is above 0. Raises IndexError where a label is no column.
    """
    wrong_M = (labels_M < 0) | (labels_M >= logits_MN.shape[1])
    if wrong_M.any():
        raise IndexError(f"a label is {int(labels_M[wrong_M][0])}, and there are {logits_MN.shape[1]} words, from 0 on")
    nll_M = logits_MN.new_empty(len(logits_MN), dtype=torch.float32)
    sizes = (*logits_MN.shape, logits_MN.stride(0))
    _run(
        "differentiate_logits",
        logits_MN,
        labels_M.to(torch.int64).contiguous(),
        nll_M,
        *sizes,
        float(scale),
        need_gradient,
    )
    return nll_M


def swiglu_into(h_MN: torch.Tensor, gate_MN: torch.Tensor, up_MN: torch.Tensor) -> None:
    """Writes silu(gate) * up, whose first factor is rounded too."""
    strides = (x.stride(0) for x in (h_MN, gate_MN, up_MN))
    _run("swiglu", h_MN, gate_MN, up_MN, *gate_MN.shape, *strides)


def differentiate_swiglu_into(
    dgate_MN: torch.Tensor,
    dup_MN: torch.Tensor,
    h_MN: torch.Tensor | None,
    dh_MN: torch.Tensor,
    gate_MN: torch.Tensor,
    up_MN: torch.Tensor,
) -> None:
    """Writes the gradients of gate and up, and h = silu(gate) * up, which may lie where `dh` does; dense all three.

    No h where it is None.
    """
    strides = (x.stride(0) for x in (dh_MN, gate_MN, up_MN))
    _run("differentiate_swiglu", dgate_MN, dup_MN, h_MN, dh_MN, gate_MN, up_MN, *gate_MN.shape, *strides)


def rms_norm_into(
    y_MK: torch.Tensor,
    h_MK: torch.Tensor,
    rstd_M: torch.Tensor,
    x_MK: torch.Tensor,
    residual_MK: torch.Tensor | None,
    weight_K: torch.Tensor,
    eps: float,
) -> None:
    """Writes h = x + residual, its 1 / rms, and weight * (h / rms). `h` is dense, and written with a residual only."""
    strides = (y_MK.stride(0), x_MK.stride(0), 0 if residual_MK is None else residual_MK.stride(0))
    _run("rms_norm", y_MK, h_MK, rstd_M, x_MK, residual_MK, weight_K, *x_MK.shape, *strides, float(eps))


def differentiate_rms_norm_into(
    dx_MK: torch.Tensor,
    dy_MK: torch.Tensor,
    dh_MK: torch.Tensor | None,
    h_MK: torch.Tensor,
    rstd_M: torch.Tensor,
    weight_K: torch.Tensor,
) -> None:
    """Writes the gradient of h, dense: what the norm sends back to it, and `dh`."""
    strides = (dy_MK.stride(0), 0 if dh_MK is None else dh_MK.stride(0), h_MK.stride(0))
    _run("differentiate_rms_norm", dx_MK, dy_MK, dh_MK, h_MK, rstd_M, weight_K, *h_MK.shape, *strides)


def rotate_into(
    out_BHTD: torch.Tensor, x_BHTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, inverse: bool
) -> None:
    """Writes what `rope` does; the angles are dense float32, [B or 1, T, D]."""
    strides = (_longs(out_BHTD.stride()[:3]), _longs(x_BHTD.stride()[:3]))
    per_row = cos_BTD.stride(0) if len(cos_BTD) > 1 else 0
    _run("rotate", out_BHTD, x_BHTD, cos_BTD, sin_BTD, *x_BHTD.shape, *strides, per_row, inverse)


def differentiate_scores_(
    scores_JRL: torch.Tensor, dp_JRL: torch.Tensor, queries: int, window: int, scale: float
) -> None:
    """Writes p = softmax(scale * scores) over the scores and scale p (dp - sum(p dp)), the gradient of q k.T, over dp.

    Args:
        scores_JRL: dense, R = G * Q; the last query of a head sees all L keys, each before it one less.
        queries: Q.
        window: keys that a query sees at most, 0 for any number.
        scale: above 0.
    """
    heads, rows, keys = scores_JRL.shape
    _run("differentiate_scores", scores_JRL, dp_JRL, heads * rows, queries, keys, window, float(scale))


def gather_into(out_SHRD: torch.Tensor, x_HTD: torch.Tensor, parts: Sequence[slice]) -> None:
    """Writes each part of T, of at most R rows, and zeros behind it; `out` is dense."""
    _run("gather", out_SHRD, x_HTD, *_parts(x_HTD, parts, out_SHRD))


def scatter_into(x_HTD: torch.Tensor, y_SHRD: torch.Tensor, parts: Sequence[slice]) -> None:
    """Writes the first rows of each [H, R, D], which is dense, where the part of T lies."""
    _run("scatter", y_SHRD, x_HTD, *_parts(x_HTD, parts, y_SHRD))


def scatter_add(x_HTD: torch.Tensor, y_SHRD: torch.Tensor, parts: Sequence[slice]) -> None:
    """Adds what `scatter_into` writes to `x`, which is float32 whatever `y` is; no parts overlap."""
    _run("scatter_add", y_SHRD, x_HTD, *_parts(x_HTD, parts, y_SHRD))


def _parts(x_HTD: torch.Tensor, parts: Sequence[slice], stacked_SHRD: torch.Tensor) -> tuple[Any, ...]:
    _, heads, rows, width = stacked_SHRD.shape
    ends = [end for part in parts for end in (part.start, part.stop)]
    return rows, len(parts), heads, width, _longs(ends), *x_HTD.stride()[:2]


def _longs(numbers: Sequence[int]) -> Any:
    return (ctypes.c_long * len(numbers))(*numbers)


def _run(name: str, *arguments: Any) -> None:
    """Runs a loop of the dtype of the first argument on as many threads as torch has.

    Tensors go as addresses, whole numbers as long, others as float.
    """
    if isinstance(arguments[0], FakeTensor):
        return
    loop = getattr(library(arguments[0].dtype), name)
    if loop.argtypes is None:
        loop.argtypes, loop.restype = (ctypes.c_int, *map(_as_in_c, arguments)), None
    loop(torch.get_num_threads(), *(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments))


def _as_in_c(argument: Any) -> Any:
    """Returns the type in C of an argument, which is the same whenever a loop is called."""
    return {bool: ctypes.c_int, int: ctypes.c_long, float: ctypes.c_float}.get(type(argument), ctypes.c_void_p)

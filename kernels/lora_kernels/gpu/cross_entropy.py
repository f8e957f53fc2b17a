"""Cross entropy of rows of logits and its gradient: bound by memory, two reads of the logits and one write.

The second read is of a row that one program has just read, so it comes from the L2 cache where the rows in flight fit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WORDS = 4096
"""Logits of a step: 8 KiB in flight, two vector loads a thread at 8 warps."""
WARPS = 8


@triton.jit
def tanh(x):
    """Returns tanh, which Triton's own language lacks, and its derivative, neither as a difference of near numbers."""
    b_exp = tl.exp(-2 * tl.abs(x))
    b_tanh = (1 - b_exp) / (1 + b_exp)
    # Below 1/4 five terms of the series are exact in float32.
    b_square = x * x
    b_series = 2 / 15 + b_square * (-17 / 315 + b_square * (62 / 2835))
    b_series = x * (1 + b_square * (-1 / 3 + b_square * b_series))
    b_tanh = tl.where(tl.abs(x) < 0.25, b_series, tl.where(x < 0, -b_tanh, b_tanh))
    return b_tanh, 4 * b_exp / ((1 + b_exp) * (1 + b_exp))


@triton.jit
def capped(b_logit, scale, softcap, SOFTCAP: tl.constexpr):
    """Returns the numbers to take the softmax of, in float32, and their derivative by the logits."""
    b_z = b_logit.to(tl.float32) * scale
    b_slope = scale
    if SOFTCAP:
        b_tanh, b_tanh_slope = tanh(b_z / softcap)
        b_z = softcap * b_tanh
        b_slope = scale * b_tanh_slope
    return b_z, b_slope


@triton.jit
def differentiate_logits_kernel(
    p_logits,
    p_labels,
    p_nll,
    words,
    stride_logits,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    WORDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_logits += row * stride_logits
    label = tl.load(p_labels + row)
    z_label, _slope = capped(tl.load(p_logits + label), scale, softcap, SOFTCAP)

    # The sum of exp(z - maximum) while both grow. Finite at first: -inf - -inf is NaN where the first words are masked.
    maximum, total = -3.0e38, 0.0
    for first in range(0, words, WORDS):
        o_word = first + tl.arange(0, WORDS)
        # Memory is read up to where the next row begins, which keeps vector loads whatever the number of words.
        b_logit = tl.load(p_logits + o_word, mask=o_word < stride_logits)
        b_z, b_slope = capped(b_logit, scale, softcap, SOFTCAP)
        b_z = tl.where(o_word < words, b_z, float("-inf"))
        larger = tl.maximum(maximum, tl.max(b_z, axis=0))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(b_z - larger), axis=0)
        maximum = larger
    tl.store(p_nll + row, tl.log(total) - (z_label - maximum))

    if GRADIENT:
        # Every thread has read the logit of the label before one of them writes over it.
        tl.debug_barrier()
        for first in range(0, words, WORDS):
            o_word = first + tl.arange(0, WORDS)
            m_row = o_word < stride_logits
            b_logit = tl.load(p_logits + o_word, mask=m_row)
            b_z, b_slope = capped(b_logit, scale, softcap, SOFTCAP)
            b_gradient = (tl.exp(b_z - maximum) / total - (o_word == label)) * b_slope
            tl.store(p_logits + o_word, b_gradient, mask=m_row)


def differentiate_logits(
    rows_CP: torch.Tensor, words: int, labels_C: torch.Tensor, scale: float, softcap: float, need_gradient: bool
) -> torch.Tensor:
    """Returns the loss of each row, [C] float32, and puts its gradient where the logits were, if it is needed.

    `rows_CP` is dense; the columns from `words` on are read and written, but mean nothing.
    """
    nll_C = rows_CP.new_empty(len(rows_CP), dtype=torch.float32)
    differentiate_logits_kernel[(len(rows_CP),)](
        rows_CP,
        labels_C,
        nll_C,
        words,
        rows_CP.stride(0),
        scale,
        softcap,
        SOFTCAP=softcap != 0,
        GRADIENT=need_gradient,
        WORDS=WORDS,
        num_warps=WARPS,
    )
    return nll_C

"""Cross entropy of a linear head over a large vocabulary, whose logits never exist all at once.

T tokens, L of them labelled, V words, K columns.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from lora_kernels import backend
from lora_kernels.cpu import loops
from lora_kernels.matmul import matmul_float32
from lora_kernels.operators import Operator

ROWS_IN_CACHE = 16
"""Rows whose softmax a CPU computes at a time: in float32 those of 49,152 words are 3 MiB."""

FEWEST_ROWS = 256
"""Rows of a chunk, at least: with fewer, reading the weight takes longer than multiplying by it. A product of n rows
does n operations for each byte of a 16-bit weight; an RTX 3090 can do 76 in the time that it reads one, a 4090 164."""


def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    ignore: int = -100,
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the negative log-likelihood summed, 0-d float32, and of each token, float32 in the shape of `labels`.

    Logits are z = scale * (h @ weight.T + bias), or softcap * tanh(z / softcap) where `softcap` is not 0, for labelled
    tokens only and `chunk_rows` of them at a time. The gradients of `h`, `weight` and `bias`, where they require one,
    are computed with the loss, so that the backward pass only scales them. The loss of a token has no gradient.

    On a GPU this waits once for what is queued: how many tokens are labelled decides the shape of the products. (A sort
    of the labels needs no wait, but then the tokens that are not labelled have to be multiplied as well.)

    Args:
        h: [..., K].
        weight: [V, K] in the dtype of `h`.
        labels: [...] int64: a word below V, or `ignore`, which counts 0.
        bias: [V], or None.
        chunk_rows: None keeps a chunk of logits about as large as the labelled rows of `h`.
    """
    needed = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (h, weight, bias)]
    loss, nll_T, *_ = _linear_cross_entropy(
        h.reshape(-1, h.shape[-1]), weight, bias, labels.reshape(-1), scale, softcap, ignore, chunk_rows, *needed
    )
    return loss, nll_T.view(labels.shape)


def _empty_outputs(
    h_TK: torch.Tensor,
    weight_VK: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_T: torch.Tensor,
    scale: float,
    softcap: float,
    ignore: int,
    chunk_rows: int | None,
    need_h: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns float32 zeros for the loss, nll_T, dh_TK, dweight_VK and dbias_V; gradients not needed are empty.

    Gradients wait in float32 for the upstream gradient, so that they are rounded once, multiplied by it.
    """
    zeros = functools.partial(h_TK.new_zeros, dtype=torch.float32)
    dh_TK, dweight_VK = zeros(h_TK.shape if need_h else 0), zeros(weight_VK.shape if need_weight else 0)
    return zeros(()), zeros(len(labels_T)), dh_TK, dweight_VK, zeros(len(weight_VK) if need_bias else 0)


@Operator
def _linear_cross_entropy(
    h_TK: torch.Tensor,
    weight_VK: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_T: torch.Tensor,
    scale: float,
    softcap: float,
    ignore: int,
    chunk_rows: int | None,
    need_h: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = (scale, softcap, ignore, chunk_rows, need_h, need_weight, need_bias)
    _, nll_T, dh_TK, dweight_VK, dbias_V = _empty_outputs(h_TK, weight_VK, bias_V, labels_T, *options)
    (words, columns), dtype = weight_VK.shape, backend.product_dtype(h_TK)
    weight_VK, bias_V = weight_VK.to(dtype), None if bias_V is None else bias_V.to(dtype)
    place_L = (labels_T != ignore).nonzero().squeeze(1)
    chunk_rows = chunk_rows or max(FEWEST_ROWS, -(-len(place_L) * columns // words))
    need_any = need_h or need_weight or need_bias
    # One buffer for all chunks. P is V and what aligns the rows, so that vector loads do not hang on the vocabulary.
    buffer_CP = h_TK.new_empty((backend.alike(min(chunk_rows, len(place_L)), h_TK), -(-words // 16) * 16), dtype=dtype)
    buffer_CP[:, words:].zero_()  # `backend.readable` tells who reads it
    for place_C in place_L.split(chunk_rows):
        count, rows = len(place_C), backend.alike(len(place_C), h_TK)
        h_CK = h_TK[place_C].to(dtype)
        if rows > count:
            h_CK = torch.nn.functional.pad(h_CK, (0, 0, 0, rows - count))
        rows_CP, logits_CV = buffer_CP[:count], buffer_CP[:rows, :words]
        if bias_V is None:
            torch.mm(h_CK, weight_VK.t(), out=logits_CV)
        else:
            torch.addmm(bias_V, h_CK, weight_VK.t(), out=logits_CV)
        logits_CV[count:].zero_()
        nll_T[place_C] = _differentiate_logits(rows_CP, words, labels_T[place_C], scale, softcap, need_any)
        if need_h:
            dh_TK[place_C] = _product(logits_CV, weight_VK)[:count]
        if need_weight:
            dweight_VK += _product(logits_CV.t(), h_CK)
        if need_bias:
            dbias_V += logits_CV.sum(0, dtype=torch.float32)
    return nll_T.sum(), nll_T, dh_TK, dweight_VK, dbias_V


_linear_cross_entropy.register_fake(_empty_outputs)


def _differentiate_logits(
    rows_CP: torch.Tensor, words: int, labels_C: torch.Tensor, scale: float, softcap: float, need_gradient: bool
) -> torch.Tensor:
    """Returns the loss of each row, [C] float32, and puts its gradient where the logits were, if it is needed."""
    if backend.is_triton(rows_CP):
        from lora_kernels.gpu import cross_entropy

        return cross_entropy.differentiate_logits(rows_CP, words, labels_C, scale, softcap, need_gradient)
    if not softcap and scale > 0 and loops.takes(rows_CP):
        return loops.differentiate_logits_(rows_CP[:, :words], labels_C, scale, need_gradient)
    nll_C = rows_CP.new_empty(len(rows_CP), dtype=torch.float32)
    for first in range(0, len(rows_CP), ROWS_IN_CACHE):
        rows = slice(first, first + ROWS_IN_CACHE)
        nll_C[rows] = _differentiate_rows(rows_CP[rows, :words], labels_C[rows], scale, softcap, need_gradient)
    return nll_C


def _differentiate_rows(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, scale: float, softcap: float, need_gradient: bool
) -> torch.Tensor:
    slope_CV, z_CV = None, logits_CV
    if scale != 1.0:
        z_CV = z_CV.float() * scale
    if softcap:
        z_CV = z_CV.float().div(softcap).tanh_()
        slope_CV = 1 - z_CV.square() if need_gradient else None
        z_CV *= softcap
    logp_CV = torch.log_softmax(z_CV, 1, dtype=torch.float32)
    nll_C = -logp_CV.gather(1, labels_C[:, None]).squeeze(1)
    if need_gradient:
        dz_CV = logp_CV.exp_().scatter_add_(1, labels_C[:, None], logp_CV.new_full((len(labels_C), 1), -1.0))
        if slope_CV is not None:
            dz_CV *= slope_CV
        torch.mul(dz_CV, scale, out=logits_CV)
    return nll_C


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns left @ right in float32.

    Nothing is rounded on the way but on a CPU that multiplies 16-bit numbers itself, where products come out rounded
    and one in float32 takes four times as long; what 16 bits have lost of the logits by then is far more.
    """
    if left.device.type == "cpu" and left.dtype != torch.float32 and not backend.is_triton(left):
        return torch.mm(left, right).float()
    return matmul_float32(left, right)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.dtypes = [x.dtype if needed else None for x, needed in zip(inputs[:3], inputs[-3:], strict=True)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _differentiate(ctx: Any, dloss: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    if dloss is None:
        return (None,) * 11
    gradients = [
        None if dtype is None else torch.mul(gradient, dloss, out=gradient.new_empty(gradient.shape, dtype=dtype))
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    return (*gradients, *[None] * 8)


_linear_cross_entropy.register_autograd(_differentiate, setup_context=_keep_for_backward)

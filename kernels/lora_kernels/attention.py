"""Causal attention over examples that lie end to end in one sequence, none of which sees another.

H heads of queries, J heads of keys and values, G = H / J queries to a key, T tokens, D width of a head, S examples;
within an example a block of Q queries meets L keys. Of S blocks together each has R rows; B = S J, and theirs are G R.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from lora_kernels import backend, slabs
from lora_kernels.cpu import loops
from lora_kernels.operators import Operator

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

BLOCK = 96
"""Queries in a block. Its scores stay in the cache, and keys after it are never multiplied. Gradients of keys and
values are sums over these queries: with 128 they were up to 1.25 times as far off as the plain way, in float32."""

BLOCK_16_BITS = 128
"""That of 16-bit numbers, whose products are summed in float32 inside."""

TILE = 32
"""Queries that blocks are filled up to multiples of, with zeros, to be differentiated together: as many as a matrix
instruction sums over, so that in 16 bits an example's sums are the same in whatever company it is."""


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Returns softmax(cap(scale * q k.T)) v within each example, [H, T, D] in the dtype of `q`; no T x T mask is made.

    Scores are float32; where `softcap` is not 0 they are softcap * tanh(score / softcap). The backward pass computes
    them again from q, k and v, which are all that is kept. Grouped heads follow one another, as PyTorch's do.

    Args:
        q: [H, T, D].
        k, v: [J, T, D] where J divides H.
        bounds: Where examples begin, and T: S + 1 numbers, the first of them 0.
        window: Keys that a query sees, itself the last of them; None for all before it.

    Raises:
        ValueError: the bounds do not go up from 0 to T.
    """
    found = list(bounds)
    if found[0] != 0 or found[-1] != q.shape[1] or any(a >= b for a, b in pairwise(found)):
        raise ValueError(f"packed_attention: bounds must go up from 0 to {q.shape[1]}, the tokens; got {found}")
    return _packed_attention(q, k, v, found, scale, window or 0, softcap)


def _blocks(bounds: Sequence[int], window: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice]]:
    """Yields the queries of each block, and the keys that any of them sees."""
    rows = BLOCK if dtype == torch.float32 else BLOCK_16_BITS
    for begin, end in pairwise(bounds):
        for first in range(begin, end, rows):
            last = min(first + rows, end)
            yield slice(first, last), slice(max(begin, first - window + 1) if window else begin, last)


def _alike(bounds: Sequence[int], window: int, q_HTD: torch.Tensor) -> list[list[tuple[slice, slice]]]:
    """Returns the blocks of `_blocks`, some at a time that are filled up to the length of the first.

    They are of different examples, and before the first query of each there are as many keys. The cache holds them and
    their scores. Short examples are many, and a product of one of them takes less time than starting it.
    """
    by_place: dict[int, list[tuple[slice, slice]]] = {}
    for ends in pairwise(bounds):
        for place, block in enumerate(_blocks(ends, window, q_HTD.dtype)):
            by_place.setdefault(place, []).append(block)
    batches, sizes = [], []
    for blocks in by_place.values():
        blocks.sort(key=lambda block: -_length(block[0]))
        queries, keys = blocks[0]
        lead = _length(keys) - _length(queries)
        while blocks:
            rows = _filled(blocks[0][0])
            size = len(q_HTD) * rows * (rows + lead + q_HTD.shape[-1]) * q_HTD.dtype.itemsize
            fit = max(slabs.BLOCK // size, 1)
            batches.append(blocks[:fit])
            sizes.append(size * len(batches[-1]))
            blocks = blocks[fit:]
    return slabs.counted(batches, sizes)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _filled(part: slice) -> int:
    """Returns how many rows a part has once it is filled up to whole `TILE`s."""
    return -(-_length(part) // TILE) * TILE


def _stacked(x_HTD: torch.Tensor, parts: Sequence[slice], rows: int) -> torch.Tensor:
    """Returns parts of T one after the other, each with zeros behind it up to `rows`: [parts, H, rows, D]."""
    heads, _, width = x_HTD.shape
    out_SHRD = x_HTD.new_empty((len(parts), heads, rows, width))
    if loops.takes(x_HTD):
        loops.gather_into(out_SHRD, x_HTD, parts)
        return out_SHRD
    for out_HRD, part in zip(out_SHRD.zero_(), parts, strict=True):
        out_HRD[:, : _length(part)] = x_HTD[:, part]
    return out_SHRD


def _put(x_HTD: torch.Tensor, parts: Sequence[slice], y_SHRD: torch.Tensor) -> None:
    """Puts the rows of `y` where `_stacked` takes them from."""
    if loops.takes(x_HTD, y_SHRD):
        loops.scatter_into(x_HTD, y_SHRD, parts)
        return
    for part, y_HRD in zip(parts, y_SHRD, strict=True):
        x_HTD[:, part] = y_HRD[:, : _length(part)]


def _add(x_HTD: torch.Tensor, parts: Sequence[slice], y_SHRD: torch.Tensor) -> None:
    """Adds the rows of `y` to float32 numbers, where `_put` would put them."""
    if loops.takes(y_SHRD):
        loops.scatter_add(x_HTD, y_SHRD, parts)
        return
    for part, y_HRD in zip(parts, y_SHRD, strict=True):
        x_HTD[:, part] += y_HRD[:, : _length(part)]


def _hidden(rows: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """Returns what hides the last keys from the queries of a block: -inf where one comes after, or before the window.

    It is float32, else 0, [Q, L] or, without a window, [Q, Q]. It is added, as filling by a mask that is the same for
    all heads takes longer than a product.
    """
    if not window:
        return torch.full((rows, rows), -math.inf, device=device).triu(1)
    before_QL = torch.full((rows, keys), -math.inf, device=device)
    return before_QL.triu(keys - rows + 1) + before_QL.tril(keys - rows - window)


class _Block:
    """The probabilities of one block, and what it takes to differentiate them, in torch."""

    def __init__(self, q_JGQD: torch.Tensor, k_JLD: torch.Tensor, window: int, scale: float, softcap: float) -> None:
        heads, group, rows, width = q_JGQD.shape
        scores_JRL = torch.bmm(q_JGQD.reshape(heads, group * rows, width), k_JLD.transpose(1, 2))
        scores_JRL, self.scale = _scaled(scores_JRL, scale), scale
        self.slope_JRL: torch.Tensor | None = None
        if softcap:
            scores_JRL = scores_JRL.float().div_(softcap).tanh_()
            self.slope_JRL = 1 - scores_JRL.square()
            scores_JRL.mul_(softcap)
        hidden_QL = _hidden(rows, k_JLD.shape[1], window, k_JLD.device)
        scores_JRL.view(heads, group, rows, -1)[..., -hidden_QL.shape[1] :].add_(hidden_QL)
        self.p_JRL = torch.softmax(scores_JRL.float(), -1)

    def times(self, v_JLD: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self.p_JRL.to(v_JLD.dtype), v_JLD)

    def differentiated(self, do_JRD: torch.Tensor, v_JLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the probabilities, and the gradient of q k.T, in the dtype of products."""
        dp_JRL = _scaled(torch.bmm(do_JRD, v_JLD.transpose(1, 2)), self.scale).float()
        ds_JRL = torch.ops.aten._softmax_backward_data(dp_JRL, self.p_JRL, -1, torch.float32)
        if self.slope_JRL is not None:
            ds_JRL.mul_(self.slope_JRL)
        return self.p_JRL.to(v_JLD.dtype), ds_JRL.to(v_JLD.dtype)


def _scaled(scores_JRL: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns scale * scores, widened unless the scale is a power of two: that rounds nothing, and half is read."""
    return scores_JRL.mul_(scale) if math.frexp(scale)[0] == 0.5 else scores_JRL.float().mul_(scale)


def _over_queries(left_JRL: torch.Tensor, right_JRD: torch.Tensor, group: int) -> torch.Tensor:
    """Returns left.T @ right, [J, L, D].

    In float32 it is a sum for each head of queries, and those added: one over all heads that share a key would be as
    many times as long, and rounds more. Products of 16 bits are rounded once, after their sum.
    """
    if left_JRL.dtype != torch.float32:
        return torch.bmm(left_JRL.transpose(1, 2), right_JRD)
    heads = len(left_JRL) * group
    left_HQL, right_HQD = (x.view(heads, -1, x.shape[-1]) for x in (left_JRL, right_JRD))
    each_HLD = torch.bmm(left_HQL.transpose(1, 2), right_HQD)
    return each_HLD.view(-1, group, *each_HLD.shape[1:]).sum(1)


def _empty_like(x_HTD: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of that shape and dtype, heads inside tokens as projections take them, whatever `x_HTD` has."""
    heads, tokens, width = x_HTD.shape
    return x_HTD.new_empty((tokens, heads, width)).transpose(0, 1)


def _longest(bounds: Sequence[int]) -> int:
    return max(end - begin for begin, end in pairwise(bounds))


def _in_product_dtype(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields each tensor in the dtype that its device multiplies in, the numbers of a row side by side."""
    dtype = backend.product_dtype(tensors[0])
    for tensor in tensors:
        tensor = tensor.to(dtype)
        yield tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@Operator
def _packed_attention(
    q_HTD: torch.Tensor,
    k_JTD: torch.Tensor,
    v_JTD: torch.Tensor,
    bounds: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    out_HTD = _empty_like(q_HTD)
    q, k, v = _in_product_dtype(q_HTD, k_JTD, v_JTD)
    q_JGTD, out_JGTD = (x.view(len(k), -1, *x.shape[1:]) for x in (q, out_HTD))
    if q.is_cpu and not softcap and not (window and window < _longest(bounds)):
        for begin, end in pairwise(bounds):
            k_JGLD, v_JGLD = (x[:, None, begin:end].expand(-1, q_JGTD.shape[1], -1, -1) for x in (k, v))
            arguments = (q_JGTD[:, :, begin:end], k_JGLD, v_JGLD, 0.0, True)
            out_JGTD[:, :, begin:end] = _flash(*arguments, scale=scale)[0]
        return out_HTD
    for queries, keys in _blocks(bounds, window, q.dtype):
        block = _Block(q_JGTD[:, :, queries], k[:, keys], window, scale, softcap)
        out_JGTD[:, :, queries] = block.times(v[:, keys]).view_as(out_JGTD[:, :, queries])
    return out_HTD


@_packed_attention.register_fake
def _(q_HTD: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _empty_like(q_HTD)


@Operator
def _packed_attention_backward(
    do_HTD: torch.Tensor,
    q_HTD: torch.Tensor,
    k_JTD: torch.Tensor,
    v_JTD: torch.Tensor,
    bounds: Sequence[int],
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    do, q, k, v = _in_product_dtype(do_HTD, q_HTD, k_JTD, v_JTD)
    dq_HTD = _empty_like(q_HTD)
    # A key is seen from several blocks.
    dk_JTD, dv_JTD = (x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v))
    for blocks in _alike(bounds, window, q):
        _add_gradients(dq_HTD, dk_JTD, dv_JTD, do, q, k, v, blocks, scale, window, softcap)
    return dq_HTD, _empty_like(k_JTD).copy_(dk_JTD), _empty_like(v_JTD).copy_(dv_JTD)


def _add_gradients(
    dq_HTD: torch.Tensor,
    dk_JTD: torch.Tensor,
    dv_JTD: torch.Tensor,
    do_HTD: torch.Tensor,
    q_HTD: torch.Tensor,
    k_JTD: torch.Tensor,
    v_JTD: torch.Tensor,
    blocks: Sequence[tuple[slice, slice]],
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Writes what some of `_alike` make of the gradient of q, and adds what they make of those of k and v."""
    heads, group, width = len(k_JTD), len(q_HTD) // len(k_JTD), q_HTD.shape[-1]
    queries, keys = zip(*blocks, strict=True)
    rows = _filled(queries[0])
    seen = rows + _length(keys[0]) - _length(queries[0])
    q_BGRD, do_BGRD = (_stacked(x, queries, rows).view(-1, group, rows, width) for x in (q_HTD, do_HTD))
    k_BLD, v_BLD = (_stacked(x, keys, seen).flatten(0, 1) for x in (k_JTD, v_JTD))
    q_BRD, do_BRD = q_BGRD.flatten(1, 2), do_BGRD.flatten(1, 2)
    if not softcap and scale > 0 and loops.takes(q_BRD, k_BLD, v_BLD, do_BRD):
        p_BRL, ds_BRL = torch.bmm(q_BRD, k_BLD.transpose(1, 2)), torch.bmm(do_BRD, v_BLD.transpose(1, 2))
        loops.differentiate_scores_(p_BRL, ds_BRL, rows, window, scale)
    else:
        block = _Block(q_BGRD, k_BLD, window, scale, softcap)
        p_BRL, ds_BRL = block.differentiated(do_BRD, v_BLD)
    _put(dq_HTD, queries, torch.bmm(ds_BRL, k_BLD).view(len(blocks), -1, rows, width))
    for sums_JTD, left_BRL, right_BRD in ((dk_JTD, ds_BRL, q_BRD), (dv_JTD, p_BRL, do_BRD)):
        _add(sums_JTD, keys, _over_queries(left_BRL, right_BRD, group).unflatten(0, (-1, heads)))


@_packed_attention_backward.register_fake
def _(do_HTD: torch.Tensor, *qkv: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q_HTD, k_JTD, v_JTD = qkv[:3]
    return _empty_like(q_HTD), _empty_like(k_JTD), _empty_like(v_JTD)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _differentiate(ctx: Any, do_HTD: torch.Tensor) -> tuple[Any, ...]:
    bounds, *_ = ctx.options
    return (
        *_packed_attention_backward(do_HTD, *ctx.saved_tensors, *ctx.options),
        [None] * len(bounds),
        None,
        None,
        None,
    )


_packed_attention.register_autograd(_differentiate, setup_context=_keep_for_backward)

"""Frozen layers that share their input, such as those of queries, keys and values, and their adapters as one operation.

M rows of activations, K inputs of every layer, N outputs of one of them, R the rank of all adapters and what aligns
it, S = K + R.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_kernels import backend, linear, lora
from lora_kernels.dropout import new_seed
from lora_kernels.frozen import Frozen
from lora_kernels.matmul import matmul_float32
from lora_kernels.nf4 import dequantize_into
from lora_kernels.operators import Operator

ALIGNED = 16
"""Ranks in a stack are filled up to a multiple of it: in 16 bits, rows of [x | x @ a.T] then begin on 32 bytes where
those of x do. cuBLAS multiplies matrices whose rows are not aligned to 16 bytes by slower kernels."""


@dataclass(frozen=True, slots=True)
class Projection:
    """One of the layers that share an input: its weight [N, K], and of its adapter what does not read the input."""

    weight: Frozen
    bias: torch.Tensor | None
    """[N], of any float dtype."""
    b: torch.Tensor
    """[N, its rank], of any float dtype."""
    scaling: float


def stacked(a: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the down projections of a group one below the other, [R, K], and zeros up to a multiple of 16 rows."""
    missing = -sum(len(part) for part in a) % ALIGNED
    return torch.cat([*a, a[0].new_zeros(missing, a[0].shape[1])] if missing else list(a))


def lora_group(
    x: torch.Tensor,
    a: torch.Tensor | None,
    projections: Sequence[Projection],
    *,
    dropout: float = 0.0,
    seed: int | None = None,
) -> list[torch.Tensor]:
    """Returns x @ W.T + bias + scaling * dropout(x) @ a.T @ b.T for each projection: [..., N] in the dtype of `x`.

    x is read once for all adapters, and the gradients that the projections send back to it meet in one tensor. They
    share the mask of dropout. Differentiable in x, a, and each b and bias; no dense weight and no mask is kept.

    On a GPU a packed weight is written out with scaling * b behind its rows, so that base and adapter are one matrix
    product with [x | x @ a.T], whose sum is rounded once. (With a dense weight that would cost a copy of it, and for
    few rows other kernels are faster: `dispatch`.) Where `x` brings x @ a.T, its gradient is the sum of
    dy @ [W | scaling * b], else of [dy | ds] @ [W; a]: one product, where putting the dy side by side moves less than
    adding to dx once for each projection. Dropout has to come between ds @ a and the sum, so with it ds @ a is a
    product of its own, that dx begins with.

    Args:
        x: [..., K]; or where `a` is None [..., K + R], with x @ a.T behind x as `rms_norm_lora` and `swiglu_lora`
            put it. Its gradient has the same columns, of which the last R make that of `a` there.
        a: the down projections as `stacked` stacks them, in the order of the projections.
        seed: drawn here where it is None.

    Raises:
        ValueError: the columns of `x` are not as many as the above, or there is dropout without `a`.
    """
    columns, rank = projections[0].weight.shape[1], sum(one.b.shape[1] for one in projections)
    brought = x.shape[-1] - columns if a is None else len(a)
    if brought < rank or (a is not None and x.shape[-1] != columns):
        raise ValueError(
            f"lora_group: x has {x.shape[-1]} columns, but the weights have {columns} inputs and the adapters a rank "
            f"of {rank} together{'' if a is None else f', of {len(a)} in a'}."
        )
    if dropout and a is None:
        raise ValueError("lora_group: x @ a.T is there already, so nothing can be dropped before it; give x and a.")
    if dropout and seed is None:
        seed = new_seed()
    x_MS = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    flat = [list(part) for part in zip(*(one.weight.flat() for one in projections), strict=True)]
    b, bias, scaling = (list(part) for part in zip(*((p.b, p.bias, p.scaling) for p in projections), strict=True))
    *outputs, _ = _lora_group(x_MS, a, b, bias, scaling, *flat, dropout, 0 if seed is None else seed)
    return outputs if x.ndim == 2 else [y_MN.view(*x.shape[:-1], y_MN.shape[1]) for y_MN in outputs]


def _side_by_side(sizes: Iterable[int]) -> list[slice]:
    """Returns where parts of these sizes lie that lie one behind the other."""
    return [slice(*ends) for ends in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


def _places(projections: Sequence[Projection]) -> list[slice]:
    """Returns the columns of x @ a.T that each projection reads."""
    return _side_by_side(one.b.shape[1] for one in projections)


def _forward(
    x_MS: torch.Tensor, a_RK: torch.Tensor | None, projections: Sequence[Projection], dropout: float, seed: int
) -> list[torch.Tensor]:
    """Returns every y_MN, and x @ a.T in a dtype of products."""
    x_MS = x_MS.to(backend.product_dtype(x_MS))
    columns = projections[0].weight.shape[1]
    x_MK = x_MS[:, :columns]
    if a_RK is None:
        # A copy, so that nothing keeps the wide columns for the backward pass, which does not read them.
        xa_MR = x_MS[:, columns:].clone(memory_format=torch.contiguous_format)
    else:
        xa_MR = lora.down(x_MK, a_RK, dropout, seed)
    inside = [_takes_inside(x_MK, one.weight) for one in projections]
    if any(inside):
        x_MS = x_MS if a_RK is None else torch.cat([x_MK, xa_MR], dim=1)
        # One buffer, as each weight is multiplied while the cache has it.
        most = max(one.weight.shape[0] for one, wide in zip(projections, inside, strict=True) if wide)
        buffer_PS = x_MS.new_empty(most, x_MS.shape[1])
    outputs = []
    for one, place, wide in zip(projections, _places(projections), inside, strict=True):
        if wide:
            outputs.append(_product_inside(x_MS, one, place, buffer_PS[: one.weight.shape[0]]))
        else:
            outputs.append(linear.product(x_MK, one.weight, one.bias, xa_MR[:, place], one.b, one.scaling))
    return [*outputs, xa_MR]


def _takes_inside(x_MK: torch.Tensor, weight: Frozen) -> bool:
    """Returns whether the weight is written out anyway, so that the adapter can be written behind it."""
    if not backend.is_triton(x_MK) or weight.blocks is None:
        return False
    return linear.choose_path(x_MK, weight) == "dequant"


def _product_inside(x_MS: torch.Tensor, one: Projection, place: slice, w_NS: torch.Tensor) -> torch.Tensor:
    """Returns [x | xa] @ [W | scaling * b].T + bias; `w_NS` is written over."""
    _write_out(w_NS, one, place)
    x_MS = backend.readable(x_MS)
    if one.bias is None:
        return torch.mm(x_MS, w_NS.t())
    return torch.addmm(one.bias.to(x_MS.dtype), x_MS, w_NS.t())


def _write_out(w_NS: torch.Tensor, one: Projection, place: slice) -> None:
    """Writes [W | scaling * b] into `w_NS`, with zeros where other projections have their b."""
    columns = one.weight.shape[1]
    dequantize_into(w_NS[:, :columns], one.weight)
    tail_NR = w_NS[:, columns:]
    if one.b.shape[1] < tail_NR.shape[1]:
        tail_NR.zero_()
    # Scaled in float32, so that it is rounded once.
    torch.mul(one.b.float(), one.scaling, out=tail_NR[:, place])


def _backward(
    dys: Sequence[torch.Tensor],
    x_MK: torch.Tensor | None,
    a_RK: torch.Tensor | None,
    xa_MR: torch.Tensor,
    projections: Sequence[Projection],
    dropout: float,
    seed: int,
    need_dx: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor]]:
    """Returns dx, which is dx_MS where `x` brought x @ a.T, da_RK or None there, and every db_NR in float32."""
    # Columns side by side: one copy here, or one in each of the products below.
    dtype = backend.product_dtype(dys[0])
    dys = [dy_MN.to(dtype) if dy_MN.stride(1) == 1 else dy_MN.to(dtype).contiguous() for dy_MN in dys]
    weights = [one.weight for one in projections]
    if x_MK is None or a_RK is None:
        dx_MS, dbs = _backward_of_brought(dys, xa_MR, projections, need_dx)
        return dx_MS, None, dbs
    ds_MR, dbs = _up_backward(dys, xa_MR, projections)
    if need_dx and not dropout and _is_joint(weights, saved=len(weights)) and _all_inside(xa_MR, weights):
        _, da_RK = lora.down_backward(ds_MR, x_MK, a_RK, 0.0, 0, need_dx=False)
        return _joint_input_gradient(dys, ds_MR, weights, a_RK), da_RK, dbs
    maybe_dx_MK, da_RK = lora.down_backward(ds_MR, x_MK, a_RK, dropout, seed, need_dx)
    if maybe_dx_MK is not None:
        maybe_dx_MK = maybe_dx_MK.to(dtype)
        _add_products(maybe_dx_MK, dys, weights, beta=1)
    return maybe_dx_MK, da_RK, dbs


def _up_backward(
    dys: Sequence[torch.Tensor], xa_MR: torch.Tensor, projections: Sequence[Projection]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the gradient of x @ a.T, [M, R], and every db_NR in float32."""
    ds_MR, dbs = torch.zeros_like(xa_MR), []
    for dy_MN, one, place in zip(dys, projections, _places(projections), strict=True):
        ds_MR[:, place], db_NR = lora.up_backward(dy_MN, one.b, xa_MR[:, place], one.scaling)
        dbs.append(db_NR)
    return ds_MR, dbs


def _backward_of_brought(
    dys: Sequence[torch.Tensor], xa_MR: torch.Tensor, projections: Sequence[Projection], need_dx: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Returns dx_MS and every db_NR in float32, where `x` brought x @ a.T."""
    weights = [one.weight for one in projections]
    if need_dx and _all_inside(xa_MR, weights):
        joint = _is_joint(weights, saved=len(weights) - 1)
        return (_joint_backward if joint else _backward_one_by_one)(dys, xa_MR, projections)
    ds_MR, dbs = _up_backward(dys, xa_MR, projections)
    if not need_dx:
        return None, dbs
    columns = weights[0].shape[1]
    dx_MS = ds_MR.new_empty(len(ds_MR), columns + ds_MR.shape[1])
    dx_MS[:, columns:] = ds_MR
    _add_products(dx_MS[:, :columns], dys, weights, beta=0)
    return dx_MS, dbs


def _all_inside(xa_MR: torch.Tensor, weights: Sequence[Frozen]) -> bool:
    return all(_takes_inside(xa_MR, weight) for weight in weights)


def _is_joint(weights: Sequence[Frozen], saved: int) -> bool:
    """Returns whether dx, of weights that are written out anyway, is one product of all dy side by side.

    Those are 2 M sum(N) numbers read and written, in place of 2 M K for each of the `saved` products that would add to
    dx. For queries, keys and values in groups it pays, for gate and up it does not. A dense weight would be copied too.
    """
    return sum(weight.shape[0] for weight in weights) < saved * weights[0].shape[1]


def _joint_input_gradient(
    dys: Sequence[torch.Tensor], ds_MR: torch.Tensor, weights: Sequence[Frozen], a_RK: torch.Tensor
) -> torch.Tensor:
    """Returns [dy | ds] @ [W; a] of all dy side by side, [M, K]."""
    *rows, last = _side_by_side([*(weight.shape[0] for weight in weights), len(a_RK)])
    w_PK = ds_MR.new_empty(last.stop, a_RK.shape[1])
    for weight, its in zip(weights, rows, strict=True):
        dequantize_into(w_PK[its], weight)
    w_PK[last] = a_RK
    return torch.mm(torch.cat([*dys, ds_MR], dim=1), w_PK)


def _joint_backward(
    dys: Sequence[torch.Tensor], xa_MR: torch.Tensor, projections: Sequence[Projection]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns dy @ [W | scaling * b] of all dy side by side, and every db_NR in float32."""
    rows = _side_by_side(one.weight.shape[0] for one in projections)
    w_PS = xa_MR.new_empty(rows[-1].stop, projections[0].weight.shape[1] + xa_MR.shape[1])
    dy_MP = torch.cat(list(dys), dim=1)
    # Of each projection with the image of all of them, of which it takes its own: one read of xa.
    db_PR, dbs = matmul_float32(dy_MP.t(), xa_MR), []
    for one, place, its in zip(projections, _places(projections), rows, strict=True):
        _write_out(w_PS[its], one, place)
        dbs.append(db_PR[its, place] * one.scaling)
    return torch.mm(dy_MP, w_PS), dbs


def _backward_one_by_one(
    dys: Sequence[torch.Tensor], xa_MR: torch.Tensor, projections: Sequence[Projection]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the sum of dy @ [W | scaling * b], and every db_NR in float32."""
    wide = projections[0].weight.shape[1] + xa_MR.shape[1]
    # One buffer, as each weight is multiplied while the cache has it.
    buffer_PS = xa_MR.new_empty(max(one.weight.shape[0] for one in projections), wide)
    dx_MS, beta, dbs = xa_MR.new_empty(len(xa_MR), wide), 0, []
    for dy_MN, one, place in zip(dys, projections, _places(projections), strict=True):
        w_NS = buffer_PS[: one.weight.shape[0]]
        _write_out(w_NS, one, place)
        dx_MS.addmm_(backend.readable(dy_MN), w_NS, beta=beta)
        dbs.append(matmul_float32(dy_MN.t(), xa_MR[:, place]).mul_(one.scaling))
        beta = 1
    return dx_MS, dbs


def _add_products(dx_MK: torch.Tensor, dys: Sequence[torch.Tensor], weights: Sequence[Frozen], beta: int) -> None:
    """Makes `dx_MK` beta * dx + the sum of dy @ W, by products of each weight in turn."""
    for dy_MN, weight in zip(dys, weights, strict=True):
        linear.add_input_gradient(dx_MK, dy_MN, weight, beta)
        beta = 1


@Operator
def _lora_group(
    x_MS: torch.Tensor,
    a_RK: torch.Tensor | None,
    b: list[torch.Tensor],
    bias: list[torch.Tensor | None],
    scaling: list[float],
    data: list[torch.Tensor],
    absmax: list[torch.Tensor | None],
    code: list[torch.Tensor | None],
    blocksize: list[int],
    nested_absmax: list[torch.Tensor | None],
    nested_code: list[torch.Tensor | None],
    offset: list[torch.Tensor | None],
    nested_size: list[int],
    rows: list[int],
    columns: list[int],
    dropout: float,
    seed: int,
) -> list[torch.Tensor]:
    """Returns every y_MN, and what the backward pass needs of x @ a.T."""
    flat = (data, absmax, code, blocksize, nested_absmax, nested_code, offset, nested_size, rows, columns)
    *outputs, xa_MR = _forward(x_MS, a_RK, _together(b, bias, scaling, flat), dropout, seed)
    return [*(y_MN.to(x_MS.dtype) for y_MN in outputs), xa_MR]


def _together(
    b: Sequence[torch.Tensor], bias: Sequence[torch.Tensor | None], scaling: Sequence[float], flat: Sequence[Any]
) -> list[Projection]:
    weights = [Frozen.back(*parts) for parts in zip(*flat, strict=True)]
    return [Projection(*parts) for parts in zip(weights, bias, b, scaling, strict=True)]


@_lora_group.register_fake
def _(x_MS: torch.Tensor, a_RK: torch.Tensor | None, *rest: Any) -> list[torch.Tensor]:
    rows, columns = rest[-4], rest[-3]
    rank = x_MS.shape[1] - columns[0] if a_RK is None else a_RK.shape[0]
    dtype = backend.product_dtype(x_MS) if a_RK is None else lora.product_dtype(x_MS)
    xa_MR = x_MS.new_empty((x_MS.shape[0], rank), dtype=dtype)
    return [*(x_MS.new_empty((x_MS.shape[0], n)) for n in rows), xa_MR]


@Operator
def _lora_group_backward(
    xa_MR: torch.Tensor,
    dys: list[torch.Tensor],
    x_MK: torch.Tensor | None,
    a_RK: torch.Tensor | None,
    b: list[torch.Tensor],
    scaling: list[float],
    data: list[torch.Tensor],
    absmax: list[torch.Tensor | None],
    code: list[torch.Tensor | None],
    blocksize: list[int],
    nested_absmax: list[torch.Tensor | None],
    nested_code: list[torch.Tensor | None],
    offset: list[torch.Tensor | None],
    nested_size: list[int],
    rows: list[int],
    columns: list[int],
    dropout: float,
    seed: int,
    need_dx: bool,
) -> list[torch.Tensor]:
    """Returns dx, da and every db; what is not asked for, or there is not, is empty."""
    flat = (data, absmax, code, blocksize, nested_absmax, nested_code, offset, nested_size, rows, columns)
    projections = _together(b, [None] * len(b), scaling, flat)
    dx, da_RK, dbs = _backward(dys, x_MK, a_RK, xa_MR, projections, dropout, seed, need_dx)
    found = [dys[0].new_empty(0) if dx is None else dx.to(dys[0].dtype)]
    found.append(xa_MR.new_empty(0) if da_RK is None or a_RK is None else da_RK.to(a_RK.dtype))
    return [*found, *(db_NR.to(b_NR.dtype) for db_NR, b_NR in zip(dbs, b, strict=True))]


@_lora_group_backward.register_fake
def _(
    xa_MR: torch.Tensor,
    dys: list[torch.Tensor],
    x_MK: torch.Tensor | None,
    a_RK: torch.Tensor | None,
    b: list[torch.Tensor],
    *rest: Any,
) -> list[torch.Tensor]:
    (rows, rank), columns, need_dx = xa_MR.shape, rest[-4][0], rest[-1]
    dx = dys[0].new_empty((rows, columns + (rank if a_RK is None else 0)) if need_dx else 0)
    da_RK = xa_MR.new_empty(0) if a_RK is None else a_RK.new_empty(a_RK.shape)
    return [dx, da_RK, *(b_NR.new_empty(b_NR.shape) for b_NR in b)]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x_MS, a_RK, b, bias, scaling, data, absmax, code, blocksize, *nested, nested_size, rows, columns = inputs[:-2]
    ctx.numbers, ctx.adapter = (scaling, blocksize, nested_size, rows, columns), inputs[-2:]
    ctx.bias_dtypes = [None if one is None else one.dtype for one in bias]
    ctx.mark_non_differentiable(output[-1])
    kept = (*b, *data, *absmax, *code, *(part for parts in nested for part in parts))
    ctx.save_for_backward(output[-1], None if a_RK is None else x_MS, a_RK, *kept)


def _differentiate(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
    xa_MR, x_MK, a_RK, *kept = ctx.saved_tensors
    scaling, blocksize, *sizes = ctx.numbers
    n = len(scaling)
    b, data, absmax, code, *nested = (kept[first : first + n] for first in range(0, len(kept), n))
    dys, need_dx = list(gradients[:-1]), ctx.needs_input_grad[0]
    flat = (data, absmax, code, blocksize, *nested, *sizes)
    dx, da_RK, *dbs = _lora_group_backward(xa_MR, dys, x_MK, a_RK, b, scaling, *flat, *ctx.adapter, need_dx)
    need_bias = ctx.needs_input_grad[2 + n : 2 + 2 * n]
    dbiases = [
        dy_MN.sum(0, dtype=torch.float32).to(dtype) if needed else None
        for dy_MN, dtype, needed in zip(dys, ctx.bias_dtypes, need_bias, strict=True)
    ]
    frozen = [[None] * n for _ in (scaling, *flat)]
    return dx if need_dx else None, None if a_RK is None else da_RK, dbs, dbiases, *frozen, None, None


_lora_group.register_autograd(_differentiate, setup_context=_keep_for_backward)

"""4-bit weights back to numbers, in one pass over them."""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels import backend
from lora_kernels.frozen import Frozen
from lora_kernels.operators import Operator
from lora_kernels.slabs import dense_slabs


def nf4_dequant(weight: Frozen, dtype: torch.dtype) -> torch.Tensor:
    """Returns the 4-bit `weight` as [N, K] in `dtype`, bit for bit what bitsandbytes dequantizes it to.

    Raises:
        ValueError: the weight is dense.
    """
    weight.packed()
    return _nf4_dequant(*weight.flat(), dtype)


@Operator
def _nf4_dequant(
    data: torch.Tensor,
    absmax: torch.Tensor | None,
    code: torch.Tensor | None,
    blocksize: int,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_size: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    nested = (nested_absmax, nested_code, offset, nested_size)
    weight = Frozen.back(data, absmax, code, blocksize, *nested, rows, columns)
    out_NK = data.new_empty((rows, columns), dtype=dtype)
    dequantize_into(out_NK, weight)
    return out_NK


@_nf4_dequant.register_fake
def _(data: torch.Tensor, *flat: Any) -> torch.Tensor:
    *_, rows, columns, dtype = flat
    return data.new_empty((rows, columns), dtype=dtype)


def dequantize_into(out_NK: torch.Tensor, weight: Frozen) -> None:
    """Writes the 4-bit `weight` into `out_NK`, whose rows may stand further apart than K; no gradient."""
    if backend.is_triton(out_NK):
        from lora_kernels.gpu import nf4

        nf4.dequantize_into(out_NK, weight)
    else:
        for rows, slab in dense_slabs(weight, out_NK.dtype):
            out_NK[rows].copy_(slab)

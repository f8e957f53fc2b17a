"""A frozen weight as tensors: dense, or in the 4-bit blocks of bitsandbytes."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, slots=True)
class Nested:
    """How scales are themselves quantized, to 8 bits in groups (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""

    absmax: torch.Tensor
    """[ceil(blocks / size)] float32: the scale of each group."""
    code: torch.Tensor
    """[256] float32: what each 8-bit code stands for."""
    offset: torch.Tensor
    """0-d float32, added to every scale."""
    size: int
    """Scales in a group."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """How 4-bit weights are scaled: `size` of them in a row share a scale."""

    absmax: torch.Tensor
    """[ceil(N * K / size)] float32, or uint8 where nested."""
    code: torch.Tensor
    """[16] float32: what each 4-bit code stands for."""
    size: int
    nested: Nested | None

    @property
    def kind(self) -> str:
        """`nf4` or `fp4`: the code of the one begins with -1, of the other with 0. Reads a code once, then knows it."""
        known = _kinds.get(self.code)
        if known is None:
            known = _kinds[self.code] = "nf4" if float(self.code[0]) == -1.0 else "fp4"
        return known


_kinds: MutableMapping[torch.Tensor, str] = WeakTensorKeyDictionary()


@dataclass(frozen=True, slots=True)
class Frozen:
    """A frozen weight [N, K] that operations multiply by."""

    data: torch.Tensor
    """Dense: [N, K], any float dtype. In 4 bits: [ceil(N * K / 2)] uint8, row-major, high half first."""
    shape: tuple[int, int]
    """(N, K)."""
    blocks: Blocks | None = None
    """None for a dense weight."""

    @classmethod
    def of(cls, weight: torch.Tensor, state: Any = None) -> Frozen:
        """Returns a dense weight, or one of bitsandbytes with its `QuantState`; nothing is copied."""
        rows, columns = weight.shape if state is None else state.shape
        if state is None:
            return cls(weight.detach(), (rows, columns))
        nested = None
        if state.nested:
            inner = state.state2
            nested = Nested(inner.absmax, inner.code, state.offset, inner.blocksize)
        # quant_storage may be any dtype: the bytes are the same.
        packed = weight.detach().reshape(-1).view(torch.uint8)
        return cls(packed, (rows, columns), Blocks(state.absmax, state.code, state.blocksize, nested))

    def packed(self) -> Blocks:
        """Returns how the weight is packed. Raises ValueError for a dense one."""
        if self.blocks is None:
            raise ValueError("the weight is dense already, so there is nothing to dequantize")
        return self.blocks

    def flat(self) -> tuple[Any, ...]:
        """Returns the weight as ten arguments of an operator; `Frozen.back` puts it together again."""
        rows, columns = self.shape
        if self.blocks is None:
            return (self.data, None, None, 0, None, None, None, 0, rows, columns)
        inner = self.blocks.nested
        nested = (inner.absmax, inner.code, inner.offset, inner.size) if inner else (None, None, None, 0)
        return (self.data, self.blocks.absmax, self.blocks.code, self.blocks.size, *nested, rows, columns)

    @classmethod
    def back(cls, *flat: Any) -> Frozen:
        """Returns the weight that `flat` took apart."""
        data, absmax, code, size, *nested, rows, columns = flat
        blocks = None
        if absmax is not None:
            blocks = Blocks(absmax, code, size, Nested(*nested) if nested[0] is not None else None)
        return cls(data, (rows, columns), blocks)

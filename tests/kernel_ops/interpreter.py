"""Triton's interpreter, made to give the numbers that the GPU gives.

The interpreter of Triton 3.6 to 3.9 stores bfloat16 as its bits in uint16, then computes on those bits as if they were
the numbers: 1.0 + 1.0 is 0x3F80 + 0x3F80, which is -0.0. It also cuts float32 off to bfloat16 where the GPU rounds to
nearest, even where tied. Both go unnoticed, as nothing raises. `make_bfloat16_exact` mends them, and makes three more
things that only a GPU would refuse or lose show up here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle, interpreter_builder


def make_bfloat16_exact() -> None:
    """Mends the interpreter of this process, once however often it is called.

    - bfloat16 is computed in float32 and rounded to nearest even; a reduction of it is refused, as the kernels sum and
      compare in float32.
    - `tl.device_assert` raises, and so does an integer that overflows 32 bits.
    - `tl.dot` refuses a contraction shorter than 16, as compiling it does.
    - `tl.dot` of float32 rounds what it multiplies to TF32 unless `input_precision` says otherwise, as tensor cores do.
    """
    if hasattr(InterpreterBuilder, "get_bf16"):
        return
    InterpreterBuilder.binary_op = _binary(InterpreterBuilder.binary_op)
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _convert(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.create_fma = _fma(InterpreterBuilder.create_fma)
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    InterpreterBuilder.get_bf16 = lambda self, value: _encode(np.array([value], np.float32))
    for scheme in (ReduceOps, ScanOps):
        scheme.apply_impl = _without_bfloat16(scheme.apply_impl)
    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, debug=True)
    interpreter_builder.codegen_fns["min_dot_size"] = lambda lhs, rhs: (1, 1, 32 if _bits(lhs) == 8 else 16)


def _bits(dtype: Any) -> int:
    return dtype.scalar.primitive_bitwidth


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _decode(handle: TensorHandle) -> TensorHandle:
    """Returns the same numbers in float32; a handle of another dtype comes back as it is."""
    if not _is_bfloat16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _encode(numbers: np.ndarray) -> TensorHandle:
    """Returns float32 numbers as a bfloat16 handle, rounded to nearest even. NaN is 0x7FFF, as PTX's cvt has it."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    # Half of the last place kept, less one where that place is even: a tie carries only into an odd one.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return TensorHandle(np.where(np.isnan(numbers), 0x7FFF, rounded).astype(np.uint16), tl.bfloat16)


def _binary(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Arithmetic and comparisons; what else Triton lets bfloat16 do, abs and where among it, is right on the bits.

    Rounding to float32 first harms nothing, as 24 bits of mantissa are more than twice the 8 of bfloat16 (Figueroa
    1995, When is double rounding innocuous?).
    """

    def mended(self: Any, x: TensorHandle, y: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        if not _is_bfloat16(x):
            return stock(self, x, y, op)
        found = stock(self, _decode(x), _decode(y), op)
        # A comparison gives booleans.
        return _encode(found.data) if found.data.dtype == np.float32 else found

    return mended


def _cast(stock: Callable[..., Any]) -> Callable[..., Any]:
    def mended(self: Any, value: TensorHandle, dtype: Any) -> TensorHandle:
        if dtype.scalar != tl.bfloat16:
            return stock(self, _decode(value), dtype)
        return value if _is_bfloat16(value) else _encode(value.data.astype(np.float32))

    return mended


def _convert(stock: Callable[..., Any]) -> Callable[..., Any]:
    def mended(self: Any, value: TensorHandle, dtype: Any, rounding: Any) -> TensorHandle:
        if not _is_bfloat16(value) and dtype.scalar != tl.bfloat16:
            return stock(self, value, dtype, rounding)
        if rounding == ir.ROUNDING_MODE.RTZ:
            raise NotImplementedError("bfloat16 is rounded to nearest even only")
        return self.cast_impl(value, dtype)

    return mended


def _fma(stock: Callable[..., Any]) -> Callable[..., Any]:
    def mended(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not _is_bfloat16(z):
            return stock(self, x, y, z)
        product = np.multiply(_decode(x).data, _decode(y).data, dtype=np.float64)
        return _encode((product + _decode(z).data).astype(np.float32))

    return mended


def _dot(stock: Callable[..., Any]) -> Callable[..., Any]:
    def mended(self: Any, a: TensorHandle, b: TensorHandle, acc: TensorHandle, precision: Any, *rest: Any) -> Any:
        operands = [_decode(a), _decode(b)]
        if a.dtype.scalar == b.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
            operands = [TensorHandle(_to_tf32(operand.data), tl.float32) for operand in operands]
        found = stock(self, *operands, _decode(acc), precision, *rest)
        return _encode(found.data) if _is_bfloat16(acc) else found

    return mended


def _to_tf32(numbers: np.ndarray) -> np.ndarray:
    """Returns float32 numbers with 10 bits of mantissa: to nearest, away from zero where tied, as PTX's cvt.rna."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(numbers), rounded, numbers)


def _without_bfloat16(stock: Callable[..., Any]) -> Callable[..., Any]:
    def mended(self: Any, inputs: Any) -> Any:
        if any(tensor.dtype == tl.bfloat16 for tensor in inputs):
            raise NotImplementedError("a reduction of bfloat16 adds up its rounding: convert to float32 first")
        return stock(self, inputs)

    return mended

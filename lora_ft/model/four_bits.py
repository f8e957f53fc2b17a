"""Weights that bitsandbytes packed in 4 bits: the numbers they stand for, dense stand-ins, and what it misreads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_ft.config import BaseCache
from lora_kernels import Frozen, nf4_dequant

# Weights that share a scale in NF4.
BLOCK = 64
MISREAD = f"bitsandbytes misreads 4-bit weights on this processor whose rows are no multiple of {BLOCK}"

# Bytes of dense weights that a 4-bit model may hold beside its own on a processor: 0.4 GiB for SmolLM2-135M in float32.
DENSE_LIMIT = 1 << 30


def keep_in_place(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in place.

    On processors with AVX512-BF16 the first forward in evaluation mode rewrites each weight for speed, after
    which dequantization, and so every merge and every later backward pass, reads wrong values (off by 0.18).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def unpacked(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """Returns the numbers [N, K] that a weight packed by bitsandbytes stands for, in the dtype of its `QuantState`.

    Its own `dequantize_4bit` (0.50.2) is wrong without a word where blocks cross rows and the processor has AVX512.
    """
    return nf4_dequant(Frozen.of(weight, state), state.dtype)


class Dequantized(nn.Linear):
    """The dense stand-in of a 4-bit layer, of the very numbers that the layer would dequantize to."""

    compute_dtype: torch.dtype
    """That of the layer, as its own attribute is called."""
    quant_state = None

    @classmethod
    def of(cls, layer: bnb.nn.Linear4bit) -> Dequantized:
        """Returns the stand-in of `layer`, in the dtype that it computes in."""
        dense = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = unpacked(layer.weight, layer.weight.quant_state).to(layer.compute_dtype)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        dense.bias, dense.compute_dtype = layer.bias, layer.compute_dtype
        return dense.train(layer.training)


def choose_cache(model: nn.Module, cache: BaseCache) -> None:
    """Says of a model what `dequantized` does with it from here on."""
    model.base_cache = cache  # type: ignore[assignment]


@contextmanager
def dequantized(model: nn.Module) -> Iterator[None]:
    """Runs the block with 4-bit weights dequantized once, where each pass would do it anew.

    Unless something was chosen for the model (`choose_cache`): on a processor and small models only, by their size
    alone, so that a run computes the same however much memory is free. The kernels of a GPU read the packed weights.
    """
    cache = getattr(model, "base_cache", "auto")
    places = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, bnb.nn.Linear4bit) and layer.compute_dtype
    ]
    held = sum(layer.in_features * layer.out_features * layer.compute_dtype.itemsize for *_, layer in places)
    on_gpu = any(layer.weight.device.type != "cpu" for *_, layer in places)
    if cache == "off" or (cache == "auto" and (on_gpu or held > DENSE_LIMIT)):
        places = []
    try:
        for parent, name, layer in places:
            setattr(parent, name, Dequantized.of(layer))
        yield
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)


def misread(skeleton: PreTrainedModel, but: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the linear layers that bitsandbytes, in 4 bits, would multiply by other numbers than it was given.

    Args:
        but: layers that are not quantized anyway.
    """
    if not misreads_crossed_blocks():
        return ()
    inputs = {
        name: module.nx if isinstance(module, Conv1D) else module.in_features
        for name, module in skeleton.named_modules()
        if isinstance(module, Conv1D | nn.Linear)
    }
    return tuple(name for name, columns in inputs.items() if columns % BLOCK and name not in but)


@functools.cache
def misreads_crossed_blocks() -> bool:
    """Returns whether `dequantize_4bit` is wrong on this processor where blocks cross rows (`unpacked`)."""
    packed, state = bnb.functional.quantize_4bit(torch.linspace(-1, 1, 64 * 96).view(64, 96), quant_type="nf4")
    return not torch.equal(bnb.functional.dequantize_4bit(packed, state), unpacked(packed, state))

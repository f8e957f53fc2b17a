"""A base without numbers: its layers as loading makes them, on the meta device, and filled with fake tensors."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import nn
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from lora_ft import base as bases
from lora_ft.base import Base
from lora_ft.config import RunConfig
from lora_ft.memory.ledger import Ledger
from lora_ft.model import four_bits
from lora_ft.sources import Source
from lora_ft.system.devices import Device
from lora_ft.tasks import Task
from lora_kernels import slabs

WEIGHTS, ADAPTERS = "weights", "adapters"
# Scales that share one of their own in NF4.
NESTED = 256


def made(config: RunConfig, task: Task, source: Source, device: Device) -> Base:
    """Returns a base as `base.load` makes it, on the meta device: shapes and dtypes of weights, and none of them."""
    dtype = getattr(torch, device.dtype if config.train.dtype == "auto" else config.train.dtype)
    told = bases.text_config(source, task.model_class)
    for key, value in task.config_changes().items():
        setattr(told, key, value)
    if getattr(told, "pad_token_id", None) is None:
        told.pad_token_id = task.tokenizer.pad_token_id
    told.dtype = dtype
    quant = config.quant
    stored = bases.stored_quant(told, source, quant)
    if stored:
        del told.quantization_config
    model = bases.skeleton(source.name, told, task.model_class)
    output, task_heads = bases.heads(model)
    if quant != "none":
        misread = four_bits.misread(model, but=output + task_heads) if quant == "nf4" and device.kind == "cpu" else ()
        in_float32 = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
        settings: Any = bases.quantization(quant, dtype, output + task_heads + misread + in_float32)
        replace_with_bnb_linear(
            model, modules_to_not_convert=settings.llm_int8_skip_modules, quantization_config=settings
        )
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                _pack(module, dtype)
            elif isinstance(module, bnb.nn.Linear8bitLt):
                _narrow(module)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    four_bits.keep_in_place(model)
    return Base(model, task.tokenizer, source, quant, dtype, (), task_heads)


def _pack(layer: Any, dtype: torch.dtype) -> None:
    """Gives a 4-bit layer on the meta device the weight and the scales that loading gives it."""
    n, k = layer.out_features, layer.in_features
    scales = -(-n * k // four_bits.BLOCK)
    with torch.device("meta"):
        groups = QuantState(
            absmax=torch.empty(-(-scales // NESTED)), code=torch.empty(256), blocksize=NESTED, dtype=torch.float32
        )
        weight: Any = nn.Parameter(torch.empty(-(-n * k // 2), 1, dtype=torch.uint8), requires_grad=False)
        absmax, offset = torch.empty(scales, dtype=torch.uint8), torch.empty(())
    # Numbers, by which the operators know what kind of weight it is.
    code = bnb.functional.get_4bit_type("nf4", device="cpu")
    weight.quant_state = layer.quant_state = QuantState(
        absmax=absmax, shape=torch.Size((n, k)), code=code, blocksize=four_bits.BLOCK, quant_type="nf4", dtype=dtype,
        offset=offset, state2=groups,
    )  # fmt: skip
    weight.compress_statistics, weight.quant_type, weight.blocksize = True, "nf4", four_bits.BLOCK
    weight.quant_storage, weight.bnb_quantized = torch.uint8, True
    layer.weight, layer.compute_type_is_set = weight, True


def _narrow(layer: Any) -> None:
    """Gives an 8-bit layer on the meta device the weight and the scales that loading gives it."""
    with torch.device("meta"):
        weight = torch.empty(layer.out_features, layer.in_features, dtype=torch.int8)
        layer.state.SCB = torch.empty(layer.out_features)
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)


@contextmanager
def filled(model: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Runs the block with fake tensors in the place of those on the meta device, each counted as what it is."""
    places: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (owned, name, tensor)
        for module in model.modules()
        for owned in (module._parameters, module._buffers)
        for name, tensor in owned.items()
        if tensor is not None
    ]
    found: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in found:
            with ledger.counting(ADAPTERS if tensor.requires_grad else WEIGHTS):
                like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                like = nn.Parameter(like, requires_grad=tensor.requires_grad)
                vars(like).update({key: _with(value, fake) for key, value in vars(tensor).items()})
            found[id(tensor)] = like
        return found[id(tensor)]

    states = [(m, m.quant_state) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    narrow: list[Any] = [(m, m.state) for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    try:
        for owned, name, tensor in places:
            owned[name] = fake(tensor)
        for layer, _ in states:
            layer.quant_state = layer.weight.quant_state
        for layer, state in narrow:
            layer.state = copy.copy(state)
            layer.state.CB, layer.state.SCB = layer.weight.data, fake(state.SCB)
        yield
    finally:
        for owned, name, tensor in places:
            owned[name] = tensor
        for layer, state in states:
            layer.quant_state = state
        for layer, state in narrow:
            layer.state = state


def _with(value: Any, change: Any) -> Any:
    """Returns how a weight is packed, with its tensors changed; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, QuantState):
        value = copy.copy(value)
        vars(value).update({key: _with(part, change) for key, part in vars(value).items()})
    return value


@contextmanager
def weights_whole() -> Iterator[None]:
    """Runs the block as a GPU does: a weight is dequantized whole."""
    before, slabs.SLAB = slabs.SLAB, sys.maxsize
    try:
        yield
    finally:
        slabs.SLAB = before

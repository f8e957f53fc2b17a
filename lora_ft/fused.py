"""The bridge to `lora_kernels`: PEFT's layers, with the frozen product and its adapter computed as one operation.

Each class is PEFT's own with another `forward`, so whatever else is done to an adapter (saving, merging, switching it
off) is PEFT's, and no trace of the class is in what is saved. What the kernels do not take goes through PEFT's forward.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from peft.tuners import lora
from torch import nn
from torch._subclasses import FakeTensor
from transformers.pytorch_utils import Conv1D

from lora_ft.model.four_bits import Dequantized
from lora_ft.speed import tuning
from lora_kernels import Frozen, lora_down, lora_linear, new_seed
from lora_kernels.cpu.build import library

log = logging.getLogger(__name__)

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
# What the kernels are compiled and checked for; before it there are no matrix instructions for bfloat16.
OLDEST_GPU = (8, 0)


def register(settings: peft.LoraConfig) -> None:
    """Makes PEFT use the layers of this module wherever it puts this adapter into a model."""
    if torch.cuda.is_available():
        tuning.recall(torch.cuda.get_device_name())
    # The first that fits counts, and bitsandbytes' layers are `nn.Linear` too.
    settings._register_custom_module(
        {bnb.nn.Linear4bit: Linear4bit, bnb.nn.Linear8bitLt: Linear8bitLt, nn.Linear: Linear, Conv1D: TransposedLinear}
    )


def paths(model: nn.Module) -> dict[str, list[str]]:
    """Returns the names of the adapted layers, by how they are computed as they stand: fused, or by PEFT and why."""
    found: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, lora.LoraLayer):
            found.setdefault(_path(layer), []).append(name)
    return found


def tell(model: nn.Module) -> None:
    """Logs `paths`, a line for each, with the layers named by their places in a block, and what makes a CPU slower."""
    for path, names in paths(model).items():
        places = dict.fromkeys(re.split(r"\.\d+\.", name)[-1] for name in names)
        log.info("%d layers %s: %s", len(names), path, ", ".join(places))
    numbers = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    if numbers.device.type == "cpu" and isinstance(loops := library(numbers.dtype), str):
        log.info("norms, activations and losses take torch several passes each, for want of compiled loops: %s", loops)


def implementation(device: torch.device) -> str:
    """Returns what computes fused layers on a device: the Triton kernels, the CPU form, or PEFT and why."""
    refusal = refusal_of_device(device)
    if refusal is not None:
        return f"through PEFT: {refusal}"
    if device.type != "cuda":
        loops = library(torch.float32)
        by = f"by torch: {loops}" if isinstance(loops, str) else "compiled"
        return f"fused: CPU form, as there is no GPU, with its loops {by}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"fused: Triton {importlib.metadata.version('triton')} on sm_{major}{minor}"


@dataclass(frozen=True, slots=True)
class Active:
    """The one adapter that is active in a layer."""

    a: torch.Tensor
    """[rank, K]."""
    b: torch.Tensor
    """[N, rank]."""
    scaling: float
    dropout: float
    """0 in evaluation."""


def draw_seed(x: torch.Tensor, dropout: float) -> int:
    """Returns a seed for the mask of `x`. No number can be read from fake tensors, and on them nothing is dropped."""
    return new_seed() if dropout and not isinstance(x, FakeTensor) else 0


class _Fused:
    """What the layers share. It goes before the class of PEFT that each of them is, whose attributes these are."""

    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_variant: Any
    scaling: Any
    active_adapters: Any
    disable_adapters: Any
    merged: Any

    path = "fused"
    """How the layer is computed where nothing stands against it."""
    unfit: str | None = None
    """What stood against the dtypes that the last forward pass met."""

    def active(self, *, zeros_for_off: bool = False) -> Active | str:
        """Returns the adapter that the kernels compute this layer with as it stands, or why PEFT computes it.

        Args:
            zeros_for_off: take one of zeros for an adapter that is switched off, so that a layer without its adapter is
                computed, and rounded, as one with it.
        """
        off = self.disable_adapters
        if off and not zeros_for_off:
            return "the adapter is switched off"
        if self.merged:
            return "the adapter is merged"
        lora_a, variants, base = self.lora_A, self.lora_variant, self.base_layer
        names = [name for name in self.active_adapters if name in lora_a]
        if len(names) != 1:
            return f"{len(names)} adapters are active"
        name = names[0]
        if name in variants:
            return f"the adapter is a {type(variants[name]).__name__}"
        a, b, dropout = lora_a[name], self.lora_B[name], self.lora_dropout[name]
        if type(a) is not nn.Linear or type(b) is not nn.Linear or type(dropout) not in (nn.Identity, nn.Dropout):
            return f"the adapter is made of {type(a).__name__}, {type(b).__name__} and {type(dropout).__name__}"
        if b.bias is not None:
            return "the adapter has a bias"
        if is_watched(base) or is_watched(a) or is_watched(b) or is_watched(dropout):
            return "a hook watches a part of the layer"
        weight = a.weight
        against = refusal_of_device(weight.device) or self._refusal_of_base(base)
        if against is not None:
            return against
        if off:
            return Active(torch.zeros_like(weight), torch.zeros_like(b.weight), self.scaling[name], 0.0)
        dropped = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        return Active(weight, b.weight, self.scaling[name], dropped)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns what PEFT's `forward` does, in the same dtype; other arguments than `x` are for PEFT alone."""
        active = self.active()
        if args or kwargs or isinstance(active, str):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        dtype = self.product_dtype(x, active)
        if dtype is None or x.shape[-1] != active.a.shape[1] or not x.numel():
            return super().forward(x)  # type: ignore[misc]
        return self.compute(x, dtype, active)

    def product_dtype(self, x: torch.Tensor, active: Active) -> torch.dtype | None:
        """Returns the one dtype in which PEFT would multiply a tensor of the dtype and device of `x`.

        None where there is none, which is said once, or where PEFT would raise.
        """
        a, b, autocast = active.a, active.b, _autocast(x.device)
        base, adapter = self._dtype_of_base(x, autocast), autocast or a.dtype
        if base is None or not x.device == a.device == self.base_layer.weight.device:
            return None  # PEFT raises what is to be raised
        alike = base == adapter and (autocast is not None or a.dtype == b.dtype)
        if alike and base in DTYPES and x.dtype in DTYPES and a.dtype in DTYPES and b.dtype in DTYPES:
            if self.unfit is not None:
                self.unfit = None
            return base
        self.unfit = f"the base computes in {_word(base)} and the adapter in {_word(adapter)}, outside torch.autocast"
        _say_once(self.unfit)
        return None

    def _refusal_of_base(self, base: Any) -> str | None:
        raise NotImplementedError

    def _dtype_of_base(self, x: torch.Tensor, autocast: torch.dtype | None) -> torch.dtype | None:
        """Returns the dtype in which PEFT would multiply `x` by the frozen weight, or None where it would raise."""
        raise NotImplementedError

    def compute(self, x: torch.Tensor, dtype: torch.dtype, active: Active) -> torch.Tensor:
        """Returns what `forward` does, given what `active` and `product_dtype` have found."""
        raise NotImplementedError


class Linear(_Fused, lora.Linear):
    """A dense linear layer: `nn.Linear`."""

    path = "fused, dense base"
    kind: type[nn.Module] = nn.Linear
    transposed = False
    """Whether the weight is [K, N]."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: peft.LoraConfig, **kwargs: Any) -> None:
        # As PEFT sets it when it chooses its own class: it is saved.
        config.fan_in_fan_out = self.transposed
        super().__init__(base_layer, adapter_name, config, is_target_conv_1d_layer=self.transposed, **kwargs)

    def _refusal_of_base(self, base: Any) -> str | None:
        if type(base) is not self.kind or hasattr(base.weight, "__tensor_flatten__"):
            return f"the base is a {type(base).__name__} of {type(base.weight).__name__}"
        return "the base is trained too" if base.weight.requires_grad else None

    def _dtype_of_base(self, x: torch.Tensor, autocast: torch.dtype | None) -> torch.dtype | None:
        return autocast or (x.dtype if x.dtype == self.base_layer.weight.dtype else None)

    def frozen(self) -> Frozen:
        """Returns the weight [N, K]."""
        weight = self.base_layer.weight
        return Frozen.of(weight.t() if self.transposed else weight)

    def compute(self, x: torch.Tensor, dtype: torch.dtype, active: Active) -> torch.Tensor:
        return _product(self, x.to(dtype), active)


class TransposedLinear(Linear):
    """A dense linear layer whose weight is [K, N]: the `Conv1D` of GPT-2."""

    kind = Conv1D
    transposed = True


class Linear4bit(_Fused, lora.Linear4bit):
    """A layer of bitsandbytes in 4 bits."""

    path = "fused, 4-bit base"

    def _refusal_of_base(self, base: Any) -> str | None:
        if type(base) is Dequantized:
            return None
        if type(base) not in (bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4):
            return f"the base is a {type(base).__name__}"
        state = _quant_state(base)
        if state is None:
            return "the base is not quantized yet"
        if getattr(state, "packing_format_for_cpu", False):
            return "bitsandbytes repacked the base for AVX512"
        if tuple(state.shape) != (base.out_features, base.in_features):
            return "the base was quantized as its transpose"
        return None

    def _dtype_of_base(self, x: torch.Tensor, autocast: torch.dtype | None) -> torch.dtype:
        return self.base_layer.compute_dtype or x.dtype

    def frozen(self) -> Frozen:
        """Returns the weight [N, K]."""
        return Frozen.of(self.base_layer.weight, _quant_state(self.base_layer))

    def compute(self, x: torch.Tensor, dtype: torch.dtype, active: Active) -> torch.Tensor:
        return _product(self, x.to(dtype), active).to(x.dtype)


class Linear8bitLt(_Fused, lora.Linear8bitLt):
    """A layer of bitsandbytes in 8 bits, which multiplies by its weight itself; only the adapter is ours."""

    path = "fused adapter on an int8 base"

    def _refusal_of_base(self, base: Any) -> str | None:
        return None

    def _dtype_of_base(self, x: torch.Tensor, autocast: torch.dtype | None) -> torch.dtype:
        return autocast or x.dtype

    def compute(self, x: torch.Tensor, dtype: torch.dtype, active: Active) -> torch.Tensor:
        y, b = self.base_layer(x), active.b
        xa = lora_down(x.to(dtype), active.a, dropout=active.dropout, seed=draw_seed(x, active.dropout))
        xa_MR = xa.reshape(-1, b.shape[1])
        # Under autocast `y` may be of the wider dtype of `x`, and is not to be narrowed.
        with torch.autocast(x.device.type, enabled=False) if _autocast(x.device) else nullcontext():
            y_MN = torch.addmm(y.reshape(-1, len(b)), xa_MR.to(y.dtype), b.to(y.dtype).t(), alpha=active.scaling)
        return y_MN.view(y.shape)


def _product(layer: Linear | Linear4bit, x: torch.Tensor, active: Active) -> torch.Tensor:
    seed = draw_seed(x, active.dropout)
    weight, bias = layer.frozen(), layer.base_layer.bias
    return lora_linear(x, weight, bias, active.a, active.b, scaling=active.scaling, dropout=active.dropout, seed=seed)


def _path(layer: Any) -> str:
    if not isinstance(layer, _Fused):
        return f"through PEFT, there is no kernel for {type(layer.get_base_layer()).__name__}"
    active = layer.active()
    against = active if isinstance(active, str) else layer.unfit
    return f"through PEFT, {against}" if against else layer.path


@functools.cache
def refusal_of_device(device: torch.device) -> str | None:
    """Returns why there are no kernels on a device, or None."""
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"there are no kernels for {'AMD GPUs' if torch.version.hip else device.type} yet"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler, which it starts kernels through: install gcc or set CC"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return f"the kernels need compute capability {'.'.join(map(str, OLDEST_GPU))}"
    return None


@functools.cache
def _say_once(unfit: str) -> None:
    log.info("a layer goes through PEFT: %s", unfit)


def _quant_state(base: Any) -> Any:
    """Returns how a 4-bit weight is packed; where the parameter was replaced, as sharding does, the layer knows."""
    return getattr(base.weight, "quant_state", None) or base.quant_state


def is_watched(module: nn.Module) -> bool:
    """Returns whether calls of a module are looked at, or replaced: in a fused layer they do not happen."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in vars(module)
    )


def _autocast(device: torch.device) -> torch.dtype | None:
    """Returns the dtype that autocast would have matrices multiplied in, None where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Decoder layers like Llama's computed whole: what lies between attention and residual sums as grouped operations.

The projections that share an input read it once, no intermediate is written twice, and on a GPU the norm and the
activation before them make their low-rank images on the way. A layer becomes one of a class of its own, which is its
class in all but `forward`: modules keep their names and classes, and saving, merging and switching adapters off are
PEFT's as before.

A layer is computed so only where its structure is known and a probe has shown that it computes the same; it is asked
again at every call, and whatever then stands against it (an adapter that is merged, a hook, a dtype that does not meet)
sends the call to the layer's own `forward`. Adapters that are off are taken for zeros: a model and its base are rounded
alike, and one that has learned nothing is its base to the bit.

B sequences of T positions, H heads of D columns, K columns of the residual.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_ft import fused
from lora_ft.model.modes import mixed_precision
from lora_kernels import Projection, backend, dispatch, lora_group, rms_norm_lora, rope, stacked, swiglu_lora

log = logging.getLogger(__name__)

PROBE_ROWS, PROBE_SIZE = 7, 0.1
"""Positions of the probe, and their spread: small beside what a layer adds to them, large beside the norm's epsilon."""
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest difference that rounding makes of what a layer adds to its input: about four units in the last place for the
ten or so roundings on the way, and for float32 the order of long sums."""
NO_NUMBERS = "there are no numbers to prove it on"
SILU = ("SiLU", "SiLUActivation")
QUERIES_KEYS_VALUES, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")

_Adapters = dict[str, tuple[Any, fused.Active]]
"""Each projection and its adapter, by its name."""


@dataclass(frozen=True)
class Family:
    """Decoder layers of one file of transformers, and what is particular to them."""

    prefix: str
    """Of its classes."""
    head_norms: bool
    """Whether queries and keys are normed, a head at a time."""
    attention: Callable[[Any], dict[str, Any]]
    """What else its attention hands to the function that computes it."""


FAMILIES = {
    "llama": Family("Llama", False, lambda attention: {}),
    "mistral": Family("Mistral", False, lambda a: {"sliding_window": getattr(a.config, "sliding_window", None)}),
    "qwen2": Family("Qwen2", False, lambda attention: {"sliding_window": attention.sliding_window}),
    "qwen3": Family("Qwen3", True, lambda attention: {"sliding_window": attention.sliding_window}),
}


def compute_whole(model: nn.Module) -> None:
    """Has the decoder layers of an adapted model computed whole, each of which a probe proves to be what it seems.

    The probe runs a few random rows through the layer's own `forward` and through ours, as in training but without
    dropout. It draws nothing from torch's generators and leaves neither gradients nor a mode behind.
    """
    with mixed_precision(model):
        layer: Any
        for layer in list(model.modules()):
            kind: Any = type(layer)
            family = _family(kind)
            if family and not isinstance(layer, _Whole) and _known_refusal(layer, family) is None:
                layer.__class__ = _class_of(kind)
                layer.unproven = _difference(layer)


def presume(model: nn.Module, on_gpu: bool) -> None:
    """Takes layers without numbers for what they seem, and for those of a GPU: for who looks at shapes only."""
    for layer in model.modules():
        if isinstance(layer, _Whole) and layer.unproven == NO_NUMBERS:
            layer.unproven, layer.presumed_on_gpu = None, on_gpu


@contextmanager
def in_parts(model: nn.Module) -> Iterator[None]:
    """Runs the block with layers computed a part at a time, as those of a plain model are.

    Whoever compares a model with its merge needs it: sums that are rounded otherwise are no effect of merging.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _Whole) and layer.unproven is None]
    try:
        for layer in layers:
            layer.unproven = "it is compared with plain ones"
        yield
    finally:
        for layer in layers:
            layer.unproven = None


def paths(model: nn.Module) -> dict[str, list[str]]:
    """Returns the names of the decoder layers, by how they are computed as they stand: whole, or a part at a time."""
    found: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        family = _family(type(layer))
        if family:
            whole = isinstance(layer, _Whole)
            active = layer.active() if whole else _known_refusal(layer, family) or "never proven"
            against = active if isinstance(active, str) else layer.unfit
            found.setdefault(f"a part at a time, {against}" if against else "whole", []).append(name)
    return found


def tell(model: nn.Module) -> None:
    """Logs `paths`, a line for each."""
    for path, names in paths(model).items():
        if NO_NUMBERS not in path:
            log.info("%d decoder layers are computed %s", len(names), path)


def implementation(device: torch.device) -> str:
    """Returns how decoder layers of the known families are computed on a device."""
    refusal = fused.refusal_of_device(device)
    return f"a part at a time: {refusal}" if refusal else f"whole, where proven: {', '.join(FAMILIES)}"


class _Whole(nn.Module):
    """What the classes share. It goes before the class of transformers that each of them is; these are its modules."""

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    family: Family
    unproven: str | None = None
    """Why the probe did not prove the layer."""
    unfit: str | None = None
    """What stood against the input of the last forward pass."""
    presumed_on_gpu = False
    """Whether the layer has shapes only and stands for one on a GPU."""

    def active(self) -> _Adapters | str:
        """Returns the adapters to compute the layer whole with, or why it is computed a part at a time."""
        return self.unproven or self._adapters()

    def _adapters(self) -> _Adapters | str:
        attention, mlp = self.self_attn, self.mlp
        found: _Adapters = {}
        norms = _norms(self)
        watched = next(filter(fused.is_watched, (attention, mlp, mlp.act_fn, *norms)), None)
        if watched is not None:
            return f"a hook watches {type(watched).__name__}"
        if any(norm.weight.requires_grad for norm in norms):
            return "a norm is trained"
        for name, layer in _projections(self).items():
            active = "a hook watches it" if fused.is_watched(layer) else layer.active(zeros_for_off=True)
            if isinstance(active, str):
                return f"{name}: {active}"
            found[name] = layer, active
        for group in (QUERIES_KEYS_VALUES, GATE_UP):
            if len({found[name][1].dropout for name in group}) > 1:
                return "projections of one input drop out unlike shares of it"
        return found

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Returns what the layer's own `forward` does."""
        given, angles = {"position_ids": position_ids, "use_cache": use_cache, **kwargs}, position_embeddings
        adapters = self.active()
        if not isinstance(adapters, str):
            unfit = self._misfit(hidden_states, angles, adapters)
            if angles is not None and unfit is None:
                self.unfit = None
                return self._whole(hidden_states, angles, adapters, attention_mask, past_key_values, given)
            self.unfit = unfit
            _say_once(str(unfit))
        return super().forward(
            hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **given,
        )

    def _misfit(
        self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None, adapters: _Adapters
    ) -> str | None:
        """Returns why the layer does not take an input and what rotates its heads, or None where it does."""
        if angles is None or x.ndim != 3 or not x.numel():
            return "there are no rows, or no rotation of them"
        if angles[0].ndim != 3 or angles[0].shape[-1] != self.self_attn.head_dim:
            return "heads are not rotated as a whole"
        for norm in _norms(self):
            if norm.weight.dtype != x.dtype:
                return f"the input is {_word(x.dtype)} and a norm {_word(norm.weight.dtype)}"
        for name, (layer, adapter) in adapters.items():
            if layer.product_dtype(x, adapter) != x.dtype:
                return f"{name} does not compute in {_word(x.dtype)}, as the input is"
        return None

    def _whole(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        adapters: _Adapters,
        attention_mask: Any,
        past_key_values: Any,
        given: Mapping[str, Any],
    ) -> torch.Tensor:
        """Returns what `forward` does; `given` is what goes on to the function that computes attention."""
        attention = self.self_attn
        shape_BTHD = (*x.shape[:2], -1, attention.head_dim)
        imaged = self.presumed_on_gpu or backend.is_triton(x)
        columns, _ = _project(self.input_layernorm, x, None, _operands(adapters, QUERIES_KEYS_VALUES), imaged)
        q, k, v = (y.view(shape_BTHD) for y in columns)
        if self.family.head_norms:
            q, k = _head_norm(attention.q_norm, q), _head_norm(attention.k_norm, k)
        q, k = rope(q.transpose(1, 2), k.transpose(1, 2), *angles)
        v = v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, attention.layer_idx)
        eager = sys.modules[type(attention).__module__].eager_attention_forward
        compute = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
        options = {**self.family.attention(attention), **given}
        dropout = attention.attention_dropout if attention.training else 0.0
        y, _ = compute(attention, q, k, v, attention_mask, dropout=dropout, scaling=attention.scaling, **options)
        o_proj, adapter = adapters["o_proj"]
        y = o_proj.compute(y.reshape(*x.shape[:2], -1).contiguous(), x.dtype, adapter)

        (gate, up), x = _project(self.post_attention_layernorm, y, x, _operands(adapters, GATE_UP), imaged)
        down = _operands(adapters, ("down_proj",))
        if down.dropout:
            down_proj, adapter = adapters["down_proj"]
            return x + down_proj.compute(swiglu_lora(gate, up, None), x.dtype, adapter)
        # On a CPU too: with the image of the activation, the memory of the activation itself is spared.
        (y,) = lora_group(swiglu_lora(gate, up, down.a), None, down.projections)
        return x + y


@dataclass(frozen=True, slots=True)
class _Operands:
    """What an input is multiplied by that projections share."""

    projections: list[Projection]
    a: torch.Tensor
    """[R, K], as `stacked` makes it."""
    dropout: float


def _operands(adapters: _Adapters, names: Sequence[str]) -> _Operands:
    layers, active = zip(*(adapters[name] for name in names), strict=True)
    projections = [
        Projection(layer.frozen(), layer.base_layer.bias, adapter.b, adapter.scaling)
        for layer, adapter in zip(layers, active, strict=True)
    ]
    return _Operands(projections, stacked([adapter.a for adapter in active]), active[0].dropout)


def _project(
    norm: Any, x: torch.Tensor, residual: torch.Tensor | None, by: _Operands, imaged: bool
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns the projections of norm(x + residual), and x + residual.

    Args:
        imaged: whether the norm makes the low-rank image on its way, if it can: with dropout that is of what is left of
            the norm's result, which the norm does not know.
    """
    apart = bool(by.dropout) or not imaged
    y, h = rms_norm_lora(x, residual, norm.weight, None if apart else by.a, norm.variance_epsilon)
    seed = fused.draw_seed(x, by.dropout)
    return lora_group(y, by.a if apart else None, by.projections, dropout=by.dropout, seed=seed), h


def _head_norm(norm: Any, x_BTHD: torch.Tensor) -> torch.Tensor:
    return rms_norm_lora(x_BTHD, None, norm.weight, None, norm.variance_epsilon)[0]


@functools.cache
def _say_once(unfit: str) -> None:
    log.info("a decoder layer is computed a part at a time: %s", unfit)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _class_of(kind: type) -> type[_Whole]:
    """Returns the class of layers of this kind that are computed whole.

    It has the name of the kind, by which sharding and placement know where to cut a model.
    """
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_Whole, kind), {**names, "family": _family(kind)})


def _family(kind: type) -> Family | None:
    """Returns the family of a class of decoder layers, None for any other."""
    found = re.fullmatch(r"transformers\.models\.(\w+)\.modeling_\1", kind.__module__)
    family = FAMILIES.get(found[1]) if found else None
    return family if family and kind.__name__ == f"{family.prefix}DecoderLayer" else None


def _norms(layer: Any) -> list[Any]:
    attention = layer.self_attn
    heads = [norm for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)) if norm]
    return [layer.input_layernorm, layer.post_attention_layernorm, *heads]


def _projections(layer: Any) -> dict[str, Any]:
    attention, mlp = layer.self_attn, layer.mlp
    found = {name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    return found | {name: getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")}


def _known_refusal(layer: Any, family: Family) -> str | None:
    """Returns what stands against a layer before it is probed, or None."""
    return fused.refusal_of_device(next(layer.parameters()).device) or _unlike(layer, family)


def _unlike(layer: Any, family: Family) -> str | None:
    """Returns what of the layer's structure is not that of its family, or None."""
    heads = {"q_norm": "RMSNorm", "k_norm": "RMSNorm"} if family.head_norms else {}
    wanted = {
        layer: {
            "self_attn": "Attention",
            "mlp": "MLP",
            "input_layernorm": "RMSNorm",
            "post_attention_layernorm": "RMSNorm",
        },
        layer.self_attn: dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "") | heads,
        layer.mlp: dict.fromkeys(("gate_proj", "up_proj", "down_proj", "act_fn"), ""),
    }
    for module, children in wanted.items():
        found = dict(module.named_children())
        if found.keys() != children.keys():
            return f"{type(module).__name__} is made of {', '.join(found)}"
        for name, kind in children.items():
            of = type(found[name])
            if kind and (of.__module__, of.__qualname__) != (type(layer).__module__, family.prefix + kind):
                return f"{name} is a {of.__name__} of {of.__module__}"
    if type(layer.mlp.act_fn).__name__ not in SILU:
        return f"its activation is {type(layer.mlp.act_fn).__name__}"
    for name, projection in _projections(layer).items():
        if type(projection) not in (fused.Linear, fused.Linear4bit):
            return f"{name} is a {type(projection).__name__} of {type(projection).__module__}"
    return None


def _difference(layer: Any) -> str | None:
    """Returns why the layer is not proven: what it does not take, or how far ours is from its own `forward`."""
    like = layer.input_layernorm.weight
    if like.device.type == "meta" or isinstance(like, FakeTensor):
        return NO_NUMBERS
    draw = functools.partial(torch.rand, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu")
    # Uniform with the spread that is wanted.
    x = ((draw(1, PROBE_ROWS, len(like)) - 0.5) * 12**0.5 * PROBE_SIZE).to(like)
    angles = (2 * torch.pi * draw(1, PROBE_ROWS, layer.self_attn.head_dim // 2)).repeat(1, 1, 2)
    turns = (angles.cos().to(like), angles.sin().to(like))
    modes = {module: module.training for module in layer.modules()}
    layer.eval()
    try:
        with torch.no_grad():
            adapters = layer.active()
            against = adapters if isinstance(adapters, str) else layer._misfit(x, turns, adapters)
            if against is not None:
                return f"it was not proven: {against}"
            wanted = super(_Whole, layer).forward(x, position_embeddings=turns)
            found = [layer._whole(x, turns, adapters, None, None, {})]
            if backend.is_triton(x) and any(type(one) is fused.Linear4bit for one in _projections(layer).values()):
                # So few rows may go to a kernel that training, with more of them, does not use.
                with dispatch.forced("dequant"):
                    found.append(layer._whole(x, turns, adapters, None, None, {}))
    finally:
        for module, training in modes.items():
            module.training = training
    wanted, x = wanted.double(), x.double()
    added, off = float((wanted - x).norm()), max(float((one.double() - wanted).norm()) for one in found)
    # The sum with the residual is rounded too.
    allowed = ROUNDING[like.dtype] * added + torch.finfo(like.dtype).eps * float(wanted.norm())
    if off <= allowed:
        return None
    log.debug("%s: the probe is off by %.2g of what the layer adds", type(layer).__name__, off / added)
    return "the probe found that it computes something else"

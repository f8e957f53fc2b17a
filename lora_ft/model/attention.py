"""Attention for examples that lie end to end in one row: none of them sees another, and no T x T mask is made.

It goes in by transformers' `AttentionInterface`. Where examples begin comes to each layer in the place of the mask, so
that what does not know it fails instead of letting examples see each other; and before a model is trained so, `refusal`
has it answer examples alone, together, and beside others.

Shapes: H heads of queries, J of keys and values, T tokens, D width of a head, S examples.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import bitsandbytes as bnb
import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lora_ft.model.modes import evaluating, unwrapped
from lora_kernels import backend, packed_attention

log = logging.getLogger(__name__)

NAME = "lora_ft_packed"
# Examples of the probe: long enough that the last one's tokens see several of their own.
PROBE_LENGTHS = (5, 9, 7)
# Of the norm of what is compared; `tests/test_attention.py` plants wrong places, which are far above.
ROUNDING = 0.05
# Options of attention that are honoured, and others that change nothing.
TAKEN = frozenset(
    {
        "sliding_window",
        "softcap",
        "position_ids",
        "position_embeddings",
        "is_causal",
        "use_cache",
        "past_key_values",
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
    }
)


def bounds(lengths: Sequence[int]) -> torch.Tensor:
    """Returns where examples of these lengths begin and the last one ends, int32 [1, 1, 1, S + 1].

    It has the four dimensions of a finished mask, which transformers hands on to the layers as it is.
    """
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends[None, None, None]


def _attend(
    module: Any,
    q_1HTD: torch.Tensor,
    k_1JTD: torch.Tensor,
    v_1JTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Returns the attention of each example to itself, [1, T, H, D]; `attention_mask` is what `bounds` returns."""
    if attention_mask is None or attention_mask.dtype != torch.int32 or attention_mask.ndim != 4:
        raise ValueError(f"{NAME}: the place of the mask must hold where examples begin.")
    unknown = sorted(key for key, value in kwargs.items() if value is not None and key not in TAKEN)
    if unknown:
        raise ValueError(f"{NAME}: attention with {', '.join(unknown)} is not one that examples can share a row in.")
    scale = q_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap") or 0.0
    autocast = q_1HTD.device.type if torch.is_autocast_enabled(q_1HTD.device.type) else None
    dtype = torch.get_autocast_dtype(autocast) if autocast else v_1JTD.dtype
    q, k, v = (x.to(dtype) for x in (q_1HTD, k_1JTD, v_1JTD))
    if q.is_cuda and dtype != torch.float32 and not softcap and not dropout and _has_flash(q.device):
        return _on_gpu(q, k, v, attention_mask, scale, window), None
    ends = attention_mask.flatten().tolist()
    if not dropout:
        out_HTD = packed_attention(q[0], k[0], v[0], ends, scale=scale, window=window, softcap=softcap)
        return out_HTD.transpose(0, 1)[None], None
    if softcap or window:
        raise ValueError(f"{NAME}: dropout together with a window or soft-capped scores is not supported.")
    parts = zip(*(x.split([b - a for a, b in pairwise(ends)], 2) for x in (q, k, v)), strict=True)
    options: dict[str, Any] = {"dropout_p": dropout, "is_causal": True, "scale": scale, "enable_gqa": True}
    return torch.cat([scaled_dot_product_attention(*part, **options) for part in parts], 2).transpose(1, 2), None


@functools.cache
def _has_flash(device: torch.device) -> bool:
    """Returns whether torch's own flash attention runs on a GPU: on those from Ampere on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _on_gpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    tokens, ends = q.shape[2], ends.flatten()
    # As long as all examples together: how long the longest is would have to be waited for, and only sizes a grid.
    seen = (window - 1 if window else -1, 0)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    out_THD: Any = varlen_attn(q, k, v, ends, ends, tokens, tokens, scale=scale, window_size=seen, enable_gqa=True)
    return out_THD[None]


AttentionInterface.register(NAME, _attend)
# Never called, as the place of the mask is taken; without one, transformers would drop what stands there.
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """Runs the block with the attention of this module in `model`.

    The block must hold backward passes too: gradient checkpointing computes layers again in them.
    """
    inner = unwrapped(model)
    own = _own[inner] = inner.config._attn_implementation
    inner.set_attn_implementation(NAME)
    try:
        yield
    finally:
        inner.set_attn_implementation(own)
        del _own[inner]


@contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Runs the block with the attention that `model` came with, also inside one of `packed`."""
    inner = unwrapped(model)
    if inner not in _own:
        yield
        return
    inner.set_attn_implementation(_own[inner])
    try:
        yield
    finally:
        inner.set_attn_implementation(NAME)


# Of models whose attention is this module's for now: their own. Not a field, which would be saved with a model.
_own: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def structural_refusal(model: Any) -> str | None:
    """Returns what of a model's structure keeps examples from sharing a row, None where `refusal` has to look."""
    config = unwrapped(model).config
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if layers or getattr(config, "attention_chunk_size", None):
        return f"it has layers of {', '.join(sorted(layers)) or 'chunked attention'}"
    if not unwrapped(model)._can_set_attn_implementation():
        return "its attention is its own, not one of AttentionInterface"
    if any(isinstance(layer, bnb.nn.Linear8bitLt) and layer.state.threshold for layer in model.modules()):
        # Those with large numbers in any row: the probe's need have none. Of padded rows they are of all, too.
        return "that examples stay apart cannot be shown: LLM.int8 chooses what it keeps in 16 bits by all of them"
    return None


def refusal(model: Any) -> str | None:
    """Returns why examples cannot share a row in this model, None where it has been seen that they can.

    It is run on random tokens: an example after others must be answered as alone, within rounding; and with other
    tokens before it as before, to the bit unless the model has experts.
    """
    against = structural_refusal(model)
    if against is not None:
        return against
    config = unwrapped(model).config
    draw = torch.Generator().manual_seed(0)
    size = config.get_text_config().vocab_size
    *others, last = [torch.randint(size, (n,), generator=draw) for n in PROBE_LENGTHS]
    changed = [(tokens + 1) % size for tokens in others]
    with evaluating(model):
        alone = _logits(model, input_ids=last[None], attention_mask=torch.ones(1, len(last), dtype=torch.int64))
        try:
            with packed(model):
                together, beside_others = (_logits(model, **row([*before, last])) for before in (others, changed))
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            return f"it does not take where examples begin ({str(error).splitlines()[0]})"
    together, beside_others = (logits[-len(last) :].float() for logits in (together, beside_others))
    # Experts multiply the tokens that were sent to them together, and how many those are may round them otherwise.
    routed = any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    moved = float((together - beside_others).norm() / together.norm())
    if not moved <= (ROUNDING / 5 if routed else 0.0):
        return "an example sees those before it"
    off = float((together - alone.float()).norm() / alone.float().norm())
    if not off <= ROUNDING:
        return f"an example is not answered as alone (relative error {off:.2g})"
    return None


def row(examples: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns model inputs with examples [T_i] end to end in one row: `input_ids`, `position_ids`, `attention_mask`."""
    return {
        "input_ids": torch.cat(list(examples))[None],
        "position_ids": torch.cat([torch.arange(len(tokens)) for tokens in examples])[None],
        "attention_mask": bounds([len(tokens) for tokens in examples]),
    }


def filled_up(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns inputs of `row` [1, T] with an example more, of token 0, where `backend.alike` wants more than T tokens.

    Inputs of other rows it returns as they are.
    """
    ends, tokens = inputs["attention_mask"], inputs["input_ids"].shape[1]
    missing = backend.alike(tokens, torch.empty(0, dtype=model.dtype, device=model.device)) - tokens
    if ends.ndim != 4 or not missing:
        return inputs
    return {
        **inputs,
        **{name: pad(inputs[name], (0, missing)) for name in ("input_ids", "position_ids")},
        "attention_mask": torch.cat([ends, ends[..., -1:] + missing], dim=-1),
    }


def _logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    return model(**{key: value.to(device) for key, value in inputs.items()}, use_cache=False).logits[0]

"""Batched greedy or sampled generation that computes what all prompts share once.

Evaluations ask many questions after one instruction or the same solved examples; the attention cache of that common
beginning is computed for one row and repeated for the others.
"""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from lora_ft import base as bases
from lora_ft.errors import LoraFtError
from lora_ft.model import four_bits
from lora_ft.model.modes import evaluating, unwrapped
from lora_ft.system import heap

log = logging.getLogger(__name__)

# Tokens of all rows of a batch together, prompt and reply: for SmolLM2-135M a cache of 0.38 GB in float32.
BATCH_TOKENS = 8192
# There are twice as many where their keys and values stay within so many bytes, as those of SmolLM2-135M do in 16 bits.
CACHE_BYTES = 3 << 27
# Below this many common tokens a pass of its own costs more than it saves.
SHORTEST_SHARED = 16
# Tokens that a cache has room for beyond those it holds: a copy of it all this often.
GROWTH = 64
# What a base says of its own beginning and end; everything else in its generation_config.json is a taste.
KEPT_RULES = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id")


class InPlaceLayer(DynamicLayer):
    """Keys and values of a layer, new tokens written behind the old ones; its parent copies all of them every token."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values [B, H, T, D] of all tokens so far, those given the last of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._extended("keys", key_states), self._extended("values", value_states)
        return self.keys, self.values

    def _extended(self, name: str, new: torch.Tensor) -> torch.Tensor:
        old, room = getattr(self, name), getattr(self, f"{name}_room", None)
        before = old.shape[-2] if old.numel() else 0
        after = before + new.shape[-2]
        # Whatever else is done to a cache, such as repeating its rows, leaves other tensors in place of ours.
        if room is None or old.data_ptr() != room.data_ptr() or len(room) != len(new) or after > room.shape[-2]:
            room = new.new_empty((*new.shape[:-2], after + GROWTH, new.shape[-1]))
            if before:
                room[..., :before, :] = old
            setattr(self, f"{name}_room", room)
        room[..., before:after, :] = new
        return room[..., :after, :]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest, any other draws."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 50
    """Likeliest tokens to draw from; 0 draws from all, as probabilities that are trained must be."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling = Sampling(),
    stop_ids: Sequence[int] = (),
) -> list[str]:
    """Returns the text generated after each prompt, as `replies` does."""
    return [text for text, _ in replies(model, tokenizer, prompts, sampling=sampling, stop_ids=stop_ids)]


def replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling = Sampling(),
    stop_ids: Sequence[int] = (),
    most_rows: int = sys.maxsize,
    note: Callable[[int], None] = lambda rows: None,
) -> list[tuple[str, bool]]:
    """Returns the text generated after each prompt, in the order of the prompts, and whether it came to its end.

    Special tokens are left out. Args, Raises: those of `reply_ids`.
    """
    options: Any = {"sampling": sampling, "stop_ids": stop_ids, "most_rows": most_rows, "note": note}
    made = reply_ids(model, tokenizer, prompts, **options)
    texts = tokenizer.batch_decode([ids for ids, _ in made], skip_special_tokens=True)
    return [(text, ended) for text, (_, ended) in zip(texts, made, strict=True)]


def reply_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling = Sampling(),
    stop_ids: Sequence[int] = (),
    most_rows: int = sys.maxsize,
    note: Callable[[int], None] = lambda rows: None,
) -> list[tuple[list[int], bool]]:
    """Returns the tokens generated after each prompt, up to the one that ended them, and whether there is one.

    Args:
        prompts: token ids of each prompt; encoder-decoder models take them as the source.
        stop_ids: tokens that end a reply besides the model's own end of text.
        most_rows: prompts answered together.
        note: told of how many more prompts there are replies, for a progress display.

    Raises:
        LoraFtError: a prompt has more tokens than the model has positions; replies that reach them end there, which is
            said.
    """
    held = bases.positions(unwrapped(model).config, "the base")
    longest = max(map(len, prompts), default=0)
    if held is not None and longest > held:
        raise LoraFtError(
            f"The prompt, with all that was said before, has {longest} tokens, and the model has positions for {held}: "
            "shorten it, or begin a new conversation."
        )
    cut = 0
    in_place = can_share(model)
    budget = _batch_tokens(model) if in_place else BATCH_TOKENS
    shared = shared_length(prompts) if len(prompts) > 1 and in_place else 0
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    made: list[tuple[list[int], bool]] = [([], False)] * len(prompts)
    with evaluating(model), four_bits.dequantized(model), _without_rules(model), contiguous_head(model):
        cache = _prefilled(model, prompts[0][:shared]) if in_place else None
        while order:
            # The longest first: the memory of the whole run is known after one batch.
            rows = min(most_rows, max(1, budget // (len(prompts[order[-1]]) + sampling.max_new_tokens)))
            room = _room(model, held, len(prompts[order[-1]]))
            limits = sampling
            if room is not None and room < sampling.max_new_tokens:
                # Alone, or what is left for this one would be all that others get.
                rows, limits = 1, replace(sampling, max_new_tokens=room)
            order, chosen = order[:-rows], order[-rows:]
            batch = [prompts[i] for i in chosen]
            for i, reply in zip(chosen, _batch(model, tokenizer, batch, shared, cache, limits, stop_ids), strict=True):
                made[i] = reply
                cut += limits is not sampling and not reply[1]
            note(len(chosen))
            if order and model.device.type == "cpu":
                # The cache of the next batch has other sizes, and would not go into the gaps that this one's left.
                heap.give_back()
    if cut:
        log.warning("%d replies were cut at the last of the %d positions that the model has", cut, held)
    return made


def _batch_tokens(model: Any) -> int:
    """Returns how many tokens the rows of a batch may have together, in a model that `can_share`."""
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    queries = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    keys_and_values = 2 * config.num_hidden_layers * heads * width * inner.dtype.itemsize
    return 2 * BATCH_TOKENS if 2 * BATCH_TOKENS * keys_and_values <= CACHE_BYTES else BATCH_TOKENS


def _room(model: Any, held: int | None, prompt: int) -> int | None:
    """Returns how many tokens can follow a prompt of so many, None for any number; the last needs no position."""
    if held is None:
        return None
    return held if unwrapped(model).config.is_encoder_decoder else held - prompt + 1


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Returns how many tokens all prompts begin with; 0 where too few to be worth a pass of their own.

    Every prompt keeps at least one token of its own, since the model must be run on something.
    """
    columns = enumerate(zip(*prompts, strict=False))
    shortest = min(map(len, prompts))
    common = min(next((i for i, column in columns if len(set(column)) > 1), shortest), shortest - 1)
    return common if common >= SHORTEST_SHARED else 0


def can_share(model: Any) -> bool:
    """Returns whether padding may stand between the shared beginning and the rest.

    It may where attention reads every slot that the mask does not hide, and a token's place is told apart from its
    slot. Windows count slots, recurrent layers run through the padding, and OpenAI-GPT keeps no cache at all.
    """
    inner = unwrapped(model)
    if inner.config.is_encoder_decoder or not {"past_key_values", "position_ids"} <= parameters(inner):
        return False
    # A cache that knows no layers yet makes plain ones.
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=inner.config).layers)


def parameters(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


@contextmanager
def _without_rules(model: Any) -> Iterator[None]:
    """Runs the block without what a base's generation_config.json adds, such as a penalty on repetition.

    PEFT keeps a reference of its own, and gives it to the model inside.
    """
    holders = {id(m): m for m in (model, unwrapped(model)) if "generation_config" in vars(m)}.values()
    before = [holder.generation_config for holder in holders]
    try:
        for holder, own in zip(holders, before, strict=True):
            holder.generation_config = GenerationConfig(**{key: getattr(own, key) for key in KEPT_RULES})
        yield
    finally:
        for holder, own in zip(holders, before, strict=True):
            holder.generation_config = own


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """Runs the block with the hidden states of each last token side by side when the head multiplies them.

    A slice of all hidden states is what transformers hands it; of that, a processor with bfloat16 instructions makes a
    batch of products and copies the head's weight for every row: 3.7 GiB for 70 rows of SmolLM2-135M (torch 2.13).
    """
    head = unwrapped(model).get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _prefilled(model: Any, ids: Sequence[int]) -> DynamicCache:
    """Returns a cache that holds `ids`, which may be none."""
    cache = DynamicCache(config=model.config)
    cache.layers = [InPlaceLayer() for _ in cache.layers or range(model.config.num_hidden_layers)]
    if ids:
        model(input_ids=torch.tensor([list(ids)], device=model.device), past_key_values=cache, use_cache=True)
    return cache


def _batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    shared: int,
    cache: DynamicCache | None,
    sampling: Sampling,
    stop_ids: Sequence[int],
) -> list[tuple[list[int], bool]]:
    """Returns the tokens of the replies, and whether each of them came to its end."""
    longest = max(map(len, prompts))
    # Padding stands between the shared beginning and the rest, so that the cache fits every row.
    ids, mask = [], []
    for prompt in prompts:
        gap = longest - len(prompt)
        ids.append([*prompt[:shared], *[tokenizer.pad_token_id] * gap, *prompt[shared:]])
        mask.append([1] * shared + [0] * gap + [1] * (len(prompt) - shared))
    inputs = {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }
    if cache is not None:
        rows = copy.deepcopy(cache)
        if shared:
            rows.batch_repeat_interleave(len(prompts))
        inputs["past_key_values"] = rows
    ends, draws = sorted({*end_ids(model, tokenizer), *stop_ids}), sampling.temperature > 0
    out = model.generate(
        **inputs,
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
        **({"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k} if draws else {}),
    )
    # A decoder begins with a token of its own, which may be that of an end.
    new = out[:, 1:] if model.config.is_encoder_decoder else out[:, longest:]
    is_end = torch.isin(new, torch.tensor(ends, device=new.device))
    ended = is_end.any(dim=1)
    lengths = torch.where(ended, is_end.int().argmax(dim=1) + 1, new.shape[1]).tolist()
    return [(ids[:length], end) for ids, length, end in zip(new.tolist(), lengths, ended.tolist(), strict=True)]


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Returns the tokens that the model and its tokenizer say a text ends with."""
    end = model.generation_config.eos_token_id
    ids = [end] if isinstance(end, int) else list(end or [])
    return [i for i in (*ids, tokenizer.eos_token_id) if i is not None]

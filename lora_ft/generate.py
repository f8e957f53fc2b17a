"""Batched greedy or sampled generation that computes what all prompts share once.

Evaluations ask many questions after one instruction or the same solved examples; the attention cache of that common
beginning is computed for one row and repeated for the others.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from lora_ft import losses

# Tokens of all rows of a batch together, prompt and reply: for SmolLM2-135M a cache of 0.75 GB in float32.
BATCH_TOKENS = 16384
# Below this many common tokens a pass of its own costs more than it saves.
SHORTEST_SHARED = 16


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling = Sampling(),
    stop_ids: Sequence[int] = (),
) -> list[str]:
    """Returns the text generated after each prompt, in the order of the prompts, special tokens left out.

    Args:
        prompts: token ids of each prompt; encoder-decoder models take them as the source.
        stop_ids: tokens that end a reply besides the model's own end of text.
    """
    encoder_decoder = bool(model.config.is_encoder_decoder)
    shared = 0 if encoder_decoder or len(prompts) < 2 else shared_length(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies = [""] * len(prompts)
    with losses.evaluating(model):
        cache = _prefill(model, prompts[0][:shared]) if shared else None
        while order:
            # The longest first: the memory of the whole run is known after one batch.
            rows = max(1, BATCH_TOKENS // (len(prompts[order[-1]]) + sampling.max_new_tokens))
            order, chosen = order[:-rows], order[-rows:]
            made = _batch(model, tokenizer, [prompts[i] for i in chosen], shared, cache, sampling, stop_ids)
            for i, reply in zip(chosen, made, strict=True):
                replies[i] = reply
    return replies


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Returns how many tokens all prompts begin with; 0 where too few to be worth a pass of their own.

    Every prompt keeps at least one token of its own, since the model must be run on something.
    """
    columns = enumerate(zip(*prompts, strict=False))
    shortest = min(map(len, prompts))
    common = min(next((i for i, column in columns if len(set(column)) > 1), shortest), shortest - 1)
    return common if common >= SHORTEST_SHARED else 0


def _prefill(model: Any, ids: Sequence[int]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
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
) -> list[str]:
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
        rows.batch_repeat_interleave(len(prompts))
        inputs["past_key_values"] = rows
    sampled = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    out = model.generate(
        **inputs,
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({*_end_ids(model, tokenizer), *stop_ids}),
        **(sampled if sampling.temperature > 0 else {"do_sample": False, "temperature": None, "top_p": None}),
    )
    new = out if model.config.is_encoder_decoder else out[:, longest:]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    ids = [end] if isinstance(end, int) else list(end or [])
    return [i for i in (*ids, tokenizer.eos_token_id) if i is not None]

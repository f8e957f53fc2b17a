"""The next token of one answer: what is likely, changed as the request asks, and one of it chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_ft.errors import LoraFtError

SHOWN = 20


@dataclass(frozen=True)
class Settings:
    """How one answer is made."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """Likeliest tokens to tell at each place, besides the chosen one; None tells none at all."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ends: frozenset[int] = frozenset()
    """Tokens that end the answer."""


@dataclass(frozen=True)
class Chosen:
    """A token and how likely it was."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities."""


class Chooser:
    """Chooses the tokens of one answer, one after the other.

    Args:
        grammar: what the answer must follow (`lora_ft.serve.grammars`), or None.
        device: where the logits are.
    """

    def __init__(self, settings: Settings, grammar: Any, device: torch.device, seed: int) -> None:
        self.settings, self.grammar = settings, grammar
        self.counts: Counter[int] = Counter()
        # Of its own, so that an answer does not depend on what is computed beside it.
        self.generator = torch.Generator(device="cpu").manual_seed(seed)
        self.biased = torch.tensor(list(settings.logit_bias), dtype=torch.int64, device=device)
        self.bias = torch.tensor(list(settings.logit_bias.values()), dtype=torch.float32, device=device)

    def choose(self, logits_V: torch.Tensor) -> Chosen:
        """Returns the next token of the answer; `logits_V` is float32 and may be changed.

        Raises:
            LoraFtError: the largest of the logits is no finite number, so that the choice would mean nothing.
        """
        settings = self.settings
        if not torch.isfinite(logits_V.max()):
            raise LoraFtError(
                "The model computes no finite numbers for its next token, so its adapter or its base is spoiled; train "
                "the adapter anew, or ask another model."
            )
        if len(self.biased):
            logits_V[self.biased] += self.bias
        if self.counts and (settings.presence_penalty or settings.frequency_penalty):
            tokens = torch.tensor(list(self.counts), device=logits_V.device)
            counts = torch.tensor(list(self.counts.values()), dtype=torch.float32, device=logits_V.device)
            logits_V[tokens] -= settings.frequency_penalty * counts + settings.presence_penalty
        told = None if settings.logprobs is None else torch.log_softmax(logits_V, dim=-1)
        if self.grammar is not None:
            logits_V[~self.grammar.allowed(len(logits_V)).to(logits_V.device)] = -torch.inf
        token = self._drawn(logits_V)
        self.counts[token] += 1
        if self.grammar is not None:
            self.grammar.take(token)
        if told is None:
            return Chosen(token, 0.0)
        values, tokens = told.topk(min(settings.logprobs or 0, SHOWN, len(told)))
        return Chosen(token, float(told[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))

    def _drawn(self, logits_V: torch.Tensor) -> int:
        settings = self.settings
        # Below this the likeliest token has all the weight, and the division would overflow.
        if settings.temperature < 1e-5:
            return int(logits_V.argmax())
        chances = torch.softmax(logits_V / settings.temperature, dim=-1).cpu()
        if settings.top_p < 1:
            ordered, order = chances.sort(descending=True, stable=True)
            # The fewest tokens that hold `top_p` together: those before which less than that lies.
            kept = ordered.cumsum(dim=-1) - ordered < max(settings.top_p, 1e-8)
            chances = torch.zeros_like(chances).index_copy(0, order, ordered * kept)
        return int(torch.multinomial(chances, 1, generator=self.generator))


def logprobs_of(logits_TV: torch.Tensor, ids: Sequence[int], most: int) -> list[Chosen]:
    """Returns how likely each of `ids` was, the logits at whose places are given, with the `most` likeliest there."""
    told = torch.log_softmax(logits_TV.float(), dim=-1)
    values, tokens = told.topk(min(most, SHOWN, told.shape[-1]), dim=-1)
    return [
        Chosen(
            token, float(told[place, token]), tuple(zip(tokens[place].tolist(), values[place].tolist(), strict=True))
        )
        for place, token in enumerate(ids)
    ]

"""Text -> token ids that know their characters, and the rule by which a token belongs to a span of characters.

A token belongs to the span in which its first non-space character lies; a token of white space alone, to the span in
which it starts. Text is cut where generation starts and tokenized piece by piece, so that a trained turn follows the
very ids that its prompt has when a model answers: tokenized as a whole, a tokenizer may join the prompt's last line
break to the answer's first word, or split "\\n\\n" only because a word follows it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Span = tuple[int, int]
"""Characters [start, end) of a text."""

# What may stand before a text so that it is tokenized as a continuation; one of them joins with no given text.
_BEFORE = ("\n", "x", ".")


@dataclass(frozen=True, slots=True)
class Tokens:
    """T token ids of a text, and for each the character that decides which span it belongs to."""

    ids: list[int]
    anchors: list[int]
    """In ascending order, as tokens follow the text."""

    @classmethod
    def of(cls, tokenizer: Any, text: str, borders: Sequence[int] = ()) -> Tokens:
        """The tokens of `text`, cut at each border. No BOS is added: a template writes its own."""
        cuts = [0, *sorted({border for border in borders if 0 < border < len(text)}), len(text)]
        ids: list[int] = []
        spans: list[Span] = []
        for start, stop in pairwise(cuts):
            more_ids, more_spans = (continued if start else _encoded)(tokenizer, text[start:stop])
            ids += more_ids
            spans += [(first + start, last + start) for first, last in more_spans]
        return cls(ids, [_anchor(text, *span) for span in spans])

    def owners(self, spans: Sequence[Span]) -> list[int]:
        """For each token, the index of the span it belongs to, or -1. Spans do not overlap."""
        owners = [-1] * len(self.ids)
        for index, (start, stop) in enumerate(spans):
            first, last = bisect_left(self.anchors, start), bisect_left(self.anchors, stop)
            owners[first:last] = [index] * (last - first)
        return owners

    def within(self, spans: Sequence[Span]) -> list[bool]:
        """For each token, whether it belongs to one of the spans."""
        return [owner >= 0 for owner in self.owners(spans)]


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS before plain text: the model has then never seen a text without it."""
    with_special, without = (
        tokenizer("a", add_special_tokens=add, verbose=False)["input_ids"] for add in (True, False)
    )
    bos = tokenizer.bos_token_id
    return bos is not None and with_special[:1] == [bos] != without[:1]


def continued(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """Token ids and spans of `text` as it follows other text: some tokenizers put a space before what comes first."""
    for before in _BEFORE:
        ids, spans = _encoded(tokenizer, before + text)
        kept = next((place for place, (_, stop) in enumerate(spans) if stop > len(before)), len(ids))
        if kept == len(ids) or spans[kept][0] >= len(before):
            return ids[kept:], [(start - len(before), stop - len(before)) for start, stop in spans[kept:]]
    return _encoded(tokenizer, text)


def _encoded(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    coded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    spans: list[Span] = []
    reached = 0
    for start, stop in coded["offset_mapping"]:
        # Byte-level tokenizers leave a token's spaces out of its offsets; the bytes of one character share theirs.
        spans.append((min(start, reached), stop))
        reached = stop
    return list(coded["input_ids"]), spans


def _anchor(text: str, start: int, stop: int) -> int:
    anchor = start
    while anchor < stop and text[anchor].isspace():
        anchor += 1
    return anchor if anchor < stop else start

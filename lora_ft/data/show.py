"""Rows as a reader sees them: the decoded text, with what is trained marked or coloured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.text import Text as RichText

from lora_ft.data.mask import IGNORE, Rendered

TRAINED_STYLE = "bold green"


def marked(tokenizer: Any, rendered: Rendered) -> str:
    """The decoded text, each trained stretch between « and »."""
    return marked_tokens(tokenizer, rendered.input_ids, [label != IGNORE for label in rendered.labels])


def marked_tokens(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> str:
    """The decoded text of `ids`, each stretch with `trained` set between « and »."""
    return "".join(f"«{text}»" if flag else text for text, flag in _stretches(tokenizer, ids, trained))


def coloured(tokenizer: Any, rendered: Rendered) -> RichText:
    """The decoded text for the terminal, trained tokens in bold green."""
    shown = RichText()
    trained = [label != IGNORE for label in rendered.labels]
    for text, flag in _stretches(tokenizer, rendered.input_ids, trained):
        shown.append(text, style=TRAINED_STYLE if flag else "dim")
    return shown


def _stretches(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> Iterator[tuple[str, bool]]:
    # Decoded from the start each time and cut: a stretch alone would lose its leading space with some tokenizers.
    before = ""
    stop = 0
    for flag, group in groupby(trained):
        start, stop = stop, stop + len(list(group))
        whole = _decoded(tokenizer, ids[:stop])
        yield (whole[len(before) :] if whole.startswith(before) else _decoded(tokenizer, ids[start:stop])), flag
        before = whole


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

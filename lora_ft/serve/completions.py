"""Texts gone on with, whole or in chunks, as the objects of completions."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_ft.serve.answers import Asking, Gone, head
from lora_ft.serve.asked import CompletionRequest
from lora_ft.serve.decoding import Decoder, special_tokens, token_bytes
from lora_ft.serve.sampling import Chosen
from lora_ft.serve.voices import Voice


@dataclass
class _Told:
    """The log-probabilities of a completion, in the lists of that API."""

    voice: Voice
    most: int
    echoed: str = ""
    """The prompt, where the answer begins with it."""
    places: deque[int] = field(default_factory=deque)
    """Where in it each of its tokens begins that is not told yet."""
    has_first: bool = True
    """Whether the first token has a log-probability; that of a prompt has none."""
    lists: dict[str, list[Any]] = field(
        default_factory=lambda: {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    )

    def __post_init__(self) -> None:
        self._decoder = Decoder(self.voice.tokenizer, ())

    def add(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> None:
        """Adds one token."""
        text = token_bytes(self.voice.tokenizer, token).decode("utf-8", "replace")
        likely = {token_bytes(self.voice.tokenizer, one).decode("utf-8", "replace"): value for one, value in top}
        if not self.has_first:
            logprob, self.has_first = None, True
        row = (self._place(token), logprob, text, likely if logprob is not None and self.most else None)
        for name, value in zip(self.lists, row, strict=True):
            self.lists[name].append(value)

    def _place(self, token: int) -> int:
        """Returns where in the text of the answer a token begins; tokens that the text leaves out have no width."""
        if self.places:
            return self.places.popleft()
        begins = len(self.echoed) + len(self._decoder.text)
        self._decoder.add(Chosen(token, 0.0))
        return begins

    def taken(self) -> dict[str, list[Any]]:
        """Returns what was added since the last time."""
        found = self.lists
        self.lists = {name: [] for name in found}
        return found


async def answer(asking: Asking, request: CompletionRequest, gone: Gone) -> dict[str, Any]:
    """Returns the whole answers to texts; of `best_of` answers the likeliest."""
    prompts, copies = _prompts(asking, request)
    texts = list(prompts)
    told = [_begun(asking, request, row.ids, text) for row, text in zip(asking.rows, prompts, strict=True)]
    sums, finish = [list[float]() for _ in asking.rows], ["stop"] * len(asking.rows)
    async for place, piece in asking.each(gone):
        texts[place] += piece.text
        sums[place] += [one.logprob for one in piece.tokens]
        for one in piece.tokens if request.logprobs is not None else ():
            told[place].add(one.token, one.logprob, one.top)
        finish[place] = piece.finish or finish[place]
    choices: list[dict[str, Any]] = []
    for start in range(0, len(texts), copies):
        group = list(range(start, start + copies))
        if copies > (request.n or 1):
            group = sorted(group, key=lambda i: -(sum(sums[i]) / max(1, len(sums[i]))))[: request.n or 1]
        for place in group:
            logprobs = told[place].lists if request.logprobs is not None else None
            choice = {"text": texts[place], "index": len(choices), "logprobs": logprobs, "finish_reason": finish[place]}
            choices.append(choice)
    return {**head(asking, request, "text_completion", "cmpl-"), "choices": choices, "usage": asking.usage}


async def stream(asking: Asking, request: CompletionRequest, gone: Gone) -> AsyncIterator[str]:
    """Yields the chunks of answers to texts, and the mark of their end."""
    common = head(asking, request, "text_completion", "cmpl-")
    more = {"usage": None} if request.tells_usage else {}
    prompts, _ = _prompts(asking, request)
    told = [_begun(asking, request, row.ids, text) for row, text in zip(asking.rows, prompts, strict=True)]
    for place, text in enumerate(prompts):
        if text:
            choice = {"text": text, "index": place, "logprobs": None, "finish_reason": None}
            yield json.dumps({**common, "choices": [choice], **more})
    async for place, piece in asking.each(gone):
        for one in piece.tokens if request.logprobs is not None else ():
            told[place].add(one.token, one.logprob, one.top)
        logprobs = told[place].taken() if request.logprobs is not None else None
        if piece.text or piece.tokens or piece.finish:
            choice = {"text": piece.text, "index": place, "logprobs": logprobs, "finish_reason": piece.finish}
            yield json.dumps({**common, "choices": [choice], **more})
    if request.tells_usage:
        yield json.dumps({**common, "choices": [], "usage": asking.usage})
    yield "[DONE]"


def _prompts(asking: Asking, request: CompletionRequest) -> tuple[list[str], int]:
    """Returns what each answer begins with, its prompt where that is echoed, and how many answers a prompt has."""
    copies = request.best_of or request.n or 1
    if not request.echo:
        return [""] * len(asking.rows), copies
    given = request.prompts
    decode = asking.voice.tokenizer.decode
    texts = [one if isinstance(one, str) else decode(one, skip_special_tokens=True) for one in given]
    return [text for text in texts for _ in range(copies)], copies


def _begun(asking: Asking, request: CompletionRequest, ids: Sequence[int], echoed: str) -> _Told:
    """Returns the lists of an answer, an echoed prompt's first token in them; a BOS that was put before it is not."""
    told = _Told(asking.voice, request.logprobs or 0)
    if not request.echo or request.logprobs is None:
        return told
    is_text = isinstance(request.prompts[0], str)
    begins = len(asking.voice.start) if is_text else 0
    # Special tokens stand in a text that was given with them; a text made of tokens leaves them out.
    kept = frozenset(special_tokens(asking.voice.tokenizer)) if is_text else frozenset[int]()
    decoder = Decoder(asking.voice.tokenizer, (), kept)
    for token in ids[begins:]:
        told.places.append(len(decoder.text))
        decoder.add(Chosen(token, 0.0))
    told.echoed, told.has_first = echoed, begins == len(ids)
    if not begins:
        told.add(ids[0], None, ())
    return told

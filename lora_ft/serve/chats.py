"""Answers to conversations, whole or in chunks, as the objects of chat completions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from lora_ft.serve.answers import Asking, Gone, head
from lora_ft.serve.asked import ChatRequest
from lora_ft.serve.decoding import token_bytes
from lora_ft.serve.sampling import Chosen
from lora_ft.serve.voices import Voice


async def answer(asking: Asking, request: ChatRequest, gone: Gone) -> dict[str, Any]:
    """Returns the whole answer to a conversation."""
    texts, told = [""] * len(asking.rows), [list[dict[str, Any]]() for _ in asking.rows]
    finish = ["stop"] * len(asking.rows)
    async for place, piece in asking.each(gone):
        texts[place] += piece.text
        told[place] += [_logprob(asking.voice, one) for one in piece.tokens if request.logprobs]
        finish[place] = piece.finish or finish[place]
    choices = []
    for place, text in enumerate(texts):
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if asking.calls is not None:
            content, calls = asking.calls.read(text)
            calls = calls[:1] if request.parallel_tool_calls is False else calls
            if calls:
                message |= {"content": content, "tool_calls": calls}
                finish[place] = "tool_calls"
        logprobs = {"content": told[place], "refusal": None} if request.logprobs else None
        choices.append({"index": place, "message": message, "logprobs": logprobs, "finish_reason": finish[place]})
    return {**head(asking, request, "chat.completion", "chatcmpl-"), "choices": choices, "usage": asking.usage}


async def stream(asking: Asking, request: ChatRequest, gone: Gone) -> AsyncIterator[str]:
    """Yields the chunks of an answer to a conversation, and the mark of their end."""
    common = head(asking, request, "chat.completion.chunk", "chatcmpl-")
    more = {"usage": None} if request.tells_usage else {}

    def chunk(place: int, delta: dict[str, Any], finish: str | None = None, told: Any = None) -> str:
        choice = {"index": place, "delta": delta, "logprobs": told, "finish_reason": finish}
        return json.dumps({**common, "choices": [choice], **more})

    # What may turn out to be a call is told once it is known.
    held = [""] * len(asking.rows)
    for place in range(len(asking.rows)):
        yield chunk(place, {"role": "assistant", "content": "", "refusal": None})
    async for place, piece in asking.each(gone):
        told = [_logprob(asking.voice, one) for one in piece.tokens] if request.logprobs else []
        text, finish = piece.text, piece.finish
        if asking.calls is not None:
            text, held[place] = _sure(held[place] + text, asking.calls.mark, ends=finish is not None)
        if text or told:
            yield chunk(place, {"content": text}, told={"content": told, "refusal": None} if request.logprobs else None)
        if finish is None:
            continue
        if asking.calls is not None and held[place]:
            said, calls = asking.calls.read(held[place])
            calls = calls[:1] if request.parallel_tool_calls is False else calls
            if said:
                yield chunk(place, {"content": said})
            for number, call in enumerate(calls):
                yield chunk(place, {"tool_calls": [{"index": number, **call}]})
            finish = "tool_calls" if calls else finish
        yield chunk(place, {}, finish)
    if request.tells_usage:
        yield json.dumps({**common, "choices": [], "usage": asking.usage})
    yield "[DONE]"


def _sure(text: str, mark: str, ends: bool) -> tuple[str, str]:
    """Returns the text that is no part of a call, and what may be one or its beginning."""
    at = text.find(mark)
    if at >= 0:
        return text[:at], text[at:]
    if ends:
        return text, ""
    kept = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
    return text[: len(text) - kept], text[len(text) - kept :]


def _logprob(voice: Voice, chosen: Chosen) -> dict[str, Any]:
    """Returns what a chat answer tells of one token."""

    def told(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(voice.tokenizer, token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    top = [told(token, logprob) for token, logprob in chosen.top]
    return {**told(chosen.token, chosen.logprob), "top_logprobs": top}

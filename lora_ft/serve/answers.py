"""Answers to requests: rows for the engine made of them, and what comes back put into the objects of the API."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from lora_ft.data.chats import OPENAI, conversation, toolbox
from lora_ft.data.faults import Faults
from lora_ft.errors import DataError, LoraFtError
from lora_ft.serve import asked, grammars, ids
from lora_ft.serve.decoding import Decoder, Piece
from lora_ft.serve.engine import Engine, Row
from lora_ft.serve.models import Models
from lora_ft.serve.refusals import RequestError, bad, body
from lora_ft.serve.sampling import Settings
from lora_ft.serve.store import now
from lora_ft.serve.toolcalls import CallForm
from lora_ft.serve.voices import Voice, Voices

log = logging.getLogger(__name__)

# How often it is looked whether a client still waits.
LOOK_S = 1.0
PING_S = 15
Gone = Callable[[], Awaitable[bool]]


@dataclass
class Asking:
    """A request on its way: its rows, and the pieces of their answers as they come."""

    voice: Voice
    rows: list[Row]
    prompt_tokens: int
    calls: CallForm | None = None
    """How calls of tools are read, where the request may be answered by some."""
    pieces: asyncio.Queue[tuple[int, Piece | Exception]] = field(default_factory=asyncio.Queue)

    def cancel(self) -> None:
        """Says that nobody waits for the answers any more."""
        for row in self.rows:
            row.cancelled = True

    async def each(self, gone: Gone) -> AsyncIterator[tuple[int, Piece]]:
        """Yields the pieces of all rows as they come, up to the last of each. Raises what ended a row."""
        left, looked = set(range(len(self.rows))), time.monotonic()
        try:
            while left:
                if time.monotonic() - looked >= LOOK_S:
                    if await gone():
                        return
                    looked = time.monotonic()
                try:
                    place, piece = await asyncio.wait_for(self.pieces.get(), LOOK_S)
                except TimeoutError:
                    continue
                if isinstance(piece, Exception):
                    raise _refusal(piece)
                if piece.finish is not None:
                    left.discard(place)
                yield place, piece
        finally:
            self.cancel()

    @property
    def usage(self) -> dict[str, Any]:
        """The tokens that the request took."""
        made = sum(row.made for row in self.rows)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }


class Answers:
    """What answers for a server."""

    def __init__(self, models: Models) -> None:
        self.voices, self.engine = Voices(models), Engine()

    def stop(self) -> None:
        """Ends what is being answered."""
        self.engine.stop()

    def forget(self, name: str) -> None:
        """Lets go of a model that was deleted."""
        if (adapter := self.voices.forget(name)) is not None:
            self.engine.forget(adapter)

    async def ask_chat(self, request: asked.ChatRequest) -> Asking:
        """Returns a conversation on its way to be answered. Raises RequestError."""
        asking = await run_in_threadpool(self._chat, request)
        return self._submit(asking)

    async def ask_completion(self, request: asked.CompletionRequest) -> Asking:
        """Returns texts on their way to be gone on with. Raises RequestError."""
        asking = await run_in_threadpool(self._completion, request)
        return self._submit(asking)

    def _submit(self, asking: Asking) -> Asking:
        loop = asyncio.get_running_loop()

        def teller(place: int) -> Callable[[Piece | Exception], None]:
            def tell(piece: Piece | Exception) -> None:
                # The loop is closed where the server has ended meanwhile: nobody waits.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(asking.pieces.put_nowait, (place, piece))

            return tell

        for place, row in enumerate(asking.rows):
            row.tell = teller(place)
        self.engine.submit(asking.rows)
        return asking

    def _chat(self, request: asked.ChatRequest) -> Asking:
        request.refuse_unsupported()
        voice = self.voices.of(request.model)
        tools, choice = _tools(request)
        messages = _messages(request)
        with voice.lock:
            renderer = voice.renderer
            calls = voice.calls if tools else None
            read = calls if choice != "none" else None
            marks = read.tokens(voice.tokenizer) if read else frozenset()
            try:
                prompt = renderer.prompt(messages, tools if choice != "none" else ())
            except LoraFtError as error:
                told = str(error).removeprefix("prompt: ")
                raise bad(_place_in(told) or "messages", told, "invalid_messages") from None
        most = _most(request.most_tokens, len(prompt), voice.context, "messages")
        ends = voice.ends | {renderer.end_id}
        settings = request.settings(most, request.told_logprobs, ends, voice.vocabulary)
        source = self._grammar(request, voice, tools, choice, calls)
        rows = [
            self._row(voice, prompt, settings, place, marks, grammar=_grammar_of(voice, source) if source else None)
            for place in range(request.n or 1)
        ]
        return Asking(voice, rows, len(prompt), read)

    def _completion(self, request: asked.CompletionRequest) -> Asking:
        request.refuse_unsupported()
        voice = self.voices.of(request.model)
        with voice.lock:
            prompts = [_tokens(voice, one) for one in request.prompts]
        wanted = asked.COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        copies = request.best_of or request.n or 1
        if len(prompts) * copies > asked.MAX_ANSWERS:
            raise bad("n", f"prompts times n is {len(prompts) * copies}; ask for {asked.MAX_ANSWERS} at most.")
        # Which of several answers is best is told by how likely they are.
        logprobs = 0 if request.logprobs is None and copies > (request.n or 1) else request.logprobs
        rows = []
        for place, (prompt, _) in enumerate(itertools.product(prompts, range(copies))):
            most = _most(wanted, len(prompt), voice.context, "prompt")
            settings = request.settings(most, logprobs, voice.ends, voice.vocabulary)
            told = request.logprobs if request.echo else None
            rows.append(self._row(voice, prompt, settings, place, echo=told))
        return Asking(voice, rows, sum(map(len, prompts)))

    @staticmethod
    def _row(
        voice: Voice,
        prompt: list[int],
        settings: Settings,
        place: int,
        marks: frozenset[int] = frozenset(),
        **more: Any,
    ) -> Row:
        # Several answers to one request differ, and are the same the next time.
        seed = None if settings.seed is None else settings.seed + place
        settings = replace(settings, seed=seed)
        decoder = Decoder(voice.tokenizer, settings.stop, marks)
        return Row(voice.home, voice.adapter, prompt, settings, decoder, lambda piece: None, **more)

    @staticmethod
    def _grammar(
        request: asked.ChatRequest, voice: Voice, tools: Sequence[dict[str, Any]], choice: str, calls: CallForm | None
    ) -> tuple[str, str] | None:
        """Returns the grammar that the answer must follow, and the field that asked for it."""
        if choice not in ("auto", "none"):
            if calls is None:
                told = f"The chat template of {voice.model.name} writes no calls of tools that could be held to a form."
                raise bad("tool_choice", told, "unsupported_parameter")
            chosen = [tool for tool in tools if choice in ("required", tool["function"]["name"])]
            many = request.parallel_tool_calls is not False and choice == "required"
            return grammars.of_calls(calls.before, calls.after, calls.key, chosen, many, "tools"), "tools"
        schema = request.wanted_schema
        return None if schema is None else (grammars.of_schema(*schema), schema[1])


def _grammar_of(voice: Voice, source: tuple[str, str]) -> grammars.Grammar:
    with voice.lock:
        known = voice.grammar_tokenizer
    return grammars.Grammar(known, *source)


def _most(wanted: int | None, prompt: int, context: int, param: str) -> int:
    """Returns the longest answer in tokens. Raises RequestError where it does not fit behind the prompt."""
    if prompt + (1 if wanted is None else wanted) > context:
        raise asked.too_long(prompt, 1 if wanted is None else wanted, context, param)
    return context - prompt if wanted is None else wanted


def _tokens(voice: Voice, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return voice.plain(prompt)
    wrong = next((one for one in prompt if not 0 <= one < voice.vocabulary), None)
    if wrong is not None:
        raise bad("prompt", f"prompt: {wrong} is no token; the model has 0 to {voice.vocabulary - 1}.")
    return list(prompt)


def _messages(request: asked.ChatRequest) -> tuple[dict[str, Any], ...]:
    """Returns the messages in the normal form. Raises RequestError with all that is wrong with them."""
    faults = Faults("request")
    messages = conversation(request.messages, "messages", OPENAI, faults, trained=False)
    _raise(faults, "messages")
    return messages


def _tools(request: asked.ChatRequest) -> tuple[tuple[dict[str, Any], ...], str]:
    """Returns the tools offered, and `auto`, `none`, `required` or the name of the one to call. Raises RequestError."""
    faults = Faults("request")
    tools = toolbox(request.tools, "tools", faults)
    _raise(faults, "tools")
    choice = request.tool_choice
    if choice is None:
        return tools, "auto" if tools else "none"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools, choice = _allowed(tools, choice.get("allowed_tools"))
    elif isinstance(choice, dict):
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, dict) else None
        if choice not in [tool["function"]["name"] for tool in tools]:
            raise bad("tool_choice", "tool_choice names a function that is not among tools.")
        return tools, str(choice)
    if choice not in ("auto", "none", "required"):
        raise bad("tool_choice", "tool_choice takes auto, none, required, or a function to be called.")
    if choice != "none" and not tools:
        raise bad("tool_choice", "tool_choice is only allowed when tools are given.")
    return tools, choice


def _allowed(tools: tuple[dict[str, Any], ...], given: Any) -> tuple[tuple[dict[str, Any], ...], Any]:
    """Returns the tools that an answer may call, and whether it must. Raises RequestError."""
    place, among = "tool_choice.allowed_tools", {tool["function"]["name"]: tool for tool in tools}
    given = given if isinstance(given, dict) else {}
    named = given.get("tools")
    if not isinstance(named, list) or not named or given.get("mode") not in ("auto", "required"):
        raise bad(place, f"{place} takes a mode, auto or required, and tools, at least one.")
    functions = [one.get("function") if isinstance(one, dict) else None for one in named]
    names = [one.get("name") if isinstance(one, dict) else None for one in functions]
    if any(not isinstance(name, str) or name not in among for name in names):
        raise bad(f"{place}.tools", f"{place}.tools names a function that is not among tools.")
    return tuple(among[name] for name in dict.fromkeys(names)), given["mode"]


def _raise(faults: Faults, param: str) -> None:
    try:
        faults.raise_if_any()
    except DataError as error:
        lines = [line.removeprefix("request: ") for line in error.problems]
        raise bad(_place_in(lines[0]) or param, " ".join(lines[:8]), "invalid_value") from None


def _place_in(told: str) -> str | None:
    """Returns the field that a refusal begins with."""
    place = re.match(r"(messages|tools)\b[\w.\[\]]*", told)
    return place.group() if place else None


def _refusal(error: Exception) -> RequestError:
    """Returns what a client is told of an error of the engine."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, LoraFtError):
        return RequestError(400, str(error), code="model_unavailable", param="model")
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return RequestError(
            429, "The memory of the device was not enough; ask for less, or later.", code="out_of_memory"
        )
    return RequestError(500, "The answer could not be computed; the server's log says why.", code="internal_error")


def head(asking: Asking, request: asked.Asked, kind: str, prefix: str) -> dict[str, Any]:
    """Returns what all objects of one answer share."""
    return {
        "id": ids.new(prefix, 29),
        "object": kind,
        "created": now(),
        "model": request.model,
        "system_fingerprint": asking.voice.fingerprint,
    }


class Stream(EventSourceResponse):
    """The chunks of an answer as events. Nobody waits for it any more once they end, or could not even begin."""

    def __init__(self, asking: Asking, chunks: AsyncIterator[str]) -> None:
        super().__init__(_with_errors_told(chunks), ping=PING_S, sep="\n")
        self._asking = asking

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._asking.cancel()


async def _with_errors_told(chunks: AsyncIterator[str]) -> AsyncIterator[dict[str, str]]:
    """Yields the events of a stream. One that breaks ends in an error object, which clients raise: a stream that just
    ended they would take for the whole answer."""
    try:
        async for chunk in chunks:
            yield {"data": chunk}
    except RequestError as refusal:
        yield {"data": json.dumps(refusal.body())}
    except Exception as error:
        log.error("a stream broke", exc_info=error)
        told = "The answer broke off: the server met an error of its own, and its log says which."
        yield {"data": json.dumps(body(500, told, "internal_error"))}

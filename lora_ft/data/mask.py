"""Which tokens of a rendered conversation are trained: three ways to find the assistant turns, and the contract.

A turn is trained from the end of the generation prompt up to and including its end-of-turn token, because that is
what the model must write by itself. Each way finds these characters from other evidence:

- generation tags: the template's author marked them with {% generation %};
- sentinels: marks put into each turn's text are looked up in the rendering, between the known header and end;
- prefixes: the conversation up to a turn is rendered with a generation prompt, and once more with the turn.

One rule maps characters to tokens for all three; it stands in `lora_ft.data.tokens`.

A row holds exactly one BOS, at its start, where the model knows one. A chat template writes it, and which templates may
write another number is a named rule (`lora_ft.data.template`): one for each exchange (Llama 2) or turn (SmolLM2, whose
BOS is its turn mark), or none though the tokenizer puts one before plain text (Zephyr's and ChatML's marks on a Llama
or Mistral vocabulary). Where the tokenizer itself adds none (Qwen), none is right. Plain text gets the tokenizer's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_ft.data.template import Message, RefusedError, Template, common_length
from lora_ft.data.tokens import Span, Tokens

IGNORE = -100
"""The label of a token without loss, as torch.nn.functional.cross_entropy has it."""
# Words for a message whose own must not matter.
_OTHER = "zqother"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as the model sees it: T token ids and T labels, unpadded."""

    where: str
    input_ids: list[int]
    labels: list[int]
    """labels[i] is input_ids[i] where trained, else IGNORE; labels[0] is always IGNORE, as nothing predicts it."""
    cut: int = 0
    """Tokens of the row that --data.max-length left out, all at its end."""


@dataclass(frozen=True, slots=True)
class Talk:
    """One conversation, rendered."""

    template: Template
    messages: Sequence[Message]
    tools: Sequence[Message]
    text: str
    trained: Sequence[int]
    """Indices of the assistant messages to train."""


class NoWayError(Exception):
    """Why one way of finding the assistant turns does not work for a conversation."""


def tag_spans(talk: Talk) -> list[Span]:
    """The spans between generation tags, of the trained turns only, without white space after the end of turn."""
    if not talk.template.has_tags:
        raise NoWayError("the template has none")
    text, blocks = talk.template.tagged(talk.messages, talk.tools)
    if text != talk.text:
        raise NoWayError("the template renders differently with them")
    turns = [index for index, message in enumerate(talk.messages) if message["role"] == "assistant"]
    if len(talk.trained) < len(turns):
        blocks = _blocks_of_trained(talk, turns, blocks)
    end = talk.template.end_of_turn
    spans = []
    for start, stop in blocks:
        kept = text[start:stop].rstrip()
        spans.append((start, start + len(kept) if kept.endswith(end) else stop))
    return spans


def _blocks_of_trained(talk: Talk, turns: Sequence[int], blocks: Sequence[Span]) -> list[Span]:
    if len(blocks) == len(turns):
        return [block for turn, block in zip(turns, blocks, strict=True) if turn in talk.trained]
    # A turn may hold several blocks (text and tool calls): counting those of each prefix tells whose they are.
    prefixes = [talk.messages[: _after_results(talk.messages, turn)] for turn in turns]
    upto = [len(talk.template.tagged(prefix, talk.tools)[1]) for prefix in prefixes]
    if upto[-1] != len(blocks):
        raise NoWayError("the blocks cannot be told apart by turn")
    kept: list[Span] = []
    for turn, first, last in zip(turns, [0, *upto], upto, strict=False):
        if turn in talk.trained:
            kept += blocks[first:last]
    return kept


def sentinel_spans(talk: Talk) -> list[Span]:
    """One span a trained turn, found through marks put into its text or, in a tool call, into the function's name."""
    template, text = talk.template, talk.text
    mark = "zqmark"
    while mark in text:
        mark += "q"
    messages = list(talk.messages)
    for turn in talk.trained:
        messages[turn] = _wrapped(messages[turn], f"{mark}{turn}S", f"{mark}{turn}E")
    marked = template.render(messages, talk.tools)
    pattern = re.compile(rf"{mark}(\d+)([SE])")
    places: dict[tuple[int, str], int] = {}
    removed = 0
    for found in pattern.finditer(marked):
        key = int(found[1]), found[2]
        if key in places:
            raise NoWayError(f"the template writes messages[{key[0]}] twice")
        places[key] = found.start() - removed
        removed += len(found.group())
    if pattern.sub("", marked) != text:
        raise NoWayError("the template writes other text when a turn's words change")

    spans = []
    floor = 0
    for turn in talk.trained:
        if (turn, "S") not in places or (turn, "E") not in places:
            raise NoWayError(f"the template does not write the whole of messages[{turn}]")
        first, last = places[turn, "S"], places[turn, "E"]
        starts = [
            place + len(header)
            for header in template.headers(talk.messages)
            if header.strip() and (place := text.rfind(header, floor, first)) >= 0
        ]
        if not starts:
            raise NoWayError(f"the generation prompt does not stand before messages[{turn}]")
        start = max(starts)
        if text.startswith(template.opener, start):
            start += len(template.opener)
        floor = _end(talk, turn, last)
        spans.append((start, floor))
    return spans


def _wrapped(message: Message, before: str, after: str) -> Message:
    calls = message.get("tool_calls")
    if calls:
        function = calls[0]["function"]
        named = {**function, "name": f"{before}{function['name']}{after}"}
        return {**message, "tool_calls": [{**calls[0], "function": named}, *calls[1:]]}
    # Inside the outer white space, which templates trim; after the thinking, which templates cut off or move.
    content = message.get("content") or ""
    lead = re.match(r"(?:.*</think>)?\s*", content, re.DOTALL)
    start = lead.end() if lead else 0
    stop = max(start, len(content.rstrip()))
    return {**message, "content": f"{content[:start]}{before}{content[start:stop]}{after}{content[stop:]}"}


def prefix_spans(talk: Talk) -> list[Span]:
    """One span a trained turn: from the end of its prompt to the end of turn, where shorter conversations agree."""
    template, text = talk.template, talk.text
    spans = []
    for turn in talk.trained:
        start = _prompt_length(talk, turn)
        end = _end(talk, turn, start)
        upto = _after_results(talk.messages, turn)
        # A template that rewrites earlier turns treats this one as earlier only when a message follows.
        if template.rewrites:
            upto = max(upto, turn + 2)
        if turn + 1 < len(talk.messages):
            # What follows says something else, so that a turn whose end was sought in it is found out.
            following = [{**message, "content": _OTHER} for message in talk.messages[turn + 1 : upto]]
            shorter = template.render([*talk.messages[: turn + 1], *following], talk.tools)
            if common_length(text, shorter) < end:
                raise NoWayError(f"messages[{turn}] is written differently once more messages follow")
        spans.append((start, end))
    return spans


def _after_results(messages: Sequence[Message], turn: int) -> int:
    """The index after a turn and the results of its tool calls: some templates refuse calls without them."""
    stop = turn + 1
    while stop < len(messages) and messages[stop]["role"] == "tool":
        stop += 1
    return stop


def _prompt_length(talk: Talk, turn: int) -> int:
    template, text = talk.template, talk.text
    if turn == 0:
        place = text.find(template.header) if template.header.strip() else -1
        if place < 0:
            raise NoWayError("nothing comes before messages[0]")
        return place + len(template.header)
    prompt = template.render(talk.messages[:turn], talk.tools, prompt=True)
    if not text.startswith(prompt):
        prompt = prompt.removesuffix(template.opener)
    if not text.startswith(prompt):
        raise NoWayError(f"the prompt before messages[{turn}] is written differently once the answer follows")
    return len(prompt)


def _end(talk: Talk, turn: int, start: int) -> int:
    place = talk.text.find(talk.template.end_of_turn, start)
    if place < 0:
        raise NoWayError(f"no {talk.template.end_of_turn} follows messages[{turn}]")
    return place + len(talk.template.end_of_turn)


WAYS: dict[str, Callable[[Talk], list[Span]]] = {
    "generation tags": tag_spans,
    "sentinels": sentinel_spans,
    "prefixes": prefix_spans,
}
"""By name. The last two find one span for each trained turn; tags may split a turn."""


def derive(talk: Talk, order: Sequence[str]) -> dict[str, list[Span]]:
    """The spans by the first two ways of `order` that apply. Raises RefusedError when only one does, or none."""
    found: dict[str, list[Span]] = {}
    reasons = []
    for name in order:
        try:
            found[name] = WAYS[name](talk)
        except (NoWayError, RefusedError) as error:
            reasons.append(f"{name}: {error}")
        if len(found) == 2:
            return found
    raise RefusedError(
        f"the trained text cannot be found in two independent ways ({'; '.join(reasons)}); "
        "give such turns weight 0, split the conversation, or put {% generation %} tags into the template."
    )


def labels_of(tokens: Tokens, spans: Sequence[Span], max_length: int) -> list[int]:
    """Labels of the first `max_length` tokens. By position alone: an id says nothing, as pad and EOS may share one."""
    flags = tokens.within(spans)[:max_length]
    labels = [token if flag else IGNORE for token, flag in zip(tokens.ids, flags, strict=False)]
    labels[:1] = [IGNORE] * len(labels[:1])
    return labels


def breach(
    tokens: Tokens, labels: Sequence[int], turns: dict[int, Span], template: Template, tokenizer: Any, max_length: int
) -> str | None:
    """How the labels break the contract, or None. `turns`: the span of each trained message, by its index."""
    ids, end_id = tokens.ids[:max_length], template.end_id
    if len(labels) != len(ids):
        return f"{len(labels)} labels for {len(ids)} tokens."
    wrong = wrong_bos(tokenizer, ids, template.bos_count)
    if wrong:
        return wrong
    owners = tokens.owners(list(turns.values()))
    last_of = {owner: place for place, owner in enumerate(owners)}
    end = tokenizer.convert_ids_to_tokens(end_id)
    for owner, index in enumerate(turns):
        last = last_of.get(owner)
        if last is None or tokens.ids[last] != end_id:
            return f"messages[{index}] does not end with the token {end}; mend the chat template."
        if last < len(ids) and labels[last] != end_id:
            shared = " (the pad token too)" if tokenizer.pad_token_id == end_id else ""
            return (
                f"the end of turn {end}{shared} after messages[{index}] is not trained, "
                "so the model would never learn to stop."
            )
    if labels and labels[0] != IGNORE:
        return "the first token is trained, though nothing predicts it."
    for place, (token, label, owner) in enumerate(zip(ids, labels, owners, strict=False)):
        if label != IGNORE and (owner < 0 or label != token):
            return f"token {place} is trained though it is not in a trained assistant turn."
        if label == IGNORE and owner >= 0 and place > 0:
            return f"token {place} is in a trained assistant turn but not trained."
    if all(label == IGNORE for label in labels):
        first = next(place for place, owner in enumerate(owners) if owner >= 0 and place > 0)
        return cut_off(len(tokens.ids), first, max_length)
    if all(label != IGNORE for label in labels[1:]):
        return "every token is trained, the prompt's too; mend the chat template."
    return None


def cut_off(length: int, first: int, max_length: int) -> str:
    """The problem of a row whose trained tokens start at `first`, past the cut."""
    return (
        f"has {length} tokens, and those to train start at number {first + 1}, past --data.max-length {max_length}: "
        f"nothing would be trained; raise it to {length}, or shorten the prompt."
    )


def wrong_bos(tokenizer: Any, ids: Sequence[int], count: int | None) -> str | None:
    """How BOS stands wrong in a row, or None. `count`: how many there must be; None allows any that do not touch."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    # Where one token is both, every EOS looks like a BOS, and rightly precedes the BOS of the next exchange.
    shared = bos == tokenizer.eos_token_id
    places = [place for place, token in enumerate(ids[:2] if shared else ids) if token == bos]
    touching = next((place for place in places if place - 1 in places), None)
    if touching is not None:
        return (
            f"the BOS token {tokenizer.bos_token} stands twice, at tokens {touching - 1} and {touching}; the template "
            "or the row writes one too many: remove it there."
        )
    if shared or count is None or len(places) == count:
        return None
    found = f"stands at tokens {', '.join(map(str, places[:4]))}" if places else "stands nowhere"
    rule = "exactly one must, at the start" if count else "none may"
    return f"the BOS token {tokenizer.bos_token} {found}; {rule}: mend the template, or the row that writes it."

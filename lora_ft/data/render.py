"""Examples -> token ids and labels, each row held to the mask contract.

The contract, checked for every row: labels on assistant turns only, and not on those of weight 0; the end of turn
of each trained turn is trained; BOS stands once, or as a named rule has it; something is trained and not everything;
and two independent ways of finding the trained text agree token for token (see `lora_ft.data.mask`). A row that breaks
it is refused with the decoded text, its trained stretches between « and ».

BOS is what the template writes: servers send the rendered text without adding one, so adding one here would train on
other prompts than the model will meet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from textwrap import indent
from typing import Any

from lora_ft.data.examples import Chat, Pair, Text
from lora_ft.data.mask import IGNORE, Rendered, Talk, breach, cut_off, derive, labels_of, wrong_bos
from lora_ft.data.show import coloured, marked, marked_tokens
from lora_ft.data.template import PROBE, Message, RefusedError, Template
from lora_ft.data.tokens import Span, Tokens, adds_bos, continued
from lora_ft.data.tools import AS_SYSTEM, AS_USER, extended
from lora_ft.errors import MaskError

__all__ = ["IGNORE", "ChatRenderer", "Rendered", "coloured", "marked", "render_completion"]

_SHOWN_CHARS = 1200
"""Longest decoded text in a message: a screenful, so that twenty problems can still be read."""
_THINKING = re.compile(r"<think>(.*?)</think>", re.DOTALL)


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Raises MaskError for a tokenizer or template that cannot be trained on whatever the rows say.
    """

    ways: tuple[str, ...]
    """The two ways of finding the trained text that must agree; a row one does not apply to uses the third."""
    rules: tuple[str, ...]
    """What the template does unasked, by name (see `lora_ft.data.template`); another once a row has tools."""
    end_of_turn: str
    """The token, as text, that ends an assistant turn."""
    header: str
    """What stands right before an assistant turn."""
    end_id: int
    """Its id: generation must stop at it, which `tokenizer.eos_token_id` does not always say."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._templates: dict[str, Template] = {}
        name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.chat_template:
            raise MaskError(
                [
                    f"{name} has no chat template, so conversations cannot be rendered: take the base's instruct "
                    "version, set tokenizer.chat_template, or train on prompt and completion with the task complete."
                ]
            )
        if not tokenizer.is_fast:
            raise MaskError([f"{name} gives no character offsets: load it with a tokenizer.json (a fast tokenizer)."])
        try:
            template = self._template([])
            talk = Talk(template, PROBE, (), template.render(PROBE), (1, 3))
            self.ways = tuple(derive(talk, _order(template)))
        except RefusedError as error:
            raise MaskError([f"{name}: {error}"]) from error
        self.rules, self.end_of_turn, self.end_id = template.rules, template.end_of_turn, template.end_id
        self.header = template.header

    def render(self, example: Chat | Pair) -> Rendered:
        """The row as ids and labels, at most `max_length` of each. Raises MaskError when it breaks the contract."""
        try:
            return self._render(example)
        except RefusedError as error:
            raise MaskError([f"{example.where}: {error}"]) from error

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids that a trained model answers to: the conversation and the generation prompt.

        Raises MaskError where the template refuses, or messages or tools hold a token that it alone may write.
        """
        asked_with = [dict(tool) for tool in tools]
        try:
            template = self._template(asked_with, messages)
            # What a user writes must not end a turn or begin one, as another's.
            _refuse_control_tokens(template, messages, "messages")
            _refuse_control_tokens(template, asked_with, "tools")
            asked = template.messages(messages)
            text = template.prompt(asked, asked_with)
            _refuse_dropped_tools(template.prompt, asked, asked_with, text)
        except RefusedError as error:
            raise MaskError([f"prompt: {error}"]) from error
        ids = Tokens.of(self._tokenizer, text).ids
        wrong = wrong_bos(self._tokenizer, ids, template.bos_count)
        if wrong:
            raise MaskError([f"prompt: {wrong}"])
        return ids

    def text(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text of a conversation as the template writes it. Raises MaskError where it refuses."""
        told_with = [dict(tool) for tool in tools]
        try:
            template = self._template(told_with, messages)
            return template.render(template.messages(messages), told_with)
        except RefusedError as error:
            raise MaskError([f"prompt: {error}"]) from error

    def reply(self, example: Chat) -> str:
        """The text of a conversation's last turn, without what the template puts around it. Raises as `text` does."""
        told_with = [dict(tool) for tool in example.tools]
        try:
            template = self._template(told_with, example.messages)
            messages = template.messages(example.messages)
            text = template.render(messages, told_with)
        except RefusedError as error:
            raise MaskError([f"prompt: {error}"]) from error
        begins = max(text.rfind(header) + len(header) for header in template.headers(messages) if header in text)
        return text[begins:].partition(template.end_of_turn)[0].strip()

    def _template(self, tools: Sequence[Any], messages: Sequence[Mapping[str, Any]] = ()) -> Template:
        """The template for a conversation; the tokenizer keeps it where it had to be taught tools."""
        try:
            # Some tokenizers hold a second template for conversations with tools.
            source = self._tokenizer.get_chat_template(tools=list(tools) or None)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        template = self._examined(source)
        if template.knows_tools or not (tools or any(map(_is_about_tools, messages))):
            return template
        template = self._extended(source)
        held = self._tokenizer.chat_template
        self._tokenizer.chat_template = (
            {name: template.source if other == source else other for name, other in held.items()}
            if isinstance(held, dict)
            else template.source
        )
        self.rules = template.rules
        return template

    def _extended(self, source: str) -> Template:
        for role in (AS_SYSTEM, AS_USER):
            try:
                template = self._examined(extended(source, role))
            except RefusedError:
                continue
            if template.writes_calls and template.writes_tools:
                return template
        raise RefusedError(
            "the chat template writes no tools, and written as text they do not get past it; use a base whose template "
            "supports tools, or drop these rows."
        )

    def _examined(self, source: str) -> Template:
        if source not in self._templates:
            self._templates[source] = Template(self._tokenizer, source)
        return self._templates[source]

    def _render(self, example: Chat | Pair) -> Rendered:
        example = _conversation(example)
        tools = list(example.tools)
        template = self._template(tools, example.messages)
        trained = [
            index
            for index, message in enumerate(example.messages)
            if message["role"] == "assistant" and message.get("weight", 1) != 0
        ]
        if not trained:
            raise RefusedError("no message to train on; at least one must be from assistant, without weight 0.")
        messages = template.messages(example.messages)
        _refuse_control_tokens(template, messages, "messages")
        _refuse_control_tokens(template, tools, "tools")
        talk = Talk(template, messages, tools, template.render(messages, tools), trained)
        _refuse_left_out(talk)

        found = derive(talk, _order(template))
        (one, one_spans), (other, spans) = found.items()
        tokens = Tokens.of(self._tokenizer, talk.text, [start for start, _ in spans])
        self._refuse_disagreement(tokens, {one: one_spans, other: spans})
        labels = labels_of(tokens, spans, self._max_length)
        turns = dict(zip(trained, spans, strict=True))
        kept = tokens.ids[: self._max_length]
        rendered = Rendered(example.where, kept, labels, cut=len(tokens.ids) - len(kept))
        broken = breach(tokens, labels, turns, template, self._tokenizer, self._max_length)
        if broken:
            raise RefusedError(f"{broken}\n{_quoted(marked(self._tokenizer, rendered))}")
        return rendered

    def _refuse_disagreement(self, tokens: Tokens, found: dict[str, list[Span]]) -> None:
        (one, first), (other, second) = ((name, tokens.within(spans)) for name, spans in found.items())
        if first == second:
            return
        place = next(place for place, (a, b) in enumerate(zip_longest(first, second)) if a != b)
        window = slice(max(0, place - 60), place + 60)
        shown = [
            f"    {name}:\n{_quoted(marked_tokens(self._tokenizer, tokens.ids[window], flags[window]))}"
            for name, flags in ((one, first), (other, second))
        ]
        token = self._tokenizer.decode([tokens.ids[place]])
        yes, no = (one, other) if first[place] else (other, one)
        raise RefusedError(
            f"two ways of finding the trained text disagree first at token {place}, {token!r}: {yes} would train it, "
            f"{no} would not; mend the chat template.\n" + "\n".join(shown)
        )


def render_completion(tokenizer: Any, example: Pair | Text, max_length: int) -> Rendered:
    """Plain text without a template, as ids and labels: a Pair's completion and EOS are trained, a Text's whole.

    The prompt is tokenized as it will be at generation, so no token straddles its end. One BOS comes first if the
    tokenizer adds one. Raises MaskError when nothing trained is left, or BOS would stand anywhere else.
    """
    where, eos, bos = example.where, tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None:
        raise MaskError([f"{where}: the tokenizer has no EOS token, so the model cannot learn to stop; set eos_token."])
    begins = adds_bos(tokenizer)
    prompt, completion = (example.prompt, example.completion) if isinstance(example, Pair) else ("", example.text)
    asked = _plain(tokenizer, prompt)
    head = [bos, *asked] if begins else asked
    follows = asked and tokenizer.is_fast
    tail = continued(tokenizer, completion)[0] if follows else _plain(tokenizer, completion)
    if tail[-1:] != [eos]:
        tail.append(eos)
    ids = [*head, *tail]
    labels = [*([IGNORE] * len(head)), *tail]
    labels[0] = IGNORE
    # A tokenizer that adds none may have a turn mark for BOS, which a text can hold.
    wrong = wrong_bos(tokenizer, ids, 1 if begins else None)
    if wrong:
        raise MaskError([f"{where}: {wrong}"])
    rendered = Rendered(where, ids[:max_length], labels[:max_length], cut=max(0, len(ids) - max_length))
    if all(label == IGNORE for label in rendered.labels):
        raise MaskError([f"{where}: {cut_off(len(ids), max(1, len(head)), max_length)}"])
    return rendered


def render_prompt(tokenizer: Any, prompt: str, where: str) -> list[int]:
    """Token ids of plain text to be continued, as those of a Pair begin. Raises MaskError where BOS stands wrong."""
    begins = adds_bos(tokenizer)
    ids = [*([tokenizer.bos_token_id] if begins else []), *_plain(tokenizer, prompt)]
    if not ids:
        raise MaskError([f"{where}: the tokenizer makes no token of the prompt; remove the row."])
    if wrong := wrong_bos(tokenizer, ids, 1 if begins else None):
        raise MaskError([f"{where}: {wrong}"])
    return ids


def _order(template: Template) -> tuple[str, ...]:
    """The ways in order of preference. Two are used, and the second is one that knows each turn's span."""
    return ("generation tags", "prefixes", "sentinels") if template.has_tags else ("sentinels", "prefixes")


def _conversation(example: Chat | Pair) -> Chat:
    if isinstance(example, Chat):
        return example
    ask, reply = {"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}
    return Chat(example.where, (ask, reply))


def _refuse_control_tokens(template: Template, parts: Sequence[Mapping[str, Any]], place: str) -> None:
    for index, part in enumerate(parts):
        said = json.dumps(part, ensure_ascii=False, default=str)
        token = next((token for token in template.control if token in said), None)
        if token:
            raise RefusedError(
                f"{place}[{index}] holds the control token {token}, which the template alone may write; "
                "remove it, or break it with a space."
            )


def _refuse_left_out(talk: Talk) -> None:
    """Templates drop what they do not know without a word: tools, system messages, thinking."""
    _refuse_dropped_tools(talk.template.render, talk.messages, talk.tools, talk.text)
    for index, message in enumerate(talk.messages):
        said = (message["content"] or "").rpartition("</think>")[2].strip()
        # Tool results are written as JSON text by some templates.
        if said not in talk.text and json.dumps(said, ensure_ascii=False)[1:-1] not in talk.text:
            raise RefusedError(
                f"messages[{index}] ({message['role']}) is left out or changed by the chat template; "
                "move what it says into another message, or mend the template."
            )
    last = talk.trained[-1]
    if all(message["role"] != "assistant" for message in talk.messages[last + 1 :]):
        message = talk.messages[last]
        written = _THINKING.search(message["content"] or "")
        thinking = (message.get("reasoning_content") or (written[1] if written else "")).strip()
        if thinking not in talk.text:
            raise RefusedError(
                f"messages[{last}] thinks, but the chat template drops thinking, so it would not be trained; "
                "use a template that keeps it, or remove it from the row."
            )


def _is_about_tools(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls") or message.get("function_call")) or message["role"] in ("tool", "function")


def _refuse_dropped_tools(
    write: Callable[[Sequence[Message]], str], messages: Sequence[Message], tools: Sequence[Message], text: str
) -> None:
    """Raises RefusedError where `text`, written with the tools, is what is written without them."""
    try:
        dropped = bool(tools) and write(messages) == text
    except RefusedError:
        # A template that insists on tools reads them.
        return
    if dropped:
        raise RefusedError(
            "the row has tools, but the chat template does not write them, so the model would never see them; "
            "use a base whose template supports tools, or remove them."
        )


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _quoted(text: str) -> str:
    if len(text) > _SHOWN_CHARS:
        text = f"{text[: _SHOWN_CHARS // 2]} ... {text[-_SHOWN_CHARS // 2 :]}"
    return indent(text.rstrip("\n"), "    ", lambda line: True)

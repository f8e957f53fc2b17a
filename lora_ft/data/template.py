"""One chat template: what it renders, and how its assistant turns begin and end.

A template is a program from the hub, so nothing about it is taken on trust: it is rendered on small made-up
conversations, and what it does with them decides how rows are read. Named rules say where a template does something
that a reader of the row would not expect; `Template.rules` lists those in force.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import product
from typing import Any

from lora_ft.data.chats import in_order_of_calls
from lora_ft.data.tokens import Span, adds_bos
from lora_ft.data.tools import TOOLS_AS_TEXT, is_extended
from lora_ft.foreign import templates

Message = dict[str, Any]
REWRITES = (
    "rewrites earlier turns: thinking is kept for the last turn only; earlier assistant turns are trained as rendered"
)
EMPTY_THINKING = (
    "writes an empty think block into the last turn: it comes after the generation prompt, so it is trained"
)
OPENS_THINKING = (
    "opens thinking: the generation prompt ends in a think tag that plain answers lack; prompts stop before that tag, "
    "where training starts"
)
BOS_REPEATED = "writes a BOS per exchange or turn: the model knows them so, and each is kept"
NO_BOS = (
    "writes no BOS though the tokenizer puts one before plain text: transformers and vLLM send chats of this family "
    "so, and so they are trained"
)
DROPS_THINKING = "drops thinking: no turn keeps it, so a row whose last assistant turn thinks is refused"

WITHOUT_BOS = {"Zephyr": ("<|assistant|>", "</s>"), "ChatML": ("<|im_start|>assistant", "<|im_end|>")}
"""Families whose own templates write no BOS even on a tokenizer that adds one (zephyr-7b-beta, OpenHermes-2.5-Mistral).

By what comes before an assistant turn and what ends it. Any other template without BOS forgot it: Gemma and Llama 3
answer far worse without."""

_GENERATION_TAG = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
_THINK_TAGS = ("<think>", "</think>")
_OPENER = re.compile(r"<think>\s*(?:</think>\s*)?\Z")

# Words no template holds: letters alone pass every filter (trim, tojson, escape) unchanged.
_USER, _ANSWER, _THOUGHT, _NAME, _KEY, _VALUE = "zqask", "zqanswer", "zqthought", "zqcall", "zqkey", "zqvalue"
_SYSTEM: Message = {"role": "system", "content": "zqrule"}
_ASK: Message = {"role": "user", "content": _USER}
_REPLY: Message = {"role": "assistant", "content": _ANSWER}
_THINKING_REPLY: Message = {"role": "assistant", "content": f"<think>\n{_THOUGHT}\n</think>\n\n{_ANSWER}"}
_RESULT: Message = {"role": "tool", "name": _NAME, "tool_call_id": "call00000", "content": _USER + "tool"}
_TOOL: Message = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": _USER,
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": _USER}}},
    },
}
PROBE: tuple[Message, ...] = (
    _ASK,
    _REPLY,
    {"role": "user", "content": _USER + "again"},
    {"role": "assistant", "content": _ANSWER + "again"},
)


class RefusedError(Exception):
    """Why a row or a template cannot be trained on; the caller adds the place."""


class Template:
    """One template source on one tokenizer, examined once. Raises RefusedError for one that cannot be trained on."""

    header: str
    """What stands right before an assistant turn: the generation prompt, or the end of the user's turn."""
    opener: str
    """The think tag that the generation prompt ends in, else empty."""
    end_of_turn: str
    """The token, as text, that ends an assistant turn."""
    end_id: int
    bos_count: int | None
    """How many BOS a conversation has; None where it depends on the conversation."""
    rewrites: bool
    """Whether a turn is written differently once more of the conversation follows."""
    rules: tuple[str, ...]
    """The named rules in force."""

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer = tokenizer
        self.source = source
        self.has_tags = bool(_GENERATION_TAG.search(source))
        self._examine()

    def render(self, messages: Sequence[Message], tools: Sequence[Message] = (), prompt: bool = False) -> str:
        """The text of a conversation, with the generation prompt at its end if `prompt`."""
        return self._written(messages, tools, prompt=prompt)[0]

    def prompt(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> str:
        """The text that a model trained on this template's turns answers to."""
        text = self.render(messages, tools, prompt=True)
        return text.removesuffix(self.opener) if self._opens_thinking else text

    def tagged(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> tuple[str, list[Span]]:
        """The same text, and the spans between its generation tags."""
        # apply_chat_template turns these spans into tokens itself, but it gives up at a span that starts with a space
        # the tokenizer leaves out of its offsets; the spans are the truth.
        return self._written(messages, tools, spans=True)

    def _written(
        self, messages: Sequence[Message], tools: Sequence[Message], *, prompt: bool = False, spans: bool = False
    ) -> tuple[str, list[Span]]:
        special = self._tokenizer.special_tokens_map
        try:
            return templates.render(self.source, messages, tools, special_tokens=special, prompt=prompt, spans=spans)
        except templates.TemplateError as error:
            told = str(error).rstrip(".")
            raise RefusedError(
                f"the chat template refuses the conversation: {told}; change the row, or the template."
            ) from error

    def messages(self, messages: Iterable[Mapping[str, Any]]) -> list[Message]:
        """OpenAI's messages in the form this template reads.

        Content is text. A developer is system where the template does not name that role, since it is OpenAI's newer
        word for the same thing; a function is a tool. Tool-call arguments are objects or JSON text, as it wants them,
        and results stand in the order of their calls, since many templates do not write the ids.
        """
        return in_order_of_calls([self._message(index, message) for index, message in enumerate(messages)])

    def headers(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """Every text that can stand right before an assistant turn of these messages."""
        if any(message["role"] == "tool" for message in messages) and self._tool_header:
            return (self.header, self._tool_header)
        return (self.header,)

    @cached_property
    def _tool_header(self) -> str:
        """What follows a tool's result where there is no generation prompt ([/TOOL_RESULTS]), else empty."""
        if self._has_generation_prompt:
            return ""
        arguments: Any = {_KEY: _VALUE} if self._takes_objects else json.dumps({_KEY: _VALUE})
        try:
            text = self.render([_ASK, _call(arguments), _RESULT], prompt=True)
        except RefusedError:
            return ""
        return text[text.rfind(_USER + "tool") + len(_USER + "tool") :]

    @cached_property
    def control(self) -> tuple[str, ...]:
        """The tokens, as text, that the template alone may write. A row's own thinking may hold think tags."""
        text = self.render(PROBE)
        with suppress(RefusedError):
            text += self.render([_SYSTEM, *PROBE])
        ends = (self._tokenizer.bos_token, self._tokenizer.eos_token)
        written = (token for token in self._added if token in text and token not in _THINK_TAGS)
        return tuple(dict.fromkeys(token for token in (*ends, *written) if token))

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template has a form of its own for tools or calls, if not for both."""
        return "tool_calls" in self.source or self.writes_tools

    @cached_property
    def writes_calls(self) -> bool:
        """Whether the template has a form of its own for the tool calls of an assistant turn."""
        try:
            return self._takes_objects in (True, False)
        except RefusedError:
            return False

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the tools of a conversation are written."""
        try:
            return _NAME in self.render([_ASK], [_TOOL])
        except RefusedError:
            return False

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether tool-call arguments are given as an object (Hugging Face's way) rather than as JSON text (OpenAI's).

        Templates that pass them through `tojson` quote JSON text a second time; those that concatenate need text.
        """
        raised: RefusedError | None = None
        # Some templates refuse calls without results, or without words.
        for as_object, results, words in product((True, False), ((), (_RESULT,)), (None, "")):
            try:
                call = _call({_KEY: _VALUE} if as_object else json.dumps({_KEY: _VALUE}), words)
                text = self.render([_ASK, call, *results])
            except RefusedError as error:
                raised = error
                continue
            quoted_twice, python_text = f'\\"{_KEY}', f"'{_KEY}'"
            if all(word in text for word in (_NAME, _KEY, _VALUE)) and quoted_twice not in text:
                if python_text in text:
                    continue
                return as_object
        if raised is not None and "tool_calls" in self.source:
            raise raised
        raise RefusedError(
            "the chat template does not write tool_calls, so such a turn would be trained empty; "
            "use a base whose template supports tools, or drop these rows."
        )

    def _message(self, index: int, message: Mapping[str, Any]) -> Message:
        plain = {key: value for key, value in message.items() if key not in ("weight", "refusal", "function_call")}
        if message["role"] == "developer" and "developer" not in self.source:
            plain["role"] = "system"
        if message["role"] == "function":
            plain["role"] = "tool"
        content = message.get("content")
        if isinstance(content, list | tuple):
            other = next((part.get("type") for part in content if part.get("type") not in ("text", "refusal")), None)
            if other is not None:
                raise RefusedError(f"messages[{index}].content has a part of type {other!r}; only text can be trained.")
            content = "".join(part[part["type"]] for part in content)
        plain["content"] = message.get("refusal") if content is None else content
        calls = message.get("tool_calls")
        if message.get("function_call"):
            calls = [{"id": f"call{index:05}", "type": "function", "function": message["function_call"]}]
        if calls:
            plain["tool_calls"] = [self._call(index, call) for call in calls]
        return plain

    def _call(self, index: int, call: Mapping[str, Any]) -> Message:
        function = dict(call["function"])
        arguments = function.get("arguments")
        if self._takes_objects and isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except json.JSONDecodeError as error:
                raise RefusedError(f"messages[{index}]: the arguments of {function['name']} are not JSON.") from error
        elif not self._takes_objects and not isinstance(arguments, str):
            arguments = json.dumps(arguments or {}, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}

    @cached_property
    def _added(self) -> list[str]:
        """The vocabulary's own tokens, as text, but for those of white space."""
        return [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.content.strip()]

    def _examine(self) -> None:
        asked, prompt = self.render([_ASK]), self.render([_ASK], prompt=True)
        answered, continued = self.render(PROBE[:2]), self.render(PROBE)
        if _ANSWER not in answered:
            raise RefusedError("the chat template trains nothing: it leaves out what the assistant says; mend it.")
        if _USER not in answered or _USER not in prompt:
            raise RefusedError("the chat template trains everything: it leaves out what the user says; mend it.")
        if self.has_tags:
            self._examine_tags()

        tail = answered[answered.rfind(_ANSWER) + len(_ANSWER) :]
        self.end_of_turn = _end_of_turn(tail, self._added)
        self.end_id = self._tokenizer.convert_tokens_to_ids(self.end_of_turn)
        self._refuse_second_end(asked, tail, continued)

        self.header = prompt[_border(asked, prompt, self._added) :]
        self._has_generation_prompt = bool(self.header.strip())
        if not self._has_generation_prompt:
            self.header = prompt[prompt.rfind(_USER) + len(_USER) :]

        bos_rules = self._examine_bos(answered, continued)
        opener = _OPENER.search(prompt)
        self.opener = opener.group() if opener else ""
        self.header = self.header.removesuffix(self.opener)
        self._opens_thinking = bool(opener) and not answered.startswith(prompt)

        thought = self.render([_ASK, _THINKING_REPLY])
        thought_before = self.render([_ASK, _THINKING_REPLY, *PROBE[2:]])
        turn_end = answered.find(self.end_of_turn, answered.rfind(_ANSWER)) + len(self.end_of_turn)
        self.rewrites = not continued.startswith(answered[:turn_end]) or (
            _THOUGHT in thought and _THOUGHT not in thought_before
        )
        rules = (
            (REWRITES, self.rewrites),
            (EMPTY_THINKING, answered.startswith(prompt) and "</think>" in answered[len(prompt) :]),
            (OPENS_THINKING, self._opens_thinking),
            (DROPS_THINKING, _THOUGHT not in thought),
            (TOOLS_AS_TEXT, is_extended(self.source)),
        )
        self.rules = (*(rule for rule, holds in rules if holds), *bos_rules)

    def _refuse_second_end(self, asked: str, tail: str, continued: str) -> None:
        """Raises RefusedError where another token of the vocabulary's own follows the end of turn, whatever comes next.

        Either may be the one that generation stops at. What opens the next turn is no end: BOS, and the token that the
        conversation starts with, as a template may write a generation prompt unasked.
        """
        before_next = continued.partition(_USER + "again")[0]
        following = before_next[before_next.rfind(_ANSWER) + len(_ANSWER) :]
        further = tail[: common_length(tail, following)].partition(self.end_of_turn)[2]
        bos = self._tokenizer.bos_token or ""
        start = asked.lstrip().removeprefix(bos).lstrip()
        for opener in (bos, *(token for token in self._added if start.startswith(token))):
            further = further.partition(opener)[0] if opener else further
        second = next((token for token in self._added if token in further), None)
        if second:
            raise RefusedError(
                f"the chat template ends an assistant turn with {self.end_of_turn} and then {second}, so it cannot be "
                "told at which the model stops; end the turn with one of them."
            )

    def _examine_bos(self, answered: str, continued: str) -> tuple[str, ...]:
        """Sets `bos_count` and returns the rules about BOS, from a conversation before and after it goes on."""
        bos, self.bos_count = self._tokenizer.bos_token, None
        if bos is None:
            return ()
        if not answered.lstrip().startswith(bos) and adds_bos(self._tokenizer):
            known = (self.header.strip(), self.end_of_turn) in WITHOUT_BOS.values()
            if bos in continued or not known:
                raise RefusedError(
                    f"the chat template does not start with the BOS token {bos}, though the tokenizer puts it before "
                    "every text, so the model expects it; start the template with {{ bos_token }}."
                )
            self.bos_count = 0
            return (NO_BOS,)
        if bos == self._tokenizer.eos_token:
            return ()
        if continued.count(bos) > answered.count(bos):
            return (BOS_REPEATED,)
        self.bos_count = 1 if bos in answered else 0
        return ()

    def _examine_tags(self) -> None:
        text, spans = self.tagged(PROBE)
        if not any(text[start:end].strip() for start, end in spans):
            raise RefusedError(
                "the chat template trains nothing: its generation tags hold no text; put them around each assistant "
                "turn with its end of turn, or remove them."
            )
        if any(_USER in text[start:end] for start, end in spans):
            raise RefusedError(
                "the chat template trains everything: its generation tags hold the user's turns too; put them around "
                "each assistant turn with its end of turn, or remove them."
            )


def common_length(a: str, b: str) -> int:
    """Number of characters that two texts share at their start."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _border(asked: str, prompt: str, added: Iterable[str]) -> int:
    """Where the generation prompt starts in `prompt`, never inside a token: `<|user|>` and `<|end|>` share `<|`."""
    border = common_length(asked, prompt)
    for token in added:
        start = prompt.find(token, max(0, border - len(token) + 1))
        if 0 <= start < border < start + len(token):
            border = start
    return border


def _end_of_turn(tail: str, added: Iterable[str]) -> str:
    """The first token of the vocabulary's own that the template writes after an answer."""
    found = min(((tail.find(token), -len(token), token) for token in added if token in tail), default=None)
    if found is None:
        wrote = f"{tail.strip()!r}, which is not one token" if tail.strip() else "nothing"
        raise RefusedError(
            f"the chat template ends an assistant turn with {wrote}, so the model would never learn to stop; "
            "end the turn with eos_token, or add the mark to the tokenizer as a special token."
        )
    return found[2]


def _call(arguments: Any, words: str | None = None) -> Message:
    function = {"name": _NAME, "arguments": arguments}
    return {
        "role": "assistant",
        "content": words,
        "tool_calls": [{"id": "call00000", "type": "function", "function": function}],
    }

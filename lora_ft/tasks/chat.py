"""Chat: learn the assistant's turns of conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lora_ft.config import TOOL_CALLS
from lora_ft.data import calls, meetings
from lora_ft.data.examples import Chat as Conversation
from lora_ft.data.examples import Example, Pair, Text
from lora_ft.data.questions import CONVERSATIONS
from lora_ft.data.render import ChatRenderer
from lora_ft.errors import DataError, MaskError
from lora_ft.tasks import MADE_UP, Answering, Features, replied
from lora_ft.tasks.causal import Causal


class Chat(Causal):
    """Conversations, or prompts with an answer, through the model's chat template."""

    name = "chat"
    questions = CONVERSATIONS

    def __init__(self, system: str | None = None) -> None:
        if not isinstance(system, str | None):
            raise TypeError("system is the text of a turn, or null")
        self.system = system
        """The system turn that all rows begin with; without it, an adapter is asked what it was not taught."""

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example] = ()) -> None:
        openings = {first_system(getattr(example, "messages", ())) for example in (*examples, *held_out)}
        self.system = openings.pop() if len(openings) == 1 else None

    def facts(self) -> dict[str, Any]:
        return {"system": self.system}

    def prepare(self, tokenizer: Any, max_length: int) -> None:
        super().prepare(tokenizer, max_length)
        self.renderer = ChatRenderer(tokenizer, max_length)
        self.rules, self.ways = self.renderer.rules, self.renderer.ways

    def made_up(self) -> list[Example]:
        return list(meetings.rows(MADE_UP, "train"))

    def features(self, example: Example) -> Features:
        if not isinstance(example, Conversation | Pair):
            raise DataError([f"{example.where}: a {type(example).__name__.lower()} row is not a conversation; "
                             "chat takes messages or prompt/completion rows, `complete` plain text."])  # fmt: skip
        rendered = self.renderer.render(example)
        self.rules = self.renderer.rules
        self.count_cut(rendered.cut)
        return {"input_ids": rendered.input_ids, "labels": rendered.labels}

    def question(self, example: Example) -> tuple[list[int], str]:
        if isinstance(example, Pair):
            return self.renderer.prompt([{"role": "user", "content": example.prompt}]), example.completion
        if not isinstance(example, Conversation) or not _is_reply(example.messages[-1]):
            raise DataError([f"{example.where}: the row does not end in a reply to compare with."])
        *asked, reply = example.messages
        with _told_of(example):
            prompt = self.renderer.prompt(asked, example.tools)
            return prompt, self.renderer.reply(example) if _calls(reply) else reply["content"]

    def questioned(self, examples: Sequence[Example], metrics: Sequence[str]) -> Sequence[Example]:
        """Returns the rows or, where calls are measured, what of a conversation leads to each of its calls."""
        if TOOL_CALLS not in metrics:
            return examples
        found = [
            dataclasses.replace(example, messages=example.messages[: place + 1])
            for example in examples
            if isinstance(example, Conversation)
            for place, message in enumerate(example.messages)
            if _calls(message)
        ]
        if not found:
            raise DataError([f"{TOOL_CALLS}: none of the {len(examples)} rows has a call of a function; leave it out."])
        unread = [row.where for row in found if not calls.written(self.question(row)[1])]
        if unread:
            raise DataError([f"{unread[0]}: the chat template does not write a call as JSON with a name and arguments, "
                             f"which {TOOL_CALLS} reads; leave it out."])  # fmt: skip
        return found

    def asked(self, example: Example) -> Features:
        tools: Sequence[Mapping[str, Any]] = ()
        if isinstance(example, Conversation):
            messages, tools = list(example.messages), example.tools
        elif isinstance(example, Pair | Text):
            # Such a row cannot say how a conversation opens; the rows trained on did.
            messages = [{"role": "system", "content": self.system}] if self.system else []
            messages.append({"role": "user", "content": example.prompt if isinstance(example, Pair) else example.text})
        else:
            return super().asked(example)
        with _told_of(example):
            return {"input_ids": self.renderer.prompt(messages, tools)}

    def predict(self, model: Answering, rows: Sequence[Features]) -> list[dict[str, Any]]:
        return replied(model, [row["input_ids"] for row in rows])

    def end_ids(self) -> list[int]:
        return [self.renderer.end_id]


@contextmanager
def _told_of(example: Example) -> Iterator[None]:
    """Says of which row it is what its template refuses."""
    try:
        yield
    except MaskError as error:
        told = (problem.removeprefix("prompt: ") for problem in error.problems)
        raise DataError([f"{example.where}: {problem}" for problem in told]) from None


def first_system(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns the text of the system turn that messages begin with, if they do."""
    first = messages[0] if messages else {}
    return first["content"] if first.get("role") == "system" and isinstance(first.get("content"), str) else None


def _is_reply(message: Mapping[str, Any]) -> bool:
    """Returns whether a message is the assistant's, of text or of calls."""
    return message["role"] == "assistant" and bool(_calls(message) or isinstance(message.get("content"), str))


def _calls(message: Mapping[str, Any]) -> Any:
    return message.get("tool_calls") or message.get("function_call")

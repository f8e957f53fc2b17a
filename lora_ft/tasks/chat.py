"""Chat: learn the assistant's turns of conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.data import meetings
from lora_ft.data.formats import Chat as Conversation
from lora_ft.data.formats import Example, Pair, Text
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
        if not isinstance(example, Conversation) or not _is_in_words(example.messages[-1]):
            raise DataError([f"{example.where}: the row does not end in a reply in words to compare with."])
        *asked, reply = example.messages
        return self.renderer.prompt(asked, example.tools), reply["content"]

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
        try:
            return {"input_ids": self.renderer.prompt(messages, tools)}
        except MaskError as error:
            told = (problem.removeprefix("prompt: ") for problem in error.problems)
            raise DataError([f"{example.where}: {problem}" for problem in told]) from None

    def predict(self, model: Answering, rows: Sequence[Features]) -> list[dict[str, Any]]:
        return replied(model, [row["input_ids"] for row in rows])

    def end_ids(self) -> list[int]:
        return [self.renderer.end_id]


def first_system(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns the text of the system turn that messages begin with, if they do."""
    first = messages[0] if messages else {}
    return first["content"] if first.get("role") == "system" and isinstance(first.get("content"), str) else None


def _is_in_words(message: Mapping[str, Any]) -> bool:
    """Returns whether a message is the assistant's, of text alone."""
    has_calls = message.get("tool_calls") or message.get("function_call")
    return message["role"] == "assistant" and not has_calls and isinstance(message.get("content"), str)

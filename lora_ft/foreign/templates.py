"""Chat templates rendered: each is a program from the hub, so it runs in a process of its own, sandboxed and limited.

The sandbox of jinja2 keeps a template from the machine, not from its time and memory: it writes `'a' * 500000000` and
turns a loop 10^9 times. Who makes a template can also have it do so for some conversation only, which trying it once
would not find; so every conversation is rendered in the process, which costs less than the rendering itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from lora_ft.foreign.cell import Cell, DiedError, RaisedError, StoppedError

# The longest template of the hub has some 20 KB.
MAX_CHARS = 256 * 2**10
# A conversation takes a millisecond.
SECONDS = 1.0
MEMORY_BYTES = 256 * 2**20

Turn = Mapping[str, Any]


class TemplateError(Exception):
    """A template raised, or was stopped; the text says what and why."""


class _Renderer:
    """The process that renders, and what it was told of templates."""

    def __init__(self) -> None:
        self.cell: Cell | None = None
        self.stopped: dict[str, str] = {}
        """Why a template is never rendered again, by its digest."""

    def render(
        self,
        source: str,
        messages: Sequence[Turn],
        tools: Sequence[Turn],
        special_tokens: Mapping[str, Any],
        prompt: bool,
        spans: bool,
    ) -> tuple[str, list[tuple[int, int]]]:
        if len(source) > MAX_CHARS:
            raise TemplateError(f"it has {len(source):,} characters, more than {MAX_CHARS:,}")
        digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        if digest in self.stopped:
            raise TemplateError(self.stopped[digest])
        if self.cell is None:
            # Imported here, so that the process that is forked off has it.
            from transformers.utils import chat_template_utils  # noqa: F401

            self.cell = Cell(_render, seconds=SECONDS, memory_bytes=MEMORY_BYTES)
        question = {
            "source": source,
            "messages": [{key: value for key, value in turn.items() if value is not None} for turn in messages],
            "tools": list(tools) or None,
            "special_tokens": dict(special_tokens),
            "prompt": prompt,
            "spans": spans,
        }
        try:
            text, found = self.cell.ask(question)
        except (DiedError, RaisedError) as error:
            raise TemplateError(str(error)) from None
        except StoppedError as why:
            self.stopped[digest] = f"to write a conversation it {why}, as a chat template never does"
            raise TemplateError(self.stopped[digest]) from None
        except TypeError as error:
            raise TemplateError(f"a message holds what is no JSON: {error}") from None
        return text, [(start, end) for start, end in found]


_RENDERER = _Renderer()


def render(
    source: str,
    messages: Sequence[Turn],
    tools: Sequence[Turn] = (),
    *,
    special_tokens: Mapping[str, Any],
    prompt: bool = False,
    spans: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text of a conversation, and the spans between its generation tags where `spans` asks for them.

    Args:
        special_tokens: those of the tokenizer by name, such as `bos_token`.
        prompt: whether the generation prompt stands at the end.

    Raises:
        TemplateError: the template refuses the conversation, or takes more than it may.
    """
    return _RENDERER.render(source, messages, tools, special_tokens, prompt, spans)


def _render(question: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """Returns text and spans, in the process."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[question["messages"]],
        tools=question["tools"],
        chat_template=question["source"],
        return_assistant_tokens_mask=question["spans"],
        add_generation_prompt=question["prompt"],
        **question["special_tokens"],
    )
    return texts[0], spans[0] if question["spans"] else []

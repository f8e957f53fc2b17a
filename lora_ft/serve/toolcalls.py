"""How a chat template writes calls of tools, found by having it write one; and calls read out of what a model wrote."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from lora_ft.data.render import ChatRenderer
from lora_ft.errors import LoraFtError
from lora_ft.foreign.strictjson import JsonError, Scanner
from lora_ft.serve import ids
from lora_ft.serve.decoding import special_tokens

_NAME, _KEY, _VALUE = "zqcall", "zqkey", "zqvalue"
_TOOL = {
    "type": "function",
    "function": {"name": _NAME, "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}}},
}
_ASK = {"role": "user", "content": "zqask"}
_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call00000", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}],
}


_NEXT = re.compile(r"\s*,\s*(?=\{)")


@dataclass(frozen=True)
class CallForm:
    """What a template writes around the JSON of a call, and what it calls the arguments there."""

    before: str
    after: str
    key: str = "arguments"

    @classmethod
    def of(cls, renderer: ChatRenderer) -> CallForm | None:
        """Returns how the template writes calls, None where that is no JSON object with the name in it."""
        try:
            text = renderer.text([_ASK, _CALL], [_TOOL])
        except LoraFtError:
            return None
        at = text.rfind(_VALUE)
        starts = [match.start() for match in re.finditer(r"\{", text[:at])]
        for start in reversed(starts):
            try:
                value, end = Scanner().scan(text, start)
            except JsonError:
                continue
            key = next((key for key in ("arguments", "parameters") if isinstance(value, dict) and key in value), None)
            if key is not None and value.get("name") == _NAME:
                turn = text.rfind(renderer.header, 0, start)
                begins = turn + len(renderer.header) if turn >= 0 else start
                after = text[end:].partition(renderer.end_of_turn)[0]
                return cls(text[begins:start].lstrip("\n"), after.rstrip(), key)
        return None

    @property
    def mark(self) -> str:
        """What an answer that is a call begins with."""
        return self.before.strip() or "{"

    def tokens(self, tokenizer: Any) -> frozenset[int]:
        """Returns the special tokens among the marks, by which alone a call may be known."""
        around = self.before + self.after
        return frozenset(one for one, written in special_tokens(tokenizer).items() if written in around)

    def read(self, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        """Returns what an answer says besides calls, None where that is nothing, and the calls in OpenAI's form.

        What looks like a call but is none stays in the text.
        """
        calls, said, at = [], "", 0
        while True:
            start = text.find(self.mark, at)
            if start < 0:
                break
            call, end = self._call(text, start + (len(self.mark) if self.before.strip() else 0))
            if call is None:
                said, at = said + text[at:end], end
                continue
            said += text[at:start]
            calls.append(call)
            at = end
            # Mistral's templates write all calls in one list.
            while (more := _NEXT.match(text, at)) and self.before.endswith("["):
                call, end = self._call(text, more.end())
                if call is None:
                    break
                calls.append(call)
                at = end
            closing = self.after.strip()
            if closing and text[at:].lstrip().startswith(closing):
                at = text.index(closing, at) + len(closing)
        rest = text[at:].strip()
        if calls and any(mark.startswith(rest) for mark in (self.mark, self.after.strip())):
            rest = ""  # a further call that was cut off right at its beginning, or the end of the last one
        said = f"{said}{rest}".strip() if calls else text
        return (said or None), calls

    def _call(self, text: str, start: int) -> tuple[dict[str, Any] | None, int]:
        """Returns the call whose JSON begins at `start`, behind white space, and where it ends."""
        start += len(text[start:]) - len(text[start:].lstrip())
        try:
            value, end = Scanner().scan(text, start)
        except JsonError:
            return None, max(start, 1)
        found = value if isinstance(value, dict) else {}
        arguments = found.get("arguments", found.get("parameters"))
        if not isinstance(found.get("name"), str) or not isinstance(arguments, dict | str):
            return None, end
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {
            "id": ids.new("call_"),
            "type": "function",
            "function": {"name": found["name"], "arguments": written},
        }, end

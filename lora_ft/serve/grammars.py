"""What an answer must follow: a JSON schema, any JSON object, or calls of tools; llguidance holds it to that."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import llguidance.hf
import torch

from lora_ft.serve.refusals import RequestError, bad

MAX_SCHEMA_CHARS = 100_000
# As models were shown JSON in training: without line ends between, and a blank behind commas and colons at most.
COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """The grammar of one answer, followed token by token."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, source: str, param: str) -> None:
        """Raises RequestError where the grammar cannot be followed; `param` is the field that asked for it."""
        wrong = llguidance.LLMatcher.validate_grammar(source, tokenizer)
        if wrong and not wrong.startswith("WARNING"):
            raise bad(param, f"The schema cannot be followed: {wrong.strip()[:400]}", "invalid_schema")
        self._matcher = llguidance.LLMatcher(tokenizer, source, log_level=0)

    @property
    def done(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self, size: int) -> torch.Tensor:
        """Returns which of `size` tokens may come next, bool [size].

        Raises:
            RequestError: the grammar has grown beyond what can be followed.
        """
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._require()
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        allowed_V = torch.zeros(size, dtype=torch.bool)
        flat = bits.reshape(-1)[:size].bool()
        allowed_V[: len(flat)] = flat
        return allowed_V

    def take(self, token: int) -> None:
        """Notes the token that was chosen."""
        self._matcher.consume_token(token)
        self._require()

    def _require(self) -> None:
        if self._matcher.is_error():
            raise RequestError(500, f"The schema could not be followed on: {self._matcher.get_error()[:400]}")


def tokenizer_of(tokenizer: Any, vocabulary: int, ends: Sequence[int]) -> llguidance.LLTokenizer:
    """Returns what grammars know of a tokenizer; takes a second for a large vocabulary.

    Args:
        vocabulary: the number of logits, which may be more than the tokenizer has tokens.
        ends: the tokens that end an answer.
    """
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(vocabulary, len(tokenizer)), eos_token=list(ends))


def of_schema(schema: Mapping[str, Any], param: str) -> str:
    """Returns the grammar of the JSON that a schema describes. Raises RequestError where it describes none."""
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
        raise bad(param, f"The schema is longer than {MAX_SCHEMA_CHARS:,} characters.", "invalid_schema")
    try:
        return str(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=COMPACT))
    except ValueError as error:
        raise bad(param, f"The schema cannot be followed: {str(error)[:400]}", "invalid_schema") from None


def of_calls(before: str, after: str, key: str, tools: Sequence[Mapping[str, Any]], many: bool, param: str) -> str:
    """Returns the grammar of calls of some tools, as a template writes them.

    Args:
        before, after: what the template writes around the JSON of a call.
        key: what it calls the arguments in that JSON.
        many: whether several calls may follow each other.
    """
    options = []
    for tool in tools:
        function = tool["function"]
        call = {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, key: function.get("parameters") or {"type": "object"}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        of_schema(call, param)
        options.append("%json " + json.dumps({**call, "x-guidance": COMPACT}))
    marks = [json.dumps(mark) for mark in (before, after) if mark]
    opening = f"{json.dumps(before)} " if before else ""
    closing = f" {json.dumps(after)}" if after else ""
    rules = [f"call_{place}: {option}" for place, option in enumerate(options)]
    either = " | ".join(f"call_{place}" for place in range(len(options)))
    repeat = '("\\n"? call)*' if many and marks else ""
    return "\n".join([f"start: call {repeat}", f"call: {opening}({either}){closing}", *rules])

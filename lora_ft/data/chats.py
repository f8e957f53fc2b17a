"""Messages and tools as OpenAI's JSONL or ShareGPT write them -> one normal form.

In the normal form a role is one of OpenAI's six, content is text (or null beside tool calls), the arguments of a
call are an object, as chat templates want them, and legacy functions are tools. Other keys of a message, such as
`name` or `reasoning_content`, are kept; null ones are not, for Parquet fills every absent key with null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lora_ft.data.faults import MISSING, Faults, found, listed

Message = dict[str, Any]

CALLS = "function_call"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one format writes a message."""

    role: str
    """Key of the role."""
    content: str
    """Key of the content."""
    roles: Mapping[str, str]
    """Role as written -> OpenAI's."""
    offered: str
    """The roles to name to a user who wrote another."""


OPENAI = Dialect(
    role="role",
    content="content",
    roles={role: role for role in ("system", "developer", "user", "assistant", "tool", "function")},
    offered="system, developer, user, assistant or tool",
)
SHAREGPT = Dialect(
    role="from",
    content="value",
    roles={
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        CALLS: "assistant",
        "observation": "tool",
        "tool": "tool",
    },
    offered="system, human, gpt, function_call, observation or tool",
)


def conversation(
    turns: Any, place: str, dialect: Dialect, faults: Faults, *, trained: bool = True
) -> tuple[Message, ...]:
    """Returns the messages in the normal form; notes what is wrong with them in `faults`.

    Args:
        trained: whether they are to be learned from, and not to be answered.
    """
    if not isinstance(turns, list) or not turns:
        faults.add(place, found(turns), "give a list with at least one message")
        return ()
    messages = [_message(turn, f"{place}[{index}]", dialect, faults, trained) for index, turn in enumerate(turns)]
    _check_answers(messages, place, faults)
    # Where a role is wrong, that message may have been the assistant's.
    if trained and all(message["role"] for message in messages) and not any(map(_is_trained, messages)):
        faults.add(
            place,
            "has no assistant message to learn from",
            "give at least one whose weight is not 0",
        )
    return tuple(messages)


def _is_trained(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _message(turn: Any, place: str, dialect: Dialect, faults: Faults, trained: bool) -> Message:
    if not isinstance(turn, dict):
        faults.add(place, found(turn), f'give an object with "{dialect.role}" and "{dialect.content}"')
        return {"role": None, "content": None}
    written, content = turn.get(dialect.role, MISSING), turn.get(dialect.content, MISSING)
    role = dialect.roles.get(written) if isinstance(written, str) else None
    if role is None:
        faults.add(f"{place}.{dialect.role}", found(written), f"use {dialect.offered}")
    taken = (dialect.role, dialect.content, "role", "content")
    extras = {key: value for key, value in turn.items() if value is not None and key not in taken}
    message: Message = {"role": role, "content": None, **extras}
    if dialect is SHAREGPT and written == CALLS:
        message["tool_calls"] = _bare_calls(content, f"{place}.{dialect.content}", faults)
        return message
    _check_extras(message, place, faults)
    if calls := _calls(message, place, faults):
        message["tool_calls"] = calls
    message["content"] = _content(content, message, f"{place}.{dialect.content}", faults, trained)
    return message


def _content(value: Any, message: Message, place: str, faults: Faults, trained: bool) -> str | None:
    """Returns the text, parts joined; an assistant's refusal is its text where it has no other."""
    if message["role"] == "assistant":
        refusal = message.pop("refusal", None)
        value = refusal if value in (None, MISSING) and isinstance(refusal, str) else value
    has_calls = "tool_calls" in message
    if isinstance(value, list):
        value = _joined(value, place, faults)
    if isinstance(value, str):
        if trained and not value.strip() and not has_calls and _is_trained(message):
            faults.add(place, "is empty", "an assistant message needs text, tool_calls, or a weight of 0")
        return value
    if not (value in (None, MISSING) and has_calls and message["role"] == "assistant"):
        faults.add(place, found(value), "give a string; only an assistant message with tool_calls may have null")
    return None


def _joined(parts: list[Any], place: str, faults: Faults) -> str:
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type", MISSING) if isinstance(part, dict) else MISSING
        if kind not in ("text", "refusal"):
            what, at = (found(kind), ".type") if isinstance(part, dict) else (found(part), "")
            faults.add(f"{place}[{index}]{at}", what, 'only parts of the type "text" can be trained; remove it')
        elif isinstance(text := part.get(kind, MISSING), str):
            texts.append(text)
        else:
            faults.add(f"{place}[{index}].{kind}", found(text), "give a string")
    return "".join(texts)


def _check_extras(message: Message, place: str, faults: Faults) -> None:
    """Holds the optional keys to their rules, and the weight to 0 or 1 as a whole number."""
    for key in ("name", "tool_call_id", "reasoning_content"):
        if key in message and not isinstance(message[key], str):
            faults.add(f"{place}.{key}", found(message[key]), "give a string, or leave it out")
    is_assistant = message["role"] in ("assistant", None)
    for key in ("weight", "tool_calls", CALLS):
        if key in message and not is_assistant:
            faults.add(f"{place}.{key}", "stands on a message that is not the assistant's", "remove it there")
            del message[key]
    if "weight" in message:
        weight = message.pop("weight")
        if isinstance(weight, bool) or weight not in (0, 1):
            faults.add(f"{place}.weight", found(weight), "use 0 (not trained) or 1 (trained)")
        else:
            message["weight"] = int(weight)


def _calls(message: Message, place: str, faults: Faults) -> list[Message]:
    """Takes OpenAI's tool calls, or its legacy function call, out of `message` and returns them."""
    legacy = message.pop(CALLS, None)
    calls = message.pop("tool_calls", [])
    if legacy is not None:
        return [{"type": "function", "function": _function(legacy, f"{place}.{CALLS}", faults)}]
    if not isinstance(calls, list):
        faults.add(f"{place}.tool_calls", found(calls), "give a list of calls")
        return []
    return [_call(call, f"{place}.tool_calls[{index}]", faults) for index, call in enumerate(calls)]


def _call(call: Any, place: str, faults: Faults) -> Message:
    if not isinstance(call, dict):
        faults.add(place, found(call), 'give an object with "id", "type" and "function"')
        return {}
    _check_type(call, place, faults)
    named: Message = {}
    if call.get("id") is not None:
        named["id"] = faults.text(call["id"], f"{place}.id")
    return {
        **named,
        "type": "function",
        "function": _function(call.get("function", MISSING), f"{place}.function", faults),
    }


def _bare_calls(value: Any, place: str, faults: Faults) -> list[Message]:
    """Returns ShareGPT's function calls: one or a list, as objects or as their JSON."""
    if isinstance(value, str) and value.strip():
        value = faults.json(value, place)
        if value is MISSING:
            return []
    many = isinstance(value, list) and bool(value)
    spots = [(call, f"{place}[{index}]") for index, call in enumerate(value)] if many else [(value, place)]
    return [{"type": "function", "function": _function(call, spot, faults)} for call, spot in spots]


def _function(value: Any, place: str, faults: Faults) -> Message:
    """Returns the name and the arguments of one call, the arguments as an object."""
    if not isinstance(value, dict):
        faults.add(place, found(value), 'give an object with "name" and "arguments"')
        return {}
    name = faults.text(value.get("name", MISSING), f"{place}.name")
    arguments = value.get("arguments", MISSING)
    if isinstance(arguments, str) and arguments.strip():
        arguments = faults.json(arguments, f"{place}.arguments")
        if arguments is MISSING:
            return {}
    if not isinstance(arguments, dict):
        rule = 'give an object, or one as JSON in a string ("{}" for none)'
        faults.add(f"{place}.arguments", found(arguments), rule)
    return {"name": name, "arguments": arguments}


def _check_type(value: Message, place: str, faults: Faults) -> None:
    if value.get("type") not in (None, "function"):
        faults.add(f"{place}.type", found(value["type"]), 'only "function" is known; use it')


def _check_answers(messages: list[Message], place: str, faults: Faults) -> None:
    """Notes tool results that answer no earlier call; without ids there is nothing to compare."""
    known: dict[str, None] = {}
    for index, message in enumerate(messages):
        known |= {call["id"]: None for call in message.get("tool_calls", ()) if "id" in call}
        answered = message.get("tool_call_id")
        if known and isinstance(answered, str) and answered not in known:
            rule = f"use the id of an earlier tool call: {listed(list(known))}"
            faults.add(f"{place}[{index}].tool_call_id", found(answered), rule)


def in_order_of_calls(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages, each run of tool results in the order of the calls before it, where all name one."""
    ordered: list[Message] = []
    places: dict[str | None, int] = {}
    for are_results, group in groupby(messages, key=lambda message: message["role"] == "tool"):
        run = list(group)
        if not are_results:
            places = {call.get("id"): place for place, call in enumerate(run[-1].get("tool_calls") or ())}
        elif all(result.get("tool_call_id") in places for result in run):
            run.sort(key=lambda result: places[result.get("tool_call_id")])
        ordered += run
    return ordered


def toolbox(value: Any, place: str, faults: Faults) -> tuple[Message, ...]:
    """Returns the tools a conversation may call, each `{"type": "function", "function": {...}}`.

    Takes a list or its JSON, of tools in that form or of bare functions (name, description, parameters).
    """
    if isinstance(value, str) and value.strip():
        value = faults.json(value, place)
        if value is MISSING:
            return ()
    if value in (None, MISSING) or (isinstance(value, str) and not value.strip()):
        return ()
    if not isinstance(value, list):
        faults.add(place, found(value), "give a list of tools, or one as JSON in a string")
        return ()
    return tuple(_tool(tool, f"{place}[{index}]", faults) for index, tool in enumerate(value))


def _tool(tool: Any, place: str, faults: Faults) -> Message:
    if not isinstance(tool, dict):
        faults.add(place, found(tool), 'give an object with "type" and "function"')
        return {}
    _check_type(tool, place, faults)
    function = tool
    if "function" in tool:
        function, place = tool["function"], f"{place}.function"
    if not isinstance(function, dict):
        faults.add(place, found(function), 'give an object with "name" and "parameters"')
        return {}
    faults.text(function.get("name", MISSING), f"{place}.name")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        faults.add(f"{place}.parameters", found(parameters), "give a JSON schema as an object, or leave it out")
    kept = {key: value for key, value in function.items() if value is not None and key != "type"}
    return {"type": "function", "function": kept}

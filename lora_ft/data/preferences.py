"""Rows that say which reply is better, or whether one is good -> a prompt and its replies, in the form of `chats`.

In the normal form the assistant's turns of a prompt have the weight 0: only the replies are learned from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_ft.data.chats import OPENAI, SHAREGPT, Message, conversation, toolbox
from lora_ft.data.faults import MISSING, found

if TYPE_CHECKING:
    from lora_ft.data.formats import Fields

Messages = tuple[Message, ...]

# A label as a text, which is all that a CSV file can hold.
VERDICTS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt and two replies to it, of which the first is the better one."""

    where: str
    prompt: Messages
    chosen: Messages
    rejected: Messages
    tools: Messages = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """A prompt, a reply to it, and whether that is good."""

    where: str
    prompt: Messages
    reply: Messages
    good: bool
    tools: Messages = ()


def has_verdict(fields: Mapping[str, Any]) -> bool:
    """Returns whether the label of a row says that a reply is good or bad, rather than what it is."""
    return _verdict(fields.get("label")) is not None


def of_input(row: Fields, asked: str, better: str, worse: str) -> Preference:
    """Returns a row of OpenAI's: `input` with messages and tools, `preferred_output`, `non_preferred_output`."""
    value, place = row.get(asked), row.place(asked)
    if not isinstance(value, dict):
        row.faults.add(place, found(value), 'give an object with "messages"')
        value = {"messages": [{"role": "user", "content": "?"}]}
    messages = _messages(row, value.get("messages", MISSING), f"{place}.messages", trained=False)
    tools = toolbox(value.get("tools"), f"{place}.tools", row.faults)
    return _preference(row, messages, better, worse, tools)


def of_prompt(row: Fields, asked: str, better: str, worse: str) -> Preference:
    """Returns a row whose prompt is a text or messages, and whose replies may repeat those messages."""
    value = row.get(asked)
    if isinstance(value, list):
        messages = _messages(row, value, row.place(asked), trained=False)
    else:
        more = row.optional("input") if asked == "instruction" else ""
        text = "\n\n".join(filter(None, (row.text(asked), more)))
        messages = ({"role": "user", "content": text},)
    return _preference(row, _after_system(row, messages), better, worse, _tools(row))


def of_conversations(row: Fields, better: str, worse: str) -> Preference:
    """Returns a row of two conversations that begin alike: what they share is the prompt."""
    both = [row.get(better), row.get(worse)]
    if not all(isinstance(value, list) and len(value) > 1 for value in both):
        for name, value in zip((better, worse), both, strict=True):
            if not isinstance(value, list) or len(value) < 2:
                row.faults.add(row.place(name), found(value), "give a whole conversation, or a prompt beside it")
        return Preference(row.where, (), (), ())
    same = 0
    while same < min(map(len, both)) - 1 and both[0][same] == both[1][same]:
        same += 1
    prompt = both[0][:same]
    if not prompt:
        row.faults.add(row.place(worse), f"begins otherwise than {row.place(better)}", "begin both with the prompt")
        return Preference(row.where, (), (), ())
    return _preference(row, _messages(row, prompt, row.place(better), trained=False), better, worse, _tools(row))


def judged_reply(row: Fields, asked: str, reply: str, label: str) -> Judged:
    """Returns a row of a prompt, a completion and whether that is good."""
    messages = ({"role": "user", "content": row.text(asked)},)
    said = ({"role": "assistant", "content": row.text(reply)},)
    return Judged(row.where, _after_system(row, messages), said, _good(row, label), _tools(row))


def judged_conversation(row: Fields, said: str, label: str) -> Judged:
    """Returns a row of a conversation whose last turn is the reply that is judged."""
    place = row.place(said)
    messages = _messages(row, row.get(said), place, trained=True)
    if messages and messages[-1]["role"] != "assistant":
        row.faults.add(f"{place}[{len(messages) - 1}]", "is not the assistant's", "end with the reply that is judged")
    prompt = _asked(row, messages[:-1], place)
    return Judged(row.where, _after_system(row, prompt), messages[-1:], _good(row, label), _tools(row))


def _preference(row: Fields, prompt: Messages, better: str, worse: str, tools: Messages) -> Preference:
    prompt = _asked(row, prompt, "the prompt")
    replies = [_reply(row, name, prompt) for name in (better, worse)]
    if all(replies) and replies[0] == replies[1]:
        rule = "give two replies that differ, or leave the row out"
        row.faults.add(row.place(worse), f"is the same as {row.place(better)}", rule)
    return Preference(row.where, prompt, replies[0], replies[1], tools)


def _asked(row: Fields, prompt: Messages, place: str) -> Messages:
    """Returns the messages before a reply, none of them to be learned from."""
    last = prompt[-1]["role"] if prompt else None
    if last in ("assistant", "system", "developer"):
        row.faults.add(place, f"ends with a turn of {last}", "a reply answers the user's last turn; end with one")
    return tuple({**message, "weight": 0} if message["role"] == "assistant" else message for message in prompt)


def _reply(row: Fields, name: str, prompt: Messages) -> Messages:
    """Returns the turns of a reply: a text, a message, or messages that may begin with the prompt's."""
    value, place = row.get(name), row.place(name)
    if isinstance(value, str) or value is MISSING or value is None:
        return ({"role": "assistant", "content": row.faults.text(value, place)},)
    if isinstance(value, dict):
        value = [value]
    messages = _messages(row, value, place, trained=True)
    shared = len(prompt)
    plain = [_plain(message) for message in messages]
    if shared < len(messages) and plain[:shared] == [_plain(message) for message in prompt]:
        messages = messages[shared:]
    roles = [message["role"] for message in messages]
    if "assistant" in roles and None not in roles:
        wrong = next((role for role in roles if role not in ("assistant", "tool")), None)
        if wrong or roles[-1] != "assistant":
            what = f"has a turn of {wrong}" if wrong else "does not end with the assistant"
            row.faults.add(place, what, "give the assistant's reply to the prompt alone")
    return messages


def _plain(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "weight"}


def _messages(row: Fields, value: Any, place: str, *, trained: bool) -> Messages:
    first: Any = value[0] if isinstance(value, list) and value else None
    dialect = SHAREGPT if isinstance(first, dict) and "from" in first and "role" not in first else OPENAI
    return conversation(value, place, dialect, row.faults, trained=trained)


def _after_system(row: Fields, messages: Sequence[Message]) -> Messages:
    system = row.optional("system")
    return ({"role": "system", "content": system}, *messages) if system else tuple(messages)


def _tools(row: Fields) -> Messages:
    return toolbox(row.get("tools"), row.place("tools"), row.faults)


def _good(row: Fields, label: str) -> bool:
    verdict = _verdict(row.get(label))
    if verdict is None:
        row.faults.add(row.place(label), found(row.get(label)), "give true for a good reply and false for a bad one")
    return bool(verdict)


def _verdict(value: Any) -> bool | None:
    return VERDICTS.get(value.strip().lower()) if isinstance(value, str) else value if type(value) is bool else None

"""Rows of a file or hub data set that ask a model, each beside what it was made of; an answer in them is not read.

The formats are those of training (`lora_ft.data.formats`) without the field that holds the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lora_ft.data.chats import OPENAI, SHAREGPT, Dialect, conversation, toolbox
from lora_ft.data.examples import Chat, Example, Labelled, Pair, Tagged, Text
from lora_ft.data.faults import found
from lora_ft.data.formats import Fields, Format, after, alpaca, with_rows
from lora_ft.data.problems import of_prompt
from lora_ft.data.rows import Row
from lora_ft.errors import DataError


def each(
    source: str, columns: Mapping[str, str], formats: tuple[Format, ...]
) -> Iterator[tuple[Row, Example] | DataError]:
    """Yields each row and the question in it, or what is wrong with it; held one at a time.

    Raises:
        DataError: there is no reading on.
    """
    # A hub data set is read again from its cache, and not fetched again.
    return with_rows(source, columns, formats, streaming=False)


def _chat(row: Fields, messages: str) -> Chat:
    tools = [tool for name in ("tools", "functions") for tool in toolbox(row.get(name), row.place(name), row.faults)]
    return Chat(row.where, _said(row, messages, OPENAI), tuple(tools))


def _sharegpt(row: Fields, conversations: str) -> Chat:
    tools = toolbox(row.get("tools"), row.place("tools"), row.faults)
    return Chat(row.where, after(row.optional("system"), _said(row, conversations, SHAREGPT)), tools)


def _said(row: Fields, field: str, dialect: Dialect) -> tuple[dict[str, object], ...]:
    """Returns a conversation up to the reply that it ends in, if it does."""
    said = conversation(row.get(field), row.place(field), dialect, row.faults, trained=False)
    if said and said[-1]["role"] == "assistant":
        said = said[:-1]
        if not said:
            row.faults.add(row.place(field), "has nothing but a reply", "give the message that is to be answered")
    return said


def _alpaca(row: Fields, instruction: str) -> Pair | Chat:
    return alpaca(row, instruction, None)


def _prompt(row: Fields, prompt: str) -> Pair:
    return Pair(row.where, row.text(prompt), "")


def _texts(row: Fields, first: str, second: str) -> Labelled:
    return Labelled(row.where, row.text(first), "", row.text(second))


def _text(row: Fields, text: str) -> Text:
    return Text(row.where, row.text(text))


def _words(row: Fields, words: str) -> Tagged:
    value, place = row.get(words), row.place(words)
    if not isinstance(value, list | tuple) or not value:
        row.faults.add(place, found(value), "give a list of strings, one or more")
        return Tagged(row.where, (), ())
    said = tuple(row.faults.text(word, f"{place}[{index}]", "give a word") for index, word in enumerate(value))
    return Tagged(row.where, said, ())


_INSTRUCTION = Format(("instruction",), _alpaca, takes=("input", "system", "history"))
_PAIRS = (Format(("text", "text_pair"), _texts), Format(("sentence1", "sentence2"), _texts))
_TEXT = Format(("text",), _text)
_PROMPTS = tuple(Format((name,), _prompt) for name in ("prompt", "question", "source"))

# What each kind of task is asked by: a `source` beside a text to classify may say where that is from.
CONVERSATIONS = (
    Format(("messages",), _chat, takes=("tools", "functions")),
    Format(("conversations",), _sharegpt, takes=("system", "tools")),
    _INSTRUCTION,
    *_PROMPTS,
    _TEXT,
)
# A prompt that is text is gone on from there, and put in a conversation in the others.
PROBLEMS = (Format(("prompt",), of_prompt), *CONVERSATIONS)
PROMPTS = (_INSTRUCTION, *_PROMPTS, _TEXT)
TEXTS = (*_PAIRS, Format(("sentence",), _text), _TEXT)
ANCHORS = (Format(("anchor",), _text), Format(("question",), _text), Format(("sentence",), _text), _TEXT)
WORDS = (Format(("words",), _words), Format(("tokens",), _words), _TEXT)

"""Rows of a file or hub data set -> examples; every problem names its file, line, field and mend.

The format is read from the first row: it is the first in `FORMATS` whose fields the row has. A plain text file gives
one row for each paragraph, that is for the lines between blank ones.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_ft.data.chats import OPENAI, SHAREGPT, conversation, toolbox
from lora_ft.data.examples import Chat, Example, Label, Labelled, Match, Pair, Scored, Tagged, Text
from lora_ft.data.faults import MISSING, Faults, found, listed
from lora_ft.data.files import rows
from lora_ft.data.preferences import (
    has_verdict,
    judged_conversation,
    judged_reply,
    of_conversations,
    of_input,
    of_prompt,
)
from lora_ft.data.problems import Problem, answer_of
from lora_ft.data.problems import of_prompt as problem_of
from lora_ft.data.rows import Row
from lora_ft.data.tagged import of_spans, places_of, sentence
from lora_ft.errors import DataError
from lora_ft.foreign.strictjson import bare

# A number as people write it; Python reads more, such as 1_000 and nan.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# A report of more problems than this is of no use, and a broken file can have millions.
MAX_PROBLEMS = 1000


def read(source: str, columns: Mapping[str, str] | None = None) -> list[Example]:
    """Returns every row of `source`. Raises DataError with all problems of all rows at once."""
    examples: list[Example] = []
    problems: list[str] = []
    try:
        for example in each(source, columns or {}, streaming=False):
            if isinstance(example, DataError):
                problems += example.problems
            elif not problems:
                examples.append(example)
            if len(problems) >= MAX_PROBLEMS:
                problems.append(f"The rest was not read, after {len(problems):,} problems.")
                break
    except DataError as last:
        problems += last.problems
    if problems:
        raise DataError(problems)
    return examples


def stream(source: str, columns: Mapping[str, str] | None = None) -> Iterator[Example]:
    """Yields rows as they are read, holding one at a time. Raises DataError at the first bad row."""
    for example in each(source, columns or {}, streaming=True):
        if isinstance(example, DataError):
            raise example
        yield example


def each(source: str, columns: Mapping[str, str], streaming: bool) -> Iterator[Example | DataError]:
    """Yields an example for each row, or what is wrong with it. Raises DataError where there is no reading on."""
    for made in with_rows(source, columns, FORMATS, streaming):
        yield made if isinstance(made, DataError) else made[1]


def with_rows(
    source: str, columns: Mapping[str, str], known: tuple[Format, ...], streaming: bool
) -> Iterator[tuple[Row, Example] | DataError]:
    """Yields what `each` does by other formats, an example beside the row that it was made of."""
    formats = _formats_for(columns, known)
    form: Format | None = None
    began = ""
    for row in rows(source, streaming):
        if isinstance(row, DataError):
            yield row
            continue
        try:
            fields = Fields(row.where, _renamed(row, columns), columns, Faults(row.where))
            if form is None:
                form, began = _recognised(row, fields, formats, known), row.where
            _refuse_mixture(fields, form, began, formats)
            example = form.parse(fields, *form.needs)
            fields.faults.raise_if_any()
        except DataError as error:
            if form is None:
                raise
            yield error
        else:
            yield row, example


def problems(row: Row) -> tuple[str, ...]:
    """Returns what is wrong with one row by itself, nothing where an example can be made of it."""
    fields = Fields(row.where, row.fields, {}, Faults(row.where))
    try:
        form = _recognised(row, fields, _in_order(FORMATS), FORMATS)
        form.parse(fields, *form.needs)
        fields.faults.raise_if_any()
    except DataError as error:
        return error.problems
    return ()


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one row under their known names; messages call them by the user's own."""

    where: str
    values: Mapping[str, Any]
    columns: Mapping[str, str]
    faults: Faults

    def get(self, name: str) -> Any:
        """Returns the value, or MISSING."""
        return self.values.get(name, MISSING)

    def place(self, name: str) -> str:
        """Returns what the user calls the field."""
        return bare(self.columns.get(name, name))

    def text(self, name: str) -> str:
        """Returns the text, which must not be empty."""
        return self.faults.text(self.get(name), self.place(name))

    def optional(self, name: str) -> str:
        """Returns the text, or "" where the field is absent, null or blank."""
        value = self.get(name)
        if value is MISSING or value is None or (isinstance(value, str) and not value.strip()):
            return ""
        return self.faults.text(value, self.place(name), "give a string")


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write rows: the fields it is known by, those it may have besides, and how to read them."""

    needs: tuple[str, ...]
    parse: Callable[..., Example]
    """Takes the Fields and the names in `needs`; notes what is wrong in the Fields' faults."""
    takes: tuple[str, ...] = ()
    first: bool = False
    """Whether it is looked for before the others."""
    offered: bool = True
    """Whether it is named to who has rows of no format; of those that differ in a word one is enough."""
    when: Callable[[Mapping[str, Any]], bool] = lambda fields: True
    """Takes the fields of a row that has those in `needs`, and says whether it is of the format even so."""

    def __str__(self) -> str:
        return " + ".join(self.needs)


def _chat(row: Fields, messages: str) -> Chat:
    said = conversation(row.get(messages), row.place(messages), OPENAI, row.faults)
    tools = [tool for name in ("tools", "functions") for tool in toolbox(row.get(name), row.place(name), row.faults)]
    return Chat(row.where, said, tuple(tools))


def _sharegpt(row: Fields, conversations: str) -> Chat:
    said = conversation(row.get(conversations), row.place(conversations), SHAREGPT, row.faults)
    tools = toolbox(row.get("tools"), row.place("tools"), row.faults)
    return Chat(row.where, after(row.optional("system"), said), tools)


def _pair(row: Fields, prompt: str, completion: str) -> Pair:
    return Pair(row.where, row.text(prompt), row.text(completion))


def _question(row: Fields, question: str, answer: str) -> Pair | Problem:
    """Returns a Pair, or a Problem where the answer is no text but can be checked."""
    if isinstance(row.get(answer), int | float | dict | list) and not isinstance(row.get(answer), bool):
        return Problem(row.where, ({"role": "user", "content": row.text(question)},), answer_of(row, answer))
    return _pair(row, question, answer)


def alpaca(row: Fields, instruction: str, output: str | None) -> Pair | Chat:
    """Returns a Pair, or a Chat where the row has a system prompt or earlier turns; without `output`, of no reply."""
    ask = "\n\n".join(filter(None, (row.text(instruction), row.optional("input"))))
    reply = row.text(output) if output else ""
    system, earlier = row.optional("system"), _history(row)
    if not system and not earlier:
        return Pair(row.where, ask, reply)
    last = ({"role": "assistant", "content": reply},) if output else ()
    return Chat(row.where, after(system, (*earlier, {"role": "user", "content": ask}, *last)))


def _history(row: Fields) -> tuple[dict[str, Any], ...]:
    """Returns the messages of Alpaca's earlier turns, which are pairs of what was asked and answered."""
    value, place = row.get("history"), row.place("history")
    if value is MISSING or value is None:
        return ()
    rounds = value if isinstance(value, list) else [value]
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(rounds):
        if not isinstance(turn, list) or len(turn) != 2:
            row.faults.add(f"{place}[{index}]", found(turn), "give a list of pairs, [asked, answered]")
            continue
        for side, role in enumerate(("user", "assistant")):
            messages.append({"role": role, "content": row.faults.text(turn[side], f"{place}[{index}][{side}]")})
    return tuple(messages)


def after(system: str, messages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Returns the messages after a system turn, where there is one."""
    return ({"role": "system", "content": system}, *messages) if system else messages


def _labelled(row: Fields, *needs: str) -> Labelled:
    *texts, label = needs
    said = [row.text(name) for name in texts]
    value, place = row.get(label), row.place(label)
    read: Label
    if isinstance(value, float):
        read = value
        if not math.isfinite(value):
            row.faults.add(place, found(value), "give a finite number")
    elif isinstance(value, list):
        read = tuple(_class(row, item, f"{place}[{index}]") for index, item in enumerate(value))
        if twice := [name for name, count in Counter(read).items() if count > 1 and name]:
            row.faults.add(place, f"names {listed(twice)} twice", "name each class once")
    else:
        read = _class(row, value, place)
    return Labelled(row.where, said[0], read, said[1] if len(said) > 1 else None)


def _class(row: Fields, value: Any, place: str) -> str:
    # A whole number names a class as well as a word does; true is more likely a slip.
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return row.faults.text(value, place, "give the class as a string or a whole number")


def _match(row: Fields, *needs: str) -> Match:
    return Match(row.where, *(row.text(name) for name in needs))


def _scored(row: Fields, text: str, text_pair: str, score: str) -> Scored:
    said, value, place = (row.text(text), row.text(text_pair)), row.get(score), row.place(score)
    # A table has nothing but words.
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        row.faults.add(place, found(value), "give how alike the texts are, as a number from -1 to 1")
        value = 0.0
    return Scored(row.where, *said, float(value))


def _tagged(row: Fields, words: str, tags: str) -> Tagged:
    return Tagged(row.where, *sentence(row.get(words), row.get(tags), (row.place(words), row.place(tags)), row.faults))


def _spans(row: Fields, text: str, spans: str) -> Tagged:
    said = row.text(text)
    words, tags = of_spans(said, row.get(spans), row.place(spans), row.faults)
    return Tagged(row.where, words, tags, said, places_of(said))


def _text(row: Fields, text: str) -> Text:
    return Text(row.where, row.text(text))


FORMATS = (
    Format(("messages",), _chat, takes=("tools", "functions")),
    Format(("conversations",), _sharegpt, takes=("system", "tools")),
    Format(("instruction", "output"), alpaca, takes=("input", "system", "history")),
    Format(("prompt", "completion"), _pair),
    Format(("prompt", "answer"), problem_of),
    Format(("question", "answer"), _question),
    Format(("source", "target"), _pair),
    Format(("text", "text_pair", "label"), _labelled),
    Format(("sentence1", "sentence2", "label"), _labelled),
    Format(("text", "label"), _labelled),
    Format(("sentence", "label"), _labelled),
    Format(("text", "text_pair", "score"), _scored, offered=False),
    Format(("sentence1", "sentence2", "score"), _scored),
    Format(("anchor", "positive", "negative"), _match, offered=False),
    Format(("anchor", "positive"), _match),
    Format(("words", "tags"), _tagged),
    Format(("tokens", "ner_tags"), _tagged),
    Format(("tokens", "tags"), _tagged, offered=False),
    Format(("text", "spans"), _spans),
    Format(("text",), _text),
    # Looked for first: read as chat or as pairs they would teach the rejected reply or none, or the bad ones.
    Format(("input", "preferred_output", "non_preferred_output"), of_input, first=True),
    Format(("input", "preferred_completion", "non_preferred_completion"), of_input, first=True, offered=False),
    Format(("conversations", "chosen", "rejected"), of_prompt, takes=("system", "tools"), first=True, offered=False),
    Format(("prompt", "chosen", "rejected"), of_prompt, takes=("system", "tools"), first=True),
    Format(("question", "chosen", "rejected"), of_prompt, takes=("system", "tools"), first=True, offered=False),
    Format(("instruction", "chosen", "rejected"), of_prompt, takes=("input", "system"), first=True, offered=False),
    Format(("chosen", "rejected"), of_conversations, takes=("tools",), first=True, offered=False),
    Format(("prompt", "completion", "label"), judged_reply, takes=("system", "tools"), when=has_verdict, first=True),
    Format(("messages", "label"), judged_conversation, takes=("tools",), when=has_verdict, first=True, offered=False),
    Format(("messages", "kto_tag"), judged_conversation, takes=("tools",), first=True, offered=False),
    Format(("conversations", "kto_tag"), judged_conversation, takes=("system", "tools"), first=True, offered=False),
)


def _in_order(formats: tuple[Format, ...]) -> tuple[Format, ...]:
    """Returns formats in the order in which they are looked for."""
    return tuple(sorted(formats, key=lambda form: not form.first))


def _formats_for(columns: Mapping[str, str], formats: tuple[Format, ...]) -> tuple[Format, ...]:
    """Returns those of the formats that have every field `columns` names. Raises DataError where there is none."""
    known = dict.fromkeys(name for form in formats for name in (*form.needs, *form.takes))
    if unknown := [bare(name) for name in columns if name not in known]:
        raise DataError([f"data.columns: {name} is no known field; use {', '.join(known)}." for name in unknown])
    fitting = tuple(form for form in _in_order(formats) if columns.keys() <= {*form.needs, *form.takes})
    if not fitting:
        together = listed(list(columns))
        raise DataError([f"data.columns: no format has {together} together; formats are {_offer(formats)}."])
    return fitting


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields under known names, a mapped one under that only. Raises DataError where one is missing."""
    if not columns:
        return row.fields
    here = listed(list(row.fields))
    absent = [
        f"{row.where}: {bare(own)}, given for {known} by data.columns, is missing; the row has {here}."
        for known, own in columns.items()
        if own not in row.fields
    ]
    if absent:
        raise DataError(absent)
    kept = {name: value for name, value in row.fields.items() if name not in columns.values() and name not in columns}
    return kept | {known: row.fields[own] for known, own in columns.items()}


def _detected(fields: Fields, formats: tuple[Format, ...]) -> Format | None:
    fitting = (form for form in formats if fields.values.keys() >= set(form.needs))
    return next((form for form in fitting if form.when(fields.values)), None)


def _recognised(row: Row, fields: Fields, formats: tuple[Format, ...], known: tuple[Format, ...]) -> Format:
    """Returns the format of the first row. Raises DataError where it has none, offering those that are known."""
    form = _detected(fields, formats)
    if form is not None and form.parse is _tagged:
        _refuse_numbers(fields, form.needs[1])
    if form is None:
        what = f"has the fields {listed(list(row.fields))}, which fit no format" if row.fields else "has no fields"
        mapped = "--data.columns prompt ask completion reply" if known is FORMATS else "--columns prompt ask"
        raise DataError([f"{row.where}: {what}; use {_offer(known)}, or map yours, as in {mapped}."])
    return form


def _refuse_numbers(fields: Fields, tags: str) -> None:
    """Raises DataError where tags are numbers, of which nothing says what they stand for: said once, not of each."""
    value = fields.get(tags)
    if isinstance(value, list) and value and all(type(tag) is int for tag in value):
        what = f"{fields.place(tags)} holds whole numbers such as {value[0]}, and nothing says what they stand for"
        mend = "write the tags themselves (O, B-TYPE, I-TYPE), or name the hub data set, whose features may name them"
        raise DataError([f"{fields.where}: {what}; {mend}."])


def _refuse_mixture(fields: Fields, form: Format, began: str, formats: tuple[Format, ...]) -> None:
    """Raises DataError where a row is of another format; one that merely lacks a field is left to the parser."""
    other = _detected(fields, formats)
    if other not in (None, form) and not set(other.needs) < set(form.needs):
        raise DataError([f"{fields.where}: is {other}, but {began} is {form}; keep one format in a file."])


def _offer(formats: tuple[Format, ...]) -> str:
    *others, last = (str(form) for form in formats if form.offered)
    return f"{', '.join(others)} or {last}"

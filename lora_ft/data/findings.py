"""What could be better about rows before they are trained on: each finding with its rows and, maybe, a fix.

A finding is *told*, *needed* (without its fix no training can use the file) or *advised* (asked for, one by one). They
are looked for in order, each on the rows as the fixes before it left them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lora_ft.data import formats
from lora_ft.data.chats import SHAREGPT
from lora_ft.data.faults import listed
from lora_ft.data.preferences import has_verdict
from lora_ft.data.rows import Row

Kind = Literal["chat", "completion", "text", "preference"]
Weight = Literal["told", "needed", "advised"]

FEW = 100
LONG_CHARS = 10_000
# Column names that mean the same, by what they become.
PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("input", "output"),
    ("source", "target"),
    ("prompt", "response"),
)
PREFERENCES = (("preferred_output", "non_preferred_output"), ("chosen", "rejected"))
# Columns of what two replies answer; the first that is there.
ASKED = ("input", "prompt", "conversations", "question", "instruction")
# Columns of rows that are as their task takes them.
READY = (
    (("text", "label"), "classify"),
    (("sentence", "label"), "classify"),
    (("sentence1", "sentence2", "label"), "classify"),
    (("sentence1", "sentence2", "score"), "embed"),
    (("text", "text_pair", "score"), "embed"),
    (("anchor", "positive", "negative"), "embed"),
    (("anchor", "positive"), "embed"),
    (("text", "spans"), "tag"),
    (("words", "tags"), "tag"),
    (("tokens", "tags"), "tag"),
    (("tokens", "ner_tags"), "tag"),
)
SEPARATORS = ("\n\n###\n\n", "\n\n===\n\n", "\n\n---\n\n", " ->")
ENDINGS = (" END", " ###", "\n\n\n")
SHORTEST_PREFIX, LONGEST_SUFFIX = 12, 10


@dataclass
class Line:
    """One row on its way, and where it came from."""

    where: str
    fields: dict[str, Any]

    @property
    def number(self) -> str:
        """The number of the row, as people count."""
        return self.where.rpartition(":")[2].removeprefix("row ")


Lines = list[Line]


@dataclass(frozen=True)
class Finding:
    """Something about the rows."""

    weight: Weight
    text: str
    rows: tuple[str, ...] = ()
    """Numbers of the rows that it is about."""
    fix: Callable[[Lines], Lines] | None = None
    ask: str = ""
    """What the fix does, as it is offered."""

    def __str__(self) -> str:
        some = f" Rows {listed(self.rows)}." if self.rows else ""
        return f"{self.text}{some}"


def ready_for(lines: Sequence[Line]) -> str | None:
    """Returns the task whose rows these are, by the first, where there is nothing to prepare for it; else None."""
    names = {name.strip().lower() for name in lines[0].fields}
    if names & {"completion", "messages", "conversations"} and ("kto_tag" in names or has_verdict(lines[0].fields)):
        return "prefer"
    return next((task for columns, task in READY if set(columns) <= names), None)


def kind_of(lines: Sequence[Line]) -> tuple[Kind, tuple[str, ...]] | None:
    """Returns what the rows are, and the columns that make them so, by the first row; None where nothing fits."""
    names = {name.strip().lower(): name for name in lines[0].fields}
    for pair in PREFERENCES:
        if set(pair) <= names.keys():
            return "preference", tuple(names[name] for name in pair)
    for name in ("messages", "conversations"):
        if name in names:
            return "chat", (names[name],)
    for pair in PAIRS:
        if set(pair) <= names.keys():
            return "completion", tuple(names[name] for name in pair)
    for name in ("completion", "text"):
        if name in names:
            return "text", (names[name],)
    return None


def normal(lines: Sequence[Line], kind: Kind, columns: Sequence[str]) -> Lines:
    """Returns the rows under the names that training reads; what a row lacks is empty in it."""
    made = []
    for line in lines:
        get = line.fields.get
        fields: dict[str, Any]
        if kind == "chat":
            turns = get(columns[0])
            fields = {"messages": [_turn(turn) for turn in turns] if isinstance(turns, list) else []}
            fields |= {
                name: get(name) for name in ("tools", "functions", "parallel_tool_calls") if get(name) is not None
            }
        elif kind == "completion":
            fields = {"prompt": _text(get(columns[0])), "completion": _text(get(columns[1]))}
        elif kind == "text":
            fields = {"text": _text(get(columns[0]))}
        else:
            asked = next((value for name in ASKED if (value := get(name)) is not None), None)
            fields = {"input": asked if isinstance(asked, dict) else {"messages": _asked(asked)}}
            sides = ("preferred_output", "non_preferred_output")
            fields |= {name: _said(get(column)) for name, column in zip(sides, columns, strict=True)}
        made.append(Line(line.where, fields))
    return made


def look(lines: Lines, kind: Kind) -> Generator[tuple[Finding, Lines], Lines | None, None]:
    """Yields each finding with the rows it is about; send back the rows as they are after it."""
    for check in CHECKS:
        for finding in check(lines, kind):
            answer = yield finding, lines
            lines = lines if answer is None else answer


def _few(lines: Lines, kind: Kind) -> Iterator[Finding]:
    if len(lines) < FEW:
        more = "a few hundred teach more, and each doubling about as much again"
        yield Finding("told", f"The file has {len(lines)} rows; {more}.")


def _empty(lines: Lines, kind: Kind) -> Iterator[Finding]:
    lost = [line for line in lines if not _answer(line, kind).strip()]
    if lost:
        yield _dropping("needed", f"{len(lost)} rows have no answer to learn.", lost, "Leave them out")


def _repeated(lines: Lines, kind: Kind) -> Iterator[Finding]:
    seen: set[str] = set()
    lost = []
    for line in lines:
        key = json.dumps(line.fields, sort_keys=True, ensure_ascii=False)
        if key in seen:
            lost.append(line)
        seen.add(key)
    if lost:
        yield _dropping("advised", f"{len(lost)} rows repeat an earlier one.", lost, "Leave them out")


def _long(lines: Lines, kind: Kind) -> Iterator[Finding]:
    lost = [line for line in lines if kind != "text" and len(json.dumps(line.fields)) > LONG_CHARS]
    if lost:
        yield _dropping(
            "advised", f"{len(lost)} rows are longer than {LONG_CHARS:,} characters.", lost, "Leave them out"
        )


def _last_turn(lines: Lines, kind: Kind) -> Iterator[Finding]:
    if kind != "chat":
        return
    late = [line for line in lines if _role(line.fields["messages"][-1]) in ("user", "system", "developer")]
    if late:

        def cut(held: Lines) -> Lines:
            for line in held:
                turns = line.fields["messages"]
                while turns and _role(turns[-1]) in ("user", "system", "developer"):
                    turns.pop()
            return [line for line in held if line.fields["messages"]]

        numbers = tuple(line.number for line in late)
        yield Finding(
            "advised", f"{len(late)} conversations end with a question.", numbers, cut, "Cut what nobody answers"
        )


def _untrainable(lines: Lines, kind: Kind) -> Iterator[Finding]:
    wrong = {id(line): found for line in lines if (found := formats.problems(Row(line.where, line.fields)))}
    lost = [line for line in lines if id(line) in wrong]
    if lost:
        told = " ".join(problem for found in list(wrong.values())[:5] for problem in found[:1])
        yield _dropping("advised", f"{len(lost)} rows cannot be trained on: {told}", lost, "Leave them out")


def _capitals(lines: Lines, kind: Kind) -> Iterator[Finding]:
    for name in ("prompt", "completion") if kind == "completion" else ():
        texts = [line.fields[name] for line in lines]
        upper = sum(c.isupper() for text in texts for c in text)
        lower = sum(c.islower() for text in texts for c in text)
        if upper * 2 > lower and upper:
            yield _on_texts("advised", f"More than a third of the letters of {name} are capitals.", name, str.lower,
                            "Write them small")  # fmt: skip


def _prompt_end(lines: Lines, kind: Kind) -> Iterator[Finding]:
    if kind != "completion" or len(lines) < 2:
        return
    prompts = [line.fields["prompt"] for line in lines]
    if len(set(prompts)) == 1:
        yield Finding("told", "All prompts are the same, so nothing is learned about how they differ.")
        return
    end = _common_end(prompts)
    if not end.strip():
        free = next((mark for mark in SEPARATORS if not any(mark in text for text in prompts)), SEPARATORS[0])
        told = "No common ending says where a prompt is over, so the model may go on with it."
        yield _on_texts("advised", told, "prompt", lambda text: text + free, f"End each prompt with {free!r}")
    elif any(end in text[: -len(end)] for text in prompts):
        yield Finding("told", f"The common ending {end!r} of the prompts also stands inside of some.")
    elif len(end) > LONGEST_SUFFIX:
        yield Finding("told", f"All prompts end in {end!r}; the model needs no more than a short mark there.")


def _beginnings(lines: Lines, kind: Kind) -> Iterator[Finding]:
    for name, shortest in (("prompt", SHORTEST_PREFIX), ("completion", 5)) if kind == "completion" else ():
        begin = _common_start([line.fields[name] for line in lines])
        if len(lines) > 1 and len(begin) >= shortest and all(line.fields[name][len(begin) :].strip() for line in lines):
            told = f"Every {name} begins with {begin[:60]!r}, which tells the model nothing."
            yield _on_texts("advised", told, name, partial(_without, begin), "Take it out")


def _without(begin: str, text: str) -> str:
    return text.removeprefix(begin)


def _completion_end(lines: Lines, kind: Kind) -> Iterator[Finding]:
    if kind != "completion" or len(lines) < 2:
        return
    texts = [line.fields["completion"] for line in lines]
    if len(set(texts)) == 1:
        yield Finding("told", "All completions are the same, so there is nothing to learn.")
        return
    if not _common_end(texts):
        free = next((mark for mark in ENDINGS if not any(mark in text for text in texts)), ENDINGS[0])
        told = "No common ending says where a completion is over; a stop sequence needs one."
        yield _on_texts("advised", told, "completion", lambda text: text + free, f"End each completion with {free!r}")


def _completion_start(lines: Lines, kind: Kind) -> Iterator[Finding]:
    if kind == "completion" and not all(line.fields["completion"][:1].isspace() for line in lines):
        told = "Completions do not begin with a space, as words inside of a text do."
        yield _on_texts("advised", told, "completion", lambda text: text if text[:1].isspace() else f" {text}",
                        "Begin each with a space")  # fmt: skip


CHECKS = (
    _few, _empty, _last_turn, _untrainable, _repeated, _long, _capitals, _prompt_end, _beginnings, _completion_end,
    _completion_start,
)  # fmt: skip


def task_of(lines: Lines, kind: Kind) -> str:
    """Returns, in words, what the rows teach: a few classes, answers to what is asked, or texts of a kind."""
    if kind != "completion":
        return {"chat": "conversations", "text": "texts of a kind", "preference": "which answer is better"}[kind]
    different = len(Counter(line.fields["completion"] for line in lines))
    return "a few classes" if different < len(lines) / 3 else "completions of prompts"


def _dropping(weight: Weight, text: str, lost: Sequence[Line], ask: str) -> Finding:
    gone = {id(line) for line in lost}
    numbers = tuple(line.number for line in lost)
    return Finding(weight, text, numbers, lambda held: [line for line in held if id(line) not in gone], ask)


def _on_texts(weight: Weight, text: str, name: str, change: Callable[[str], str], ask: str) -> Finding:
    def fix(held: Lines) -> Lines:
        return [Line(line.where, {**line.fields, name: change(line.fields[name])}) for line in held]

    return Finding(weight, text, (), fix, ask)


def _common_start(texts: Sequence[str]) -> str:
    """Returns what all texts begin with."""
    first, last = min(texts), max(texts)
    differ = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(differ, min(len(first), len(last)))]


def _common_end(texts: Sequence[str]) -> str:
    """Returns what all texts end with."""
    return _common_start([text[::-1] for text in texts])[::-1]


def _answer(line: Line, kind: Kind) -> str:
    """Returns what there is to learn of a row."""
    fields = line.fields
    if kind == "chat":
        said = [turn for turn in fields["messages"] if _role(turn) == "assistant"]
        calls = any(turn.get("tool_calls") or turn.get("function_call") for turn in said)
        return "call" if calls else "".join(_text(turn.get("content")) for turn in said)
    if kind == "preference":
        both = [fields["preferred_output"], fields["non_preferred_output"]]
        return "yes" if all(any(_text(turn.get("content")).strip() for turn in side) for side in both) else ""
    return str(fields["completion" if kind == "completion" else "text"])


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, dict) else None


def _turn(turn: Any) -> Any:
    """Returns a message under OpenAI's names."""
    if isinstance(turn, dict) and "from" in turn and "role" not in turn:
        role = SHAREGPT.roles.get(turn["from"], turn["from"])
        return {"role": role, "content": turn.get("value")}
    return turn


def _asked(value: Any) -> list[Any]:
    return [_turn(turn) for turn in value] if isinstance(value, list) else [{"role": "user", "content": _text(value)}]


def _said(value: Any) -> list[Any]:
    """Returns an answer as a list of one message, the last where a whole conversation stands there."""
    if isinstance(value, dict):
        value = [value]
    turns = value if isinstance(value, list) else [{"role": "assistant", "content": _text(value)}]
    return [_turn(turn) for turn in turns[-1:]]


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

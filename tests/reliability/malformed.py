"""Malformed data sets by the thousand: `python -m tests.reliability.malformed --count 1000`.

Each begins as a valid file, drawn by hypothesis from every format and kind of file, which must be read without a word.
Then one thing in it is broken. Nothing but DataError may come out, and each of its messages must name the file, the
row, the field where there is one, and the mend.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import io
import json
import pickle
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lora_ft.data import formats
from lora_ft.errors import DataError

Draw = Callable[[Any], Any]
Row = dict[str, Any]

# Valid files -------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=20)
TEXT = WORDS.filter(lambda text: text.strip() and not text.startswith("\ufeff"))
NAME = st.from_regex(r"[a-z]{1,8}", fullmatch=True)


@st.composite
def chat_row(draw: Draw) -> Row:
    messages: list[Row] = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT)})
        if draw(st.booleans()):
            call = {"name": draw(NAME), "arguments": json.dumps({draw(NAME): draw(TEXT)})}
            messages.append(
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "c1", "type": "function", "function": call}],
                }
            )
            messages.append({"role": "tool", "tool_call_id": "c1", "content": draw(TEXT)})
        messages.append({"role": "assistant", "content": draw(TEXT), "weight": 1})
    return {"messages": messages}


@st.composite
def sharegpt_row(draw: Draw) -> Row:
    turns = [{"from": who, "value": draw(TEXT)} for _ in range(draw(st.integers(1, 3))) for who in ("human", "gpt")]
    return {"conversations": turns}


def fields_row(*names: str) -> st.SearchStrategy[Row]:
    return st.fixed_dictionaries(dict.fromkeys(names, TEXT))


FLAT: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "question": ("question", "answer"),
    "source": ("source", "target"),
    "label": ("text", "label"),
    "pair of texts": ("sentence1", "sentence2", "label"),
    "text": ("text",),
}
ROWS: dict[str, st.SearchStrategy[Row]] = {"chat": chat_row(), "sharegpt": sharegpt_row()} | {
    name: fields_row(*names) for name, names in FLAT.items()
}
KINDS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "txt", "md")


def written(kind: str, rows: list[Any], escaped: bool = False) -> bytes:
    """Returns the bytes of a file of `kind` that holds the rows; values may be of any type in JSON and Parquet."""
    if kind in ("jsonl", "ndjson"):
        return "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows).encode()
    if kind == "json":
        return json.dumps(rows, ensure_ascii=escaped, indent=1).encode()
    if kind in ("csv", "tsv"):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]), delimiter="," if kind == "csv" else "\t", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode()
    if kind == "parquet":
        held = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(rows), held)
        return held.getvalue()
    return "\n\n".join(row["text"] for row in rows).encode()


def fits(kind: str, form: str) -> bool:
    """Returns whether a file of `kind` can hold rows of the format."""
    if kind in ("txt", "md"):
        return form == "text"
    return kind not in ("csv", "tsv") or form in FLAT


# What is broken ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """A file with one thing wrong in it."""

    what: str
    data: bytes
    field: str = ""
    """The field that the message must name; empty where the file as a whole is wrong."""
    row: int = 0
    """The number of the row that is wrong; 0 where it is none of them."""


def _junk(*, text: bool = False) -> st.SearchStrategy[Any]:
    """Values where a text should be; with `text`, blank ones too."""
    other = st.one_of(
        st.none(), st.booleans(), st.integers(-5, 5), st.floats(allow_nan=False, allow_infinity=False),
        st.lists(st.integers(0, 3), max_size=2), st.dictionaries(NAME, st.integers(0, 3), max_size=2),
    )  # fmt: skip
    return st.one_of(other, st.sampled_from(["", " ", "\t\n"])) if text else other


def _break_flat(draw: Draw, form: str, row: Row) -> tuple[str, str, Row]:
    # "text" alone would still be a format where the label of "text + label" is gone; the message then names the field.
    name = draw(st.sampled_from(FLAT[form]))
    how = draw(st.sampled_from(["junk", "missing", "surrogate", "NUL"] if len(FLAT[form]) > 1 else ["junk", "NUL"]))
    if how == "missing":
        del row[name]
        return f"{name} missing", name, row
    if how == "junk":
        row[name] = draw(_junk(text=True).filter(lambda v: not (name == "label" and type(v) is int)))
    else:
        row[name] += {"surrogate": "\ud800", "NUL": "\0"}[how]
    return f"{name}: {how}", name, row


def _break_messages(draw: Draw, row: Row) -> tuple[str, str, Row]:
    messages = row["messages"]
    index = draw(st.integers(0, len(messages) - 1))
    last = len(messages) - 1
    place, it, end = f"messages[{index}]", messages[index], messages[last]
    call = {"id": "c9", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    def at(where: str, **changes: Any) -> str:
        (end if where == "end" else it).update(changes)
        return f"messages[{last if where == 'end' else index}].{next(iter(changes))}"

    def lose_role() -> str:
        del it["role"]
        return f"{place}.role"

    def lose_all(value: Any) -> str:
        row["messages"] = value
        return "messages"

    def become(value: Any) -> str:
        messages[index] = value
        return place

    def no_assistant() -> str:
        row["messages"] = [{"role": "user", "content": "a"}]
        return "messages"

    ways: dict[str, Callable[[], str]] = {
        "role unknown": lambda: at("it", role=draw(st.sampled_from(["bot", "User", "", "ipython"]))),
        "role no text": lambda: at("it", role=draw(_junk())),
        "role missing": lose_role,
        "content wrong": lambda: at("end", content=draw(_junk(text=True).filter(lambda v: v not in ([], [0])))),
        "an image": lambda: at("end", content=[{"type": "image_url", "image_url": {"url": "x"}}]),
        "no message": lambda: become(draw(_junk().filter(lambda v: not isinstance(v, dict)))),
        "no messages": lambda: lose_all(draw(_junk(text=True))),
        "no assistant": no_assistant,
        "weight": lambda: at("end", weight=draw(st.sampled_from([2, -1, 0.5, True, "1"]))),
        "name": lambda: at("end", name=draw(st.integers())),
        "calls no list": lambda: at("end", tool_calls=draw(st.sampled_from([5, "f", {"a": 1}]))),
        "call no object": lambda: at("end", tool_calls=[draw(st.integers())]),
        "arguments": lambda: at("end", tool_calls=[call | {"function": {"name": "f", "arguments": "{"}}]),
        "arguments a list": lambda: at("end", tool_calls=[call | {"function": {"name": "f", "arguments": "[1]"}}]),
        "call without name": lambda: at("end", tool_calls=[call | {"function": {"arguments": "{}"}}]),
        "call of a kind": lambda: at("end", tool_calls=[call | {"type": "code"}]),
        "NUL": lambda: at("end", content="a\0b"),
        "surrogate": lambda: at("end", content="a\udfffb"),
    }
    what = draw(st.sampled_from(sorted(ways)))
    return what, ways[what](), row


def _break_turns(draw: Draw, row: Row) -> tuple[str, str, Row]:
    turns = row["conversations"]
    index = draw(st.integers(0, len(turns) - 1))
    how = draw(st.sampled_from(["from", "value", "turn", "all"]))
    if how == "all":
        row["conversations"] = draw(_junk(text=True))
        return "conversations", "conversations", row
    if how == "turn":
        turns[index] = draw(_junk().filter(lambda v: not isinstance(v, dict)))
        return "turn", f"conversations[{index}]", row
    if how == "from":
        turns[index]["from"] = draw(_junk(text=True))
        return "from", f"conversations[{index}].from", row
    turns[-1]["value"] = draw(_junk(text=True).filter(lambda v: v not in ([], [0])))
    return "value", f"conversations[{len(turns) - 1}].value", row


def _break_row(draw: Draw, form: str, row: Row) -> tuple[str, str, Row]:
    """Returns what was done, the field that a message must name, and the row."""
    if form == "chat":
        return _break_messages(draw, row)
    return _break_turns(draw, row) if form == "sharegpt" else _break_flat(draw, form, row)


def _spoil_line(draw: Draw, line: str) -> tuple[str, str]:
    """Returns a line that is no JSON object, and what it is."""
    ways = {
        "cut": line[: draw(st.integers(1, len(line) - 1))],
        "two values": line + line,
        "a comma more": line[:-1] + ",}",
        "single quotes": line.replace('"', "'"),
        "no object": draw(st.sampled_from(["5", '"a"', "[1]", "null", "true"])),
        "NaN": line[:-1] + ', "x": NaN}',
        "a huge number": line[:-1] + f', "x": {"9" * draw(st.integers(20, 6000))}}}',
        "a key twice": line[:-1] + ', "x": 1, "x": 2}',
        "deep": line[:-1] + ', "x": ' + "[" * 100 + "]" * 100 + "}",
        "very deep": line[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "a control character": line[:-1] + ', "x": "\x01"}',
    }
    what = draw(st.sampled_from(sorted(ways)))
    return what, ways[what]


def _spoil_file(draw: Draw, kind: str, data: bytes) -> tuple[str, bytes]:
    """Returns bytes that are no file of that kind, and what they are."""
    ways: dict[str, bytes] = {
        "empty": b"",
        "gzip": gzip.compress(data),
        "a pickle": pickle.dumps({"a": 1}),
        "zip": b"PK\x03\x04" + data,
    }
    if kind == "parquet":
        ways |= {"cut": data[: draw(st.integers(1, len(data) - 1))], "text": b'{"text": "a"}\n'}
    else:
        ways |= {
            "UTF-16": data.decode().encode("utf-16"),
            "Latin-1": data + "\n\n\xe9\xff".encode("latin-1"),
            "blank": draw(st.sampled_from([b"\n", b" \n\n", b"\r\n\r\n"])),
            "NUL": b"\0\0\0" + data,
        }
    if kind in ("csv", "tsv"):
        gap = b"," if kind == "csv" else b"\t"
        ways |= {
            "open quote": data + b'"open\n',
            "a cell more": data + b"x" + gap * data.split(b"\r\n")[0].count(gap) + gap + b"y\n",
            "columns twice": b"a" + gap + b"a\n1" + gap + b"2\n",
            "header alone": data.split(b"\r\n")[0] + b"\r\n",
        }
    if kind == "json":
        ways |= {
            "cut": data.rstrip()[: draw(st.integers(1, len(data.decode().rstrip().encode()) - 1))],
            "one object": b'{"text": "a"}',
            "more after": data + b"{}",
        }
    what = draw(st.sampled_from(sorted(ways)))
    return what, ways[what]


@st.composite
def broken_file(draw: Draw) -> tuple[str, list[Row], Broken]:
    """Draws a kind of file, valid rows, and the file with one thing wrong in it."""
    kind = draw(st.sampled_from(KINDS))
    form = draw(st.sampled_from([form for form in ROWS if fits(kind, form)]))
    rows = draw(st.lists(ROWS[form], min_size=2, max_size=4))
    where = draw(st.integers(1, len(rows) - 1))
    level = draw(st.sampled_from(["row", "line", "file"]))
    if level == "line" and kind in ("jsonl", "ndjson"):
        lines = [line + "\n" for line in written(kind, rows).decode().split("\n") if line]
        what, spoiled = _spoil_line(draw, lines[where].rstrip("\n"))
        lines[where] = spoiled + "\n"
        return kind, rows, Broken(what, "".join(lines).encode(), row=where + 1)
    # In Parquet a column has one type, and in CSV every cell is text, so their rows cannot be broken so freely.
    if level == "row" and kind in ("jsonl", "ndjson", "json"):
        changed = copy.deepcopy(rows)
        what, name, changed[where] = _break_row(draw, form, changed[where])
        return kind, rows, Broken(what, written(kind, changed, escaped=True), field=name, row=where + 1)
    if level == "row" and kind in ("csv", "tsv", "parquet") and form in FLAT:
        changed = copy.deepcopy(rows)
        name = draw(st.sampled_from(FLAT[form]))
        changed[where][name] = draw(st.sampled_from(["", " "] if kind != "parquet" else ["", " ", None]))
        # A CSV row with nothing in it is a blank line, which is no fault.
        if any(cell for cell in changed[where].values()):
            return kind, rows, Broken("blank cell", written(kind, changed), field=name, row=where + 1)
    what, data = _spoil_file(draw, kind, written(kind, rows))
    return kind, rows, Broken(what, data)


# The count ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the files."""

    files: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    tracebacks: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    """Messages without file, row, field or mend, and broken files that were read."""
    false_alarms: list[str] = field(default_factory=list)

    @property
    def faultless(self) -> bool:
        return not (self.tracebacks or self.unclear or self.false_alarms)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.by_kind.items()))
        return (
            f"{self.files} malformed data sets ({kinds}): {len(self.tracebacks)} tracebacks, {len(self.unclear)} "
            f"messages without place or mend, {len(self.false_alarms)} false alarms on the {self.files} valid ones"
        )


def examine(folder: Path, kind: str, rows: list[Row], broken: Broken, tally: Tally) -> None:
    """Reads the valid file and the broken one, and counts what happened."""
    tally.files += 1
    tally.by_kind[kind] += 1
    good, bad = folder / f"good.{kind}", folder / f"bad.{kind}"
    good.write_bytes(written(kind, rows))
    bad.write_bytes(broken.data)
    try:
        found = formats.read(str(good))
        if len(found) != len(rows) and kind not in ("txt", "md"):
            tally.false_alarms.append(f"{kind}: {len(rows)} rows were read as {len(found)}")
    except DataError as error:
        tally.false_alarms.append(f"{kind}: {error}")
    try:
        formats.read(str(bad))
    except DataError as error:
        tally.unclear += unclear(bad.name, kind, broken, error.problems)
    except Exception:
        tally.tracebacks.append(f"{kind}, {broken.what}: {traceback.format_exc()}")
    else:
        tally.unclear.append(f"{kind}, {broken.what}: was read as if nothing were wrong")


def unclear(name: str, kind: str, broken: Broken, problems: tuple[str, ...]) -> list[str]:
    """Returns the messages that lack the file, the row, the field or the mend."""
    found = []
    place = re.escape(name)
    for problem in problems:
        # What to do stands behind a semicolon.
        whole = re.fullmatch(rf"{place}(:(\d+|row \d+))?: [^;]+; .+\.", problem, re.DOTALL)
        if not whole or not problem.isprintable():
            found.append(f"{kind}, {broken.what}: {problem}")
    if broken.row:
        # Each line of a JSONL file is a row; CSV counts its header, and text in its cells has line ends of its own.
        row = rf"{place}:({broken.row}|row {broken.row})" if kind not in ("csv", "tsv") else rf"{place}:\d+"
        if not any(re.match(rf"{row}: ", problem) and broken.field in problem for problem in problems):
            found.append(f"{kind}, {broken.what}: none names row {broken.row} and {broken.field!r}: {problems}")
    return found


def run(count: int, number: int = 0) -> Tally:
    """Returns what became of `count` files drawn from the seed `number`."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:

        @seed(number)
        @settings(
            max_examples=count, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(broken_file())
        def each(case: tuple[str, list[Row], Broken]) -> None:
            examine(Path(folder), *case, tally)

        each()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    tally = run(chosen.count, chosen.seed)
    for line in (*tally.tracebacks, *tally.unclear, *tally.false_alarms):
        print(line)
    print(tally)
    return 0 if tally.faultless else 1


if __name__ == "__main__":
    sys.exit(main())

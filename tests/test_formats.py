"""Each format, each way a file can be broken, and that nothing but an example or a DataError ever comes out."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import pickle
import re
import threading
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lora_ft.data import files
from lora_ft.data.examples import Chat, Example, Labelled, Pair, Text
from lora_ft.data.formats import MAX_PROBLEMS, read, stream
from lora_ft.data.rows import MAX_ROW_BYTES
from lora_ft.errors import DataError
from lora_ft.foreign import strictjson

SHARED = Path(__file__).parents[2] / "shared" / "data"

ASK = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello."}
GOOD = {"messages": [ASK, REPLY]}
WEATHER = {"name": "weather", "description": "Looks outside", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": WEATHER}


def lines(*rows: Any) -> bytes:
    """Returns JSON Lines; text stands as it is."""
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows).encode()


def chat(*messages: Any, **fields: Any) -> bytes:
    return lines({"messages": list(messages), **fields})


def called(arguments: Any, **call: Any) -> dict[str, Any]:
    """Returns an assistant's message that calls `weather`."""
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function, **call}]}


def parquet_of(*rows: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.jsonl", lines(GOOD))
    return sink.getvalue()


def put(folder: Path, name: str, data: bytes) -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def messages_of(source: str, **options: Any) -> list[str]:
    """Returns the problems that reading `source` reports, and holds them to the house rules for messages."""
    with pytest.raises(DataError) as caught:
        read(source, **options)
    for problem in caught.value.problems:
        assert "\n" not in problem
        assert len(problem) < 600
        assert problem.isprintable()
        assert problem.endswith(".")
        assert not problem.endswith("..")
        assert "Traceback" not in problem
        assert "MISSING" not in problem
    return list(caught.value.problems)


# Each format ------------------------------------------------------------------------------------------------------

FORMATS: list[tuple[str, Any, Any]] = [
    (
        "chat",
        {"messages": [{"role": "system", "content": "Be brief."}, ASK, {**REPLY, "weight": 1}], "other": 1},
        lambda at: Chat(at, ({"role": "system", "content": "Be brief."}, ASK, {**REPLY, "weight": 1})),
    ),
    (
        "chat with parts",
        {
            "messages": [
                {"role": "developer", "content": ""},
                {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
                {"role": "assistant", "content": "", "weight": 0},
                {"role": "assistant", "content": None, "refusal": "No."},
                {**REPLY, "name": "bo", "reasoning_content": "Hm", "weight": None, "tool_calls": []},
            ]
        },
        lambda at: Chat(
            at,
            (
                {"role": "developer", "content": ""},
                {"role": "user", "content": "AB"},
                {"role": "assistant", "content": "", "weight": 0},
                {"role": "assistant", "content": "No."},
                {**REPLY, "name": "bo", "reasoning_content": "Hm"},
            ),
        ),
    ),
    (
        "chat with tools",
        {
            "messages": [
                ASK,
                called('{"city": "Rome", "days": [1]}', id="c1"),
                {"role": "tool", "tool_call_id": "c1", "content": "Sun"},
                called({}),
                {"role": "tool", "content": "Rain"},
            ],
            "tools": [TOOL],
            "parallel_tool_calls": False,
        },
        lambda at: Chat(
            at,
            (
                ASK,
                called({"city": "Rome", "days": [1]}, id="c1"),
                {"role": "tool", "content": "Sun", "tool_call_id": "c1"},
                called({}),
                {"role": "tool", "content": "Rain"},
            ),
            (TOOL,),
        ),
    ),
    (
        "chat with legacy functions",
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
                {"role": "function", "name": "weather", "content": "Sun"},
            ],
            "functions": [WEATHER],
        },
        lambda at: Chat(at, (ASK, called({}), {"role": "function", "content": "Sun", "name": "weather"}), (TOOL,)),
    ),
    ("prompt", {"prompt": "2 + 2 =", "completion": " 4"}, lambda at: Pair(at, "2 + 2 =", " 4")),
    ("question", {"question": "Why?", "answer": "So.\n#### 1"}, lambda at: Pair(at, "Why?", "So.\n#### 1")),
    ("source", {"source": "Hund", "target": "dog"}, lambda at: Pair(at, "Hund", "dog")),
    ("alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3"}, lambda at: Pair(at, "Add.\n\n1, 2", "3")),
    (
        "alpaca alone",
        {"instruction": "Sing.", "input": "", "output": "La", "system": "", "history": []},
        lambda at: Pair(at, "Sing.", "La"),
    ),
    (
        "alpaca with system and history",
        {"instruction": "Add.", "input": "1", "output": "3", "system": "Count.", "history": [["Hi", "Hello."]]},
        lambda at: Chat(
            at,
            (
                {"role": "system", "content": "Count."},
                ASK,
                REPLY,
                {"role": "user", "content": "Add.\n\n1"},
                {"role": "assistant", "content": "3"},
            ),
        ),
    ),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
            "system": "Be kind.",
        },
        lambda at: Chat(at, ({"role": "system", "content": "Be kind."}, ASK, REPLY)),
    ),
    (
        "sharegpt with tools",
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
                {"from": "observation", "value": "Sun"},
                {"from": "function_call", "value": [{"name": "weather", "arguments": "{}"}]},
                {"from": "tool", "value": "Rain"},
                {"from": "gpt", "value": "Hello.", "weight": 0},
            ],
            "tools": json.dumps([WEATHER]),
        },
        lambda at: Chat(
            at,
            (
                ASK,
                called({"city": "Rome"}),
                {"role": "tool", "content": "Sun"},
                called({}),
                {"role": "tool", "content": "Rain"},
                {**REPLY, "weight": 0},
            ),
            (TOOL,),
        ),
    ),
    ("label", {"text": "Bravo!", "label": "good"}, lambda at: Labelled(at, "Bravo!", "good")),
    ("whole number", {"text": "Bravo!", "label": 0}, lambda at: Labelled(at, "Bravo!", "0")),
    ("text pair", {"text": "A", "text_pair": "B", "label": 1}, lambda at: Labelled(at, "A", "1", "B")),
    ("sentences", {"sentence1": "A", "sentence2": "B", "label": "x"}, lambda at: Labelled(at, "A", "x", "B")),
    ("sentence", {"sentence": "A", "label": "x", "idx": 7}, lambda at: Labelled(at, "A", "x")),
    ("labels", {"text": "A", "label": ["x", "y"]}, lambda at: Labelled(at, "A", ("x", "y"))),
    ("no label", {"text": "A", "label": []}, lambda at: Labelled(at, "A", ())),
    ("number", {"text": "A", "label": 1.5}, lambda at: Labelled(at, "A", 1.5)),
    ("text", {"text": " spaces stay \n"}, lambda at: Text(at, " spaces stay \n")),
]


@pytest.mark.parametrize(("row", "expected"), [case[1:] for case in FORMATS], ids=[case[0] for case in FORMATS])
def test_format_is_told_by_the_first_row(tmp_path: Path, row: Any, expected: Any) -> None:
    wanted = [expected("a.jsonl:1"), expected("a.jsonl:3")]
    source = put(tmp_path, "a.jsonl", lines(row, "", row))
    assert read(source) == wanted
    assert list(stream(source)) == wanted
    listed = [expected("a.json:row 1"), expected("a.json:row 2")]
    assert read(put(tmp_path, "a.json", json.dumps([row, row], indent=2).encode())) == listed


# One column of Parquet cannot hold text here and a list there.
UNIFORM = [case for case in FORMATS if case[0] not in ("chat with parts", "chat with tools", "sharegpt with tools")]


@pytest.mark.parametrize(("row", "expected"), [case[1:] for case in UNIFORM], ids=[case[0] for case in UNIFORM])
def test_parquet_gives_what_jsonl_gives(tmp_path: Path, row: Any, expected: Any) -> None:
    # Nor an object without fields.
    row = json.loads(json.dumps(row).replace('"properties": {}', '"properties": {"x": 1}'))
    wanted = repr([expected("a.parquet:row 1")]).replace("'properties': {}", "'properties': {'x': 1}")
    assert repr(read(put(tmp_path, "a.parquet", parquet_of(row)))) == wanted


def test_csv_and_tsv_keep_cells_as_text(tmp_path: Path) -> None:
    table = put(tmp_path, "a.csv", '\ufefftext,label\n"a, ""b""\nc",007\n\nNA,true\n"ü",1.0'.encode())
    expected = [
        Labelled("a.csv:2", 'a, "b"\nc', "007"),
        Labelled("a.csv:5", "NA", "true"),
        Labelled("a.csv:6", "ü", "1.0"),
    ]
    assert read(table) == expected
    assert list(stream(table)) == expected
    assert read(put(tmp_path, "b.tsv", b"prompt\tcompletion\r\na,b\tc\r\n")) == [Pair("b.tsv:2", "a,b", "c")]
    assert read(put(tmp_path, "c.csv", b'text\r5" pipe\rb\r')) == [Text("c.csv:2", '5" pipe'), Text("c.csv:3", "b")]


def test_text_file_is_read_by_paragraphs(tmp_path: Path) -> None:
    source = put(tmp_path, "a.txt", b"\xef\xbb\xbf\nOne\ntwo\r\n\n  \nThree")
    assert read(source) == [Text("a.txt:2", "One\ntwo"), Text("a.txt:6", "Three")]
    assert read(put(tmp_path, "A.MD", b"# A\n\nB\n")) == [Text("A.MD:1", "# A"), Text("A.MD:3", "B")]


def test_bom_crlf_and_blank_lines_are_harmless(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf\r\n" + lines({"text": "\U0001f600 é"}).replace(b"\n", b"\r\n") + b" \t\r\n" + b'{"text": "b"}'
    assert read(put(tmp_path, "a.ndjson", data)) == [Text("a.ndjson:2", "\U0001f600 é"), Text("a.ndjson:4", "b")]
    assert read(put(tmp_path, "a.json", b'\xef\xbb\xbf [ {"text": "a"} ] \n')) == [Text("a.json:row 1", "a")]


def test_depth_and_size_just_within_the_limits(tmp_path: Path) -> None:
    deep = '{"text": "a", "x": ' + "[" * (strictjson.MAX_DEPTH - 1) + "]" * (strictjson.MAX_DEPTH - 1) + "}"
    long = '{"text": "' + "x" * (MAX_ROW_BYTES - 12) + '"}'
    assert len(long) == MAX_ROW_BYTES
    numbers = f'{{"text": "a", "x": [{2**63 - 1}, {-(2**63)}, 1e308]}}'
    assert len(read(put(tmp_path, "a.jsonl", lines(deep, long, numbers)))) == 3


def test_json_list_is_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": 'ü\\"\U0001f600' * n, "x": [n, -1.5e-7, True, None, {}]} for n in range(1, 9)]
    data = json.dumps(rows, indent=1).encode()
    for size in (1, 2, 3, 7):
        monkeypatch.setattr("lora_ft.data.texts.CHUNK_BYTES", size)
        assert [row.text for row in read(put(tmp_path, "a.json", data))] == [row["text"] for row in rows]


# Columns ----------------------------------------------------------------------------------------------------------


def test_columns_map_known_names_to_the_users_own(tmp_path: Path) -> None:
    row = {"question_text": "Why?", "reply": "So.", "prompt": "unused", "messages": "unused"}
    columns = {"prompt": "question_text", "completion": "reply"}
    assert read(put(tmp_path, "a.jsonl", lines(row)), columns) == [Pair("a.jsonl:1", "Why?", "So.")]
    table = put(tmp_path, "a.csv", b"body,kind\nx,y\n")
    assert list(stream(table, {"text": "body", "label": "kind"})) == [Labelled("a.csv:2", "x", "y")]
    renamed = put(tmp_path, "b.jsonl", lines({"talk": [ASK, REPLY]}))
    assert read(renamed, {"messages": "talk"}) == [Chat("b.jsonl:1", (ASK, REPLY))]


def test_wrong_columns_say_what_there_is(tmp_path: Path) -> None:
    ask, both = {"ask": "a", "completion": "b"}, {"prompt": "ask"}
    source = put(tmp_path, "a.jsonl", lines(ask, {"completion": "b"}, {"ask": 3, "completion": "b"}))
    assert messages_of(source, columns=both) == [
        "a.jsonl:2: ask, given for prompt by data.columns, is missing; the row has completion.",
        "a.jsonl:3: ask is 3; give a string that is not empty.",
    ]
    (absent,) = messages_of(source, columns={"prompt": "query"})
    assert absent == "a.jsonl:1: query, given for prompt by data.columns, is missing; the row has ask, completion."
    (unknown,) = messages_of(source, columns={"promt": "ask"})
    assert unknown.startswith("data.columns: promt is no known field; use messages, tools, functions, conversations,")
    (apart,) = messages_of(source, columns={"prompt": "ask", "text_pair": "completion"})
    assert apart.startswith("data.columns: no format has prompt, text_pair together; formats are messages, ")


# Streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(20)
def test_stream_gives_a_row_before_the_next_is_written(tmp_path: Path) -> None:
    pipe = tmp_path / "a.jsonl"
    os.mkfifo(pipe)
    wanted = threading.Semaphore(0)

    def write() -> None:
        with pipe.open("wb", buffering=0) as file:
            for number in range(50):
                assert wanted.acquire(timeout=15)
                file.write(lines({"text": f"row {number}"}))

    writer = threading.Thread(target=write)
    writer.start()
    rows = stream(str(pipe))
    for number in range(50):
        wanted.release()
        assert next(rows) == Text(f"a.jsonl:{number + 1}", f"row {number}")
    writer.join()
    assert next(rows, None) is None


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt"])
def test_stream_holds_one_row(tmp_path: Path, suffix: str) -> None:
    row = {"text": "x" * 10_000}
    data = {
        ".jsonl": lambda: lines(*[row] * 1000),
        ".json": lambda: json.dumps([row] * 1000).encode(),
        ".txt": lambda: b"\n\n".join([row["text"].encode()] * 1000),
    }[suffix]()
    source = put(tmp_path, f"a{suffix}", data)
    next(stream(source))  # imports and caches are not the stream's
    tracemalloc.start()
    count = sum(1 for _ in stream(source))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1000
    assert peak_bytes < 1_000_000, f"{peak_bytes:,} bytes held of a file of {len(data):,}"


def test_stream_raises_at_the_first_bad_row(tmp_path: Path) -> None:
    rows = stream(put(tmp_path, "a.jsonl", lines({"text": "a"}, {"text": 5}, {"text": 6})))
    assert next(rows) == Text("a.jsonl:1", "a")
    with pytest.raises(DataError, match=r"^a\.jsonl:2: text is 5; [^\n]*$"):
        next(rows)


# What is broken ---------------------------------------------------------------------------------------------------

TWO = lines(GOOD, GOOD)
DEEP = '{"text": ' + "[" * 70 + "]" * 70 + "}"
# Name, ending of the file, its bytes, and how a problem goes on after the file's name; "..." is any text.
BROKEN: list[tuple[str, str, bytes, str]] = [
    # The file as a whole.
    ("empty", "jsonl", b"", ": is empty; "),
    ("empty json", "json", b"", ": is empty; "),
    ("empty csv", "csv", b"", ": is empty; "),
    ("empty text", "txt", b"", ": is empty; "),
    ("blank lines", "jsonl", b"\n \n\r\n", ": holds no rows; "),
    ("blank json", "json", b" \n ", ": holds no rows; "),
    ("empty list", "json", b"[]", ": holds no rows; "),
    ("only a BOM", "jsonl", b"\xef\xbb\xbf", ": holds no rows; "),
    ("blank text", "txt", b"\n\n \n", ": holds no rows; "),
    ("header alone", "csv", b"text,label\n", ": holds no rows; "),
    ("no rows in parquet", "parquet", parquet_of({"text": "a"})[:0], ": cannot be read as Parquet: "),
    ("gzip", "jsonl", gzip.compress(TWO), ": is binary (gzip)"),
    ("zip", "jsonl", zipped(), ": is binary (a zip archive or a spreadsheet)"),
    ("spreadsheet", "csv", zipped(), ": is binary (a zip archive or a spreadsheet)"),
    ("pickle", "jsonl", pickle.dumps(GOOD), ": is binary (a Python pickle)"),
    ("parquet in disguise", "json", parquet_of({"text": "a"}), ": is binary (Parquet)"),
    ("NUL bytes", "txt", b"\0" * 999, ": is binary (it begins with NUL bytes)"),
    ("utf-16", "jsonl", TWO.decode().encode("utf-16"), ":1: is UTF-16 or UTF-32 from byte 1 on; re-save"),
    ("utf-16 without BOM", "json", '[{"text": "a"}]'.encode("utf-16-be"), ":1: is UTF-16 or UTF-32"),
    ("utf-16 csv", "csv", "text\na\n".encode("utf-16"), ":1: is UTF-16 or UTF-32"),
    ("unknown kind", "xlsx", b"PK", ": its kind cannot be told from its ending; it must be one of .jsonl, "),
    ("compressed", "gz", gzip.compress(TWO), ": its kind cannot be told"),
    # Lines.
    ("latin-1", "jsonl", lines(GOOD) + b'{"text": "caf\xe9"}\n', ":2: byte 14 of the line is 0xe9, ...re-save"),
    ("latin-1 json", "json", b'[\n{"text":\n"\xe9"}]', ":3: byte 13 of the file is 0xe9, which is not UTF-8; re-"),
    ("half a character", "json", b'[{"text": "\xc3', ":1: byte 12 of the file is 0xc3, which is not UTF-8"),
    ("latin-1 text", "txt", b"a\n\n\xfcber\n", ":3: byte 1 of the line is 0xfc"),
    ("surrogate bytes", "jsonl", b'{"text": "\xed\xa0\x80"}', ":1: byte 11 of the line is 0xed"),
    ("NUL in a line", "jsonl", lines(GOOD) + b'{"text": "a\0b"}\n', ":2: byte 12 of the line is NUL"),
    ("BOM amid", "jsonl", lines(GOOD) + b"\xef\xbb\xbf" + lines(GOOD), ":2: begins with a byte order mark"),
    ("CR alone", "jsonl", TWO.replace(b"\n", b"\r"), ":1: the file ends its lines with CR alone; re-save"),
    ("CR alone in text", "txt", b"a\r\rb\r", ":1: the file ends its lines with CR alone"),
    ("10 MB line", "jsonl", b"x" * 10_000_000 + b"\n", ":1: is 10,000,001 bytes long; shorten ... 8,388,608"),
    ("endless paragraph", "txt", b"x" * 99_999 + b"\n" + (b"y" * 99_999 + b"\n") * 90, ":1: the paragraph is over"),
    # JSON.
    ("half a line", "jsonl", TWO[:-20], ":2: is not JSON at character ...: ...; it stops in the middle of a row"),
    ("half a string", "jsonl", b'{"text": "abcdefghijklmnopqrs', ":1: ... Unterminated string...; it stops in the"),
    ("no comma", "jsonl", b'{"text": "a" "label": "this is long"}', ":1: is not JSON at character 14: ...; mend"),
    ("single quotes", "jsonl", b"{'text': 'a and some more'}", ":1: is not JSON at character 2: "),
    ("plain words", "jsonl", b"Once upon a time there was\n", ":1: is not JSON at character 1: "),
    ("two on a line", "jsonl", b'{"text": "a"}{"text": "b"}', ":1: goes on after its JSON value, at character 14"),
    ("raw tab", "jsonl", b'{"text": "a\tb", "more": "and more"}', ":1: ...Invalid control character"),
    ("number", "jsonl", lines({"text": "a"}, "5"), ":2: is 5; a row is a JSON object"),
    ("null", "jsonl", b"null", ":1: is null; a row is a JSON object"),
    ("string", "jsonl", b'"a"', ':1: is "a"; a row is a JSON object'),
    ("list on a line", "jsonl", lines({"text": "a"}, "[1, 2]"), ":2: is a list of 2; a row is a JSON object"),
    ("pretty list", "jsonl", json.dumps([GOOD], indent=2).encode(), ":1: begins a JSON list; rename ....json"),
    ("list", "jsonl", json.dumps([GOOD]).encode(), ":1: begins a JSON list; rename"),
    ("pretty object", "jsonl", json.dumps(GOOD, indent=2).encode(), ":1: begins an object that goes over sev"),
    ("NaN", "jsonl", b'{"text": "a", "x": NaN}', ":1: has NaN, which JSON does not know; use null"),
    ("Infinity", "jsonl", b'{"text": "a", "x": [-Infinity]}', ":1: has -Infinity, which JSON does not know"),
    ("1e999", "jsonl", b'{"text": "a", "x": 1e999}', ':1: has a number beyond a 64-bit float, "1e999"; '),
    ("2**63", "jsonl", b'{"text": "a", "x": 9223372036854775808}', ':1: has a whole number ..."9223372036854775808"'),
    ("5000 digits", "jsonl", b'{"text": ' + b"9" * 5000 + b"}", ':1: has a whole number beyond 64 bits, "999...'),
    ("same key", "jsonl", b'{"text": "a", "text": "b"}', ':1: has the key "text" twice in one object; keep'),
    ("same key inside", "json", b'[{"text": "a", "x": {"y": 1, "y": 1}}]', ':row 1: has the key "y" twice'),
    ("too deep", "jsonl", DEEP.encode(), ":1: text... is nested deeper than 64 levels; make it flatter"),
    ("far too deep", "jsonl", b'{"text": ' + b"[" * 99_999, ":1: is nested deeper than 64 levels; make it"),
    ("far too deep json", "json", b"[" * 99_999, ":row 1: is nested deeper than 64 levels"),
    ("half a surrogate", "jsonl", b'{"text": "\\ud800"}', ":1: text holds half of a surrogate pair, which is"),
    ("surrogate key", "jsonl", b'{"text": "a", "x": {"\\udfff": 1}}', ":1: x holds half of a surrogate pair"),
    ("escaped NUL", "jsonl", chat(ASK, {**REPLY, "content": "\0"}), ":1: messages[1].content holds a NUL"),
    # JSON lists.
    ("object", "json", json.dumps({"train": []}).encode(), ": begins an object, not a list; put its rows in a"),
    ("jsonl named json", "json", TWO, ": holds an object per line, not a list; rename ....jsonl"),
    ("words", "json", b"hello", ': begins with "h"; a .json file holds a list of rows'),
    ("list of lists", "json", b'[{"text": "a"}, [1]]', ":row 2: is a list of 1; a row is a JSON object"),
    ("list cut off", "json", b'[{"text": "a"}, {"te', ":row 2: is not JSON at ...; it stops in the middle"),
    ("list not closed", "json", b'[{"text": "a"}', ":row 1: is the last, and the list does not end; "),
    ("list without comma", "json", b'[{"text": "a"} {"text": "b"}]', ':row 1: is followed by "{"; separate rows'),
    ("trailing comma", "json", b'[{"text": "a"},]', ":row 2: is not JSON at character 1: "),
    ("two lists", "json", b'[{"text": "a"}][]', ': goes on after the end of its list with "["; keep one'),
    ("huge element", "json", b'[{"text": "' + b"x" * (17 * 2**20), ":row 1: is longer than 8,388,608 bytes; shor"),
    # Tables.
    ("ragged", "csv", b"prompt,completion\na,b\n\nc\nd,e\n", ":4: has 1 cell, but the header names 2 (prompt, com"),
    ("comma unquoted", "csv", b'prompt,completion\n"a\n",b\nc,d,e\n', ":4: has 3 cells, but ...; quote the cells"),
    ("latin-1 ragged", "csv", b"prompt,completion\na,b\xe9,c\n", ":2: has 3 cells, but the header names 2"),
    ("twin columns", "csv", b"text,text\na,b\n", ":1: has two columns named text; name each column once"),
    ("no header", "csv", b"It rains,bad\nSun,good\n", ":2: has the fields It rains, bad, which fit no format"),
    ("blank header", "csv", b"\ntext,label\na,b\n", ":1: the first line is blank; it must name the columns"),
    ("semicolons", "csv", b"text;label\na;b\n", ':1: is split by ";", it seems; separate the columns by comm'),
    ("commas in tsv", "tsv", b"text,label\na,b\n", ':1: is split by ",", it seems; ... by tabs'),
    ("open quote", "csv", b'prompt,completion\na,b\nc,"d\ne,f\n', ":3: a quotation mark opens here and never clos"),
    ("open quote, one cell", "csv", b'prompt,completion\na,b\n"c\n', ":3: a quotation mark opens here and never c"),
    ("latin-1 cell", "csv", b"text,label\na,b\n\xe9t\xe9,b\n", ":3: text: byte 1 of the cell is 0xe9, which is not"),
    ("latin-1 header", "csv", b"text,caf\xe9\na,b\n", ":1: byte 4 of the column name is 0xe9"),
    ("NUL cell", "csv", b"text,label\na\0,b\n", ":2: text holds a NUL character; remove it"),
    ("empty cell", "csv", b"text,label\n,b\n", ":2: text is empty; give a string"),
    ("huge row", "csv", b"text\n" + b"x" * (20 * 2**20), ": cannot be read from row ... on: it is longer than"),
    ("wide", "csv", b"a," * 20_000 + b"b\n1", ":1: has 20,001 columns; keep 1,000 or fewer"),
    ("far too wide", "csv", b"," * 2**22, ":1: the header is longer than 65,536 bytes"),
    ("long header", "csv", b'a,"' + b"b\n" * 99_999, ":1: the header is longer than 65,536 bytes; check its quot"),
    (
        "no table",
        "csv",
        b"a,b\n" + b"c\n" * 2000,
        ": cannot be read from row 2 on: it and 1000 more do not fit the header; chec",
    ),
    ("not parquet", "parquet", b"text,label\na,b\n", ": cannot be read as Parquet: ...magic bytes"),
    ("cut parquet", "parquet", parquet_of({"text": "a"})[:-9], ": cannot be read as Parquet: "),
    ("null cell", "parquet", parquet_of({"text": "a"}, {"text": None}), ":row 2: text is null; give a string"),
    ("bytes", "parquet", parquet_of({"text": b"a"}), ":row 1: text is b'a'; give a string"),
    # Formats.
    ("unknown", "jsonl", lines({"a": 1, "b c": 2}), ":1: has the fields a, b c, which fit no format; ...--data.c"),
    ("no fields", "jsonl", b"{}", ":1: has no fields; use messages, "),
    ("half known", "jsonl", lines({"prompt": "a"}), ":1: has the fields prompt, which fit no format"),
    ("mixture", "jsonl", lines(GOOD, {"prompt": "a", "completion": "b"}), ":2: is prompt + completion, but x.jso"),
    ("label comes late", "jsonl", lines({"text": "a"}, {"text": "b", "label": 1}), ":2: is text + label, but"),
    ("label lacks", "jsonl", lines({"text": "a", "label": 1}, {"text": "b"}), ":2: label is missing; give the class"),
    ("preference", "json", json.dumps([{"chosen": 1, "rejected": 2}]).encode(), ":row 1: chosen is 1; give a whole"),
    # Messages.
    (
        "role",
        "jsonl",
        lines(*[GOOD] * 16) + chat(ASK, REPLY, {**REPLY, "role": "bot"}),
        ':17: messages[2].role is "bot"; use system, developer, user, assistant or tool.',
    ),
    ("no role", "jsonl", chat({"content": "a"}, REPLY), ":1: messages[0].role is missing; use system, "),
    ("role a list", "jsonl", chat({"role": [1], "content": "a"}), ":1: messages[0].role is a list of 1; use"),
    ("long role", "jsonl", chat({"role": "z" * 999, "content": "a"}), ':1: ...messages[0].role is "zzz..."; use'),
    ("no messages", "jsonl", chat(), ":1: messages is an empty list; give a list with at least one message"),
    ("messages a string", "jsonl", lines({"messages": "a"}), ':1: messages is "a"; give a list'),
    ("message a string", "jsonl", chat("a", REPLY), ':1: messages[0] is "a"; give an object with "role" and'),
    ("no assistant", "jsonl", chat(ASK), ":1: messages has no assistant message to learn from; give at least"),
    ("weights 0", "jsonl", chat(ASK, {**REPLY, "weight": 0}), ":1: messages has no assistant message to learn"),
    ("weight 2", "jsonl", chat(ASK, {**REPLY, "weight": 2}), ":1: messages[1].weight is 2; use 0 (not"),
    ("weight true", "jsonl", chat(ASK, {**REPLY, "weight": True}), ":1: messages[1].weight is true; use 0"),
    ("user's weight", "jsonl", chat({**ASK, "weight": 1}, REPLY), ":1: messages[0].weight stands on a message"),
    ("content a number", "jsonl", chat({**ASK, "content": 5}, REPLY), ":1: messages[0].content is 5; give a st"),
    ("content null", "jsonl", chat(ASK, {**REPLY, "content": None}), ":1: messages[1].content is null; ...tool_ca"),
    ("content absent", "jsonl", chat({"role": "user"}, REPLY), ":1: messages[0].content is missing; give a"),
    ("content empty", "jsonl", chat(ASK, {**REPLY, "content": " "}), ":1: messages[1].content is empty; an assi"),
    (
        "image",
        "jsonl",
        chat({**ASK, "content": [{"type": "image_url"}]}, REPLY),
        ':1: messages[0].content[0].type is "image_url"; only parts of the type "text"',
    ),
    ("part a string", "jsonl", chat({**ASK, "content": ["a"]}, REPLY), ':1: messages[0].content[0] is "a"; only'),
    (
        "part without text",
        "jsonl",
        chat({**ASK, "content": [{"type": "text"}]}, REPLY),
        ":1: messages[0].content[0].text is missing; give a string",
    ),
    (
        "part of no hashable type",
        "jsonl",
        chat({**ASK, "content": [{"type": {}}]}, REPLY),
        ":1: ...[0].type is an empty obj",
    ),
    ("name a number", "jsonl", chat({**ASK, "name": 5}, REPLY), ":1: messages[0].name is 5; give a string, or"),
    # Tools.
    (
        "arguments",
        "jsonl",
        chat(ASK, called("{city: Rome or somewhere}")),
        ":1: messages[1].tool_calls[0].function.arguments is not JSON at character 2: ...; write it as JSON",
    ),
    (
        "arguments a list",
        "jsonl",
        chat(ASK, called("[1]")),
        ":1: ...function.arguments is a list of 1; give an object, or",
    ),
    (
        "arguments empty",
        "jsonl",
        chat(ASK, called("")),
        ':1: ...function.arguments is empty; give an object, ..."{}" for none',
    ),
    (
        "arguments NaN",
        "jsonl",
        chat(ASK, called('{"a": NaN}')),
        ":1: ...function.arguments has NaN, which JSON does not know",
    ),
    (
        "arguments surrogate",
        "jsonl",
        chat(ASK, called('{"a": "\\ud800"}')),
        ":1: ...arguments holds half of a surrogate pair",
    ),
    (
        "calls a string",
        "jsonl",
        chat(ASK, {**REPLY, "tool_calls": "a"}),
        ':1: ...messages[1].tool_calls is "a"; give a list',
    ),
    (
        "call a string",
        "jsonl",
        chat(ASK, {**REPLY, "tool_calls": ["a"]}),
        ':1: ....tool_calls[0] is "a"; give an object wi',
    ),
    (
        "no function",
        "jsonl",
        chat(ASK, {**REPLY, "tool_calls": [{"id": "a"}]}),
        ":1: ...tool_calls[0].function is missing; gi",
    ),
    (
        "call's type",
        "jsonl",
        chat(ASK, called({}, type="code")),
        ':1: ....tool_calls[0].type is "code"; only "function"',
    ),
    ("call's id", "jsonl", chat(ASK, called({}, id=5)), ":1: ....tool_calls[0].id is 5; give a string"),
    (
        "user calls",
        "jsonl",
        chat({**called({}), "role": "user"}, REPLY),
        ":1: ...messages[0].tool_calls stands on a message",
    ),
    (
        "unknown id",
        "jsonl",
        chat(ASK, called({}, id="c1"), {"role": "tool", "content": "a", "tool_call_id": "c2"}),
        ':1: ...messages[2].tool_call_id is "c2"; use the id of an earlier tool call: c1',
    ),
    ("tools a number", "jsonl", chat(ASK, REPLY, tools=5), ":1: tools is 5; give a list of tools"),
    ("tools not JSON", "jsonl", chat(ASK, REPLY, tools="weather and so on"), ":1: tools is not JSON at character 1"),
    ("tool a string", "jsonl", chat(ASK, REPLY, tools=["a"]), ':1: tools[0] is "a"; give an object'),
    ("tool's name", "jsonl", chat(ASK, REPLY, tools=[{"function": {}}]), ":1: tools[0].function.name is missing"),
    (
        "tool's type",
        "jsonl",
        chat(ASK, REPLY, tools=[{**TOOL, "type": "web"}]),
        ':1: ...tools[0].type is "web"; only "func',
    ),
    (
        "parameters",
        "jsonl",
        chat(ASK, REPLY, functions=[{**WEATHER, "parameters": "a"}]),
        ':1: ...functions[0].parameters is "',
    ),
    # ShareGPT, Alpaca, pairs, labels.
    (
        "sharegpt role",
        "jsonl",
        lines({"conversations": [{"from": "bot", "value": "a"}]}),
        ':1: conversations[0].from is "bot"; use system, human, gpt, function_call, observation or tool',
    ),
    (
        "sharegpt value",
        "jsonl",
        lines({"conversations": [{"from": "gpt", "value": 1}]}),
        ":1: ...conversations[0].value is 1",
    ),
    (
        "sharegpt call",
        "jsonl",
        lines({"conversations": [{"from": "function_call", "value": "weather()"}]}),
        ":1: conversations[0].value is not JSON at character 1",
    ),
    (
        "sharegpt call empty",
        "jsonl",
        lines({"conversations": [{"from": "function_call", "value": []}]}),
        ':1: ...conversations[0].value is an empty list; give an object with "name" and "arguments"',
    ),
    (
        "sharegpt system",
        "jsonl",
        lines({"conversations": [{"from": "gpt", "value": "a"}], "system": 5}),
        ":1: ...system is 5; gi",
    ),
    ("history", "jsonl", lines({"instruction": "a", "output": "b", "history": [["c"]]}), ":1: history[0] is a l"),
    (
        "history's sides",
        "jsonl",
        lines({"instruction": "a", "output": "b", "history": [["c", 1]]}),
        ":1: ...history[0][1] is 1",
    ),
    (
        "history a string",
        "jsonl",
        lines({"instruction": "a", "output": "b", "history": "c"}),
        ':1: ...history[0] is "c"; give a',
    ),
    ("alpaca input", "jsonl", lines({"instruction": "a", "input": [1], "output": "b"}), ":1: input is a list of 1"),
    ("empty completion", "jsonl", lines({"prompt": "a", "completion": ""}), ":1: completion is empty; give a stri"),
    (
        "prompt an object",
        "jsonl",
        lines({"prompt": {"a": 1}, "completion": "b"}),
        ":1: ...prompt is an object with the keys a; give",
    ),
    ("label empty", "jsonl", lines({"text": "a", "label": " "}), ":1: label is empty; give the class as a string"),
    ("label twice", "jsonl", lines({"text": "a", "label": ["b", "c", "b"]}), ":1: label names b twice; name each"),
    ("label in a list", "jsonl", lines({"text": "a", "label": ["b", ""]}), ":1: label[1] is empty; give the class"),
    (
        "label in a list a fraction",
        "jsonl",
        lines({"text": "a", "label": [1.5]}),
        ":1: label[0] is 1.5; give the class",
    ),
    ("label an object", "jsonl", lines({"text": "a", "label": {"b": 1}}), ":1: label is an object with the keys b; "),
    ("label no number", "parquet", parquet_of({"text": "a", "label": math.nan}), ":row 1: label is nan; give a finite"),
    ("label a truth", "jsonl", lines({"text": "a", "label": True}), ":1: label is true; give the class as a str"),
    ("label null", "jsonl", lines({"text": "a", "label": None}), ":1: label is null; give the class as a string"),
    (
        "terminal escapes",
        "jsonl",
        lines({"text": "a", "label": {"\x1b[2J": 1}, "\x9b": 1}, {"text": "a", "label": None}),
        ":1: label is an object with the keys ",
    ),
]


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("kind", "data", "expected"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_file_says_what_and_where(tmp_path: Path, kind: str, data: bytes, expected: str) -> None:
    source = put(tmp_path, f"x.{kind}", data)
    problems = messages_of(source)
    pattern = re.escape(f"x.{kind}{expected}").replace(r"\.\.\.", ".*")
    assert any(re.match(pattern, problem) for problem in problems), problems
    assert not any(str(tmp_path) in problem for problem in problems)
    with pytest.raises(DataError) as caught:
        list(stream(source))
    assert caught.value.problems[0] == problems[0]


def test_reading_goes_on_after_a_broken_row(tmp_path: Path) -> None:
    data = b"x" * (MAX_ROW_BYTES + 1) + b"\n" + lines({"text": "a"}, {"text": 5}, "{") + b"\xff\n" + lines({"text": ""})
    problems = messages_of(put(tmp_path, "a.jsonl", data))
    assert [problem.split(": ")[0] for problem in problems] == [f"a.jsonl:{line}" for line in (1, 3, 4, 5, 6)]
    table = put(tmp_path, "a.csv", b'text,label\na\n,b\n"c\nd",\n\xe9,f\ng,h,i\n')
    places = [problem.split(": ")[0] for problem in messages_of(table)]
    assert places == ["a.csv:2", "a.csv:3", "a.csv:4", "a.csv:6", "a.csv:7"]


def test_all_problems_of_a_row_are_told_at_once(tmp_path: Path) -> None:
    bad = [{"role": "bot", "content": 5}, {"role": "user"}, {**REPLY, "weight": 3, "tool_calls": [{"function": {}}]}]
    problems = messages_of(put(tmp_path, "a.jsonl", chat(*bad, tools=[{}])))
    assert [problem.removeprefix("a.jsonl:1: ").split(" ")[0] for problem in problems] == [
        "messages[0].role",
        "messages[0].content",
        "messages[1].content",
        "messages[2].weight",
        "messages[2].tool_calls[0].function.name",
        "messages[2].tool_calls[0].function.arguments",
        "tools[0].name",
    ]


def test_reports_are_bounded(tmp_path: Path) -> None:
    problems = messages_of(put(tmp_path, "a.jsonl", lines({"text": "a"}, *[{"text": 1}] * 5000)))
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[-1] == "The rest was not read, after 1,000 problems."
    one_row = messages_of(put(tmp_path, "b.jsonl", chat(*[1] * 1_000_000)))
    assert one_row[-1] == "b.jsonl:1: the row was read no further."
    assert len(one_row) < 60


# Sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("missing.jsonl", r"^missing\.jsonl: there is no such file; name one \(\.jsonl, "),
        ("missing.jsonl:train", r"^missing\.jsonl:train: there is no such file"),
        ("./missing", r"^\./missing: there is no such file"),
        ("/nowhere/at all", r"^/nowhere/at all: there is no such file"),
        ("a/b/c", r"^a/b/c: there is no such file"),
        ("json", r"^json: there is no such file"),
        ("csv:train", r"^csv:train: there is no such file"),
        ("text", r"^text: there is no such file"),
        ("", r'^"": is a folder; name one file in it'),
        ("tests\0.jsonl", r'^"tests\\u0000\.jsonl": there is no such file'),
        ("x" * 5000 + ".jsonl", r'^"x{57}\.\.\.": cannot be looked up: File name too long'),
        (".", r"^\.: is a folder; name one file in it"),
    ],
)
def test_source_that_is_no_file(source: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    (problem,) = messages_of(source)
    assert re.search(expected, problem), problem


def test_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = put(tmp_path, "a.jsonl", TWO)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", source)

    monkeypatch.setattr(files.io, "FileIO", refuse)
    assert messages_of(source) == ["a.jsonl: cannot be read: Permission denied."]


@pytest.mark.parametrize(
    ("source", "name", "split"),
    [("squad", "squad", "train"), ("org/na.me", "org/na.me", "train"), ("org/set:test[:10%]", "org/set", "test[:10%]")],
)
def test_hub_data_set(source: str, name: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> Iterable[dict[str, Any]]:
        asked.append((*args, options))
        return datasets.Dataset.from_list([{"question": "a", "answer": "b", "id": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    expected = [Pair(f"{name}:row 1", "a", "b")]
    assert read(source) == expected
    assert list(stream(source)) == expected
    assert asked == [(name, {"split": split, "streaming": False}), (name, {"split": split, "streaming": True})]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'org/set' on the Hub\nmore lines"),
        ValueError('Unknown split "test"'),
        datasets.exceptions.DatasetNotFoundError("Dataset 'org/set' doesn't exist on the Hub"),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_hub_data_set_that_cannot_be_had(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    first = str(error).splitlines()[0]
    assert messages_of("org/set:test") == [
        f'org/set:test: there is no such file, and the hub data set org/set, split "test", cannot be loaded: {first}; '
        "check the name, the split (NAME:SPLIT) and the network, or give a file."
    ]


# Real data --------------------------------------------------------------------------------------------------------


def real(name: str) -> list[Example]:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the real data {path} is not here")
    examples = read(str(path))
    assert list(stream(str(path))) == examples
    return examples


def test_real_alpaca() -> None:
    examples = real("alpaca_en_demo.json")
    assert Counter(map(type, examples)) == {Pair: 999}


def test_real_tool_calls() -> None:
    examples = real("glaive_toolcall_en_demo.json")
    raw = json.loads((SHARED / "glaive_toolcall_en_demo.json").read_text(encoding="utf-8"))
    assert Counter(map(type, examples)) == {Chat: 300}
    assert [len(example.messages) for example in examples] == [len(row["conversations"]) for row in raw]
    assert [len(example.tools) for example in examples] == [len(json.loads(row["tools"])) for row in raw]
    said = [turn for row in raw for turn in row["conversations"]]
    heard = [message for example in examples for message in example.messages]
    calls = [message["tool_calls"][0]["function"] for message in heard if "tool_calls" in message]
    assert calls == [json.loads(turn["value"]) for turn in said if turn["from"] == "function_call"]
    assert len(calls) == 211


def test_real_questions() -> None:
    examples = real("gsm8k_train.jsonl")
    assert len(examples) == 7473
    assert examples[-1].where == "gsm8k_train.jsonl:7473"
    assert all("#### " in example.completion for example in examples)


@pytest.mark.parametrize("name", ["clinc150_full.json"])
def test_real_data_of_other_shapes_is_refused_in_one_line(name: str) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"the real data {SHARED / name} is not here")
    assert len(messages_of(str(SHARED / name))) == 1


# Anything at all --------------------------------------------------------------------------------------------------

FUZZ = settings(
    deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
SEEDS = [row for _, row, _ in FORMATS]
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["role", "content", "function", "type", "name", "value"]), st.text(max_size=3)),
)


def outcome(source: str) -> list[Example]:
    """Returns the examples, or none after a DataError; anything else escapes."""
    try:
        examples = read(source)
    except DataError as error:
        problems, examples = error.problems, []
    else:
        problems = ()
    assert bool(problems) != bool(examples)
    assert all(problem.isprintable() for problem in problems)
    return examples


@settings(FUZZ, max_examples=250)
@given(kind=st.sampled_from(sorted(files.READERS)), data=st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, kind: str, data: bytes) -> None:
    outcome(put(tmp_path, f"x{kind}", data))


@settings(FUZZ, max_examples=250)
@given(
    seed=st.sampled_from([case for case in BROKEN if len(case[2]) < 5000] + [("", "jsonl", lines(*SEEDS[:3]), "")]),
    data=st.data(),
)
def test_any_cut_or_flipped_byte(tmp_path: Path, seed: tuple[str, str, bytes, str], data: st.DataObject) -> None:
    raw = bytearray(seed[2])
    for _ in range(data.draw(st.integers(1, 4)) if raw else 0):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    outcome(put(tmp_path, f"x.{seed[1]}", bytes(raw[: data.draw(st.integers(0, len(raw)))])))


@settings(FUZZ, max_examples=400)
@given(row=st.sampled_from(SEEDS), kind=st.sampled_from(["jsonl", "json"]), data=st.data())
def test_any_value_in_any_place(tmp_path: Path, row: Any, kind: str, data: st.DataObject) -> None:
    mutant = json.loads(json.dumps(row))
    spots = list(places(mutant))
    for _ in range(data.draw(st.integers(1, 3))):
        holder, key = data.draw(st.sampled_from(spots))
        if key in holder if isinstance(holder, dict) else key < len(holder):
            holder[key] = data.draw(JUNK)
    text = json.dumps([mutant] if kind == "json" else mutant, ensure_ascii=data.draw(st.booleans()))
    examples = outcome(put(tmp_path, f"x.{kind}", text.encode("utf-8", "surrogatepass")))
    for example in examples:
        if isinstance(example, Chat):
            assert any(m["role"] == "assistant" and m.get("weight") != 0 for m in example.messages)
            assert all(isinstance(m["content"], str) or m["tool_calls"] for m in example.messages)
        json.dumps(repr(example)).encode()


def places(value: Any) -> Iterable[tuple[Any, Any]]:
    """Yields each holder and key in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        yield value, key
        yield from places(child)

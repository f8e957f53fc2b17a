"""`lora-ft data prepare`: what it finds in a file, what it mends, what it writes, and what it says comes next."""

import json
import re
import shlex
from pathlib import Path

import pytest

from lora_ft import cli
from lora_ft.commands.prepare import Prepared, prepare
from lora_ft.data import findings, formats
from lora_ft.data.examples import Chat, Pair, Text
from lora_ft.errors import DataError
from tests import tiny_server

COST = {"tokens": 1000.0, "steps": 9.0, "seconds": 120.0, "bytes": 2.0**30}


def prepared(source: Path, agree=lambda question: True) -> tuple[Prepared, list[str]]:
    said: list[str] = []
    return prepare(source, "tiny", agree=agree, say=said.append, estimated=lambda *_: COST), said


def rows_of(done: Prepared, part: str = "train") -> list[dict]:
    return [json.loads(line) for line in Path(done.files[part]).read_text().splitlines()]


def csv_of(folder: Path, pairs: list[tuple[str, str]], head: str = "prompt,completion") -> Path:
    path = folder / "rows.csv"
    path.write_text("\n".join([head, *(f'"{a}","{b}"' for a, b in pairs)]) + "\n")
    return path


PAIRS = [(f"what is {n}", f"it is {n * n}") for n in range(30)]


def test_a_table_becomes_rows_that_train(tmp_path):
    done, said = prepared(csv_of(tmp_path, PAIRS))
    assert (done.kind, done.rows) == ("completion", 30)
    train, valid = rows_of(done), rows_of(done, "valid")
    assert (len(train), len(valid)) == (27, 3)
    everything = formats.read(done.files["train"]) + formats.read(done.files["valid"])
    assert all(isinstance(example, Pair) for example in everything)
    # A mark ends each prompt, another each completion, which begins with a space; the common beginnings are gone.
    assert all(row["prompt"].endswith("\n\n###\n\n") for row in train)
    assert all(row["completion"].startswith(" ") and row["completion"].endswith(" END") for row in train)
    assert {row["completion"].split()[-2] for row in train + valid} == {str(n * n) for n in range(30)}
    assert "2 minutes" in "".join(said)
    assert said[-1].split("\n")[1].strip() == done.command
    words = shlex.split(done.command)
    assert words[:3] == ["lora-ft", "train", "complete"]
    assert {done.files["train"], done.files["valid"]} < set(words)


def test_nothing_is_changed_that_was_not_agreed_to(tmp_path):
    asked: list[str] = []

    def no(question):
        asked.append(question)
        return False

    done, _ = prepared(csv_of(tmp_path, [*PAIRS, PAIRS[0]]), no)
    assert len(asked) >= 4
    assert [(row["prompt"], row["completion"]) for row in rows_of(done)] == [*PAIRS, PAIRS[0]]
    assert not any(finding["taken"] for finding in done.findings if finding["weight"] == "advised")


def test_rows_are_named_by_their_numbers(tmp_path):
    done, _ = prepared(csv_of(tmp_path, [("a", "b"), ("c", ""), ("d", "e"), ("a", "b")]))
    lost = {finding["text"]: finding["rows"] for finding in done.findings if finding["rows"]}
    assert lost == {"1 rows have no answer to learn.": ["3"], "1 rows repeat an earlier one.": ["5"]}
    assert len(rows_of(done)) == 2


def test_nothing_is_overwritten(tmp_path):
    source = csv_of(tmp_path, PAIRS)
    names = {file for _ in range(3) for file in prepared(source)[0].files.values()}
    assert len(names) == 6
    assert all(Path(name).is_file() for name in names)


TURNS = [[{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a"}] for n in range(3)]
ALPACA = [{"Instruction": "i", "Output": "o", "id": 4}, {"Instruction": "j", "Output": "p", "id": 5}]


@pytest.mark.parametrize(
    ("name", "text", "kind", "form"),
    [
        ("a.tsv", "Question\tAnswer\n" + "".join(f"q{n}\ta{n}\n" for n in range(5)), "completion", Pair),
        ("a.txt", "one\n\ntwo\n\nthree\n", "text", Text),
        ("a.json", json.dumps([{"text": f"t{n}"} for n in range(4)]), "text", Text),
        ("a.jsonl", tiny_server.chats(5), "chat", Chat),
        ("a.jsonl", "".join(json.dumps({"conversations": turns}) + "\n" for turns in TURNS), "chat", Chat),
        ("a.jsonl", "".join(json.dumps(row) + "\n" for row in ALPACA), "completion", Pair),
    ],
)  # fmt: skip
def test_every_kind_of_file(tmp_path, name, text, kind, form):
    (tmp_path / name).write_text(text)
    done, _ = prepared(tmp_path / name)
    assert done.kind == kind
    assert all(isinstance(example, form) for example in formats.read(done.files["train"]))


def test_preferences_come_out_as_the_api_takes_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"q{n}", "chosen": "yes", "rejected": "no"}) + "\n" for n in range(3))
    )
    done, said = prepared(path)
    assert rows_of(done)[0] == {
        "input": {"messages": [{"role": "user", "content": "q0"}]},
        "preferred_output": [{"role": "assistant", "content": "yes"}],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    }
    assert "lora-ft train prefer" in done.command
    assert done.command in said[-1]


def test_a_command_names_paths_of_any_letters(tmp_path):
    folder = tmp_path / "my rows; $HOME's"
    folder.mkdir()
    done, _ = prepared(csv_of(folder, PAIRS))
    words = shlex.split(done.command)
    assert words[words.index("--data.train") + 1] == done.files["train"]
    assert words[words.index("--data.eval") + 1] == done.files["valid"]


WRONG = [
    {"messages": [{"role": "bot", "content": "x"}, {"role": "assistant", "content": "y"}]},
    {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "y"}]},
]


@pytest.mark.parametrize("takes", [True, False])
def test_rows_that_cannot_be_trained_on_are_named_and_left_out_where_that_is_agreed_to(tmp_path, takes):
    chats = tiny_server.chats(4).splitlines()
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*chats[:2], *map(json.dumps, WRONG), *chats[2:]]) + "\n")
    done, _ = prepared(path, lambda question: takes)
    (found,) = [finding for finding in done.findings if "cannot be trained on" in finding["text"]]
    assert (found["rows"], found["taken"]) == (["3", "4"], takes)
    assert 'a.jsonl:3: messages[0].role is "bot"' in found["text"]
    assert len(rows_of(done)) == (4 if takes else 6)
    if takes:
        assert len(formats.read(done.files["train"])) == 4
    else:
        with pytest.raises(DataError, match="bot"):
            formats.read(done.files["train"])


def test_a_prompt_that_is_empty_cannot_be_trained_on(tmp_path):
    done, _ = prepared(csv_of(tmp_path, [*PAIRS, ("", "it is 4")]))
    assert [finding["rows"] for finding in done.findings if "cannot be trained on" in finding["text"]] == [["32"]]
    assert all(formats.read(file) for file in done.files.values())


def test_without_the_base_there_is_no_estimate_and_still_a_command(tmp_path, capsys):
    source = csv_of(tmp_path, PAIRS)
    assert cli.main(["data", "prepare", str(source), "--base", str(tmp_path / "gone"), "--yes", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["estimate"] == {}
    assert done["reason"].startswith("What training takes cannot be told: ")
    assert shlex.split(done["command"])[:5] == ["lora-ft", "train", "complete", "--base", str(tmp_path / "gone")]


def test_conversations_that_end_with_a_question_are_cut(tmp_path):
    chats = [json.loads(line) for line in tiny_server.chats(3).splitlines()]
    chats[1]["messages"].append({"role": "user", "content": "and then?"})
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    done, _ = prepared(path)
    assert [row["messages"][-1]["role"] for row in rows_of(done)] == ["assistant"] * 3
    assert [finding["rows"] for finding in done.findings if finding["rows"]] == [["2"]]


def test_capitals_and_classes(tmp_path):
    done, said = prepared(csv_of(tmp_path, [(f"IS {n} EVEN", str(n % 2 == 0)) for n in range(40)]))
    assert all(row["prompt"] == row["prompt"].lower() for row in rows_of(done))
    assert "These rows teach a few classes." in said


def test_lines_that_are_broken_are_left_out_and_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(tiny_server.chats(3) + "{broken\n" + tiny_server.chats(3, seed=5))
    done, said = prepared(path)
    assert done.rows == 6
    assert "a.jsonl:4" in said[0]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "prompt,completion\nx,\n"])
def test_files_that_nothing_can_be_made_of(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=r"a\.csv"):
        prepared(path)
    assert list(tmp_path.iterdir()) == [path]


def test_common_beginnings_and_ends():
    assert findings._common_start(["abc", "abd", "ab"]) == "ab"
    assert findings._common_end(["xab", "yab"]) == "ab"
    assert findings._common_start(["same", "same"]) == "same"


def test_the_command_asks_and_can_be_told_yes(tmp_path, monkeypatch, capsys):
    base = tiny_server.base_folder(tmp_path / "base")
    source = csv_of(tmp_path, PAIRS)
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
    assert cli.main(["data", "prepare", str(source), "--base", str(base)]) == 1
    assert "--yes" in capsys.readouterr().err
    assert cli.main(["data", "prepare", str(source), "--base", str(base), "--yes", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["estimate"]["steps"] == 21
    assert done["estimate"]["tokens"] > 27 * 20
    # The command that was printed is one that runs.
    words = [*shlex.split(done["command"])[1:], "--dry-run"]
    words[words.index("--out") + 1] = str(tmp_path / "out")
    assert cli.main(words) == 0


@pytest.mark.parametrize(
    ("row", "task"), [({"text": "a", "label": "b"}, "classify"), ({"text": "a", "spans": []}, "tag")]
)
def test_rows_with_labels_need_nothing_prepared(tmp_path, capsys, row, task):
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n")
    assert cli.main(["data", "prepare", str(tmp_path / "rows.jsonl"), "--yes"]) == 1
    assert re.search(f"rows for the task {task} need nothing prepared.*--task {task}", capsys.readouterr().err)

"""Predictions over a file: those of plain transformers and PEFT, row by row, in its order, beside its fields."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from rich.console import Console

from lora_ft import predict, tasks
from lora_ft.cli import main
from lora_ft.commands.options import PredictConfig
from lora_ft.data import questions
from lora_ft.errors import ConfigError, DataError, LoraFtError, StorageError
from tests import tiny

# Task, kind of model, facts, class of transformers.
KINDS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "chat": ("chat", "llama", {"system": "w60 w61"}, "AutoModelForCausalLM"),
    "complete": ("complete", "llama", {}, "AutoModelForCausalLM"),
    "many": ("classify", "llama", {"problem_type": "multi_label_classification"}, "AutoModelForSequenceClassification"),
    "number": ("classify", "bert", {"problem_type": "regression"}, "AutoModelForSequenceClassification"),
    "one": ("classify", "bert", {"problem_type": "single_label_classification"}, "AutoModelForSequenceClassification"),
    "seq2seq": ("seq2seq", "t5", {}, "AutoModelForSeq2SeqLM"),
    "tag": ("tag", "bert", {"labels": ["O", "B-A", "I-A"]}, "AutoModelForTokenClassification"),
}
NEW_TOKENS = 6


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tiny.Run]:
    made: dict[str, tiny.Run] = {}

    def run(kind: str) -> tiny.Run:
        if kind not in made:
            task, model, facts, _ = KINDS[kind]
            there = tmp_path_factory.mktemp(kind)
            rows = tiny.rows(task)
            if task == "classify":
                facts = {"labels": [] if kind == "number" else list(tiny.LABELS), **facts}
            for row in rows:
                if kind == "many":
                    row["labels"] = [int(row["labels"] >= place) for place in range(len(tiny.LABELS))]
                elif kind == "number":
                    row["labels"] -= 0.5
            base = tiny.model_folder(there / "base", model)
            # After more of them this T5 ends every reply before its first word.
            steps = 2 if kind == "seq2seq" else 8
            made[kind] = tiny.run(
                there / "adapter", base, task=task, quant="none", features=rows, facts=facts, steps=steps, sealed=False
            )
        return made[kind]

    return run


def texts(count: int = 13) -> list[str]:
    """Returns texts of many lengths, as many as no batch size here divides."""
    rng = random.Random(7)
    return [" ".join(f"w{rng.randrange(290)}" for _ in range(rng.randrange(1, 15))) for _ in range(count)]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answered(run: tiny.Run, rows: Path, out: Path, batch_size: int = 8, **more: Any) -> list[dict[str, Any]]:
    config = PredictConfig(
        adapter=run.folder, input=str(rows), out=out, batch_size=batch_size, max_new_tokens=NEW_TOKENS, **more
    )
    done = predict.predict(config, Console(quiet=True))
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert done.rows == len(found)
    return found


def plainly(run: tiny.Run, kind: str, texts: list[str]) -> Iterator[Any]:
    """Yields what transformers and PEFT alone say to each text, one row at a time."""
    task, _, _, made = KINDS[kind]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.folder)
    base = getattr(transformers, made).from_pretrained(run.base_folder, **run.task.config_changes())
    if task == "classify":
        base.config.pad_token_id = tokenizer.pad_token_id
    model = peft.PeftModel.from_pretrained(base, run.folder).eval()
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        if task == "chat":
            turns = [{"role": "system", "content": "w60 w61"}, {"role": "user", "content": text}]
            inputs = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        if task in ("classify", "tag"):
            with torch.no_grad():
                logits = model(**inputs).logits[0].double()
            yield logits.softmax(-1) if kind == "one" else logits.sigmoid() if kind == "many" else logits
            continue
        new = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0)[0]
        new = new[1:] if task == "seq2seq" else new[inputs["input_ids"].shape[1] :]
        yield tokenizer.decode(new, skip_special_tokens=True), "stop" if 2 in new else "length"


FIELD = {"chat": "prompt", "complete": "prompt", "seq2seq": "source"}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_predictions_are_those_of_plain_transformers_however_rows_are_batched(
    runs: Callable[[str], tiny.Run], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = runs(kind), texts()
    rows = [{"id": i, FIELD.get(kind, "text"): text} for i, text in enumerate(asked)]
    file = lines(tmp_path / "rows.jsonl", rows)
    found = answered(run, file, tmp_path / "8.jsonl")
    assert [{key: row[key] for key in rows[0]} for row in found] == rows
    for text, row, plain in zip(asked, found, plainly(run, kind, asked), strict=True):
        if kind == "number":
            assert row["prediction"] == pytest.approx(float(plain[0]), abs=1e-5)
        elif kind in ("one", "many"):
            p = dict(zip(tiny.LABELS, plain.tolist(), strict=True))
            assert row["probabilities"] == pytest.approx(p, abs=1e-5)
            best = max(p, key=lambda label: p[label])
            assert row["prediction"] == (best if kind == "one" else [label for label in p if p[label] > 0.5])
        elif kind == "tag":
            assert row["prediction"] == [run.task.labels[k] for k in plain.argmax(-1).tolist()]
            assert row["words"] == text.split()
        else:
            assert (row["prediction"], row["finish_reason"]) == plain
    assert len({str(row["prediction"]) for row in found}) > 1
    # Each row by itself, in many windows.
    monkeypatch.setattr(predict, "WINDOW_BATCHES", 2)
    again = answered(run, file, tmp_path / "1.jsonl", batch_size=1)
    for one, other in zip(found, again, strict=True):
        sure, other_sure = one.pop("probabilities", {}), other.pop("probabilities", {})
        assert other_sure == pytest.approx(sure, abs=1e-5)
        if kind == "number":
            assert other.pop("prediction") == pytest.approx(one.pop("prediction"), abs=1e-5)
        assert other == one


def test_entities_are_spans_of_the_text_or_of_the_words(runs: Callable[[str], tiny.Run]) -> None:
    task = runs("tag").task
    task.prepare(tiny.tokenizer(), 6)

    class Model:
        def of_rows(self, rows: Any, compute: Any) -> list[Any]:
            # O, B-A, I-A and O again, of as many words as have a token left.
            return [torch.eye(3)[[0, 1, 2, 0, 1, 2][: sum(x != -100 for x in row["labels"])]].numpy() for row in rows]

    made = [
        task.asked(questions.Text("a:1", "w1  w2 w3 , w4")),
        task.asked(questions.Tagged("a:2", tuple(f"w{i}" for i in range(8)), ())),
    ]
    assert task.cut_rows == 1
    text, words = task.predict(Model(), made)
    assert text["words"] == ["w1", "w2", "w3", ",", "w4"]
    assert text["prediction"] == ["O", "B-A", "I-A", "O", "B-A"]
    assert text["entities"][0] == {"label": "A", "text": "w2 w3", "start": 4, "end": 9}
    assert words["prediction"] == ["O", "B-A", "I-A", "O", "B-A", "I-A", "O", "O"]
    assert [(e["start"], e["end"], e["text"]) for e in words["entities"]] == [(1, 3, "w1 w2"), (4, 6, "w4 w5")]


def test_answers_in_the_rows_are_kept_and_not_read(runs: Callable[[str], tiny.Run], tmp_path: Path) -> None:
    rows = [{"text": "w1 w2", "label": "never heard of", "source": "w3"}, {"text": "w4", "label": None, "source": "w5"}]
    found = answered(runs("one"), lines(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl")
    bare = answered(
        runs("one"), lines(tmp_path / "bare.jsonl", [{"text": row["text"]} for row in rows]), tmp_path / "2.jsonl"
    )
    assert [row["prediction"] for row in found] == [row["prediction"] for row in bare]
    assert [row["label"] for row in found] == ["never heard of", None]


def test_a_conversation_is_asked_up_to_its_reply(runs: Callable[[str], tiny.Run], tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "w60 w61"}, {"role": "user", "content": "w7 w8"}]
    rows = [{"messages": turns}, {"messages": [*turns, {"role": "assistant", "content": "w9"}]}]
    found = answered(runs("chat"), lines(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl")
    plain = answered(runs("chat"), lines(tmp_path / "plain.jsonl", [{"prompt": "w7 w8"}]), tmp_path / "2.jsonl")
    assert found[0]["prediction"] == found[1]["prediction"] == plain[0]["prediction"]


def test_csv_has_a_column_for_each_class_and_what_is_no_text_as_json(
    runs: Callable[[str], tiny.Run], tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text('id,text\n007,"w1, w2"\nNA,"w3\nw4"\n', encoding="utf-8")
    out = tmp_path / "out.csv"
    words = ["predict", str(runs("many").folder), "--input", str(tmp_path / "rows.csv"), "--out", str(out)]
    assert main(words) == 0
    with out.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["id", "text", "prediction", *(f"probabilities.{label}" for label in tiny.LABELS)]
    assert [(row["id"], row["text"]) for row in rows] == [("007", "w1, w2"), ("NA", "w3\nw4")]
    for row in rows:
        likely = [label for label in tiny.LABELS if float(row[f"probabilities.{label}"]) > 0.5]
        assert json.loads(row["prediction"]) == likely


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_column_of_a_prediction_is_written_over_no_field(
    suffix: str, runs: Callable[[str], tiny.Run], tmp_path: Path, capsys
) -> None:
    name = f"probabilities.{tiny.LABELS[0]}"
    (tmp_path / "rows.csv").write_text(f"text,{name}\nw1,0.5\n", encoding="utf-8")
    out = tmp_path / f"out.{suffix}"
    words = ["predict", str(runs("one").folder), "--input", str(tmp_path / "rows.csv"), "--out", str(out)]
    # In JSON the classes are in an object of their own.
    assert main(words) == (1 if suffix == "csv" else 0)
    assert (f"has a field {name}, which is what" in capsys.readouterr().err) == (suffix == "csv")
    assert out.exists() == (suffix == "jsonl")


# What is refused, with its place, and before a row is answered


@pytest.mark.parametrize(
    ("kind", "rows", "told"),
    [
        ("one", [{"text": "w1"}, {"text": ""}, {"text": 5}], "rows.jsonl:2: text is empty"),
        ("one", [{"prompt": "w1"}], "rows.jsonl:1: has the fields prompt, which fit no format; use text + text_pair,"),
        ("chat", [{"messages": [{"role": "assistant", "content": "w1"}]}], "has nothing but a reply; give the message"),
        ("chat", [{"prompt": "w1 <|user|> w2"}], "rows.jsonl:1: messages[1] holds the control token <|user|>"),
        ("chat", [{"prompt": "w1"}, {"prompt": " ".join(["w1"] * 600)}], "rows.jsonl:2: has 60"),
        ("tag", [{"words": ["w1", ""]}], "rows.jsonl:1: words[1] is empty; give a word."),
        ("tag", [{"words": []}], "rows.jsonl:1: words is an empty list; give a list of strings"),
        ("one", [{"text": "w1", "prediction": 1}], "rows.jsonl:1: has a field prediction, which is what a"),
        ("seq2seq", [{"source": "w1"}, {"text": "w1"}], "rows.jsonl:2: is text, but rows.jsonl:1 is source"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(
    runs: Callable[[str], tiny.Run], tmp_path: Path, kind: str, rows: list[Any], told: str
) -> None:
    with pytest.raises(DataError) as caught:
        answered(runs(kind), lines(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl")
    assert told in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_all_bad_rows_are_named_at_once(runs: Callable[[str], tiny.Run], tmp_path: Path) -> None:
    rows = lines(tmp_path / "rows.jsonl", [{"text": ""}, {"text": "w1"}, {"text": None}])
    with pytest.raises(DataError) as caught:
        answered(runs("one"), rows, tmp_path / "out.jsonl")
    assert len(caught.value.problems) == 2


def test_what_is_there_is_not_overwritten(runs: Callable[[str], tiny.Run], tmp_path: Path) -> None:
    rows = lines(tmp_path / "rows.jsonl", [{"text": "w1"}])
    before = rows.read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        answered(runs("one"), rows, rows)
    assert rows.read_bytes() == before


def test_an_end_before_the_last_row_leaves_no_file(
    runs: Callable[[str], tiny.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = lines(tmp_path / "rows.jsonl", [{"text": text} for text in texts()])
    monkeypatch.setattr(predict, "WINDOW_BATCHES", 1)
    answer, windows = predict.Live.of_rows, []

    def stopped(self: Any, *given: Any) -> Any:
        windows.append(given)
        if len(windows) == 2:
            raise KeyboardInterrupt
        return answer(self, *given)

    monkeypatch.setattr(predict.Live, "of_rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        answered(runs("one"), rows, tmp_path / "out.jsonl", batch_size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_place_that_cannot_be_written_is_said(runs: Callable[[str], tiny.Run], tmp_path: Path) -> None:
    rows = lines(tmp_path / "rows.jsonl", [{"text": "w1"}])
    with pytest.raises(StorageError, match="cannot be written"):
        answered(runs("one"), rows, rows / "out.jsonl")


def test_a_task_without_questions_says_so(
    runs: Callable[[str], tiny.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs("one")
    monkeypatch.setattr(type(run.task), "questions", ())
    with pytest.raises(LoraFtError, match="trained for the task classify, which makes no predictions"):
        answered(run, lines(tmp_path / "rows.jsonl", [{"text": "w1"}]), tmp_path / "out.jsonl")


def test_every_task_predicts() -> None:
    """A task without them is allowed, and none of ours is one."""
    for name in tasks.NAMES:
        task = tasks.get(name)
        assert task.questions
        assert type(task).predict is not tasks.Task.predict

"""Tasks: rows that are cut are counted, what a template does is passed on, and wrong rows and models are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_ft import tasks
from lora_ft.data.examples import Chat, Example, Labelled, Pair, Tagged, Text
from lora_ft.data.render import ChatRenderer
from lora_ft.data.template import BOS_REPEATED
from lora_ft.errors import DataError, MaskError, UnsupportedModelError
from lora_ft.scoring import metrics
from tests import tiny
from tests.stock_templates import tokenizer_of

WORDS = " ".join(f"w{i}" for i in range(40, 60))
LONG: dict[str, Example] = {
    "chat": Chat("a:1", ({"role": "user", "content": "w40"}, {"role": "assistant", "content": WORDS})),
    "complete": Text("a:1", WORDS),
    "classify": Labelled("a:1", WORDS, "good", "w40 w41"),
    "seq2seq": Pair("a:1", WORDS, WORDS),
    "embed": Labelled("a:1", WORDS, "good"),
    "tag": Tagged("a:1", tuple(WORDS.split()), ("good",) * 20),
}
# Of 20 words each: chat adds BOS, a mark and a word with its end, and a mark, and the end; the others the end alone.
WHOLE = {"chat": 26, "complete": 21, "classify": 22, "seq2seq": 20 + 21, "embed": 20, "tag": 20}


def prepared(name: str, max_length: int) -> tasks.Task:
    task = tasks.get(name, {"labels": list(tiny.LABELS)} if name in ("classify", "tag") else None)
    task.prepare(tiny.tokenizer(), max_length)
    return task


@pytest.mark.parametrize("name", list(LONG))
def test_cut_rows_are_counted(name: str) -> None:
    task = prepared(name, 512)
    row = task.features(LONG[name])
    texts = [row["input_ids"], row["labels"]] if name == "seq2seq" else [row["input_ids"]]
    assert sum(map(len, texts)) == WHOLE[name]
    assert task.cut_rows == 0

    task.prepare(task.tokenizer, 10)
    for row in tasks.featurize(task, [LONG[name]] * 3):
        assert [len(row[key]) for key in ("input_ids", "labels")[: len(texts)]] == [10] * len(texts)
    assert task.cut_rows == 3
    task.prepare(task.tokenizer, 512)
    assert task.cut_rows == 0


def test_a_question_is_no_row_and_is_not_counted() -> None:
    for name in ("complete", "seq2seq"):
        task = prepared(name, 8)
        ids, wanted = task.question(Pair("a:1", "w40 w41", WORDS))
        assert (len(ids), wanted) == (2, WORDS)
        assert task.cut_rows == 0


def test_a_conversation_is_a_question_only_where_it_ends_in_an_answer() -> None:
    task = tasks.get("chat")
    task.prepare(tokenizer_of("chatml"), 512)
    ask, reply = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    ids, wanted = task.question(Chat("a:1", (ask, reply)))
    assert (ids, wanted) == (task.renderer.prompt([ask]), "yes")
    for last in (ask, {**reply, "content": None}):
        with pytest.raises(DataError, match=r"^a:2: the row does not end in a reply to compare with"):
            task.question(Chat("a:2", (ask, reply, last)))


def test_calls_are_asked_for_where_each_of_them_stands() -> None:
    task = tasks.get("chat")
    task.prepare(tokenizer_of("chatml"), 512)
    function = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    calls = [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}]
    ask, calling = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": None, "tool_calls": calls}
    told = {"role": "tool", "tool_call_id": "a", "content": "dry"}
    row = Chat("a:1", (ask, calling, told, calling, told, {"role": "assistant", "content": "No."}), (function,))
    plain = Chat("a:2", (ask, {"role": "assistant", "content": "Yes."}))
    assert task.questioned([row, plain], ("exact_match",)) == [row, plain]
    first, second = task.questioned([plain, row], ("tool_calls",))
    assert (first.messages, second.messages, second.tools) == (row.messages[:2], row.messages[:4], row.tools)
    ids, wanted = task.question(first)
    assert ids == task.renderer.prompt([ask], [function])
    assert wanted == '<tool_call>\n{"name": "weather", "arguments": {"place":"Rome"}}\n</tool_call>'
    assert metrics.compute("tool_calls", [wanted], [wanted])["tool_call_match"] == 1
    with pytest.raises(DataError, match="tool_calls: none of the 1 rows has a call of a function; leave it out"):
        task.questioned([plain], ("tool_calls",))


def test_a_target_that_is_cut_teaches_no_stop() -> None:
    task = prepared("seq2seq", 10)
    end = task.tokenizer.eos_token_id
    whole = task.features(Pair("a:1", "w40", " ".join(WORDS.split()[:9])))["labels"]
    assert (len(whole), whole[-1], task.cut_rows) == (10, end, 0)
    for words in (10, 20):
        assert end not in task.features(Pair("a:1", "w40", " ".join(WORDS.split()[:words])))["labels"]
    assert task.cut_rows == 2


def test_what_a_template_does_reaches_the_task() -> None:
    task = prepared("complete", 64)
    assert (task.rules, task.ways) == ((), ())
    task = tasks.get("chat")
    task.prepare(tokenizer_of("llama2"), 512)
    assert task.rules == (BOS_REPEATED,)
    assert task.ways == ChatRenderer(tokenizer_of("llama2"), 512).ways == ("sentinels", "prefixes")


def test_all_problems_of_all_rows_are_raised_once() -> None:
    task = tasks.get("chat")
    task.prepare(tokenizer_of("gemma"), 512)
    ask, reply = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    good = Chat("a:1", (ask, reply))
    bad = [Chat(f"a:{line}", ({"role": "system", "content": "x"}, ask, reply)) for line in (2, 4)]
    with pytest.raises(MaskError) as caught:
        tasks.featurize(task, [good, bad[0], good, bad[1]])
    assert [place.split(": ")[0] for place in caught.value.problems] == ["a:2", "a:4"]
    assert tasks.featurize(task, [good, good]) == [task.features(good)] * 2


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "classify needs its rows at the start, to know the labels; leave out --data.streaming."),
        ([Labelled("a:1", "w40", "good")], "a:1: the rows have only the label 'good'"),
        ([Text("a:1", "w40")], "a:1: no row has a label"),
    ],
)
def test_rows_without_two_labels_are_refused(rows: list[Example], problem: str) -> None:
    with pytest.raises(DataError) as caught:
        tasks.get("classify").learn(rows)
    assert str(caught.value).startswith(problem)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = {}
    for name in ("gpt2", "bert"):
        folder: Path = tiny.model_folder(tmp_path_factory.mktemp("bases") / name, name)
        made[name] = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    return made


def test_a_decoder_with_other_padding_than_the_tokenizers_is_refused(classifiers: dict[str, Any]) -> None:
    task, gpt2 = prepared("classify", 64), classifiers["gpt2"]
    batch = task.collate([task.features(Labelled("a:1", text, "good")) for text in ("w40 w41", "w42 w43 w44 w45")])
    right = task.score(gpt2, batch).logits_NV
    gpt2.config.pad_token_id = 5
    try:
        with pytest.raises(UnsupportedModelError, match=r"pads with token 0, but pad_token_id .* is 5, by which"):
            task.score(gpt2, batch)
        # What the refusal is for: the padded row is read at another token, without a word.
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        wrong = gpt2(**inputs).logits
    finally:
        gpt2.config.pad_token_id = 0
    assert not torch.allclose(wrong[0], right[0], atol=1e-3)
    torch.testing.assert_close(wrong[1], right[1])


def test_an_encoder_may_name_other_padding(classifiers: dict[str, Any]) -> None:
    task, bert = prepared("classify", 64), classifiers["bert"]
    batch = task.collate([task.features(Labelled("a:1", text, "good")) for text in ("w40 w41", "w42 w43 w44 w45")])
    right = task.score(bert, batch).logits_NV
    bert.config.pad_token_id = 5
    try:
        torch.testing.assert_close(task.score(bert, batch).logits_NV, right)
    finally:
        bert.config.pad_token_id = 0

"""The task `tag`: rows of words and tags, a label at each word's first token, and the way from file to merged model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from seqeval import metrics as seqeval
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from lora_ft import evaluate, saved, seal, tasks
from lora_ft.cli import main
from lora_ft.data import formats
from lora_ft.data.examples import Tagged, Text
from lora_ft.data.tagged import WORD, places_of
from lora_ft.errors import DataError, UnsupportedModelError
from lora_ft.scoring import metrics
from tests import tiny
from tests.stock_templates import tokenizer_of

LABELS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
IGNORE = -100


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def pieces() -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer that knows no word but single letters, with a mark at both ends of a row."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<pad>", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def prepared(tokenizer: Any = None, max_length: int = 512, labels: tuple[str, ...] = LABELS) -> Any:
    task = tasks.get("tag", {"labels": list(labels)})
    task.prepare(tokenizer or pieces(), max_length)
    return task


def read(folder: Path, name: str, text: str) -> list[Any]:
    (folder / name).write_text(text, encoding="utf-8")
    return formats.read(str(folder / name))


def problems(folder: Path, name: str, text: str) -> list[str]:
    with pytest.raises(DataError) as caught:
        read(folder, name, text)
    return list(caught.value.problems)


# Rows


def test_conll_columns_are_read(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- O O\n\nAnna NNP I-NP B-PER\nleft VBD I-VP O\n\n\n"
    text += "10 CD B-NP O\n-DOCSTART- O\nOslo NNP B-NP B-LOC"
    assert read(tmp_path, "a.conll", text) == [
        Tagged("a.conll:3", ("Anna", "left"), ("B-PER", "O")),
        Tagged("a.conll:7", ("10",), ("O",)),
        Tagged("a.conll:9", ("Oslo",), ("B-LOC",)),
    ]


def test_a_word_may_hold_spaces_where_tabs_part_the_columns(tmp_path: Path) -> None:
    # A no-break space parts no columns.
    assert read(tmp_path, "a.bio", "10 000\tO\r\nNew York\tB-LOC\r\n\r\n5\u00a0km O\r\n") == [
        Tagged("a.bio:1", ("10 000", "New York"), ("O", "B-LOC")),
        Tagged("a.bio:4", ("5\u00a0km",), ("O",)),
    ]


@pytest.mark.parametrize("names", [("words", "tags"), ("tokens", "ner_tags"), ("tokens", "tags")])
def test_lists_of_words_and_tags_are_read(tmp_path: Path, names: tuple[str, str]) -> None:
    row = dict(zip(names, (["Anna", "left"], ["I-PER", "O"]), strict=True))
    assert read(tmp_path, "a.jsonl", json.dumps(row)) == [Tagged("a.jsonl:1", ("Anna", "left"), ("I-PER", "O"))]


def test_spans_become_tags_of_words(tmp_path: Path) -> None:
    text = "Dr. Anna Lie left Oslo, Norway."
    spans = [(18, 22, "LOC"), (4, 12, "PER"), (22, 30, "LOC")]  # the last begins with a comma
    row = {"text": text, "spans": [{"start": a, "end": b, "label": name} for a, b, name in spans]}
    (found,) = read(tmp_path, "a.jsonl", json.dumps(row))
    assert list(zip(found.words, found.tags, strict=True)) == [
        ("Dr", "O"), (".", "O"), ("Anna", "B-PER"), ("Lie", "I-PER"), ("left", "O"),
        ("Oslo", "B-LOC"), (",", "B-LOC"), ("Norway", "I-LOC"), (".", "O"),
    ]  # fmt: skip
    assert read(tmp_path, "b.jsonl", json.dumps({"text": "so it is", "spans": []}))[0].tags == ("O", "O", "O")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"words": ["a", "b"], "tags": ["O"]}, "tags is a list of 1, but words is one of 2; tag each word once"),
        ({"words": ["a"], "tags": ["O", "O"]}, "tags is a list of 2, but words is one of 1; tag each word once"),
        ({"words": [], "tags": []}, "words is an empty list; give a list of strings, one or more"),
        ({"words": ["a", " "], "tags": ["O", "O"]}, "words[1] is empty; give a word"),
        ({"words": ["a"], "tags": ["PER"]}, 'tags[0] is "PER"; use O, B-TYPE or I-TYPE'),
        ({"words": ["a"], "tags": ["B-"]}, 'tags[0] is "B-"; use O, B-TYPE or I-TYPE'),
        ({"tokens": ["a"], "ner_tags": [3]}, "ner_tags holds whole numbers such as 3, and nothing says what they"),
        ({"text": "so it is", "spans": [{"start": 6, "end": 9, "label": "A"}]},
         "spans[0] goes from 6 to 9; the text has 8 characters, and a span at least one of them"),
        ({"text": "so it is", "spans": [{"start": 3, "end": 3, "label": "A"}]}, "spans[0] goes from 3 to 3; the text"),
        ({"text": "so it is", "spans": [{"start": -2, "end": 2, "label": "A"}]},
         "spans[0].start is -2; give a whole number of characters"),
        ({"text": "so it is", "spans": [{"start": 0, "end": 5, "label": "A"}, {"start": 3, "end": 8, "label": "B"}]},
         "spans[1] overlaps spans[0]; give each character to one span"),
        ({"text": "so it is", "spans": [{"start": 0, "end": 1, "label": "A"}]}, 'spans[0] cuts the word "so"; let it'),
        ({"text": "so it is", "spans": [{"start": 4, "end": 8, "label": "A"}]}, 'spans[0] cuts the word "it"; let it'),
        ({"text": "so  it", "spans": [{"start": 2, "end": 4, "label": "A"}]}, "spans[0] holds no word; let it begin"),
        ({"text": "so", "spans": [{"start": 0, "end": 2}]}, "spans[0].label is missing; give a name"),
        ({"text": "so", "spans": [{"end": 2, "label": "A"}]}, "spans[0].start is missing; give a whole number"),
        ({"text": "so", "spans": "so"}, 'spans is "so"; give a list of objects with start, end and label'),
        ({"text": "so", "spans": [[0, 2]]}, "spans[0] is a list of 2; give an object with start, end and label"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_row_is_named_once_with_its_line(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    good = {"words": ["a"], "tags": ["O"]} if "words" in row else None
    text = "".join(json.dumps(one) + "\n" for one in (good, row) if one)
    (problem,) = problems(tmp_path, "a.jsonl", text)
    assert problem.startswith(f"a.jsonl:{2 if good else 1}: {told}")


def test_wrong_lines_of_conll_are_all_named(tmp_path: Path) -> None:
    found = problems(tmp_path, "a.conll", "Anna B-PER\nleft\n\nit O\nis V\n\t\tO\n")
    assert found == [
        "a.conll:2: has one column; a line is a word, and its tag in the last column.",
        'a.conll:5: the tag, in the last column, is "V"; use O, B-TYPE or I-TYPE.',
        "a.conll:6: the word, in the first column, is empty; name it.",
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_tags_of_a_hub_data_set_have_the_names_of_its_features(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(named: bool) -> Any:
        kind = datasets.ClassLabel(names=["O", "B-PER", "I-PER"]) if named else datasets.Value("int64")
        features = datasets.Features({"tokens": [datasets.Value("string")], "ner_tags": [kind]})
        made = datasets.Dataset.from_dict({"tokens": [["Anna", "left"]] * 2, "ner_tags": [[1, 0]] * 2}, features)
        return made.to_iterable_dataset() if stream else made

    read = formats.stream if stream else formats.read
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: load(True))
    assert [row.tags for row in read("org/ner")] == [("B-PER", "O")] * 2  # type: ignore[union-attr]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: load(False))
    with pytest.raises(DataError) as caught:
        list(read("org/ner"))
    (problem,) = caught.value.problems
    assert problem.startswith("org/ner:row 1: ner_tags holds whole numbers such as 1, and nothing says what they stand")


# Labels


def test_labels_are_both_of_each_type_and_are_kept() -> None:
    task = tasks.get("tag")
    task.learn([Tagged("a:1", ("x", "y"), ("B-PER", "O")), Tagged("a:2", ("x",), ("I-LOC",))])
    assert task.labels == LABELS
    assert tasks.get("tag", task.facts()).labels == LABELS
    assert task.config_changes()["id2label"] == dict(enumerate(LABELS))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "tag needs its rows at the start, to know the tags; leave out --data.streaming."),
        ([Tagged("a:1", ("x",), ("O",))], "a:1: no word is tagged as an entity"),
        ([Text("a:1", "x")], "a:1: no word is tagged as an entity"),
    ],
)
def test_rows_without_an_entity_are_refused(rows: list[Any], told: str) -> None:
    with pytest.raises(DataError) as caught:
        tasks.get("tag").learn(rows)
    assert str(caught.value).startswith(told)


def test_an_unknown_tag_and_a_row_without_tags_are_refused() -> None:
    task = prepared()
    with pytest.raises(DataError) as caught:
        task.features(Tagged("a:7", ("x", "y"), ("O", "B-ORG")))
    known = f"{', '.join(LABELS)}; correct it, or leave the row out."
    assert str(caught.value) == f'a:7: the tag of "y", "B-ORG", is not one the adapter knows: {known}'
    with pytest.raises(DataError, match=r"^a:8: the row has no tags; tag takes words/tags"):
        task.features(Text("a:8", "x"))


# Tokens


def test_the_first_token_of_a_word_is_labelled() -> None:
    row = prepared().features(Tagged("a:1", ("anna", "x", "lie"), ("B-PER", "O", "I-LOC")))
    assert len(row["input_ids"]) == 1 + 4 + 1 + 3 + 1
    assert row["labels"] == [IGNORE, 3, IGNORE, IGNORE, IGNORE, 0, 2, IGNORE, IGNORE, IGNORE]
    assert prepared().answer(row) == "B-PER O I-LOC"


def test_a_row_that_is_cut_is_counted_and_what_it_lost_is_not_found() -> None:
    task = prepared(max_length=5)
    example = Tagged("a:1", ("ab", "cd", "ef"), ("B-PER", "O", "B-LOC"))
    row = task.features(example)
    assert (len(row["input_ids"]), task.cut_rows) == (5, 1)
    assert row["labels"] == [IGNORE, 3, IGNORE, 0, IGNORE]
    assert task.compared(example, [3, 1]) == (["B-PER", "B-LOC", "O"], ["B-PER", "O", "B-LOC"])
    assert task.cut_rows == 1


def test_a_word_without_a_token_says_nothing_and_moves_no_other() -> None:
    tokenizer = pieces()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    task = prepared(tokenizer)
    example = Tagged("a:1", ("ab", "zz", "cd"), ("B-PER", "I-PER", "B-LOC"))
    assert task.features(example)["labels"] == [IGNORE, 3, IGNORE, 1, IGNORE, IGNORE]
    assert task.compared(example, [3, 1]) == (["B-PER", "O", "B-LOC"], list(example.tags))
    with pytest.raises(DataError, match=r"^a:2: the tokenizer makes no token of its words"):
        task.features(Tagged("a:2", ("zz",), ("O",)))


@pytest.mark.parametrize("name", ["chatml", "llama2", "gemma"])
def test_words_have_the_tokens_that_a_text_has(name: str) -> None:
    """Byte-level tokenizers know a word by the space before it: words one by one would be glued to each other."""
    tokenizer = tokenizer_of(name)
    task = prepared(tokenizer)
    words = ("the", "cat", "sat", ".")
    row = task.features(Tagged("a:1", words, ("O", "B-PER", "O", "O")))
    assert row["input_ids"] == tokenizer(" ".join(words))["input_ids"]
    assert [label for label in row["labels"] if label != IGNORE] == [0, 3, 0, 0]


def test_a_tokenizer_that_does_not_know_words_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedModelError, match=r"a Slow, does not tell which word a token belongs to"):
        prepared(Slow())
    tokenizer = pieces()
    # Of words one by one, each gets a mark that a text has once.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    with pytest.raises(UnsupportedModelError, match="reads words given one by one otherwise than in a text"):
        prepared(tokenizer)


@pytest.mark.parametrize("name", ["chatml", "llama2", "gemma"])
def test_of_a_text_its_own_tokens_are_learned(tmp_path: Path, name: str) -> None:
    """No spaces stand before a comma there, and none are put there."""
    tokenizer = tokenizer_of(name)
    text = "the cat, sat  (on) it."
    row = {"text": text, "spans": [{"start": 4, "end": 7, "label": "PER"}, {"start": 15, "end": 17, "label": "LOC"}]}
    (example,) = read(tmp_path, "a.jsonl", json.dumps(row))
    task = prepared(tokenizer)
    made = task.features(example)
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert made["input_ids"] == encoded["input_ids"]
    assert set(made) == set(encoded) - {"offset_mapping"} | {"labels"}
    told = {text[slice(*encoded["offset_mapping"][at])].strip(): k for at, k in enumerate(made["labels"]) if k > 0}
    assert sorted(told.values()) == [1, 3]
    assert task.asked(Text("a:1", text))["input_ids"] == made["input_ids"]


def test_words_in_one_token_share_its_tag() -> None:
    """The tokenizer knows no commas, so what is glued to one is one unknown token."""
    text = "anna left oslo,rome now"
    words = ("anna", "left", "oslo", ",", "rome", "now")
    places = ((0, 4), (5, 9), (10, 14), (14, 15), (15, 19), (20, 23))
    example = Tagged("a:1", words, ("B-PER", "O", "B-LOC", "I-LOC", "I-LOC", "O"), text, places)
    task = prepared()
    assert task.features(example)["labels"] == [
        IGNORE, 3, IGNORE, IGNORE, IGNORE, 0, IGNORE, IGNORE, IGNORE, 1, 0, IGNORE, IGNORE, IGNORE,
    ]  # fmt: skip
    assert task.compared(example, [3, 0, 1, 0])[0] == list(example.tags)
    assert task.compared(example, [0, 0, 0, 4])[0] == ["O", "O", "O", "O", "O", "I-PER"]
    cut = prepared(max_length=6)
    assert cut.compared(example, [3])[0] == ["B-PER", "O", "O", "O", "O", "O"]


# Loss and metrics


@pytest.fixture(scope="module", params=["bert", "llama"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    there = tmp_path_factory.mktemp(request.param)
    return tiny.run(there / "adapter", tiny.model_folder(there / "base", request.param), task="tag", quant="none")


def test_the_loss_is_of_labelled_tokens_alone_however_rows_are_padded(run: tiny.Run) -> None:
    model = run.model.eval()
    with torch.no_grad():
        whole = run.task.loss(model, run.task.collate(run.rows))
        single = 0.0
        for row in run.rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            labels = torch.tensor(row["labels"])
            single += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
    assert float(whole) == pytest.approx(single, rel=1e-5)


def test_metrics_are_those_of_the_decoded_predictions(run: tiny.Run) -> None:
    """Ragged batches, padding and -100 change nothing: each row is predicted by itself, by plain transformers."""
    task = prepared(run.base.tokenizer, 7, ("O", "B-A", "I-A"))
    rng = random.Random(0)
    examples = []
    for number in range(23):
        words = [f"w{rng.randrange(40, 200)}" for _ in range(rng.randrange(1, 12))]
        examples.append(Tagged(f"a:{number}", tuple(words), tuple(rng.choices(task.labels, k=len(words)))))
    rows = tasks.featurize(task, examples)
    assert task.cut_rows > 3
    with torch.no_grad():
        best = [run.model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1) for row in rows]
    # One token a word here; what was cut off is `O`.
    found = [[task.labels[k] for k in b] + ["O"] * (len(e.words) - len(b)) for b, e in zip(best, examples, strict=True)]
    wanted = metrics.compute("entities", found, [list(example.tags) for example in examples])
    assert wanted["entity_f1"] > 0
    for size in (1, 4, 23):
        values = evaluate.compare(task, run.model, examples, rows, batch_size=size).adapter
        assert {key: values[key] for key in wanted} == pytest.approx(dict(wanted))
    seen = sum(len(b) for b in best)
    labels = [label for row in rows for label in row["labels"]]
    right = sum(int(k) == label for k, label in zip(torch.cat(best), labels, strict=True))
    assert values["accuracy"] == pytest.approx(right / seen)


def test_metrics_of_texts_are_those_of_seqeval_on_the_decoded_predictions(run: tiny.Run) -> None:
    """Words share a token where a comma is glued to them; each row is predicted by itself, by plain transformers."""
    task = prepared(run.base.tokenizer, 9, ("O", "B-A", "I-A"))
    rng = random.Random(0)
    examples, words_of_chunks = [], []
    for number in range(19):
        chunks = [f"w{rng.randrange(40, 200)}{rng.choice(('', '', ',', ',x'))}" for _ in range(rng.randrange(1, 12))]
        text = "  ".join(chunks)
        words_of_chunks.append([len(WORD.findall(chunk)) for chunk in chunks])
        tags = tuple(rng.choices(task.labels, k=sum(words_of_chunks[-1])))
        examples.append(Tagged(f"a:{number}", tuple(WORD.findall(text)), tags, text, places_of(text)))
    rows = tasks.featurize(task, examples)
    assert task.cut_rows > 2
    found = []
    with torch.no_grad():
        for row, counts in zip(rows, words_of_chunks, strict=True):
            best = run.model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
            firsts = [task.labels[k] for k in best] + ["O"] * (len(counts) - len(best))
            found.append([
                tag for first, count in zip(firsts, counts, strict=True)
                for tag in (first, *["O" if first == "O" else f"I-{first[2:]}"] * (count - 1))
            ])  # fmt: skip
    wanted = [list(example.tags) for example in examples]
    assert seqeval.f1_score(wanted, found) > 0
    for size in (1, 4, 19):
        values = evaluate.compare(task, run.model, examples, rows, batch_size=size).adapter
        assert values["entity_f1"] == pytest.approx(seqeval.f1_score(wanted, found))
        assert values["entity_precision"] == pytest.approx(seqeval.precision_score(wanted, found))
        assert values["entity_recall"] == pytest.approx(seqeval.recall_score(wanted, found))


# From file to folder


def test_a_dropped_head_fails(run: tiny.Run, tmp_path: Path) -> None:
    head = "score" if "llama" in type(run.model.get_base_model()).__name__.lower() else "classifier"
    assert run.seal is not None
    assert run.seal.record["heads"] == [head]
    assert seal.verify(run.folder).passed
    tensors = load_file(run.folder / saved.WEIGHTS)
    kept = {name: t for name, t in tensors.items() if f".{head}." not in name}
    assert len(kept) < len(tensors)
    save_file(kept, run.folder / saved.WEIGHTS)
    try:
        failed = {check.name for check in seal.verify(run.folder).checks if not check.passed}
    finally:
        save_file(tensors, run.folder / saved.WEIGHTS)
    assert {"tensors", "heads", "load"} <= failed


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_from_conll_to_a_merged_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], architecture: str) -> None:
    base = tiny.model_folder(tmp_path / "base", architecture)
    rng = random.Random(0)
    lines = []
    for _ in range(40):
        words = [rng.randrange(40, 200) for _ in range(rng.randrange(2, 7))]
        lines += [*(f"w{word} NN {'B-LOW' if word < 120 else 'O'}" for word in words), ""]
    rows = tmp_path / "rows.conll"
    rows.write_text("\n".join(lines), encoding="utf-8")
    words = ["data", "check", str(rows), "--base", str(base), "--task", "tag", "--show", "1"]
    assert main(words) == 0
    assert f"-> {lines[0].split()[-1]}" in capsys.readouterr().out
    out = tmp_path / "run"
    words = ["train", "tag", "--base", str(base), "--out", str(out), "--data.train", str(rows), "--quant", "none"]
    words += ["--train.dtype", "float32"]
    assert main([*words, "--data.eval", "0.2", "--train.steps", "40", "--train.lr", "1e-2"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert all(name in last for name in ("loss", "accuracy", "entity_f1", "entity_precision", "entity_recall"))
    assert main(["evaluate", str(out), "--data", str(rows), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["entity_f1"] > max(0.5, found["base"]["entity_f1"])
    labels = ["O", "B-LOW", "I-LOW"]
    assert json.loads((out / "environment.json").read_text())["task"] == {"labels": labels}
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    assert "AutoModelForTokenClassification" in (out / "README.md").read_text()
    assert main(["verify", str(out)]) == 0
    assert main(["merge", str(out), "--out", str(tmp_path / "merged")]) == 0
    # What anyone has, without this library.
    plain = transformers.AutoModelForTokenClassification
    head = {"num_labels": 3, "id2label": dict(enumerate(labels))}
    adapted = peft.PeftModel.from_pretrained(plain.from_pretrained(base, **head), out).eval()
    merged = plain.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == dict(enumerate(labels))
    ids = torch.tensor([[50, 160, 90, 199]])
    loaded = saved.load(out, device="cpu")
    with torch.no_grad():
        live = loaded.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(adapted(ids).logits, live, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(merged(ids).logits, live, atol=1e-4, rtol=1e-4)


def test_wrong_rows_end_a_training_before_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.model_folder(tmp_path / "base", "bert")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"words": ["w50", "w51"], "tags": ["B-A", "O"]}\n{"words": ["w50"], "tags": ["O", "O"]}\n')
    words = ["train", "tag", "--base", str(base), "--out", str(tmp_path / "run"), "--data.train", str(rows)]
    capsys.readouterr()
    assert main(words) == 1
    assert capsys.readouterr().err == (
        "rows.jsonl:2: tags is a list of 2, but words is one of 1; tag each word once.\n"
    )
    assert main([*words[:-1], "other.conll"]) == 1
    assert "there is no such file" in capsys.readouterr().err


def test_a_share_held_out_leaves_every_type_in_training() -> None:
    from lora_ft.training import rows

    made = [Tagged(f"rows.jsonl:{i}", ("w1", "w2"), ("O", f"B-T{i}" if i < 10 else "B-COMMON")) for i in range(40)]
    for seed in range(5):
        train, held_out = rows._split(made, 0.1, seed, "tag")
        assert len(held_out) == 4
        assert {tag for row in held_out for tag in row.tags} <= {tag for row in train for tag in row.tags}

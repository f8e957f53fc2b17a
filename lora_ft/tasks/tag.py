"""Tag: learn which words of a text are entities, and of which type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import AutoModelForTokenClassification

from lora_ft.data.examples import Example, Tagged, Text
from lora_ft.data.faults import listed
from lora_ft.data.questions import WORDS as QUESTIONS
from lora_ft.data.render import IGNORE
from lora_ft.data.tagged import OUTSIDE, WORD, places_of
from lora_ft.errors import DataError, UnsupportedModelError
from lora_ft.foreign.strictjson import quoted
from lora_ft.scoring.entities import spans
from lora_ft.tasks import MADE_UP, Answering, Batch, Features, Scores, Task, pad

OFFSETS = "offset_mapping"
PROBE = ("One", "two", "three")


class Tag(Task):
    """One tag a word, said at the word's first token; the head is trained, saved and merged whole."""

    name = "tag"
    model_class = AutoModelForTokenClassification
    peft_task = "TOKEN_CLS"
    accuracy_name = "accuracy"
    questions = QUESTIONS
    own_metrics = ("entities",)

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self.labels = tuple(labels)

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example] = ()) -> None:
        if not examples and not self.labels:
            raise DataError(["tag needs its rows at the start, to know the tags; leave out --data.streaming."])
        if not self.labels:
            types = sorted({tag[2:] for e in examples if isinstance(e, Tagged) for tag in e.tags if tag != OUTSIDE})
            # Both of each type: a longer entity than any here is then no unknown tag.
            self.labels = (OUTSIDE, *(f"{mark}-{kind}" for kind in types for mark in "BI")) if types else ()
        if not self.labels:
            place = f"{examples[0].where}: " if examples else ""
            raise DataError([f"{place}no word is tagged as an entity; tag needs words with tags such as B-TYPE."])
        strangers = [
            f"{row.where}: the tag {quoted(tag)} is that of no training row; those have {listed(self.labels)}."
            for row in held_out
            if isinstance(row, Tagged)
            for tag in sorted({*row.tags} - {*self.labels})
        ]
        if strangers:
            raise DataError(strangers)

    def facts(self) -> dict[str, Any]:
        return {"labels": list(self.labels)}

    def config_changes(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }

    def prepare(self, tokenizer: Any, max_length: int) -> None:
        super().prepare(tokenizer, max_length)
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedModelError(
                f"the tokenizer, a {type(tokenizer).__name__}, does not tell which word a token belongs to, as those "
                "with a tokenizer.json do; choose a base that has one."
            )
        # Byte-level tokenizers know a word by the space before it, which words one by one do not have.
        text = tokenizer(" ".join(PROBE), verbose=False)["input_ids"]
        fitting = [space for space in ("", " ") if self._one_by_one(PROBE, space)["input_ids"] == text]
        if not fitting:
            raise UnsupportedModelError(
                f"the tokenizer, a {type(tokenizer).__name__}, reads words given one by one otherwise than in a text, "
                "so that their tags would be learned of what no text holds; choose another base."
            )
        self.space = fitting[0]

    def made_up(self) -> list[Example]:
        names, places = ("Anna Lie", "Ben", "Carla Moe"), ("Oslo", "New York", "Rome", "Lima")
        rows: list[Example] = []
        for n in range(MADE_UP):
            name, place = names[n % 3].split(), places[n % 4].split()
            words = (*name, "went", "to", *place, "on", "day", str(n))
            tags = ["O"] * len(words)
            for start, kind, count in ((0, "PER", len(name)), (len(name) + 2, "LOC", len(place))):
                tags[start : start + count] = [f"B-{kind}", *[f"I-{kind}"] * (count - 1)]
            rows.append(Tagged(f"made up:{n + 1}", words, tuple(tags)))
        return rows

    def features(self, example: Example) -> Features:
        if not isinstance(example, Tagged):
            raise DataError([f"{example.where}: the row has no tags; tag takes words/tags or text/spans rows, or a "
                             ".conll file with a word and its tag a line."])  # fmt: skip
        if unknown := [i for i, tag in enumerate(example.tags) if tag not in self.labels]:
            known = listed(self.labels)
            raise DataError([f"{example.where}: the tag of {quoted(example.words[i])}, {quoted(example.tags[i])}, is "
                             f"not one the adapter knows: {known}; correct it, or leave the row out."
                             for i in unknown])  # fmt: skip
        encoded, first, _ = self._kept(example)
        labels = [IGNORE] * len(encoded["input_ids"])
        for word, at in first.items():
            labels[at] = self.labels.index(example.tags[word])
        return {**encoded, "labels": labels}

    def _kept(self, example: Tagged) -> tuple[dict[str, Any], dict[int, int], set[int]]:
        """Returns a row's tokens, cut where they are too many, and what `_words` says of its words.

        Raises:
            DataError: no word has a token of its own left.
        """
        encoded = self._encoded(example)
        whole = len(encoded["input_ids"])
        if whole > self.max_length:
            encoded = self._encoded(example, truncation=True, max_length=self.max_length)
        self.count_cut(whole - len(encoded["input_ids"]))
        first, joined = _words(encoded, example)
        if not first:
            raise DataError([f"{example.where}: the tokenizer makes no token of its words; remove the row."])
        return {key: value for key, value in encoded.items() if key != OFFSETS}, first, joined

    def asked(self, example: Example) -> Features:
        if isinstance(example, Text):
            words = tuple(word[0] for word in WORD.finditer(example.text))
            example = Tagged(example.where, words, (), example.text, places_of(example.text))
        elif not isinstance(example, Tagged):
            return super().asked(example)
        encoded, first, joined = self._kept(example)
        labels = [IGNORE] * len(encoded["input_ids"])
        for at in first.values():
            labels[at] = 0
        beside = {} if example.text is None else {"text": example.text, "places": list(example.places)}
        return {**encoded, "labels": labels, "words": list(example.words), "tagged": list(first),
                "joined": sorted(joined), **beside}  # fmt: skip

    def predict(self, model: Answering, rows: Sequence[Features]) -> list[dict[str, Any]]:
        """Returns the tag of each word, and the entities: `start` and `end` in characters of a text, else in words.

        Of a text the words are said too. A word that was cut off, or has no token at all, gets `O`.
        """
        said = [logits_NV.argmax(axis=-1).tolist() for logits_NV in model.of_rows(rows, self.logits)]
        return [self._said(row, classes) for row, classes in zip(rows, said, strict=True)]

    def _said(self, row: Features, classes: Sequence[int]) -> dict[str, Any]:
        words = row["words"]
        tags = self._tags(len(words), dict(zip(row["tagged"], classes, strict=True)), set(row["joined"]))
        places = row.get("places")
        entities = []
        for kind, first, end in spans(tags):
            start, stop = (places[first][0], places[end - 1][1]) if places else (first, end)
            text = row["text"][start:stop] if places else " ".join(words[first:end])
            entities.append({"label": kind, "text": text, "start": start, "end": stop})
        return {"prediction": tags, "entities": entities} | ({"words": words} if places else {})

    def answer(self, row: Features) -> str:
        return " ".join(self.labels[label] for label in row["labels"] if label != IGNORE)

    def compared(self, example: Example, classes: Sequence[int]) -> tuple[list[str], list[str]]:
        """Returns the tags found and those wanted, of all words: one that was cut off, or has no token, gets `O`."""
        if not isinstance(example, Tagged):
            raise TypeError(f"a {type(example).__name__} row has no tags")
        first, joined = _words(self._encoded(example, truncation=True, max_length=self.max_length), example)
        return self._tags(len(example.words), dict(zip(first, classes, strict=True)), joined), list(example.tags)

    def _tags(self, count: int, told: dict[int, int], joined: set[int]) -> list[str]:
        """Returns the tag of each word: its own, or that of the one before it gone on with, whose token it shares."""
        tags: list[str] = []
        for word in range(count):
            before = tags[-1] if tags and word in joined else OUTSIDE
            own = self.labels[told[word]] if word in told else None
            tags.append(own or (OUTSIDE if before == OUTSIDE else f"I-{before[2:]}"))
        return tags

    def collate(self, rows: Sequence[Features]) -> Batch:
        batch = {"input_ids": pad([row["input_ids"] for row in rows], self.tokenizer.pad_token_id)}
        for key in ("attention_mask", "token_type_ids"):
            if key in rows[0]:
                batch[key] = pad([row[key] for row in rows], 0)
        batch["labels"] = pad([row["labels"] for row in rows], IGNORE)
        return batch

    def score(self, model: nn.Module, batch: Batch) -> Scores:
        labels_BT = batch["labels"]
        logits_BTV = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        row_N, column_N = (labels_BT != IGNORE).nonzero(as_tuple=True)
        return Scores(logits_BTV[row_N, column_N], labels_BT[row_N, column_N], row_N)

    def _encoded(self, example: Tagged, **limits: Any) -> Any:
        """Returns a text as the tokenizer reads it, with the place of each token, else words read one by one."""
        if example.text is not None:
            return self.tokenizer(example.text, return_offsets_mapping=True, verbose=False, **limits)
        return self._one_by_one(example.words, self.space, **limits)

    def _one_by_one(self, words: Sequence[str], space: str, **limits: Any) -> Any:
        """Returns words as the tokenizer reads them one by one, all but the first with `space` before them."""
        spaced = [f"{space if i else ''}{word}" for i, word in enumerate(words)]
        return self.tokenizer(spaced, is_split_into_words=True, verbose=False, **limits)


def _words(encoded: Any, example: Tagged) -> tuple[dict[int, int], set[int]]:
    """Returns the place of the first token of each word that has one of its own, and the words that have none.

    Those lie with the word before them in one token, as in a text only. Neither are words that are cut off.
    """
    first: dict[int, int] = {}
    if example.text is None:
        for at, word in enumerate(encoded.word_ids()):
            if word is not None:
                first.setdefault(word, at)
        return first, set()
    joined: set[int] = set()
    places, here = example.places, 0
    for at, (start, end) in enumerate(encoded[OFFSETS]):
        while here < len(places) and places[here][1] <= start:
            here += 1
        stop = here
        while stop < len(places) and places[stop][0] < end:
            stop += 1
        if start < end and here < stop:
            first.setdefault(here, at)
            joined.update(range(here + 1, stop))
    return first, joined - first.keys()

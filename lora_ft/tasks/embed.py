"""Embed: learn vectors of texts, alike where texts belong together.

Rows with a label, and texts with one that belongs to them, are contrasted with each other: in a step each anchor has to
tell its positives from the other texts (InfoNCE, van den Oord et al. 2018, arXiv 1807.03748, on in-batch negatives,
Henderson et al. 2017, arXiv 1705.00652, section 4.4). Texts with a score learn to be as alike as it says.

Shapes: R texts, T tokens, D width of a vector, A anchors, C candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from transformers import AutoModel, AutoModelForMaskedLM

from lora_ft.data import labels as known
from lora_ft.data import questions
from lora_ft.data import vectors as other_libraries
from lora_ft.data.examples import Example, Labelled, Match, Pair, Scored, Text
from lora_ft.data.render import IGNORE
from lora_ft.data.vectors import POOLINGS
from lora_ft.errors import DataError
from lora_ft.foreign.strictjson import shown
from lora_ft.model.modes import unwrapped
from lora_ft.tasks import MADE_UP, Answering, Batch, Features, Task, pad

# Cosines are divided by it (Gao et al. 2021, arXiv 2104.08821, section 3).
TEMPERATURE = 0.05
# For a similarity that no anchor should look at: its share of the sum is zero, and so is its gradient.
NEVER = -1e4
# On a processor texts of like length are computed together, so many of them, and little of it is padding.
TOGETHER = 32
# The group of a negative.
NOBODY = -1


class Embed(Task):
    """One vector of length 1 a text, pooled from the states of its tokens; there is no head."""

    name = "embed"
    model_class = AutoModel
    peft_task = "FEATURE_EXTRACTION"
    accuracy_name = ""
    contrasts = True
    questions = questions.ANCHORS

    def __init__(self, pooling: str = "mean") -> None:
        if pooling not in POOLINGS:
            raise TypeError(f"pooling is none of {', '.join(POOLINGS)}")
        self.pooling = pooling

    def meet(self, folder: Path, config: Any) -> None:
        self.pooling = other_libraries.pooling_of(folder, reads_both_ways(config))

    def learn(self, examples: Sequence[Example], held_out: Sequence[Example] = ()) -> None:
        for rows in (examples, held_out):
            _refuse_mixture(rows)
        labelled = [row for row in examples if isinstance(row, Labelled) and row.text_pair is None]
        labels = {row.label for row in labelled}
        if labelled and (len(labels) < 2 or len(labels) == len(labelled)):
            found = f"all rows have the label {shown(labelled[0].label)}" if len(labels) < 2 else "no two share a label"
            raise DataError([f"{labelled[0].where}: {found}; embed learns which texts belong together from rows of "
                             "two labels or more, and two rows or more of some."])  # fmt: skip

    def facts(self) -> dict[str, Any]:
        return {"pooling": self.pooling}

    def files(self, config: Any, max_length: int) -> dict[str, Any]:
        return other_libraries.files(self.pooling, config.get_text_config().hidden_size, max_length)

    def made_up(self) -> list[Example]:
        kinds = ("even", "odd", "square")
        return [
            Labelled(f"made up:{n + 1}", f"the {kinds[n % 3]} number {'no. ' * (n % 4)}{n * n}", kinds[n % 3])
            for n in range(MADE_UP)
        ]

    def features(self, example: Example) -> Features:
        score = None
        if isinstance(example, Scored) or (isinstance(example, Labelled) and example.text_pair is not None):
            texts, score = [example.text, str(example.text_pair)], _score(example)
            # Of this row alone, whatever texts it shares with others.
            group, told = repr(example), f"{score:g}"
        elif isinstance(example, Labelled):
            texts, told = [example.text], _label(example)
            group = f"label {told}"
        elif isinstance(example, Match | Pair):
            texts, group, told = _matched(example)
        else:
            raise DataError([f"{example.where}: a {type(example).__name__.lower()} row does not say which texts belong "
                             "together; embed takes text/label, anchor/positive(/negative), question/answer or "
                             "sentence1/sentence2/score rows."])  # fmt: skip
        ids, lost = zip(*(self._ids(text, example.where) for text in texts), strict=True)
        self.count_cut(sum(lost))
        row = {"input_ids": ids[0], "attention_mask": [1] * len(ids[0]), "labels": 0, "others": list(ids[1:])}
        row |= {"texts": [_number(text) for text in texts], "group": _number(group), "told": told}
        return row if score is None else row | {"score": score}

    def streamed(self, example: Example) -> Features:
        if isinstance(example, Labelled) and example.text_pair is None:
            raise DataError([f"{example.where}: a row with a label is contrasted with another of the label, and rows "
                             "that are streamed come as they lie, which may be label after label: leave out "
                             "--data.streaming, or give anchor/positive rows."])  # fmt: skip
        return self.features(example)

    def candidates(self, row: Features) -> list[Features]:
        texts = [row["input_ids"], *row["others"]]
        first = 1 if row["others"] else 0
        return [
            {
                **row,
                "input_ids": texts[number],
                "attention_mask": [1] * len(texts[number]),
                "others": [],
                "texts": [row["texts"][number]],
                "group": NOBODY if number > 1 else row["group"],
            }
            for number in range(first, len(texts))
        ]

    def _ids(self, text: str, where: str) -> tuple[list[int], int]:
        """Returns the token ids of a text, and how many were cut off. Raises DataError where there are none."""
        whole = self.tokenizer(text, verbose=False)["input_ids"]
        if all(token == self.tokenizer.pad_token_id for token in whole):
            raise DataError([f"{where}: the base's tokenizer knows nothing of a text; leave the row out."])
        if len(whole) <= self.max_length:
            return list(whole), 0
        kept = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        return list(kept), len(whole) - len(kept)

    def longest(self) -> Features:
        tokens = [0] * self.max_length
        row = super().longest()
        return row | {"labels": 0, "others": [tokens], "texts": [0, 1], "group": 0, "told": ""}

    def answer(self, row: Features) -> str:
        return str(row["told"])

    def lengths(self, row: Features) -> list[int]:
        return [len(row["input_ids"]), *map(len, row.get("others", ()))]

    def asked(self, example: Example) -> Features:
        if not isinstance(example, Text):
            return super().asked(example)
        ids, lost = self._ids(example.text, example.where)
        self.count_cut(lost)
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": 0}

    def predict(self, model: Answering, rows: Sequence[Features]) -> list[dict[str, Any]]:
        said = model.of_rows(rows, lambda inner, batch: self.vectors(inner, batch).tolist())
        return [{"prediction": vector} for vector in said]

    def canary(self, row: Features) -> Features:
        return {key: row[key] for key in ("input_ids", "attention_mask", "labels")}

    def order(self, rows: Sequence[Features]) -> Callable[[torch.Generator], Iterable[int]] | None:
        """Returns how to draw an order in which rows of a label come two by two, so that each has one in its batch.

        The pairs of each label are spread over the epoch, so that a batch holds as many labels as it can. What labels
        leave over, a row each, comes two by two among them, as negatives; one row that is then left comes last.
        """
        if not rows or len(rows[0].get("texts", ())) != 1:
            return None
        groups = [row["group"] for row in rows]

        def draw(generator: torch.Generator) -> list[int]:
            members: dict[int, list[int]] = {}
            for place in torch.randperm(len(groups), generator=generator).tolist():
                members.setdefault(groups[place], []).append(place)
            alone = [places[-1] for places in members.values() if len(places) % 2]
            spread: list[tuple[float, list[int]]] = []
            for places in (*members.values(), alone):
                pairs = [places[at : at + 2] for at in range(0, len(places) - 1, 2)]
                drawn = torch.rand(len(pairs), generator=generator).tolist()
                spread += [
                    ((n + part) / len(pairs), pair) for n, (part, pair) in enumerate(zip(drawn, pairs, strict=True))
                ]
            return [place for _, pair in sorted(spread) for place in pair] + alone[len(alone) // 2 * 2 :]

        return draw

    def collate(self, rows: Sequence[Features]) -> Batch:
        texts = [
            (row, number, ids) for row in rows for number, ids in enumerate([row["input_ids"], *row.get("others", ())])
        ]
        batch = {
            "input_ids": pad([ids for _, _, ids in texts], self.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(ids) for _, _, ids in texts], 0),
            # An anchor is the first text of its row.
            "labels": torch.tensor([IGNORE if number else row["labels"] for row, number, _ in texts]),
        }
        if "texts" not in rows[0]:
            return batch
        # A row that only fills a place in one of several processes is nothing to the others.
        there = [row["labels"] != IGNORE for row, _, _ in texts]
        batch |= {
            "text": torch.tensor([row["texts"][number] for row, number, _ in texts]),
            "group": torch.tensor([NOBODY if number > 1 else row["group"] for row, number, _ in texts]),
            "candidate": torch.tensor(
                [
                    int(here and (number > 0 or not row["others"]))
                    for here, (row, number, _) in zip(there, texts, strict=True)
                ]
            ),
        }
        if "score" in rows[0]:
            batch["score"] = torch.tensor([row["score"] for row, _, _ in texts])
        return batch

    def together(self, row: Mapping[str, Any]) -> bool:
        return "score" not in row

    def inputs(self, batch: Batch) -> Batch:
        return {key: batch[key] for key in ("input_ids", "attention_mask")}

    def vectors(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        ids_RT, mask_RT = batch["input_ids"], batch["attention_mask"]
        if ids_RT.device.type != "cpu" or isinstance(next(model.parameters()), FakeTensor):
            return self._pooled(model, ids_RT, mask_RT)
        lengths_R, order_R = mask_RT.sum(dim=1).sort(stable=True)
        parts = [
            self._pooled(model, ids_RT[at, :longest], mask_RT[at, :longest])
            for at, longest in zip(
                order_R.split(TOGETHER), [int(part[-1]) for part in lengths_R.split(TOGETHER)], strict=True
            )
        ]
        return torch.cat(parts)[order_R.argsort()]

    def _pooled(self, model: nn.Module, ids_RT: torch.Tensor, mask_RT: torch.Tensor) -> torch.Tensor:
        config = unwrapped(model).config
        cache = {} if reads_both_ways(config) else {"use_cache": False}
        states_RTD = model(input_ids=ids_RT, attention_mask=mask_RT, **cache)[0].float()
        if self.pooling == "cls":
            pooled_RD = states_RTD[:, 0]
        elif self.pooling == "lasttoken":
            pooled_RD = states_RTD[torch.arange(len(ids_RT), device=ids_RT.device), mask_RT.sum(dim=1) - 1]
        else:
            weights_RT = (mask_RT * mask_RT.cumsum(dim=1) if self.pooling == "weightedmean" else mask_RT).float()
            pooled_RD = (states_RTD * weights_RT[..., None]).sum(dim=1) / weights_RT.sum(dim=1, keepdim=True)
        return nn.functional.normalize(pooled_RD, dim=-1)

    def said(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns each number of the vectors, [R * D, 1], in units of what one would be if all were as large.

        A seal takes numbers for means of normal distributions of unit variance, so that the mean divergence over them
        is half the squared distance of two vectors, which is 1 less their cosine.
        """
        vectors_RD = self.vectors(model, batch)
        return vectors_RD.reshape(-1, 1) * vectors_RD.shape[1] ** 0.5

    def contrast(self, vectors_RD: torch.Tensor, batch: Batch, anchors_A: torch.Tensor) -> torch.Tensor:
        with torch.autocast(vectors_RD.device.type, enabled=False):
            return self._contrast(vectors_RD, batch, anchors_A)

    def _contrast(self, vectors_RD: torch.Tensor, batch: Batch, anchors_A: torch.Tensor) -> torch.Tensor:
        candidates_C = batch["candidate"].nonzero()[:, 0]
        cosines_AC = vectors_RD[anchors_A] @ vectors_RD[candidates_C].T
        group_R, text_R = batch["group"], batch["text"]
        same_AC = group_R[anchors_A][:, None] == group_R[candidates_C]
        positive_AC = same_AC & (anchors_A[:, None] != candidates_C)
        positives_A = positive_AC.sum(dim=1).clamp(min=1)
        if "score" in batch:
            # Reimers and Gurevych 2019, arXiv 1908.10084, section 3: the regression objective.
            found_A = (cosines_AC - batch["score"][anchors_A][:, None]).square() * positive_AC
            return found_A.sum(dim=1) / positives_A
        # No negative is a text of the same group, the anchor's own text, or that of one of its positives.
        texts_C = _numbered(text_R[candidates_C])
        is_positive_AC = torch.zeros_like(cosines_AC).index_add(1, texts_C, positive_AC.to(cosines_AC.dtype))
        negative_AC = ~same_AC & (is_positive_AC[:, texts_C] == 0)
        negative_AC &= text_R[anchors_A][:, None] != text_R[candidates_C]
        z_AC = cosines_AC / TEMPERATURE
        others_A = z_AC.masked_fill(~negative_AC, NEVER).logsumexp(dim=1)
        # Of each positive alone against the negatives: -log(e^z / (e^z + the sum over the negatives)).
        nll_AC = nn.functional.softplus(others_A[:, None] - z_AC) * positive_AC
        return nll_AC.sum(dim=1) / positives_A

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns the loss summed over the anchors of a batch, each against the texts of the batch.

        Where `gradient` holds that of a larger loss by each vector of the batch, and `error` the share of each text in
        it, that is what the returned sum has as gradient and value (`lora_ft.training.gradcache`).
        """
        vectors_RD = self.vectors(model, batch)
        if "gradient" not in batch:
            return self.contrast(vectors_RD, batch, (batch["labels"] != IGNORE).nonzero()[:, 0]).sum()
        product = (vectors_RD * batch["gradient"]).sum()
        return product - product.detach() + batch["error"].sum()


def reads_both_ways(config: Any) -> bool:
    """Returns whether each token of a model sees those after it, as in BERT."""
    return type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)


def _refuse_mixture(rows: Sequence[Example]) -> None:
    kinds = [_kind(row) for row in rows]
    if len(set(kinds)) > 1:
        other = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
        raise DataError([f"{rows[other].where}: is a row of {kinds[other]}, but {rows[0].where} is one of {kinds[0]}; "
                         "embed takes rows of one kind at a time."])  # fmt: skip


def _kind(row: Example) -> str:
    if isinstance(row, Match | Pair):
        return "anchor and positive"
    if isinstance(row, Scored) or (isinstance(row, Labelled) and row.text_pair is not None):
        return "texts and score"
    return "text and label" if isinstance(row, Labelled) else "no use"


def _matched(row: Match | Pair) -> tuple[list[str], str, str]:
    """Returns the texts of a row, what they are known to belong to, and the positive."""
    if isinstance(row, Pair):
        return [row.prompt, row.completion], f"anchor {row.prompt}", row.completion
    negatives = [row.negative] if row.negative is not None else []
    return [row.anchor, row.positive, *negatives], f"anchor {row.anchor}", row.positive


def _label(row: Labelled) -> str:
    if isinstance(row.label, str):
        return row.label
    kind = "several classes" if isinstance(row.label, tuple) else "a number"
    raise DataError([f"{row.where}: label is {shown(row.label)}, {kind}; embed takes one class a row, as a string or a "
                     "whole number, or two texts and a score."])  # fmt: skip


def _score(row: Labelled | Scored) -> float:
    told = row.score if isinstance(row, Scored) else row.label
    score = known.number(told)
    if score is None:
        raise DataError([f"{row.where}: label is {shown(told)}; of two texts embed learns how alike they are, so give "
                         "a number from -1 to 1."])  # fmt: skip
    if abs(score) > 1:
        raise DataError([f"{row.where}: the score is {score:g}, and a cosine lies from -1 to 1: divide all scores by "
                         "the largest there can be."])  # fmt: skip
    return score


def _number(text: str) -> int:
    """Returns a number of 63 bits by which a text is known, in every process and run."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]) >> 1


def _numbered(values_C: torch.Tensor) -> torch.Tensor:
    """Returns numbers from 0 in place of values, the same for the same one; always below C."""
    sorted_C, order_C = values_C.sort()
    new_C = torch.cat([torch.zeros_like(sorted_C[:1]), (sorted_C[1:] != sorted_C[:-1]).to(sorted_C.dtype)])
    return torch.empty_like(values_C).scatter(0, order_C, new_C.cumsum(dim=0))

"""Metrics as `evaluate` modules of our own, so that nothing is fetched when they run; and those on the hub, by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import datasets
import evaluate

from lora_ft import hub
from lora_ft.config import FROM_HUB, TOOL_CALLS
from lora_ft.data import calls
from lora_ft.errors import ConfigError, DataError, SourceError
from lora_ft.scoring import entities

# Not None, which is what `null` is read as.
NOT_JSON = object()
TEXTS = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
TAGS = datasets.Features({name: datasets.Sequence(datasets.Value("string")) for name in ("predictions", "references")})
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class ExactMatch(evaluate.Metric):
    """Share of predictions equal to their reference, white space at the ends aside."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, TEXTS)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {"exact_match": _share(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True))}


class JsonMatch(evaluate.Metric):
    """Share of predictions that parse to the same JSON as their reference, and the same for each of its fields."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, TEXTS)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        found, wanted = [parsed(text) for text in predictions], [parsed(text) for text in references]
        problems = [
            f"json_match: reference {i} of {len(wanted)} is not JSON: {text[:60]!r}; mend it, or leave the metric out."
            for i, (text, value) in enumerate(zip(references, wanted, strict=True), start=1)
            if value is NOT_JSON
        ]
        if problems:
            raise DataError(problems)
        pairs = list(zip(found, wanted, strict=True))
        fields = sorted({key for want in wanted if isinstance(want, dict) for key in want})
        return {"json_match": _share(f == w for f, w in pairs)} | {
            f"json_match.{field}": _share(
                isinstance(f, dict) and field in f and f[field] == w[field]
                for f, w in pairs
                if isinstance(w, dict) and field in w
            )
            for field in fields
        }


class Rouge(evaluate.Metric):
    """ROUGE as the package rouge-score counts it, without stemming: the mean F-measure over rows, from 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, TEXTS)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        # It brings in nltk, which takes seconds.
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer

        words = DefaultTokenizer(use_stemmer=False)
        if not any(words.tokenize(text) for text in references):
            raise DataError(
                ["rouge: none of the references has a Latin letter or a digit, the only ones that it reads; use chrf."]
            )
        scorer = RougeScorer(list(ROUGE), tokenizer=words)
        rows = [scorer.score(want, said) for want, said in zip(references, predictions, strict=True)]
        return {name: sum(row[name].fmeasure for row in rows) / len(rows) for name in ROUGE}


class Bleu(evaluate.Metric):
    """BLEU over all rows as sacrebleu counts it by default, from 0 to 100."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, TEXTS)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        from sacrebleu import corpus_bleu

        return {"bleu": corpus_bleu(list(predictions), [list(references)]).score}


class Chrf(evaluate.Metric):
    """ChrF2 over all rows as sacrebleu counts it by default, from 0 to 100."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, TEXTS)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        from sacrebleu import corpus_chrf

        return {"chrf": corpus_chrf(list(predictions), [list(references)]).score}


class ToolCalls(evaluate.Metric):
    """Shares of replies that hold a call, that call the functions wanted, and that call them with equal arguments.

    A call is JSON with a name and arguments, whatever stands around it.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, TEXTS)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        found, wanted = [calls.written(text) for text in predictions], [calls.written(text) for text in references]
        problems = [
            f"{TOOL_CALLS}: reference {i} of {len(wanted)} holds no JSON with a name and arguments: {text[:60]!r}; "
            "evaluate rows that end in a call, or leave the metric out."
            for i, (text, value) in enumerate(zip(references, wanted, strict=True), start=1)
            if not value
        ]
        if problems:
            raise DataError(problems)
        pairs = list(zip(found, wanted, strict=True))
        return {
            "tool_call_valid": _share(said for said, _ in pairs),
            "tool_call_name": _share(
                [one.name for one in said] == [one.name for one in right] for said, right in pairs
            ),
            "tool_call_match": _share(said == right for said, right in pairs),
        }


class Entities(evaluate.Metric):
    """Entities found among tags: F1, precision and recall over all of them, and the F1 of each type."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, TAGS)

    def _compute(self, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
        counts = entities.count(predictions, references)
        whole = entities.total(counts)
        found = {"entity_f1": whole.f1, "entity_precision": whole.precision, "entity_recall": whole.recall}
        return found | {f"entity_f1.{kind}": counts[kind].f1 for kind in counts}


METRICS: dict[str, type[Any]] = {
    "exact_match": ExactMatch,
    "json_match": JsonMatch,
    "rouge": Rouge,
    "bleu": Bleu,
    "chrf": Chrf,
    TOOL_CALLS: ToolCalls,
    "entities": Entities,
}


def compute(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> Mapping[str, float]:
    """Returns the values of the metric `name`, by plain name.

    Raises:
        SourceError: a metric on the hub cannot be fetched. ConfigError: it does not take texts, or gives no number.
        DataError: the references are none that the metric can be computed of.
    """
    if name.startswith(FROM_HUB):
        return _on_hub(name, predictions, references)
    # In memory alone, for else it goes by way of a file in the cache.
    return METRICS[name](keep_in_memory=True).compute(predictions=list(predictions), references=list(references))


def _on_hub(name: str, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns the numbers that a metric on the hub gives, those besides the one it is called for as `NAME.KEY`."""
    repo = name.removeprefix(FROM_HUB)
    try:
        module = hub.metric(repo)
    except hub.UnavailableError as error:
        raise SourceError(
            f"data.metrics {name} cannot be fetched: {error}; check the name and the network, or leave it out."
        ) from None
    try:
        found = module.compute(predictions=list(predictions), references=list(references))
    # It is code of others: whatever it raises on texts, such as for labels that it wants, is the user's to know.
    except Exception as error:
        raise ConfigError(
            f"data.metrics {name}: it fails on texts: {hub.reason(error)}; use a metric of texts, or leave it out."
        ) from error
    short = repo.rpartition("/")[2]
    numbers = {
        key if key == short else f"{short}.{key}": float(value)
        for key, value in (found or {}).items()
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    }
    if not numbers:
        raise ConfigError(f"data.metrics {name}: it gives no number; use another metric, or leave it out.")
    return numbers


def parsed(text: str) -> Any:
    """Returns the JSON value in `text`, or NOT_JSON."""
    try:
        return json.loads(text)
    # Not JSONDecodeError alone: a model may also write a thousand brackets, or as many digits.
    except (ValueError, RecursionError):
        return NOT_JSON


def _info(metric: evaluate.Metric, features: datasets.Features) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(description=type(metric).__doc__ or "", citation="", features=features)


def _share(matches: Any) -> float:
    hits = [bool(match) for match in matches]
    return sum(hits) / len(hits) if hits else 0.0

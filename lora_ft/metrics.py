"""Metrics on generated texts as `evaluate` modules of our own, so that nothing is fetched when they run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from lora_ft.errors import DataError

# Not None, which is what `null` is read as.
NOT_JSON = object()
TEXTS = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})


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


METRICS: dict[str, type[Any]] = {"exact_match": ExactMatch, "json_match": JsonMatch}


def compute(name: str, predictions: Sequence[str], references: Sequence[str]) -> Mapping[str, float]:
    """Returns the values of the metric `name`, by plain name."""
    return METRICS[name]().compute(predictions=list(predictions), references=list(references))


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

"""Metrics on classes and numbers as `evaluate` modules of our own, with scikit-learn behind them; nothing is fetched.

Shapes: B rows, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

# As Guo et al. 2017 (arXiv 1706.04599) have it.
BINS = 15
# A class is there from this probability on, where a row may have several.
THERE = 0.5
# Of more classes nobody could read a matrix, which grows with their square.
MOST_IN_MATRIX = 400
# What is said of single classes: tables for a page, and no numbers to compare.
TABLES = ("per_class", "confusion_matrix")


class OneClass(evaluate.Metric):
    """How right the likeliest class of each row is, and how right its probability.

    `accuracy`, `f1_macro` and `f1_weighted` over the classes that occur, as scikit-learn has them; `brier`, the mean
    squared error of the probabilities, summed over the classes (of two, that of one); `calibration_error`, by how much
    the likeliest class is right more or less often than it claims, over 15 bins; of two classes `auroc` and `auprc` of
    the second in the alphabet; `per_class`; of 400 classes or fewer `confusion_matrix`, a row for each right class.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, datasets.List(datasets.Value("float64")), datasets.Value("int64"))

    def _compute(
        self, predictions: Sequence[Sequence[float]], references: Sequence[int], labels: Sequence[str]
    ) -> dict[str, Any]:
        from sklearn import metrics

        p_BV, right_B = np.asarray(predictions), np.asarray(references)
        said_B, classes = p_BV.argmax(axis=1), range(len(labels))
        values: dict[str, Any] = {"accuracy": float(metrics.accuracy_score(right_B, said_B))}
        for average in ("macro", "weighted"):
            values[f"f1_{average}"] = float(metrics.f1_score(right_B, said_B, average=average, zero_division=0))
        values["brier"] = float(metrics.brier_score_loss(right_B, _of_two(p_BV), labels=list(classes)))
        values["calibration_error"] = calibration_error(p_BV.max(axis=1), said_B == right_B)
        if len(labels) == 2 and len(set(references)) == 2:
            values["auroc"] = float(metrics.roc_auc_score(right_B, p_BV[:, 1]))
            values["auprc"] = float(metrics.average_precision_score(right_B, p_BV[:, 1]))
        values["per_class"] = _per_class(right_B, said_B, list(classes), labels)
        if len(labels) <= MOST_IN_MATRIX:
            values["confusion_matrix"] = metrics.confusion_matrix(right_B, said_B, labels=list(classes)).tolist()
        return values


class ManyClasses(evaluate.Metric):
    """How right the classes of each row are that are likelier than not.

    `f1_micro` and `f1_macro` over all classes, `subset_accuracy`, the share of rows with all of their classes and no
    other, and `per_class`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, datasets.List(datasets.Value("float64")), datasets.List(datasets.Value("int64")))

    def _compute(
        self, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[int]], labels: Sequence[str]
    ) -> dict[str, Any]:
        from sklearn import metrics

        said_BV, right_BV = (np.asarray(predictions) > THERE).astype(int), np.asarray(references)
        # Of a single column scikit-learn would count the rows without the class too.
        columns = list(range(len(labels))) if len(labels) > 1 else [1]
        if len(labels) == 1:
            said_BV, right_BV = said_BV[:, 0], right_BV[:, 0]
        values: dict[str, Any] = {
            f"f1_{average}": float(
                metrics.f1_score(right_BV, said_BV, labels=columns, average=average, zero_division=0)
            )
            for average in ("micro", "macro")
        }
        values["subset_accuracy"] = float(metrics.accuracy_score(right_BV, said_BV))
        values["per_class"] = _per_class(right_BV, said_BV, columns, labels)
        return values


class Numbers(evaluate.Metric):
    """How far numbers are from those wanted: `mse`, `mae`, and the correlations `pearson` and `spearman`.

    A correlation is left out where all numbers on a side are the same, for there is none.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, datasets.Value("float64"), datasets.Value("float64"))

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        from scipy import stats
        from sklearn import metrics

        values = {
            "mse": float(metrics.mean_squared_error(references, predictions)),
            "mae": float(metrics.mean_absolute_error(references, predictions)),
        }
        if len(set(predictions)) > 1 and len(set(references)) > 1:
            values["pearson"] = float(stats.pearsonr(references, predictions).statistic)
            values["spearman"] = float(stats.spearmanr(references, predictions).statistic)
        return values


MEASURES: dict[str, type[Any]] = {
    "single_label_classification": OneClass,
    "multi_label_classification": ManyClasses,
    "regression": Numbers,
}


def measure(name: str, logits: np.ndarray, targets: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
    """Returns the values of a measure, by plain name.

    Args:
        logits: one row for each of `targets`: of the classes; where a row may have several, 0 and the logit of each
            class in turn; or the number itself.
        targets: the right class of each row, 0 or 1 for each class, or the number wanted.
    """
    logits = logits.astype(np.float64)
    # In memory alone, for else it goes by way of a file in the cache.
    metric = MEASURES[name](keep_in_memory=True)
    if name == "regression":
        return metric.compute(predictions=logits[:, 0].tolist(), references=[float(value) for value in targets])
    if name == "multi_label_classification":
        logits = logits.reshape(len(logits), len(labels), 2)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    p_BV = p[..., 1] if p.ndim == 3 else p
    return metric.compute(predictions=p_BV.tolist(), references=list(targets), labels=labels)


def calibration_error(claimed_B: np.ndarray, right_B: np.ndarray) -> float:
    """Returns the mean distance between probability claimed and share right, over bins of equal width, in [0, 1]."""
    bins_B = np.minimum((claimed_B * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins_B, weights=claimed_B - right_B, minlength=BINS)
    return float(np.abs(gaps).sum() / len(claimed_B))


def _of_two(p_BV: np.ndarray) -> np.ndarray:
    """Returns the probability of the second of two classes, [B], else those of all, [B, V], as scikit-learn wants."""
    return p_BV[:, 1] if p_BV.shape[1] == 2 else p_BV


def _per_class(
    right: np.ndarray, said: np.ndarray, columns: Sequence[int], labels: Sequence[str]
) -> dict[str, dict[str, float | int]]:
    """Returns precision, recall, F1 and support of each class; 0 where nothing can be divided by."""
    from sklearn import metrics

    found = metrics.precision_recall_fscore_support(right, said, labels=columns, average=None, zero_division=0)
    return {
        label: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for label, p, r, f, s in zip(labels, *found, strict=True)
    }


def _info(metric: evaluate.Metric, predictions: Any, references: Any) -> evaluate.MetricInfo:
    features = datasets.Features({"predictions": predictions, "references": references})
    return evaluate.MetricInfo(description=type(metric).__doc__ or "", citation="", features=features)

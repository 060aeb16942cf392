"""Scores: one number for a list of predictions. Own formulas only where scikit-learn and scipy have none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics as sk

from paretune.errors import DataError, unknown
from paretune.tasks.text_metrics import TEXT

Predictions = Sequence[Any]
_CLASSES = ("classification", "choice", "image", "audio")


def _accuracy(truth: list[Any], predicted: list[Any]) -> float:
    return float(np.mean([t == p for t, p in zip(truth, predicted, strict=True)]))


def _f1(truth: list[Any], predicted: list[Any]) -> float:
    """F1 of the second class where there are two, else the mean over the classes."""
    if len(np.shape(truth)) == 1 and set(truth) | set(predicted) <= {0, 1}:
        return float(sk.f1_score(truth, predicted, zero_division=0))
    return _f1_macro(truth, predicted)


def _f1_macro(truth: list[Any], predicted: list[Any]) -> float:
    return float(sk.f1_score(truth, predicted, average="macro", zero_division=0))


def _f1_micro(truth: list[Any], predicted: list[Any]) -> float:
    return float(sk.f1_score(truth, predicted, average="micro", zero_division=0))


def _matthews(truth: list[Any], predicted: list[Any]) -> float:
    return float(sk.matthews_corrcoef(truth, predicted))


def _correlation(function: Callable[..., Any]) -> Callable[[list[float], list[float]], float]:
    def correlation(truth: list[float], predicted: list[float]) -> float:
        if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(predicted) == 0:
            return 0.0  # a constant explains nothing; scipy would warn and give nan
        return float(function(truth, predicted)[0])

    return correlation


def _exact_match(truth: list[list[str]], predicted: list[str]) -> float:
    return float(np.mean(matches(truth, predicted)))


def _perplexity(truth: list[Any], predicted: list[tuple[float, int]]) -> float:
    """exp of the mean negative log-likelihood (nats) of a token."""
    return math.exp(sum(nll for nll, _ in predicted) / sum(tokens for _, tokens in predicted))


def _f1_spans(truth: list[list[str]], predicted: list[list[str]]) -> float:
    """2 TP / (predicted spans + true spans); a span counts only whole, with its type (BIO tags)."""
    pairs = [(_spans(t), _spans(p)) for t, p in zip(truth, predicted, strict=True)]
    total = sum(len(t) + len(p) for t, p in pairs)
    return 2 * sum(len(t & p) for t, p in pairs) / total if total else 1.0


def _spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, start, end) of each run of B-x I-x ...; an I-x after another type begins a span, as in CoNLL."""
    spans, start, kind = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, own = tag.partition("-")
        if kind and not (mark == "I" and own == kind):
            spans.add((kind, start, place))
            kind = ""
        if mark in ("B", "I") and not kind:
            start, kind = place, own
    return spans


# name -> (formula, kinds it fits)
OWN: dict[str, tuple[Callable[[list[Any], list[Any]], float], tuple[str, ...]]] = {
    "accuracy": (_accuracy, (*_CLASSES, "multilabel", "tokens")),
    "f1": (_f1, (*_CLASSES, "multilabel", "tokens")),
    "f1_macro": (_f1_macro, (*_CLASSES, "multilabel", "tokens")),
    "f1_micro": (_f1_micro, (*_CLASSES, "multilabel", "tokens")),
    "f1_spans": (_f1_spans, ("tokens",)),
    "matthews": (_matthews, (*_CLASSES, "tokens")),
    "pearson": (_correlation(stats.pearsonr), ("regression",)),
    "spearman": (_correlation(stats.spearmanr), ("regression",)),
    "exact_match": (_exact_match, ("generation",)),
    "perplexity": (_perplexity, ("language", "generation")),
    **{name: (formula, ("generation",)) for name, formula in TEXT.items()},
}
_SCORERS_FIT = (*_CLASSES, "multilabel", "regression")


def names() -> list[str]:
    """Every metric's name: our own, then scikit-learn's scorers."""
    return [*OWN, *(name for name in sk.get_scorer_names() if name not in OWN)]


def better(metric: str) -> str:
    """Which direction of a metric is better; scikit-learn's scorers are all "higher"."""
    return "lower" if metric in ("perplexity", "ter") else "higher"


def check(metric: str, kind: str) -> None:
    """Refuses a metric that does not exist or does not fit the kind of task.

    Raises:
        DataError: with the nearest name, or the metrics that fit.
    """
    if metric not in names():
        raise DataError(unknown("metric", metric, allowed=OWN) + "; scikit-learn's scorers are allowed too")
    fits = OWN[metric][1] if metric in OWN else _SCORERS_FIT
    if kind not in fits:
        allowed = [name for name, (_, kinds) in OWN.items() if kind in kinds]
        raise DataError(f"metric {metric!r} does not fit a {kind} task; {', '.join(allowed)} do")


def evaluate(metric: str, truth: list[Any], *, predicted: list[Any], scores: np.ndarray | None = None) -> float:
    """The score. `scores` (rows, classes) or (rows,) are the raw predictions, for scikit-learn's probability metrics."""
    if metric in OWN:
        return OWN[metric][0](truth, predicted)
    stored = _Stored(np.asarray(predicted), scores, np.asarray(truth))
    return float(sk.get_scorer(metric)(stored, np.arange(len(truth))[:, None], np.asarray(truth)))


def matches(truth: list[list[str]], predicted: list[str]) -> list[float]:
    """1.0 where the text equals one of its references, spaces apart."""
    return [float(" ".join(p.split()) in {" ".join(t.split()) for t in ts}) for ts, p in zip(truth, predicted, strict=True)]


class _Stored:
    """An estimator for scikit-learn's scorers that answers with predictions made before; X holds row numbers."""

    def __init__(self, predicted: np.ndarray, scores: np.ndarray | None, truth: np.ndarray) -> None:
        self.predicted, self.scores = predicted, scores
        self.regression = scores is None or scores.ndim == 1
        if not self.regression:
            self.classes_ = np.arange(scores.shape[1])  # type: ignore[union-attr]

    def __sklearn_tags__(self) -> Any:
        from sklearn.base import BaseEstimator

        tags = BaseEstimator().__sklearn_tags__()
        tags.estimator_type = "regressor" if self.regression else "classifier"
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, rows: Any, truth: Any) -> _Stored:
        return self

    def predict(self, rows: np.ndarray) -> np.ndarray:
        return self.predicted[rows[:, 0]]

    def predict_proba(self, rows: np.ndarray) -> np.ndarray:
        assert self.scores is not None
        return self.scores[rows[:, 0]]

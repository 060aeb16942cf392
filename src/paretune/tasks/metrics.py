"""Scores: one number for a list of predictions. Own formulas only where scikit-learn and scipy have none."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import sparse, stats
from sklearn import metrics as sk

from paretune.errors import DataError, unknown
from paretune.tasks.text_metrics import TEXT, sacrebleu_redrawn

Predictions = Sequence[Any]
_CLASSES = ("classification", "choice", "image", "audio")


def _accuracy(truth: list[Any], predicted: list[Any]) -> float:
    return float(np.mean([t == p for t, p in zip(truth, predicted, strict=True)]))


def _f1(truth: list[Any], predicted: list[Any], weights: np.ndarray | None = None) -> float:
    """F1 of the second class where there are two, else the mean over the classes."""
    if len(np.shape(truth)) == 1 and set(truth) | set(predicted) <= {0, 1}:
        return float(sk.f1_score(truth, predicted, sample_weight=weights, zero_division=0))
    return _f1_macro(truth, predicted, weights)


def _f1_macro(truth: list[Any], predicted: list[Any], weights: np.ndarray | None = None) -> float:
    return float(sk.f1_score(truth, predicted, average="macro", sample_weight=weights, zero_division=0))


def _f1_micro(truth: list[Any], predicted: list[Any], weights: np.ndarray | None = None) -> float:
    return float(sk.f1_score(truth, predicted, average="micro", sample_weight=weights, zero_division=0))


def _matthews(truth: list[Any], predicted: list[Any], weights: np.ndarray | None = None) -> float:
    return float(sk.matthews_corrcoef(truth, predicted, sample_weight=weights))


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
    return _share(_span_counts(truth, predicted))


def _span_counts(truth: list[list[str]], predicted: list[list[str]]) -> np.ndarray:
    """(texts, 2): twice the spans that are right, and the spans of both sides."""
    pairs = [(_spans(t), _spans(p)) for t, p in zip(truth, predicted, strict=True)]
    return np.array([(2 * len(t & p), len(t) + len(p)) for t, p in pairs])


def _share(counts: np.ndarray) -> float:
    right, total = counts.sum(axis=0)
    return float(right / total) if total else 1.0


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
OWN: dict[str, tuple[Callable[..., float], tuple[str, ...]]] = {
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
_MEANS = ("accuracy", "exact_match", "rouge_l")  # the score of rows is the mean of theirs
_WEIGHTED = ("f1", "f1_macro", "f1_micro", "matthews")  # their formulas take weights
_NEED_SPREAD = ("matthews", "pearson", "spearman")  # not defined where one side is constant; a whole score counts as 0 there


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


def each(metric: str, truth: list[list[Any]], *, predicted: list[list[Any]]) -> list[float] | None:
    """The score of each row alone, where a row is one answer and the metric is their mean, else None. One list of answers for each row."""
    if metric not in _MEANS or any(len(p) != 1 for p in predicted):
        return None
    return [evaluate(metric, t, predicted=p) for t, p in zip(truth, predicted, strict=True)]


Redrawn = Callable[[Sequence[int]], float]  # row numbers, some of them several times -> their score


def redrawn(metric: str, truth: list[list[Any]], *, predicted: list[list[Any]], scores: np.ndarray | None = None) -> Redrawn | None:
    """The metric as a function of row numbers, for a bootstrap over rows; one list of answers for each row, as the tags of a text.

    A draw in which it is not defined (a correlation with a constant, the area under a curve of one class) gives nan. None for NIST, which takes
    about a second for a draw of 500 texts.
    """
    alone = each(metric, truth, predicted=predicted)
    if alone is not None:
        values = np.array(alone)
        return lambda drawn: float(values[drawn].mean())
    if metric == "f1_spans":
        counts = _span_counts(_joined(truth), _joined(predicted))
        return lambda drawn: _share(counts[drawn])
    if metric == "accuracy":  # of words, by text
        right = np.array([(sum(a == b for a, b in zip(t, p, strict=True)), len(t)) for t, p in zip(truth, predicted, strict=True)])
        return lambda drawn: _share(right[drawn])
    if metric == "perplexity":
        spent = np.array(_joined(predicted))  # (rows, 2): nll and tokens of each
        return lambda drawn: math.exp(_share(spent[drawn]))
    if metric in TEXT:
        return None if metric == "nist" else sacrebleu_redrawn(metric, _joined(truth), predicted=_joined(predicted))
    if metric in _WEIGHTED and np.ndim(_joined(predicted)) == 1:
        return _counted(metric, truth, predicted)
    return lambda drawn: _defined(
        metric, *(np.array(_joined([side[i] for i in drawn])) for side in (truth, predicted)), None if scores is None else scores[drawn]
    )


def _counted(metric: str, truth: list[list[Any]], predicted: list[list[Any]]) -> Redrawn:
    """`redrawn` of single classes: each pair of a true and a predicted class once, weighted by how often the drawn rows have it."""
    pairs, which = np.unique([_joined(truth), _joined(predicted)], axis=1, return_inverse=True)  # (2, pairs), (answers,)
    row = np.repeat(np.arange(len(truth)), [len(answers) for answers in truth])
    counts = sparse.csr_array((np.ones(len(row)), (which.ravel(), row)), shape=(pairs.shape[1], len(truth)))

    def score(drawn: Sequence[int]) -> float:
        weights = counts @ np.bincount(drawn, minlength=len(truth))
        there = weights > 0
        return math.nan if _undefined(metric, *pairs[:, there]) else OWN[metric][0](*pairs[:, there], weights[there])

    return score


def _undefined(metric: str, truth: np.ndarray, predicted: np.ndarray) -> bool:
    return metric in _NEED_SPREAD and bool(np.ptp(truth) == 0 or np.ptp(predicted) == 0)


def _joined(rows: Sequence[list[Any]]) -> list[Any]:
    return [answer for row in rows for answer in row]


def _defined(metric: str, truth: Any, predicted: Any, scores: np.ndarray | None) -> float:
    """`evaluate`, or nan where the metric is not defined; scikit-learn warns of it in every draw, or raises."""
    if _undefined(metric, truth, predicted):
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return evaluate(metric, truth, predicted=predicted, scores=scores)
        except (ValueError, OverflowError):
            return math.nan


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

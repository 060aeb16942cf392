"""Intervals of scores: over test examples, over seeds, and of the difference between two recipes.

A recipe's results are a matrix (seeds, examples): one row of per-example scores (1.0 right, 0.0 wrong) per training seed, all
on the same test examples. Examples and seeds are two crossed sources of chance: a hard example is hard for every seed, so an
example is drawn once for all seeds (Owen 2007, "The pigeonhole bootstrap"; it errs on the wide side).

A metric that is no mean over examples (F1, a correlation, BLEU) has no such row: there a run's interval is a bootstrap of the metric itself, and
`over_seeds` joins the runs' intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special

from paretune.errors import DataError

RESAMPLES = 4000
DRAWS = 500  # of a whole metric, 2 to 5 ms each for scikit-learn's; the half-width is then known to 6 %
_UNDEFINED = 0.05  # of the draws at most: more could hold both tails of the interval
_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution

Interval = tuple[float, float]
Results = Sequence[Sequence[float]]  # (seeds, examples)


def wilson(right: float, total: int) -> Interval:
    """Wilson's 95 % interval of a share, `right` of `total` (Wilson 1927)."""
    share, z2 = right / total, _Z * _Z
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap(results: Results, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The 95 % interval of the mean of results (seeds, examples), over both; the same `seed` gives the same interval."""
    matrix, rng = _matrix(results), np.random.default_rng(seed)
    return _percentiles(_means([matrix], rng, resamples)[0])


def difference(a: Results, b: Results, *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Mean of a minus mean of b, with its paired 95 % interval: both are drawn on the same examples, each on its own seeds.

    Args:
        a: per-example scores (seeds of a, examples).
        b: the same for the other recipe, on the same test examples in the same order.

    Raises:
        DataError: where the two have different numbers of examples.
    """
    first, second, rng = _matrix(a), _matrix(b), np.random.default_rng(seed)
    if first.shape[1] != second.shape[1]:
        raise DataError(f"a paired difference needs the same test examples; one recipe has {first.shape[1]} results, the other {second.shape[1]}")
    drawn = _means([first, second], rng, resamples)
    return (float(first.mean() - second.mean()), *_percentiles(drawn[0] - drawn[1]))


def score_interval(results: Results) -> Interval:
    """The 95 % interval of a recipe's score: Wilson for one seed of 0/1 results, else the bootstrap."""
    matrix = _matrix(results)
    if len(matrix) == 1 and np.isin(matrix, (0.0, 1.0)).all():
        return wilson(float(matrix.sum()), matrix.shape[1])
    return bootstrap(results)


def how(results: Results) -> str:
    """What `score_interval` of these results is over."""
    if len(results) > 1:
        return "over seeds and test examples (bootstrap)"
    return f"over test examples ({'Wilson' if set(results[0]) <= {0.0, 1.0} else 'bootstrap'})"


def of_run(each: Sequence[float] | None, score: Callable[[np.ndarray], float] | None, *, rows: int) -> tuple[Interval | None, str]:
    """The 95 % interval of one run's score, and how it was made or why there is none: Wilson's for 0/1 results, else `resampled`."""
    if each and set(each) <= {0.0, 1.0}:
        return wilson(sum(each), len(each)), how([each])
    if score is None:
        return None, "none: the metric takes too long to be computed anew for each draw of test examples"
    return resampled(score, rows)


def resampled(score: Callable[[np.ndarray], float], rows: int, *, draws: int = DRAWS, seed: int = 0) -> tuple[Interval | None, str]:
    """The 95 % percentile interval of any score over draws of `rows` rows with replacement (Efron 1979), widened to hold the score of all rows.

    Returns the interval and how it was made; None and the reason where there are fewer than two rows, where more than 5 % of the draws are not
    defined, or where all draws score the same (a perfect F1, of which a bootstrap would be certain). Up to 5 % are left out, and counted.

    Args:
        score: of the rows with these numbers, some of them several times; nan where it is not defined.
    """
    if rows < 2:
        return None, "none: a bootstrap needs two test examples"
    rng = np.random.default_rng(seed)
    found = np.array([score(rng.integers(rows, size=rows)) for _ in range(draws)])
    defined = found[np.isfinite(found)]
    lost = draws - len(defined)
    if lost > _UNDEFINED * draws:
        return None, f"none: the metric is not defined in {lost} of {draws} draws of test examples"
    if np.ptp(defined) == 0:
        return None, f"none: all {draws} draws of test examples score the same"
    whole, (low, high) = score(np.arange(rows)), _percentiles(defined)
    return (min(low, whole), max(high, whole)), "over test examples (bootstrap of the metric" + (f", {lost} of {draws} draws undefined)" if lost else ")")


def over_seeds(scores: Sequence[float], own: Sequence[Interval | None]) -> tuple[Interval | None, str]:
    """The 95 % interval of the mean of several seeds' scores from each run's own interval, and what it is over.

    With the mean m of k scores, their standard deviation s and the mean [l, h] of the runs' own intervals, it reaches from
    m - √((m - l)² + (t s / √k)²) to m + √((h - m)² + (t s / √k)²), t being Student's 97.5 % quantile at k - 1. The part of the
    examples does not shrink with k, for all seeds share them (it errs on the wide side, as the bootstrap above). Where a run has no interval of
    its own only the seeds' part is left; it is None where the scores do not differ at all.
    """
    k, mean = len(scores), float(np.mean(scores))
    seeds = float(special.stdtrit(k - 1, 0.975)) * float(np.std(scores, ddof=1)) / math.sqrt(k)
    known = [pair for pair in own if pair]
    if len(known) < k:
        return ((mean - seeds, mean + seeds), "over seeds (Student's t)") if seeds else (None, "none: all seeds score the same")
    low, high = np.mean(known, axis=0)
    return (mean - math.hypot(mean - low, seeds), mean + math.hypot(high - mean, seeds)), "over seeds (Student's t) and test examples, in quadrature"


def _matrix(results: Results) -> np.ndarray:
    if not len(results) or len({len(row) for row in results}) != 1 or not len(results[0]):
        raise DataError(f"results must be one row of per-example scores per seed, all equally long; the rows have {[len(row) for row in results]}")
    return np.array(results, dtype=float)


def _means(matrices: list[np.ndarray], rng: np.random.Generator, resamples: int) -> list[np.ndarray]:
    """Resampled means (resamples,) of each matrix; the examples drawn are the same for all, the seeds are not."""
    # examples with equal results are interchangeable: for 0/1 results a handful of patterns stands for thousands of examples
    patterns, counts = np.unique(np.concatenate(matrices), axis=1, return_counts=True)
    shares = rng.multinomial(counts.sum(), counts / counts.sum(), size=resamples) / counts.sum()  # (resamples, patterns)
    at, out = 0, []
    for matrix in matrices:
        k = len(matrix)
        rows = shares @ patterns[at : at + k].T  # (resamples, k): each seed's score on the drawn examples
        at += k
        mean = rows.mean(axis=1)
        if k > 1:
            drawn = np.take_along_axis(rows, rng.integers(k, size=(resamples, k)), axis=1).mean(axis=1)
            # k draws from k seeds have (k-1)/k of the variance of the mean of k new seeds
            mean = mean + math.sqrt(k / (k - 1)) * (drawn - mean)
        out.append(mean)
    return out


def _percentiles(drawn: np.ndarray) -> Interval:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)

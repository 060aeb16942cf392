"""What more data buys: learning curves fitted to scores at several sizes of the training split, and where they lead.

    pow3  a − b x^(−c)        pow4  a − b (x + d)^(−c)        mmf4  (a b + c x^d) / (b + x^d)        wbl4  a − b e^(−c x^d)        last  a

x is the number of training examples, y the score, higher is better. The families are those of the learning curve database (Mohr et
al. 2022, LCDB 1.0), and the one that foretells the newest sizes best from the others is taken; `last`, which says that nothing more
comes, is one of them. Its interval is a residual bootstrap: residuals drawn anew are added to the fitted curve, and it is fitted again.

When a prediction can be trusted is after Vilares Ferro, Darriba Bilbao & Ribadas Pena 2024, arXiv:2402.02515: pow3 is fitted to the
first 3, 4, ... sizes; the asymptotes of these fits settle, and `levels` says from which size on.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize

from paretune.errors import DataError

if TYPE_CHECKING:
    from paretune.store import Run

LEAST = 4  # different sizes without which nothing is foretold
HIGHEST = 1.0  # the best value a score can have; no curve ends above it


@dataclasses.dataclass(frozen=True)
class Family:
    """A form of curve: y(x; parameters), with first guesses and bounds for sizes divided by the largest one."""

    name: str
    y: Callable[..., np.ndarray]
    start: Callable[[float, float], tuple[float, ...]]  # (lowest, highest score) -> first guess
    low: tuple[float, ...]
    high: tuple[float, ...]
    end: int = 0  # which parameter is the asymptote


INF = math.inf
FAMILIES = (
    Family("pow3", lambda x, a, b, c: a - b * x**-c, lambda lo, hi: (hi, hi - lo, 0.5), (-INF, 0, 0), (INF, INF, 5)),
    Family("pow4", lambda x, a, b, c, d: a - b * (x + d) ** -c, lambda lo, hi: (hi, hi - lo, 0.5, 0.01), (-INF, 0, 0, 0), (INF, INF, 5, 5)),
    Family("mmf4", lambda x, a, b, c, d: (a * b + c * x**d) / (b + x**d), lambda lo, hi: (lo, 0.1, hi, 1.0), (-INF, 0, -INF, 0), (INF, INF, INF, 5), end=2),
    Family("wbl4", lambda x, a, b, c, d: a - b * np.exp(-c * x**d), lambda lo, hi: (hi, hi - lo, 3.0, 0.5), (-INF, 0, 0, 0), (INF, INF, INF, 5)),
    Family("last", lambda x, a: a + 0 * x, lambda lo, hi: (hi,), (-INF,), (INF,)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Curve:
    """A fitted family."""

    family: str
    parameters: tuple[float, ...]
    unit: float  # the size that counts as x = 1

    def at(self, sizes: Sequence[float] | np.ndarray) -> np.ndarray:
        """Scores at numbers of training examples (n)."""
        return _named(self.family).y(np.asarray(sizes, float) / self.unit, *self.parameters)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The score that a run with so many training examples is expected to reach, with the interval in which 95 % of such runs fall."""

    size: int
    score: float
    low: float
    high: float
    family: str


def fitted(sizes: Sequence[float], scores: Sequence[float], *, family: str, start: Sequence[float] | None = None, bounded: bool = True) -> Curve | None:
    """Least squares (trust region), larger sizes weighing more as √x; None where the fit does not converge or has more parameters than sizes.

    Args:
        sizes: numbers of training examples.
        scores: of as many runs.
        family: a name of `FAMILIES`.
        start: parameters to begin from; else the family's guess.
        bounded: may the curve not end above `HIGHEST`?
    """
    form = _named(family)
    x, y, unit = np.asarray(sizes, float) / max(sizes), np.asarray(scores, float), float(max(sizes))
    if family == "last":
        return Curve(family, (float(y[x == x.max()].mean()),), unit)
    if len(set(sizes)) < len(form.low):
        return None
    high = tuple(min(bound, HIGHEST) if bounded and i == form.end else bound for i, bound in enumerate(form.high))
    first = np.clip(form.start(y.min(), y.max()) if start is None else start, form.low, np.asarray(high) - 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow in a try, and a covariance that is not used
        try:
            found, _ = optimize.curve_fit(form.y, x, y, first, sigma=x**-0.5, bounds=(form.low, high), max_nfev=300, ftol=1e-6)
        except (RuntimeError, ValueError):
            return None
    return Curve(family, tuple(map(float, found)), unit)


def chosen(sizes: Sequence[float], scores: Sequence[float]) -> Curve:
    """The family that foretells the newest third of the sizes best from the older ones (least squares; of equals the simplest), fitted to all."""
    order = sorted(set(sizes))
    held_out = set(order[-max(1, len(order) // 3) :])
    older, newer = ([(x, y) for x, y in zip(sizes, scores, strict=True) if (x in held_out) == new] for new in (False, True))

    def error(form: Family) -> float:
        curve = fitted(*zip(*older, strict=True), family=form.name)
        return INF if curve is None else float(np.mean([(curve.at([x])[0] - y) ** 2 for x, y in newer]))

    best_first = sorted(sorted(FAMILIES, key=lambda form: len(form.low)), key=error)
    return next(curve for form in best_first if (curve := fitted(sizes, scores, family=form.name)) is not None)  # `last` always fits


def predict(sizes: Sequence[int], scores: Sequence[float], *, at: Sequence[int], draws: int = 200, seed: int = 0) -> list[Prediction]:
    """The scores to expect at further sizes.

    Args:
        sizes: numbers of training examples of the runs at hand; several runs of one size are welcome.
        scores: theirs; higher is better.
        at: sizes to foretell.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: for fewer than `LEAST` different sizes.
    """
    if len(set(sizes)) < LEAST:
        raise DataError(f"a learning curve needs runs at {LEAST} different sizes of the training split or more, and there are {len(set(sizes))}; run more shares")
    curve = chosen(sizes, scores)
    fit = curve.at(sizes)
    spread = math.sqrt(len(sizes) / max(1, len(sizes) - len(curve.parameters)))  # residuals of a fit are too small by this
    residuals, random = spread * (np.asarray(scores) - fit), np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        again = fitted(sizes, list(fit + random.choice(residuals, len(fit))), family=curve.family, start=curve.parameters)
        if again is not None:
            found.append(again.at(at) + random.choice(residuals, len(at)))  # a new run has a residual of its own
    low, high = np.minimum(np.quantile(found, [0.025, 0.975], axis=0), HIGHEST)
    return [Prediction(n, float(y), float(lo), float(hi), curve.family) for n, y, lo, hi in zip(at, curve.at(at), low, high, strict=True)]


@dataclasses.dataclass(frozen=True)
class Levels:
    """From which size on a curve can be foretold; None where the sizes at hand do not reach so far."""

    asymptotes: tuple[tuple[int, float], ...]  # (size up to which pow3 is fitted, its asymptote)
    working: int | None  # from here on the asymptotes move one way: what was irregular has ended
    prediction: int | None  # and here is the first from then on that no score's limit forbids
    converged: int | None  # from here on two fits differ by less than the threshold everywhere beyond


@dataclasses.dataclass(frozen=True)
class Points:
    """What runs on shares of one training split reached and took; one entry per run, smallest share first."""

    sizes: list[int]
    scores: list[float]  # on the test split
    train_s: list[float]


def points(runs: Sequence[Run]) -> Points:
    """The points of finished runs."""
    records = sorted((run.record for run in runs), key=lambda record: record["task_definition"]["rows"]["train"])
    return Points([r["task_definition"]["rows"]["train"] for r in records], [r["score"] for r in records], [r["cost"]["train_s"] for r in records])


@dataclasses.dataclass(frozen=True)
class Doubling:
    """What twice the data would buy."""

    now: Prediction  # of the fitted curve at the largest size
    then: Prediction
    train_s: float  # of a run at the doubled size: a rising line through the times of the larger runs
    levels: Levels

    def describe(self, metric: str) -> str:
        """Two lines for people."""
        gain = 100 * (self.then.score - self.now.score)
        settled = f"the fits have settled since {self.levels.converged:,} rows" if self.levels.converged else "the fits have not settled yet, so that it is a rough guess"
        return (
            f"doubled to {self.then.size:,} rows: {metric} {self.then.score:.3f} expected, {gain:+.1f} points (95 % of such runs from {self.then.low:.3f} to "
            f"{self.then.high:.3f}), for about {self.train_s:.0f} s of training\nan extrapolation by {self.then.family}; {settled}"
        )


def next_doubling(points: Points) -> Doubling:
    """The score and the training time to expect of twice the largest size.

    Raises:
        DataError: as `predict`.
    """
    largest = max(points.sizes)
    now, then = predict(points.sizes, points.scores, at=[largest, 2 * largest])
    recent = [(size, seconds) for size, seconds in zip(points.sizes, points.train_s, strict=True) if size >= largest / 4]  # the first runs warm up
    (start, slope), _ = optimize.nnls([[1.0, size] for size, _ in recent], [seconds for _, seconds in recent])
    return Doubling(now, then, float(start + slope * 2 * largest), levels(points.sizes, points.scores))


def shares(count: int) -> list[int]:
    """Six numbers of training examples, doubling up to all of `count`; fewer where the smallest would be below 16.

    Raises:
        DataError: for so few examples that `LEAST` shares are not to be had.
    """
    found = [round(count / 2**k) for k in range(5, -1, -1)]
    found = [size for size in found if size >= 16]
    if len(found) < LEAST:
        raise DataError(
            f"a learning curve halves the training rows {LEAST - 1} times or more, down to 16 at least, so that it needs {16 * 2 ** (LEAST - 1)}; there are {count}"
        )
    return found


def levels(sizes: Sequence[int], scores: Sequence[float], *, threshold: float = 0.01) -> Levels:
    """The working level, the prediction level and convergence of a sequence of fits, one per size from the third on.

    Args:
        sizes: as in `predict`.
        scores: as in `predict`; at most 1.
        threshold: the largest distance of two fits that follow each other, at their size and beyond, that counts as converged.
    """
    order = sorted(set(sizes))
    fits = []
    for size in order[2:]:
        seen = [(x, y) for x, y in zip(sizes, scores, strict=True) if x <= size]
        fit = fitted(*zip(*seen, strict=True), family="pow3", bounded=False)
        if fit is not None:
            fits.append((size, fit))
    ends = [(size, fit.parameters[0]) for size, fit in fits]
    working = next((size for i, (size, _) in enumerate(ends[:-1]) if _one_way([end for _, end in ends[i:]])), None)
    prediction = next((size for size, end in ends if working is not None and size >= working and end <= HIGHEST), None)
    layers = [(size, _distance(before, after, size)) for (_, before), (size, after) in zip(fits, fits[1:], strict=False)]
    converged = next((size for size, gap in layers if prediction is not None and size >= prediction and gap <= threshold), None)
    return Levels(tuple(ends), working, prediction, converged)


def _one_way(values: Sequence[float]) -> bool:
    steps = np.diff(values)
    return bool((steps <= 0).all() or (steps >= 0).all())


def _distance(before: Curve, after: Curve, size: int) -> float:
    """The largest distance of two power laws from a size on: at the size, or at infinity, or where they turn between."""
    beyond = size * np.geomspace(1, 1e6, 200)
    return float(np.abs(before.at(beyond) - after.at(beyond)).max())


def _named(family: str) -> Family:
    return next(f for f in FAMILIES if f.name == family)

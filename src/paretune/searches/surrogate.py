"""What to try next, by a model of the answers: a Gaussian process for each objective over the holes of a draw, and the hypervolume it lets one expect.

    k(x, x') = exp(-Σ_h w_h |φ_h(x) - φ_h(x')|²)        φ_h: the value of hole h as a vector, apart from all values where the draw has no such hole
    p(y | x) = N(μ(x), s²(x)) for each objective; the w_h and the noise by the largest marginal likelihood (Rasmussen & Williams 2006, eq. 2.25, 2.26 and 5.8)
    HV(Y) = c E_λ max_{y in Y} min_i ((z_i - y_i)⁺ / λ_i)^d    λ uniform on the positive unit sphere, z the worst corner (Golovin & Zhang 2020, arXiv:2006.04655)

The last turns the hypervolume that a candidate is expected to add into a mean over draws of λ and of y, in any number of objectives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from paretune.searches.holes import Seeded, Suggest

CANDIDATES = 400  # draws by chance that are compared, and as many with one value changed of a draw that nothing beats
SAMPLES, WEIGHTS = 64, 64  # draws of y and of λ
STEPS, RATE = 60, 0.15  # of Adam, on the logarithms of w and noise
WEIGHT, NOISE, SPREAD = 0.3, 0.01, 1.5  # where those start, and the standard deviation of the normal prior around it
APART = 0.7  # how far what a draw lacks is from all values of it

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of a proposal: all objectives, lower is better, and the seconds that it took."""

    params: Params
    losses: Sequence[float]
    seconds: float


Draw = Callable[[Suggest], str]


class Asked:
    """Values by chance, or given ones, that are remembered with their ranges."""

    def __init__(self, seed: int, given: Params) -> None:
        self.chance, self.given, self.params, self.holes = Seeded(seed), given, dict[str, Any](), dict[str, Hole]()

    def suggest_int(self, name: str, *, low: int, high: int, log: bool = False) -> int:
        """A whole number from low to high."""
        return int(self._remembered(name, Hole(low, high, log), lambda: self.chance.suggest_int(name, low=low, high=high, log=log)))

    def suggest_float(self, name: str, *, low: float, high: float, log: bool = False) -> float:
        """A number from low to high."""
        return float(self._remembered(name, Hole(low, high, log), lambda: self.chance.suggest_float(name, low=low, high=high, log=log)))

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of the choices."""
        return str(self._remembered(name, Hole(choices=tuple(choices)), lambda: self.chance.suggest_categorical(name, choices)))

    def _remembered(self, name: str, hole: Hole, drawn: Callable[[], Any]) -> Any:
        self.holes[name] = hole
        given = self.given.get(name)
        return self.params.setdefault(name, given if given is not None and hole.holds(given) else drawn())


@dataclasses.dataclass(frozen=True)
class Hole:
    """A range, or choices; choices that are all numbers are ordered."""

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[str, ...] = ()

    def holds(self, value: Any) -> bool:
        """Is this one of its values?"""
        return value in self.choices if self.choices else self.low <= value <= self.high

    def vector(self, value: Any) -> list[float]:
        """A value, or None, as a vector: numbers along one axis of length 1, other choices each an axis."""
        if self.choices and not self._numbers():
            return [math.sqrt(0.5) * (value == choice) for choice in self.choices]
        return [0.0, APART] if value is None else [self._share(value) - 0.5, 0.0]

    def _numbers(self) -> list[float]:
        try:
            return sorted(map(float, self.choices))
        except ValueError:
            return []

    def _share(self, value: Any) -> float:
        if self.choices:
            numbers = self._numbers()
            return numbers.index(float(value)) / max(1, len(numbers) - 1)
        low, high, at = (math.log(v) if self.log else float(v) for v in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5


def leaves_open(draw: Draw, fixed: Params) -> bool:
    """Does a draw with these values ask for others, too?"""
    asked = Asked(0, fixed)
    with contextlib.suppress(ValueError):
        draw(asked)
    return bool(asked.params.keys() - fixed.keys())


def best(draw: Draw, answers: Sequence[Answer], *, tried: Sequence[Params], fixed: Params, aim: Params, limits: Sequence[float], seed: int) -> Params:
    """The values of the draw that is expected to add most hypervolume for the seconds it is going to take; of none that was tried, where there are others.

    Args:
        answers: of the proposals that have one.
        tried: values of all proposals so far.
        fixed: values of which nothing else is drawn.
        aim: values in whose place the answers matter, as all rows while few are tried.
        limits: of each objective what it must not exceed; infinite where it has none.
        seed: the same seed and the same answers give the same values.
    """
    chance = random.Random(seed)
    values = np.array([list(answer.losses) for answer in answers], float)
    holes: dict[str, Hole] = {}
    found = []
    top = [answers[i].params for i in range(len(values)) if not ((values <= values[i]).all(1) & (values < values[i]).any(1)).any()]
    for k in range(2 * CANDIDATES):
        given = dict(fixed)
        if k % 2:
            near = chance.choice(top)
            dropped = chance.choice(sorted(near))
            given = {**{name: value for name, value in near.items() if name != dropped}, **fixed}
        asked = Asked(chance.getrandbits(32), given)
        try:
            draw(asked)
        except ValueError:  # no recipe
            continue
        holes |= asked.holes
        found.append(asked.params)
    new = [p for p in {tuple(sorted(p.items())): p for p in found}.values() if p not in tried] or found
    if not new:
        return fixed
    known, sizes = _points([answer.params for answer in answers], holes), [len(hole.vector(None)) for hole in holes.values()]
    gains = _gains(known, values, _points([{**params, **aim} for params in new], holes), sizes=sizes, limits=np.array(limits), seed=seed)
    seconds, _ = predicted(known, np.log([max(answer.seconds, 1e-3) for answer in answers]), at=_points(new, holes), sizes=sizes)
    return new[int((gains / np.exp(seconds)).argmax())]


def _points(params: Sequence[Params], holes: Mapping[str, Hole]) -> np.ndarray:
    return np.array([[x for name, hole in holes.items() for x in hole.vector(p.get(name))] for p in params])


def _gains(known: np.ndarray, values: np.ndarray, at: np.ndarray, *, sizes: Sequence[int], limits: np.ndarray, seed: int) -> np.ndarray:
    """Of each candidate the hypervolume that it is expected to add, but for a factor. known (n, f), values (n, d), at (m, f)."""
    random_state = np.random.default_rng(seed)
    columns = []
    for y in values.T:
        mean, deviation = predicted(known, y, at=at, sizes=sizes)
        columns.append(mean + deviation * random_state.standard_normal((SAMPLES, 1)))
    drawn = np.stack(columns, -1)  # (samples, m, d)
    corner = np.minimum(values.max(0), limits)
    if not (values < corner).all(1).any():  # nothing keeps the limits yet
        corner = values.max(0)
    length = np.maximum(corner - values.min(0), 1e-9)
    ways = directions(WEIGHTS, values.shape[1], chance=random_state)
    reached = scalarized((corner - values) / length, ways).max(0)
    return np.maximum(scalarized((corner - drawn) / length, ways) - reached, 0.0).mean((0, 2))


def directions(n: int, d: int, *, chance: np.random.Generator) -> np.ndarray:
    """(n, d) directions, even over the positive part of the unit sphere."""
    drawn = np.abs(chance.standard_normal((n, d)))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def scalarized(better: np.ndarray, ways: np.ndarray) -> np.ndarray:
    """How far points (..., d) reach from the corner, by which they are better, in each direction, to the power d: (..., directions). The mean over
    directions of the best of several is their hypervolume but for π^(d/2) / (2^d Γ(d/2 + 1))."""
    return np.min(np.maximum(better, 0.0)[..., None, :] / ways, -1) ** ways.shape[1]


def predicted(known: np.ndarray, y: np.ndarray, *, at: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of an objective at points (m, f), from its values (n,) at known ones (n, f); `sizes`: features of each hole."""
    shift, scale = y.mean(), y.std() or 1.0
    target = torch.as_tensor((y - shift) / scale)
    near, far = (torch.as_tensor(_apart(known, other, sizes)) for other in (known, at))  # (n, n, holes), (n, m, holes)
    start = torch.tensor([math.log(WEIGHT)] * len(sizes) + [math.log(NOISE)], dtype=torch.float64)
    free = start.clone().requires_grad_()
    adam = torch.optim.Adam([free], lr=RATE)
    for _ in range(STEPS):
        adam.zero_grad()
        factor = _factor(near, free)
        solved = torch.cholesky_solve(target[:, None], factor)[:, 0]
        loss = 0.5 * target @ solved + factor.diagonal().log().sum() + 0.5 * (((free - start) / SPREAD) ** 2).sum()
        loss.backward()
        adam.step()
    with torch.no_grad():
        factor = _factor(near, free)
        cross = torch.exp(-far @ free[:-1].exp())  # (n, m)
        mean = cross.T @ torch.cholesky_solve(target[:, None], factor)[:, 0]
        left = 1.0 - (torch.linalg.solve_triangular(factor, cross, upper=False) ** 2).sum(0)
    return shift + scale * mean.numpy(), scale * left.clamp_min(1e-9).sqrt().numpy()


def _factor(near: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    kernel = torch.exp(-near @ free[:-1].exp())
    return torch.linalg.cholesky(kernel + (free[-1].exp() + 1e-6) * torch.eye(len(kernel), dtype=kernel.dtype))


def _apart(one: np.ndarray, other: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    squares = (one[:, None, :] - other[None, :, :]) ** 2
    return np.stack([part.sum(-1) for part in np.split(squares, np.cumsum(sizes)[:-1], axis=-1)], -1)

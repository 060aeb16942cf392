"""`pathfinder-32`: are the two dots of a picture the ends of one dashed path?

A picture of 32 × 32 gray levels shows two long dashed paths and some short ones. Two dots stand at both ends of one long path
("yes"), or at one end of each ("no"), so that nothing but following a path tells the two apart. A generator of our own for the
task of Linsley et al. 2018, arXiv:1805.08315, as the Long Range Arena (Tay et al. 2020, arXiv:2011.04006) reads it: pixel by pixel.

A pixel is one character, `GRAY[level]`, and a picture a text of 1,024 of them, row by row.
"""

from __future__ import annotations

import functools

import numpy as np

SIDE = 32  # pixels
GRAY = tuple(chr(0x2800 + level) for level in range(256))  # one printable character per gray level
DASHES, SHORT, DISTRACTORS = (6, 10), (2, 4), (2, 5)  # dashes of a long path and of a short one; number of short ones (from, to)
DASH, GAP, TURN = 2.2, 1.6, 0.35  # pixels, pixels, and the standard deviation of the angle between dashes, radians
APART = 2.0  # pixels between paths, at least
ALONG = np.linspace(0, 1, 5)[:, None]  # where a dash is looked at, and drawn

Path = list[tuple[np.ndarray, np.ndarray]]  # its dashes as (from, to) in pixels


@functools.cache
def rows(count: int) -> tuple[dict[str, str], ...]:
    """So many pictures, half of them "yes": `{"text": ..., "connected": ...}`; always the same ones."""
    random = np.random.default_rng(0)
    return tuple({"text": as_text(picture(random, connected=i % 2 == 0)), "connected": "yes" if i % 2 == 0 else "no"} for i in range(count))


def as_text(image: np.ndarray) -> str:
    """Gray levels (SIDE, SIDE) as text, row by row."""
    return "".join(GRAY[level] for level in image.reshape(-1))


def picture(random: np.random.Generator, *, connected: bool) -> np.ndarray:
    """One picture (SIDE, SIDE) of gray levels, 0 to 255."""
    while True:
        taken: list[np.ndarray] = []
        long = [_path(random, int(random.integers(*DASHES)), taken) for _ in range(2)]
        if all(long):
            break
    short = [_path(random, int(random.integers(*SHORT)), taken) for _ in range(random.integers(*DISTRACTORS))]
    image = np.zeros((SIDE, SIDE))
    _draw(image, np.concatenate([start + ALONG * (end - start) for path in (*long, *short) for start, end in path]))
    first, second = (path if random.random() < 0.5 else [(b, a) for a, b in reversed(path)] for path in long)
    for dot in (first[0][0], first[-1][1] if connected else second[0][0]):
        _draw(image, dot + np.array([(x, y) for x in (-0.8, 0, 0.8) for y in (-0.8, 0, 0.8)]))
    return np.round(255 * np.minimum(image, 1)).astype(np.uint8)


def _path(random: np.random.Generator, dashes: int, taken: list[np.ndarray]) -> Path:
    """A path that keeps clear of the border and of what is taken, to which it is added; empty where forty tries found no room."""
    for _ in range(40):
        at, angle = random.uniform(3, SIDE - 3, 2), random.uniform(0, 2 * np.pi)
        path: Path = []
        points: list[np.ndarray] = []
        while len(path) < dashes:
            step = np.array([np.cos(angle), np.sin(angle)])
            dash = at + DASH * ALONG * step
            if not _clear(dash, [*taken, *points[:-1]]):
                break
            path.append((at, at + DASH * step))
            points.append(dash)
            at, angle = at + (DASH + GAP) * step, angle + random.normal(0, TURN)
        else:
            taken.append(np.concatenate(points))
            return path
    return []


def _clear(dash: np.ndarray, others: list[np.ndarray]) -> bool:
    """Is a dash (n, 2) inside the picture and away from the others?"""
    if dash.min() < 2 or dash.max() > SIDE - 3:
        return False
    return not others or bool((np.square(dash[:, None] - np.concatenate(others)[None]).sum(-1) > APART**2).all())


def _draw(image: np.ndarray, points: np.ndarray) -> None:
    """Adds points (n, 2) to the four pixels around each, by their shares."""
    low = np.floor(points).astype(int)
    part = points - low
    for dx in (0, 1):
        for dy in (0, 1):
            share = np.abs(1 - dx - part[:, 0]) * np.abs(1 - dy - part[:, 1])
            np.add.at(image, (low[:, 0] + dx, low[:, 1] + dy), 0.5 * share)

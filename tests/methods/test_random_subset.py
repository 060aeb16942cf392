from __future__ import annotations

import types

import pytest
import torch

from paretune.methods.modifiers.random_subset import RandomSubset

NONE = torch.Generator()


def chooser(keep, *, seed=0, **knobs):
    loop = types.SimpleNamespace(settings=types.SimpleNamespace(seed=seed))
    return RandomSubset(keep=keep, **knobs).events(loop)


@pytest.mark.parametrize("keep, n", [(0.3, 10), (0.25, 100), (0.7, 10), (0.4, 17), (0.9, 11), (0.1, 7), (0.01, 3)])
def test_every_example_comes_up_before_any_comes_up_again(keep, n):
    events, size = chooser(keep), max(1, round(keep * n))
    seen = [0] * n
    for epoch in range(25):
        visited = events.indices(epoch, n, generator=NONE)
        assert len(visited) == len(set(visited)) == size and visited == sorted(visited)
        for i in visited:
            seen[i] += 1
        assert max(seen) - min(seen) <= 1  # without replacement: the counts never differ by more than one
    assert sum(seen) == 25 * size


def test_the_subset_follows_from_seed_and_epoch_alone():
    forwards = [chooser(0.4).indices(e, 17, generator=NONE) for e in range(6)]
    assert forwards == [chooser(0.4).indices(e, 17, generator=NONE) for e in reversed(range(6))][::-1]
    assert forwards != [chooser(0.4, seed=1).indices(e, 17, generator=NONE) for e in range(6)]
    assert len(set(map(tuple, forwards))) == 6


def test_all_of_the_data_is_the_plain_order():
    assert chooser(1.0).indices(3, 10, generator=NONE) is None
    assert chooser(1.0, replacement=True).indices(3, 10, generator=NONE) is None


def test_with_replacement_the_epochs_are_independent():
    events = chooser(0.5, replacement=True)
    first, second = events.indices(0, 100, generator=NONE), events.indices(1, 100, generator=NONE)
    assert len(first) == len(set(first)) == 50
    assert 5 < len(set(first) & set(second)) < 45  # hypergeometric around 25; without replacement it is 0
    assert not set(chooser(0.5).indices(0, 100, generator=NONE)) & set(chooser(0.5).indices(1, 100, generator=NONE))

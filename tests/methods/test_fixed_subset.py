from __future__ import annotations

import types

import torch

from paretune.methods.modifiers.fixed_subset import FixedSubset

NONE = torch.Generator()


def chooser(keep, seed=0):
    return FixedSubset(keep=keep).events(types.SimpleNamespace(settings=types.SimpleNamespace(seed=seed)))


def test_every_epoch_visits_the_same_share():
    epochs = [chooser(0.3).indices(e, 50, generator=NONE) for e in range(4)]
    assert epochs.count(epochs[0]) == 4
    assert len(set(epochs[0])) == 15 and set(epochs[0]) <= set(range(50)) and epochs[0] == sorted(epochs[0])


def test_the_seed_chooses_uniformly():
    counts = [0] * 20
    for seed in range(400):
        for i in chooser(0.25, seed).indices(0, 20, generator=NONE):
            counts[i] += 1
    assert sum(counts) == 2000 and all(60 < c < 140 for c in counts)  # binomial(400, 1/4): 100 ± 4.6 standard deviations


def test_all_of_the_data_is_the_plain_order():
    assert chooser(1.0).indices(0, 10, generator=NONE) is None
    assert chooser(0.0).indices(0, 10, generator=NONE) is not None  # never nothing: one example stays

"""The promises of every modifier, over the whole registry: off it is the plain loop, bit for bit; the same seed gives the same."""

from __future__ import annotations

import functools

import pytest
import steps
import tiny
import torch
import work

from paretune import registry, surgery
from paretune.methods.adapters.lora import LoRA

OFF = {"keep": 1.0, "weight": 0.0, "inner_steps": 0, "mix": 0.0, "bits": 32}  # the knob that says how much of it there is, and its value for none
NAMES = [name for name in registry.names("modifier") if name != "schedule"]  # a schedule is the loop's own settings


RANKED = [family for family in tiny.FAMILIES if family in (*tiny.CAUSAL, *tiny.SEQ2SEQ)]
ALL = [(name, family) for name in NAMES for family in (RANKED if registry.get(name).ranks else tiny.FAMILIES)]


def trained(*modifiers, family="bert", seed=0, head=True, ranks=False):
    """The tensors of a tiny model (one that ranks choices, where asked for) with LoRA after two epochs of a tiny task, and how many examples they took."""
    torch.manual_seed(0)  # of the adapter's start
    model = work.ranked(family) if ranks else work.ready(family)
    surgery.attach(model, [LoRA(r=2, dropout=0.1)], head=head)
    fit = work.fitted(model, work.task(family), *modifiers, seed=seed)
    return steps.tensors(model), fit


@functools.cache
def plain(family, ranks=False):
    return trained(family=family, ranks=ranks)


def off(name):
    (knob,) = [k["name"] for k in registry.describe(name).knobs if k["name"] in OFF]
    return registry.get(name)(**{knob: OFF[knob]})


@pytest.mark.parametrize("name, family", ALL)
def test_off_is_the_plain_loop(name, family):
    ranks = registry.get(name).ranks
    tensors, fit = trained(off(name), family=family, ranks=ranks)
    assert steps.same(tensors, plain(family, ranks)[0]) and fit == plain(family, ranks)[1]
    assert fit.examples == 2 * 24  # keep=1.0 is all of the data


@pytest.mark.parametrize("name", NAMES)
def test_it_is_deterministic_by_its_seed(name):
    how = {"family": "gpt2" if registry.get(name).ranks else "bert", "ranks": registry.get(name).ranks}
    (first, fit), (second, again) = trained(registry.get(name)(), **how), trained(registry.get(name)(), **how)
    assert steps.same(first, second) and fit == again
    assert not steps.same(first, plain(**how)[0])
    assert not steps.same(first, trained(registry.get(name)(), seed=1, **how)[0])


def test_without_a_trained_head_it_stays():
    tensors, _ = trained(head=False)
    assert all((tensors[n] == t).all() for n, t in work.ready("bert").state_dict().items() if n.startswith("classifier"))
    assert not steps.same(tensors, plain("bert")[0])

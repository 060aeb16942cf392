"""The promises of every modifier, over the whole registry: off it is the plain loop, bit for bit; the same seed gives the same."""

from __future__ import annotations

import pytest
import torch

import steps
import work
from paretune import registry, surgery
from paretune.methods.adapters.lora import LoRA

OFF = {"keep": 1.0, "weight": 0.0, "inner_steps": 0}  # the knob that says how much of it there is, and its value for none
NAMES = [name for name in registry.names("modifier") if name != "schedule"]  # a schedule is the loop's own settings


def trained(*modifiers, seed=0, head=True):
    """The tensors of a tiny BERT with LoRA after two epochs of a tiny task, and how many examples they took."""
    torch.manual_seed(0)  # of the adapter's start
    model = work.ready("bert")
    surgery.attach(model, [LoRA(r=2, dropout=0.1)], head=head)
    fit = work.fitted(model, work.text_task(), *modifiers, seed=seed)
    return steps.tensors(model), fit


@pytest.fixture(scope="module")
def plain():
    return trained()


def off(name):
    (knob,) = [k["name"] for k in registry.describe(name).knobs if k["name"] in OFF]
    return registry.get(name)(**{knob: OFF[knob]})


@pytest.mark.parametrize("name", NAMES)
def test_off_is_the_plain_loop(name, plain):
    tensors, fit = trained(off(name))
    assert steps.same(tensors, plain[0]) and fit == plain[1]
    assert fit.examples == 2 * 24  # keep=1.0 is all of the data


@pytest.mark.parametrize("name", NAMES)
def test_it_is_deterministic_by_its_seed(name, plain):
    (first, fit), (second, again) = trained(registry.get(name)()), trained(registry.get(name)())
    assert steps.same(first, second) and fit == again
    assert not steps.same(first, plain[0])
    assert not steps.same(first, trained(registry.get(name)(), seed=1)[0])


def test_without_a_trained_head_it_stays(plain):
    tensors, _ = trained(head=False)
    assert all((tensors[n] == t).all() for n, t in work.ready("bert").state_dict().items() if n.startswith("classifier"))
    assert not steps.same(tensors, plain[0])

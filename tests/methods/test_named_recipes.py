"""The named recipes of adapters alone (`mam`, `unipelt`, `houlsby`): as one adapter, they keep the promises that each of their parts keeps."""

from __future__ import annotations

import pytest
import steps
import tiny
import torch
import work

import paretune as pt
from paretune import inference, phases, registry, surgery
from paretune.recipe import parse
from paretune.roles import Adapter

RECIPES = [name for name in registry.names("recipe") if len(found := parse(name).phases) == 1 and all(isinstance(m, Adapter) for m in found[0])]
every_case = pytest.mark.parametrize("recipe, family", [(name, family) for name in RECIPES for family in tiny.FAMILIES])


def trained(recipe, family):
    """The tiny model after a few steps of training all parts together."""
    model = pt.adapt(work.opened(family), recipe)
    work.fitted(model, work.task(family), epochs=0.5, warmup=0.0)
    return model


def test_the_mixes_of_the_papers_are_among_them():
    assert {"mam", "unipelt"} <= set(RECIPES)


@every_case
def test_training_changes_what_each_part_learns_and_the_output(recipe, family):
    model = pt.adapt(work.opened(family), recipe)
    start, before = steps.logits(model, family), steps.parameters(model)
    work.fitted(model, work.task(family), epochs=0.5, warmup=0.0)
    assert not torch.equal(steps.logits(model, family), start)  # logits are without dropout
    changed = {n for n, p in steps.parameters(model).items() if not torch.equal(p, before[n])}
    assert changed == steps.learning(model).keys()


@every_case
def test_saved_and_opened_it_gives_the_same(recipe, family, tmp_path):
    model = trained(recipe, family)
    surgery.freeze(model)
    surgery.settle(model)  # the prefix gives up its MLP, as at the end of a run's phase
    wanted = steps.logits(model, family)
    phases.save_model(model, tmp_path)
    opened = inference.open_model(tmp_path, work.task(family))
    assert torch.equal(steps.logits(opened, family), wanted)
    assert steps.same(steps.tensors(opened), steps.tensors(model))


@every_case
def test_removed_it_leaves_the_backbone(recipe, family):
    model = trained(recipe, family)
    plain = work.opened(family)
    wanted = steps.logits(plain, family)
    surgery.switch(model)
    assert torch.equal(steps.logits(model, family), wanted)
    surgery.remove(model, "default")
    assert torch.equal(steps.logits(model, family), wanted)
    assert steps.same(steps.tensors(model), steps.tensors(plain))

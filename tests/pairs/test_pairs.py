"""Every two methods, with and then: they work together on a tiny model, or say `Incompatible`; nothing else."""

from __future__ import annotations

import itertools

import pytest
import steps
import tiny
import torch
import work

from paretune import inference, phases, registry, surgery, training
from paretune.errors import Incompatible
from paretune.recipe import Recipe, is_training, parse
from paretune.roles import Adapter, Modifier

NAMES = [n for n in registry.names() if not registry.is_recipe(n)]


def _refusal(text: str) -> Incompatible | None:
    """Why the recipe does not compose, whatever the model."""
    try:
        parse(text).check()
    except Incompatible as error:
        return error
    return None


def _spelled() -> list[tuple[str, str]]:
    """(recipe, family): the families in rotation; a modifier stands beside an adapter when it begins or ends a chain."""
    families = itertools.cycle(tiny.FAMILIES)
    chains = itertools.product(NAMES, NAMES)
    return [(text, next(families)) for left, right in chains for text in (f"{left} | {right}", f"{left} + {right}")]


REFUSALS = {text: _refusal(text) for text, _ in _spelled()}
COMPOSED = [(text, family) for text, family in _spelled() if REFUSALS[text] is None]
ALL = [pytest.param(text, family, marks=pytest.mark.all) for text, family in itertools.product((t for t, _ in COMPOSED), tiny.FAMILIES)]


def walk(recipe: Recipe, family: str) -> torch.nn.Module:
    """The recipe's phases on a tiny model in memory: three steps where it trains, the change where it changes."""
    model, given = work.ready(family), work.task(family)
    torch.manual_seed(0)
    for k, phase in enumerate(recipe.phases, 1):
        if is_training(phase):
            adapters, _ = phases.decided(model, [m for m in phase if isinstance(m, Adapter)], task=given)
            surgery.attach(model, adapters, name=f"phase_{k}", on_top=True)
            before = {n: p.detach().clone() for n, p in steps.learning(model).items()}
            work.fitted(model, given, *(m for m in phase if isinstance(m, Modifier)), epochs=0.5, warmup=0.0)
            after = steps.learning(model)  # a modifier may have added parameters of its own, which do not count
            assert any(not torch.equal(after[n], p) for n, p in before.items())
            surgery.freeze(model)
            surgery.settle(model)
        else:
            phases.shrink(model, phase[0], given)
    return model


def answers(model: torch.nn.Module, family: str) -> torch.Tensor:
    """Probabilities on the test rows, in evaluation mode."""
    given = work.task(family)
    return torch.tensor(training.predict(model, given, rows=given.test))


@pytest.mark.parametrize("text, family", COMPOSED)
def test_two_methods_work_together_or_say_that_they_do_not(text, family, tmp_path):
    check(text, family, tmp_path)


@pytest.mark.parametrize("text, family", ALL)
def test_on_every_family(text, family, tmp_path):
    check(text, family, tmp_path)


def check(text, family, tmp_path):
    try:
        model = walk(parse(text), family)
    except Incompatible as error:
        assert len(str(error).split()) > 5, "the refusal is a sentence"
        return
    found = answers(model, family)
    assert found.isfinite().all()
    phases.save_model(model, tmp_path)
    again = answers(inference.open_model(tmp_path, work.task(family)), family)
    assert torch.equal(found, again)


def test_what_does_not_compose_says_why():
    assert not [text for text, refusal in REFUSALS.items() if refusal and len(str(refusal).split()) <= 5], "the refusal is a sentence"


def test_refused_pairs_are_the_exception():
    refused = [pair for pair in itertools.product(NAMES, NAMES) if REFUSALS[" | ".join(pair)]]
    modifiers = len(registry.names("modifier"))
    impossible = 2 * modifiers * len(NAMES) - modifiers**2  # a modifier alone is no phase
    assert len(refused) - impossible <= 0.4 * (len(NAMES) ** 2 - impossible)

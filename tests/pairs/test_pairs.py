"""Every two methods, with and then: they work together on a tiny model, or say `Incompatible`; nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path

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
SPELLED = {n: repr(work.biting(n)) for n in NAMES}  # with knobs that change the attention of ten tokens
MATRIX = Path(__file__).parents[2] / "docs" / "matrix.md"  # tests/contracts compares it with the library


def _refusal(text: str) -> Incompatible | None:
    """Why the recipe does not compose, whatever the model."""
    try:
        parse(text).check()
    except Incompatible as error:
        return error
    return None


def _takers() -> dict[str, list[str]]:
    """The families that each method takes when it is alone, by the page of all that it refuses."""
    rows = [[cell.strip() for cell in line.split("|")] for line in MATRIX.read_text().splitlines() if line.startswith("| ")]
    refused = {(name, family) for _, name, promise, _, families, *_ in rows if promise in ("attach", "apply", "train", "fit") for family in families.split(", ")}
    return {name: [f for f in tiny.FAMILIES if (name, f) not in refused] for name in NAMES}


TAKERS = _takers()


def _spelled() -> list[tuple[str, str]]:
    """(recipe, family): the families that take both methods in rotation, all where none does."""
    made = []
    for (i, left), (j, right) in itertools.product(enumerate(NAMES), enumerate(NAMES)):
        both = [f for f in TAKERS[left] if f in TAKERS[right]] or tiny.FAMILIES
        made += [(f"{SPELLED[left]} {sign} {SPELLED[right]}", both[place % len(both)]) for sign, place in (("|", i + j), ("+", i - j))]
    return made


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


def test_each_method_meets_each_family_that_takes_it():
    assert TAKERS["blockwise"] == ["bert", "roberta", "vit"]  # the page is read
    takers = {SPELLED[name]: set(families) for name, families in TAKERS.items()}
    chains = [(text.split(" | "), family) for text, family in COMPOSED if " | " in text]
    for (left, right), family in chains:
        assert family in takers[left] & takers[right] or not takers[left] & takers[right], (left, right)
    for method, side in itertools.product(takers, range(2)):
        met = [family for pair, family in chains if pair[side] == method]
        assert len(met) < 20 or set(met) >= takers[method], (method, side)  # few begin with what quantizes or merges


def test_what_does_not_compose_says_why():
    assert not [text for text, refusal in REFUSALS.items() if refusal and len(str(refusal).split()) <= 5], "the refusal is a sentence"


def test_refused_pairs_are_the_exception():
    refused = [pair for pair in itertools.product(NAMES, NAMES) if REFUSALS[" | ".join(SPELLED[n] for n in pair)]]
    modifiers = len(registry.names("modifier"))
    impossible = 2 * modifiers * len(NAMES) - modifiers**2  # a modifier alone is no phase
    assert len(refused) - impossible <= 0.4 * (len(NAMES) ** 2 - impossible)

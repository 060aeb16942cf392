"""Search spaces: what a draw may be, what every hole is drawn from, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import steps

import paretune as pt
from paretune import registry
from paretune.errors import Incompatible, RecipeError, TargetError
from paretune.methods.adapters.lora import LoRA
from paretune.recipe import parse
from paretune.searches.holes import Seeded
from paretune.searches.space import NAMED, read

ISSUE = "lora(r=[2..64 log], targets={attention, ffn, linear}) + random_subset(keep=[0.1..1]) | merge | {none, int8, nf4}"


def draws(text: str, n: int = 60) -> list[str]:
    suggest, space = Seeded(0), read(text)
    return [space.draw(suggest) for _ in range(n)]


def test_a_draw_is_a_recipe_whose_knobs_lie_in_their_ranges():
    found = [parse(text) for text in draws(ISSUE)]
    loras, subsets = zip(*(recipe.phases[0] for recipe in found), strict=True)
    assert all(2 <= lora.r <= 64 and isinstance(lora.r, int) for lora in loras)
    assert {lora.targets for lora in loras} == {"attention", "ffn", "linear"}
    assert all(0.1 <= subset.keep <= 1.0 for subset in subsets)
    assert {len(recipe.phases) for recipe in found} == {2, 3}
    assert {repr(recipe.phases[2][0]) for recipe in found if len(recipe.phases) == 3} == {"int8", "nf4"}
    assert sum(lora.r <= 11 for lora in loras) == pytest.approx(30, abs=12)  # log: half of the draws below √(2 · 64)


def test_a_finite_space_lists_each_of_its_recipes_once():
    space = read("{lora(r={2, 4}, targets={attention, ffn}), full} | {none, int8, merge | int8}")
    wanted = [f'lora(r={r}, targets="{t}"){then}' for r in (2, 4) for t in ("attention", "ffn") for then in ("", " | int8", " | merge | int8")]
    assert space.size == 15
    assert sorted(map(str, map(parse, space.every()))) == sorted(str(parse(t)) for t in [*wanted, "full", "full | int8", "full | merge | int8"])
    assert read(ISSUE).size == math.inf
    assert read("lora(r=[3..5])").every() == ["lora(r=3)", "lora(r=4)", "lora(r=5)"]


@pytest.mark.parametrize(("text", "kept"), [
    ("{none, full} + {none, bitfit} | {none, int8}", {"full", "bitfit", "full | int8", "bitfit | int8", "full + bitfit", "full + bitfit | int8"}),
    ("{none, merge, lora | merge} | {none, full}", {"lora | merge", "full", "lora | merge | full"}),
])  # fmt: skip
def test_none_leaves_its_place_out_with_its_sign(text, kept):
    wanted = {str(parse(t)) for t in kept if _composes(t)}
    assert {str(parse(t)) for t in read(text).every() if _has_training(t)} == {w for w in wanted if _has_training(w)}


def _composes(text: str) -> bool:
    try:
        parse(text)
    except Incompatible:
        return False
    return True


def _has_training(text: str) -> bool:
    return any(name in text for name in ("full", "bitfit", "lora"))


def test_a_draw_that_leaves_everything_out_is_refused():
    class Nothing(Seeded):
        def suggest_categorical(self, name, choices):
            return "none"

    with pytest.raises(Incompatible, match="no recipe"):
        read("{none, lora} | {none, int8}").draw(Nothing(0))


def test_two_dots_take_the_ranges_of_the_card():
    hints = {k["name"]: k["search"] for k in registry.describe("lora").knobs if k["search"]}
    assert hints == {"r": "2..64 log", "targets": "query value, attention, ffn, linear"}  # what the draws below must show
    found = [parse(text).phases[0][0] for text in draws("lora(.., dropout=0.1)")]
    assert all(isinstance(m, LoRA) and 2 <= m.r <= 64 and m.dropout == 0.1 for m in found)
    assert {m.targets for m in found} == {"query value", "attention", "ffn", "linear"}
    assert {parse(t).phases[0][0].r for t in draws("lora(r=4, ..)")} == {4}
    assert {parse(t).phases[0][0].targets for t in draws("lora(r=..)")} == {LoRA().targets}


def test_texts_of_several_words_and_quotes_are_one_choice():
    assert {parse(t).phases[0][0].targets for t in draws('lora(targets={query value, "up, down", linear})')} == {"query value", "up, down", "linear"}


@pytest.mark.parametrize("name", NAMED)
def test_named_spaces_have_draws_that_compose(name):
    suggest, space, composed = Seeded(1), read(name), 0
    for _ in range(60):
        try:
            parse(space.draw(suggest))
        except Incompatible:
            continue
        composed += 1
    assert composed >= 45


def test_switches_are_one_for_all_methods_and_without_any_a_method_is_left_out():
    text = "adapter(layers=[0..2 each]) + prefix(layers=[0..2 each]) + bitfit"
    found = [parse(draw).phases[0] for draw in draws(text, 80)]
    kinds = {tuple(m.layers for m in phase if hasattr(m, "layers")) for phase in found}
    subsets = [",".join(map(str, kept)) for n in (1, 2, 3) for kept in itertools.combinations(range(3), n)]
    assert kinds == {(kept, kept) for kept in subsets} | {()}  # bitfit alone, where all are off
    wanted = {str(parse(f'adapter(layers="{k}") + prefix(layers="{k}") + bitfit')) for k in subsets}
    assert {str(parse(t)) for t in read(text).every()} == wanted | {"bitfit"}


def test_a_range_without_an_end_goes_to_the_last_layer():
    assert {parse(t).phases[0][0].layers for t in read("prefix(layers=[1.. each])", layers=3).every()} == {"1", "2", "1,2"}


def test_what_is_switched_off_holds_nothing():
    model = steps.model("bert")
    pt.adapt(model, pt.parse('adapter(form="pfeiffer", bottleneck=3, norms=False, layers="1") + prefix(length=2, reparametrize="none", layers="1")'))
    count = 2 * 16 * 3 + 3 + 16 + 2 * 2 * 16  # U, D, their biases; keys and values: all of width 16, in one of two layers
    own = {name: parameter for name, parameter in steps.learning(model).items() if ".paretune." in name}
    assert sum(p.numel() for p in own.values()) == count and all(".layer.1." in name for name in own)
    with pytest.raises(TargetError, match="no layer 2"):
        pt.adapt(steps.model("bert"), pt.parse('prefix(layers="0,2")'))
    with pytest.raises(RecipeError, match="numbers from 0"):
        pt.adapt(steps.model("bert"), pt.parse('adapter(layers="first")'))


@pytest.mark.parametrize(("text", "complaint"), [
    ("lora(r=[2..64 lg])", "between the ends of a range"),
    ("{lora, full", "no }"),
    ("lora}", "without its {"),
    ("lora(r=[8..2])", "lower to its higher"),
    ("lora(r=[0..8 log])", "above 0 for log"),
    ("lora(r=[0..8])", "r is at least 1"),
    ("lora(rr=[1..2])", "did you mean r"),
    ("{lorra, full}", "did you mean lora"),
    ("prefix(layers=[3..1 each])", "a lower number to a higher"),
    ("full(..)", "suggests no ranges"),
    ("lora(dropout=..)", "suggests no range for dropout"),
    ("lora(r={})", "empty or twice"),
    ("lora(r={2, 2})", "empty or twice"),
    ("__import__('os')", "not known"),
])  # fmt: skip
def test_what_cannot_be_read_is_said_at_once(text, complaint):
    with pytest.raises(RecipeError, match=complaint):
        read(text)


def test_a_space_in_which_nothing_composes_is_refused():
    with pytest.raises(Incompatible, match="no adapter is attached"):
        read("merge | {none, int8}")

"""The algebra: exact round trips, the rules of composition, errors that help, and no evaluated code."""

from __future__ import annotations

import dataclasses
import random
import string

import pytest

import paretune as pt
from paretune import registry
from paretune.errors import Incompatible, RecipeError
from paretune.methods.adapters.adapter import Adapter
from paretune.methods.adapters.bitfit import BitFit
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.lora import LoRA
from paretune.methods.modifiers.random_subset import RandomSubset
from paretune.methods.modifiers.schedule import Schedule
from paretune.methods.transforms.int8 import Int8
from paretune.methods.transforms.merge import Merge
from paretune.recipe import Recipe, as_recipe, as_written, is_training, parse
from paretune.roles import Adapter as AdapterRole
from paretune.roles import After, Modifier, Readout

METHODS = [n for n in registry.names() if not registry.is_recipe(n)]


# --- round trips ----------------------------------------------------------------------------------------------------------------


def a_text(pick):
    return "".join(pick.choice(string.ascii_letters + string.digits + " ._-,*\"'\\|+()[]@=é") for _ in range(pick.randint(0, 12)))


def a_value(pick, knob):
    """A value that the knob allows, of any of its types."""
    if knob["choices"]:
        return pick.choice(knob["choices"])
    kind = pick.choice(knob["type"].replace("tuple[str, ...]", "texts").replace("tuple[int, ...]", "numbers").split(" | "))
    low = knob["low"] if knob["low"] is not None else -5
    high = knob["high"] if knob["high"] is not None else low + pick.choice([10, 1e6])
    return {
        "int": lambda: pick.randint(int(low), int(high)),
        "float": lambda: pick.choice([pick.uniform(low, high), float(low), float(high), min(high, max(low, 1e-7))]),
        "bool": lambda: pick.random() < 0.5,
        "str": lambda: a_text(pick),
        "texts": lambda: tuple(a_text(pick) for _ in range(pick.randint(0, 3))),
        "numbers": lambda: tuple(sorted(pick.sample(range(12), pick.randint(1, 4)))),
        "After": lambda: After(pick.randrange(4)),
        "None": lambda: None,
    }[kind]()


def a_method(pick, name):
    """A method with random knobs; where knobs exclude each other, another draw."""
    while True:
        knobs = registry.describe(name).knobs
        chosen = {k["name"]: a_value(pick, k) for k in knobs if pick.random() < 0.6}
        try:
            return registry.get(name)(**chosen)
        except (Incompatible, RecipeError):
            if not chosen:
                raise


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reads_back_what_it_spells(name):
    pick = random.Random(name)
    for _ in range(60):
        method = a_method(pick, name)
        for text in (method.spell(), method.spell(defaults=True)):
            (((again,),)) = read(text)
            assert again == method and hash(again) == hash(method) and type(again) is type(method)
            assert again.spell() == method.spell()


def read(text):
    """The phases of a text, without the check of what composes."""
    from paretune.recipe import _Parser

    return _Parser(text).recipe().phases


def a_recipe(pick):
    """Random phases that may or may not compose: round trips do not ask."""
    phases = [tuple(a_method(pick, pick.choice(METHODS)) for _ in range(pick.choice([1, 1, 2, 3]))) for _ in range(pick.randint(1, 4))]
    return Recipe(tuple(phases))


def test_random_recipes_read_back_what_they_spell():
    pick = random.Random(0)
    for _ in range(300):
        made = a_recipe(pick)
        for text in (str(made), made.resolved, " ".join(str(made).split(" ")), str(made).replace(" | ", "|").replace(" + ", "+")):
            again = Recipe(read(text))
            assert again == made and str(again) == str(made) and again.id == made.id and hash(again) == hash(made)


def test_canonical_text():
    assert str(parse("lora( r = 4 ,targets=['query','value'] )+schedule(epochs=1)|merge | int8")) == (
        'lora(r=4, targets=["query", "value"]) + schedule(epochs=1.0) | merge | int8'
    )
    assert str(parse("lora(8, 16)")) == "lora(alpha=16.0)"  # by place, in the card's order; a default is not spelled
    assert parse("lora(r=8)") == parse("lora") and parse("lora(r=8)").id == parse("lora").id
    assert parse("lora(r=4)").id != parse("lora").id
    assert "dropout=0.0" in parse("lora").resolved and parse(parse("lora").resolved) == parse("lora")


def test_python_and_text_are_the_same():
    assert LoRA(r=4) + Schedule(epochs=1.0) | Merge() | Int8() == parse("lora(r=4) + schedule(epochs=1) | merge | int8")
    assert repr(LoRA(r=4)) == "lora(r=4)" and eval(repr(LoRA(r=4)), {"lora": LoRA}) == LoRA(r=4)
    assert as_recipe(LoRA()) == LoRA() and LoRA() == as_recipe(LoRA()).phases[0][0]
    assert (LoRA() | Merge()).phases == ((LoRA(),), (Merge(),))
    assert parse("lora") | Merge() == LoRA() | Merge() == LoRA() | parse("lora | merge").phases[1][0]
    assert len({parse("lora"), as_recipe(LoRA()), parse("lora(r=8)")}) == 1


def test_then_binds_looser_than_with():
    assert [len(p) for p in parse("bitfit + lora | merge | bitfit + schedule").phases] == [2, 1, 2]
    with pytest.raises(RecipeError, match="has several; use | between"):
        (LoRA() | Merge()) + BitFit()


def test_the_prefix_of_a_recipe():
    whole = parse("lora | merge | int8")
    assert whole.prefix(1) == LoRA() and whole.prefix(2) == (LoRA() | Merge()) and whole.prefix(3) == whole


def test_a_named_recipe_is_expanded():
    for name in registry.names("recipe"):
        line = registry.line_of(name)
        assert parse(name) == parse(line) and str(parse(name)) == str(parse(line)) and parse(name).id == parse(line).id
        with pytest.raises(RecipeError, match="takes no knobs"):
            parse(f"{name}(r=3)")


def test_a_method_is_frozen_and_lists_become_tuples():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRA().r = 3
    assert LoRA(targets=["query", "value"]) == LoRA(targets=("query", "value"))
    assert Schedule(epochs=2) == Schedule(epochs=2.0) and repr(Schedule(epochs=2)) == "schedule(epochs=2.0)"


# --- what cannot be read --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "expected the name of a method at column 1"),
        ("lorra", "did you mean lora?"),
        ("LoRA", "did you mean lora?"),
        ("lora(rank=4)", "knob 'rank' is not known"),
        ("lora(target='x')", "did you mean targets?"),
        ("lora(r=0)", "r is at least 1"),
        ("lora(r=2.5)", "r is a whole number, not float"),
        ("lora(r='2')", "r is a whole number, not str"),
        ("lora(r=True)", "r is a whole number, not bool"),
        ("in_context(words='bad good')", 'words is a list, not str; write words=["bad", "good"]'),
        ("lora(dropout=1.5)", "dropout is from 0.0 to 1.0"),
        ("lora(r=4, r=5)", "r is given twice"),
        ("lora(1, 2, 0.1, 'query', True, True, 7)", "has 6 knobs, and more values were given"),
        ("adapter(form='houlsbi')", "did you mean houlsby?"),
        ("merge(3)", "merge has no knobs"),
        ("merge(x=3)", "merge has no knobs; 'x' was given"),
        ("lora(r=4", "expected , or )"),
        ("lora(r=)", "expected a value"),
        ("lora r=4", "expected | or + or the end at column 6"),
        ("lora |", "expected the name of a method"),
        ("| lora", "expected the name of a method at column 1"),
        ("lora || merge", "expected the name of a method"),
        ("lora & merge", "'&' at column 6 has no meaning"),
        ("lora(targets='query)", "needs both its quotes"),
        ("lora(targets=query)", "expected a value"),
        ("lora(targets=['query' 'value'])", "expected , or ]"),
        ("lora(r=@1)", "r is a whole number, not After"),
        ("lora(r=@x)", "the number of a phase"),
        ("schedule(lr=nan)", "expected a value"),
        ("schedule(lr=1e999)", "lr is a finite number"),
        ("lora(targets=[1, 2])", "the list holds texts alone"),
        ("lora(targets=[['query']])", "lists hold no lists"),
    ],
)
def test_an_error_says_where_and_what(text, words):
    with pytest.raises(RecipeError) as error:
        parse(text)
    assert words in str(error.value), str(error.value)


@pytest.mark.parametrize("text, near", [("lorra | merge", " (did you mean lora?)"), ("full | wand", " (did you mean wanda?)"), ("mqxz", "")])
def test_an_unknown_name_gets_the_nearest_and_where_all_are(text, near):
    with pytest.raises(RecipeError) as error:
        parse(text)
    name = next(n for n in ("lorra", "wand", "mqxz") if n in text)
    assert str(error.value) == f"method {name!r} is not known{near}; `paretune methods` lists all"


@pytest.mark.parametrize("name", METHODS)
def test_every_range_is_checked(name):
    for knob in registry.describe(name).knobs:
        cls = registry.get(name)
        if knob["choices"]:
            with pytest.raises(RecipeError, match=knob["name"]):
                cls(**{knob["name"]: "none of them" if isinstance(knob["choices"][0], str) else 10**9})
        for limit, beyond in (("low", -1), ("high", 1)):
            if knob[limit] is not None:
                with pytest.raises(RecipeError, match="at least|from|at most"):
                    cls(**{knob["name"]: knob[limit] + beyond})
        with pytest.raises(RecipeError, match=knob["name"]):
            cls(**{knob["name"]: object()})


def test_not_a_number_is_outside_every_range():
    with pytest.raises(RecipeError):
        Schedule(lr=float("nan"))
    with pytest.raises(RecipeError):
        Schedule(lr=float("inf"))


def test_parsing_runs_no_code(monkeypatch):
    import builtins

    for forbidden in ("eval", "exec", "compile"):
        monkeypatch.setattr(builtins, forbidden, lambda *a, **k: pytest.fail("code was run"))
    for text in ("__import__('os')", "lora(r=__import__('os').getpid())", "lora(r=1+1)", "lora(targets=f'{1}')", "lora.__class__", "lora(**{})", "lambda: 0"):
        with pytest.raises(RecipeError):
            parse(text)
    hostile = "lora(targets=\"__import__('os').getpid()\")"
    assert parse(hostile).phases[0][0].targets == "__import__('os').getpid()"


def test_long_and_deep_texts_end_in_an_error_or_a_recipe():
    assert len(parse(" | ".join(["full"] * 500)).phases) == 500
    with pytest.raises(RecipeError):
        parse("lora(targets=" + "[" * 50_000)


def test_random_text_gives_a_recipe_or_an_error_of_ours():
    pick = random.Random(1)
    pieces = ["lora", "merge", "int8", "(", ")", "|", "+", "r", "=", "4", ",", '"query"', "@0", "[", "]", "None", " ", "-1e3", "'", "$"]
    read = refused = 0
    for _ in range(3000):
        try:
            found = parse("".join(pick.choice(pieces) for _ in range(pick.randint(1, 9))))
        except (RecipeError, Incompatible) as error:
            assert str(error)
            refused += 1
        else:
            assert parse(str(found)) == found
            read += 1
    assert read and refused


# --- what does not compose ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "lora",
        "head",
        "full | int8",
        "lora(r=8) + random_subset(keep=0.3) | merge | int8",
        "adapter + bitfit",
        "lora | lora | merge",
        "lora | merge | bitfit",
        'full | keep_layers(layers="0") | full | int8',
        "int8",
        "lora + schedule(lr=0.001) + fixed_subset | merge | cast",
    ],
)
def test_recipes_that_compose(text):
    assert parse(text).check() == parse(str(parse(text)))


@pytest.mark.parametrize(
    "text, words",
    [
        ("lora + int8", "stands alone in its phase; use | around it"),
        ("int8 + schedule", "stands alone"),
        ("lora | schedule", "nothing learns in this phase"),
        ("random_subset + fixed_subset | lora", "nothing learns"),
        ("lora + schedule + schedule(epochs=1)", "schedule stands twice"),
        ("int8 | lora", "lora needs float weights"),
        ("lora | int8 | bitfit", "put int8 after it"),
        ("cast | full", "put cast after it"),
        ("merge | lora", "no adapter is attached"),
        ("adapter | merge", "cannot be folded"),
        ("lora | int8 | merge", "put merge before int8"),
        ("int8 | int8", "int8"),
        ("int8 | cast", "int8"),
        ("int8 | vocabulary", "put vocabulary before int8"),
    ],
)
def test_recipes_that_do_not_compose(text, words):
    with pytest.raises(Incompatible) as error:
        parse(text)
    assert words in str(error.value)


def test_modifiers_alone_are_a_part_of_a_phase():
    part = parse("schedule(epochs=1) + random_subset")
    assert not is_training(part.phases[0])
    assert LoRA() + part == parse("lora + schedule(epochs=1) + random_subset")
    with pytest.raises(Incompatible, match="nothing learns"):
        part.check()


def test_a_named_recipe_counts_from_its_own_first_phase():
    alone, behind = pt.parse("distilbert"), pt.parse("vocabulary | max_length | distilbert")
    assert "teacher=@1" in str(alone) and "teacher=@3" in str(behind)
    assert "teacher=@1" in str(pt.parse("vocabulary | distilgpt2")), "what it starts from is the model before it"
    assert pt.parse("vocabulary | full + distill").phases[-1][1].teacher == pt.after(0), "a number that was written stays"
    assert pt.parse(str(behind)) == behind


@dataclasses.dataclass(frozen=True, repr=False)
class Distill(Modifier):
    """Stands for a modifier that takes a model."""

    teacher: After = After(0)

    @classmethod
    def spelling(cls):
        return "distill"


@dataclasses.dataclass(frozen=True, repr=False)
class Prototypes(Readout):
    """Stands for a readout."""

    @classmethod
    def spelling(cls):
        return "prototypes"


def test_a_modifier_names_only_models_that_exist_by_then():
    (Full() | Full() + Distill(After(1))).check()
    with pytest.raises(Incompatible, match="phase 1 and can name @0 to @0, not @1"):
        (Full() + Distill(After(1))).check()
    assert repr(Distill(pt.after(2))) == "distill(teacher=@2)"


def test_a_recipe_has_at_most_one_readout():
    (LoRA() | Prototypes()).check()
    with pytest.raises(Incompatible, match="at most one readout, not 2"):
        (LoRA() | Prototypes() | Prototypes()).check()
    with pytest.raises(Incompatible, match="stands alone"):
        (LoRA() + Prototypes()).check()


def test_every_method_has_one_role():
    for name in METHODS:
        roles = [role for role in (AdapterRole, Modifier, Readout, registry.ROLES["transforms"]) if issubclass(registry.get(name), role)]
        assert len(roles) == 1


def test_the_public_names():
    assert pt.LoRA is LoRA and pt.parse is parse and pt.Adapter is Adapter and pt.RandomSubset is RandomSubset
    assert "LoRA" in dir(pt) and "run" in dir(pt)
    with pytest.raises(AttributeError, match="no attribute 'Lora'"):
        pt.Lora  # noqa: B018


def test_a_named_recipe_keeps_its_name_in_the_text_as_written():
    assert as_written("mam|int8 ") == "mam | int8" and as_written("houlsby+schedule( epochs=1 ) | int8") == "houlsby + schedule(epochs=1.0) | int8"
    assert parse(as_written("full | houlsby")) == parse("full | houlsby")
    assert as_written(LoRA(r=4) | Merge()) == as_written("lora(r=4)|merge") == "lora(r=4) | merge"

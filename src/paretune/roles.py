"""The four roles a method can have, and what each role asks of a method file.

A method is a frozen dataclass of knobs. What it does to a model it says through the functions of its role; the spine
(recipe, surgery, training, store) does everything that methods share. This file imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import TYPE_CHECKING, Any, ClassVar

from paretune.card import Card
from paretune.errors import Incompatible, RecipeError, did_you_mean, one_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from paretune.recipe import Recipe
    from paretune.surgery import Patch, Site
    from paretune.training import Events, Loop


@dataclasses.dataclass(frozen=True)
class Trail:
    """What a recipe has done to the model so far: the state that `Method.follow` checks and moves on."""

    attached: tuple[Adapter, ...] = ()  # adapters on the model, frozen after their phase
    weights: str = "float"  # the format of the linear weights: "float", or what a transform left ("int8", "bf16")
    by: str = ""  # the spelling of the transform that left it
    narrowed: tuple[str, ...] = ()  # the spellings of the transforms that kept a share of all neurons, heads or layers
    fixed: str = ""  # the spelling of a transform that left zeros, thin factors or shared layers, which no sum may undo
    shared: str = ""  # the spelling of a transform that left layers with one set of parameters, of which no layer can have codes of its own
    carries: bool = False  # do weights of that format pass gradients on to adapters, as a frozen base?
    ranges: Modifier | None = None  # the qat whose step sizes wait to become codes
    embeddings: str = "float"  # the format of the token embedding, where a transform packed it
    readout: Readout | None = None  # how the answer is read, where that is not a trained head
    attention: str = ""  # the spelling of the transform that replaced the attention

    def replace(self, **changes: Any) -> Trail:
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class After:
    """`@k`: the frozen model after phase k; `@0` is the loaded backbone."""

    phase: int

    def __repr__(self) -> str:
        return f"@{self.phase}"


class Method:
    """A technique with its knobs; `repr` is its spelling in a recipe, `+` is with, `|` is then.

    Raises:
        RecipeError: at construction, when a knob has the wrong type or lies outside its range.
    """

    role: ClassVar[str]
    card: ClassVar[Card]
    keeps_ranges: ClassVar[bool] = False  # may it come between qat and the codes?

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = _coerce(self, field, hints[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @classmethod
    def spelling(cls) -> str:
        """The method's name in a recipe: its file's name."""
        return cls.__module__.rpartition(".")[2]

    def knobs(self, *, defaults: bool = False) -> dict[str, Any]:
        """The knobs that differ from their default (or, with `defaults`, all), in the file's order."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {f.name: v for f in fields if (v := getattr(self, f.name)) != f.default or defaults}

    def spell(self, *, defaults: bool = False) -> str:
        """The recipe text of this method; with `defaults`, every knob is written out."""
        inside = ", ".join(f"{k}={spell_value(v)}" for k, v in self.knobs(defaults=defaults).items())
        return f"{self.spelling()}({inside})" if inside else self.spelling()

    def __repr__(self) -> str:
        return self.spell()

    def __add__(self, other: Method | Recipe) -> Recipe:
        from paretune.recipe import as_recipe

        return as_recipe(self) + other

    def __or__(self, other: Method | Recipe) -> Recipe:
        from paretune.recipe import as_recipe

        return as_recipe(self) | other

    def follow(self, trail: Trail) -> Trail:
        """The state after this method, or Incompatible when it cannot come there."""
        return trail


class Adapter(Method):
    """Says what learns. It gives one patch per site of its targets, or selects existing parameters."""

    role = "adapter"
    foldable: ClassVar[bool] = True  # can its effect be written into the backbone's weights?
    additive: ClassVar[bool] = False  # does it only add to an output? then each row of a batch may have its own
    selects: ClassVar[bool] = False  # does it train parameters the backbone already has?
    reweighs: ClassVar[bool] = False  # does the model compute with changed weights, so that they must stay as they are?
    attends: ClassVar[bool] = False  # does it act inside the attention call?

    def follow(self, trail: Trail) -> Trail:
        if trail.weights != "float" and not (trail.carries and not (self.selects or self.reweighs)):
            raise Incompatible(
                f"{trail.by} | {self!r}: {self.spelling()} needs float weights to train on, and {trail.by} left {trail.weights}; "
                f"put {trail.by} after it"
            )
        if self.attends and trail.attention:
            raise Incompatible(f"{trail.attention} | {self!r}: {self.spelling()} acts inside the attention that {trail.attention} replaced; use lora or adapter")
        return trail.replace(attached=(*trail.attached, self))

    def chosen(self, model: nn.Module, examples: Examples | None) -> tuple[Adapter, dict[str, float]]:
        """This adapter with what it leaves to the data decided on a training split, and what it found out for the record."""
        return self, {}

    def sites(self, model: nn.Module) -> list[Site]:
        """Where the adapter sits in this model (`anatomy.resolve` of its targets); empty for a pure selection."""
        return []

    def patch(self, site: Site) -> Patch:
        """A fresh patch for one site; its initial values come from torch's global generator."""
        raise AssertionError(f"{self!r} gives sites and no patch")

    def shared(self, model: nn.Module) -> nn.Module | None:
        """Tensors that all patches of this adapter have in common, as `patch.shared`; trained and saved once."""
        return None

    def settle(self, patches: list[Patch]) -> list[dict[str, Tensor]]:
        """What each patch holds once its phase has ended; overridden where that depends on all of them together."""
        return [patch.settle() for patch in patches]

    def start(self, model: nn.Module, patches: list[Patch]) -> None:
        """First values that only the adapted model can give, such as activations; called once, at the end of attaching."""

    @property
    def exact_at_start(self) -> bool:
        """Is the output at the start the backbone's, bit for bit? The card says so of all choices of the knobs, unless overridden."""
        return self.card.exact_at_start

    @property
    def lr(self) -> float | None:
        """The learning rate that suits it: the card's, unless overridden for some choices of the knobs."""
        return self.card.lr

    def events(self, loop: Loop) -> Events | None:
        """Handlers for the training phase in which this adapter learns, where it needs any: a penalty, a stage of its own."""
        return None

    def selection(self, model: nn.Module) -> list[str]:
        """Names (as in `named_parameters`) of the existing parameters that learn."""
        return []

    def unused(self, model: nn.Module) -> list[str]:
        """Paths of modules whose output this adapter goes around, so that nothing in them can learn."""
        return []


class Transform(Method):
    """Changes the model at once."""

    role = "transform"
    needs_examples: ClassVar[bool] = False  # does it read the training split?
    needs_processor: ClassVar[bool] = False  # does it read or replace the tokenizer or image processor?

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        """The changed model: the same object, and the same class."""
        raise AssertionError(f"{self!r} does not say how to change a model")

    def facts(self, processor: Any, model: nn.Module, *, task: Any) -> dict[str, float]:
        """What a run's record shall say of the change: by name, from the processor before it and the model after it."""
        return {}

    def empty(self, module: nn.Module) -> nn.Module:
        """For transforms that pack modules: the packed module in this one's place, before its values are loaded."""
        raise AssertionError(f"{self!r} packs no modules")


class Modifier(Method):
    """Changes how a training phase runs."""

    role = "modifier"
    ranks: ClassVar[bool] = False  # does its loss compare the answers of a language model that ranks them?

    def follow(self, trail: Trail) -> Trail:
        if self.ranks and trail.readout is not None and not trail.readout.speaks:
            raise Incompatible(f"{self!r}: it compares answers in a language model's own words, and {trail.readout!r} reads a head; use choices in its place")
        return trail

    @property
    def keeps_outputs(self) -> bool:
        """Are `models` asked once for each training example, and not in every epoch?"""
        return False

    def models(self) -> list[tuple[After | str, bool]]:
        """The models that it reads beside the one that learns, `@k`, folders or hub ids; and whether it asks for their answers."""
        return []

    def events(self, loop: Loop) -> Events:
        """The handlers of this modifier for one training phase; they may hold state, the method may not."""
        raise AssertionError(f"{self!r} gives no handlers")


class Readout(Method):
    """Says how an answer is read where that is not a trained head; fitted by forward passes. Its patches are a part of the head."""

    role = "readout"
    keeps_ranges = True
    speaks: ClassVar[bool] = False  # does the answer come in a language model's own words, and not from a head?

    @property
    def reads_every_row(self) -> bool:
        """Does fitting it take a forward pass of every training example?"""
        return False

    def follow(self, trail: Trail) -> Trail:
        if self.speaks and trail.attached:
            raise Incompatible(f"{self!r} says how this model answers, in training, too; put it first, as in {self!r} | {trail.attached[0]!r}")
        return trail.replace(readout=self)

    def sites(self, model: nn.Module) -> list[Site]:
        """Where its patches sit in this model."""
        return []

    def patch(self, site: Site) -> Patch:
        """A fresh patch for one site."""
        raise AssertionError(f"{self!r} gives sites and no patch")

    def shared(self, model: nn.Module) -> nn.Module | None:
        """Nothing: each patch of a readout has its own tensors."""
        return None

    def unused(self, model: nn.Module) -> list[str]:
        """Paths of modules whose output it goes around, so that nothing in them can learn."""
        return []

    def encode(self, task: Any, rows: Any, *, processor: Any, max_length: int | None, config: Any) -> list[dict[str, Any]]:
        """The encodings of rows as the model that is read so shall get them; by default the task's own."""
        return task.encode(rows, processor, max_length=max_length, config=config)

    def check(self, model: nn.Module, examples: Examples) -> None:
        """Refuses a model or task that cannot be read so. It is called before a recipe runs, too: the model has no values then, `examples` no processor."""

    def fit(self, model: nn.Module, examples: Examples) -> int:
        """Makes the model's head answer; returns how many training examples went through the model or into a prompt."""
        raise AssertionError(f"{self!r} does not say how to fit a readout")


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a transform or readout may read: the training split of a task and the model's processor."""

    task: Any  # paretune.tasks.Task
    processor: Any
    max_length: int | None = None

    def texts(self) -> list[str]:
        """The training split's texts."""
        return self.task.texts("train")


ROLES: dict[str, type[Method]] = {"adapters": Adapter, "transforms": Transform, "modifiers": Modifier, "readouts": Readout}


def spell_value(value: Any) -> str:
    """A knob's value as a recipe spells it; `recipe.parse` reads it back to an equal value."""
    if isinstance(value, Method):
        return value.spell()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(map(spell_value, value)) + "]"
    return repr(value)


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _coerce(method: Method, field: dataclasses.Field, hint: Any, value: Any) -> Any:
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    where = f"{method.spelling()}({field.name}={value!r})"
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed and int not in allowed:
        value = float(value)
    kinds = tuple(typing.get_origin(a) or a for a in allowed)
    inside = tuple(typing.get_args(a)[0] for a in allowed if typing.get_origin(a) is tuple)
    if isinstance(value, tuple) and inside and not all(isinstance(v, inside) and not isinstance(v, bool) for v in value):
        raise RecipeError(f"{where}: the list holds {one_of(_MANY.get(k, k.__name__) for k in inside)} alone")
    if isinstance(value, bool) and bool not in kinds or not isinstance(value, kinds):
        listed = f"; write {field.name}={spell_value(tuple(value.split()))}" if isinstance(value, str) and inside == (str,) else ""
        raise RecipeError(f"{where}: {field.name} is {one_of(_TYPES.get(k, k.__name__) for k in kinds)}, not {type(value).__name__}{listed}")
    limits = field.metadata
    choices, low, high = limits.get("choices"), limits.get("low"), limits.get("high")
    if choices and value not in choices:
        raise RecipeError(f"{where}: {field.name} is {one_of(map(spell_value, choices))}{did_you_mean(str(value), map(str, choices))}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: {field.name} is a finite number")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and ((low is not None and value < low) or (high is not None and value > high)):
        bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        raise RecipeError(f"{where}: {field.name} is {bounds}")
    return value


_TYPES = {
    After: "a model such as @0",
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    tuple: "a list",
    type(None): "None",
}
_MANY = {str: "texts", int: "whole numbers", float: "numbers"}

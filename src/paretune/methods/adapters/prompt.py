"""Prompt tuning: a few learned vectors stand among the embedded tokens of the input; the model itself is frozen.

    [P; E(x)],   P (length, D) learns

Lester et al. 2021, arXiv:2104.08691: section 3.2 and figure 3 for the start, section 6 for several prompts that vote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paretune import processors, surgery, virtual_tokens
from paretune.anatomy import Site
from paretune.card import Card, knob
from paretune.errors import Incompatible, RecipeError, unknown
from paretune.roles import Adapter
from paretune.seams import Patch

PLACES = ("auto", "before", "after_cls")
COMMON = 5000  # the paper samples its words among so many of the most common; vocabularies begin with those


@dataclasses.dataclass(frozen=True, repr=False)
class Prompt(Adapter):
    """Trains virtual tokens before the input."""

    card = Card(
        title="Prompt tuning",
        paper="Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning",
        arxiv="2104.08691",
        equation="Y = LM([P; E(x)])",
        lowers="E",
        why="length · D numbers learn and no weight gradient is formed; every call reads so many tokens more.",
        lr=1e-2,
        note="Virtual tokens are attended to before any training, so the output moves at the start. "
        "The paper trains with Adafactor at a constant rate of 0.3 and no head; the rate here is for AdamW, and the head shares it.",
    )
    foldable = False
    additive = True  # rows of a batch meet in no layer, and each may have its own prompt

    length: int = knob(20, "virtual tokens", low=1, search="5..100 log")
    init: str = knob("random", "first values: in [-0.5, 0.5], or embeddings of words", choices=("random", "vocabulary", "classes", "text"))
    text: str = knob("", 'the text of init="text", over and over up to the length')
    place: str = knob("auto", '"before" the input, "after_cls" behind an encoder\'s class token; auto is that where there is one')
    positions: str = knob("tokens", "what a position counts: tokens alone, or padding on their left, too, as PEFT does", choices=("tokens", "all"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.place not in PLACES:
            raise RecipeError(unknown("place of a prompt", self.place, allowed=PLACES))

    def sites(self, model: nn.Module) -> list[Site]:
        sites = virtual_tokens.sites(model, self, length=self.length, places=(int(self.place == "after_cls"),))
        self.words(model)
        return sites

    def patch(self, site: Site) -> Patch:
        if site.place == virtual_tokens.MEMORY:
            return virtual_tokens.Memory(site, places=(0,) * self.length)
        behind = self.place == "after_cls" or self.place == "auto" and site.place == virtual_tokens.CLASS
        return SoftPrompt(site, places=(int(behind),) * self.length, positions=self.positions)

    @torch.no_grad()
    def start(self, model: nn.Module, patches: list[Patch]) -> None:
        if self.init == "random":
            return
        table, words = model.get_input_embeddings().weight.float(), self.words(model)
        words += _sampled(model, self.length - len(words))  # the paper: what classes do not fill starts as common words
        for patch in patches:
            if isinstance(patch, SoftPrompt):
                patch.tokens.copy_(torch.stack([table[ids].mean(0) for ids in words]))

    def words(self, model: nn.Module) -> list[list[int]]:
        """Token ids that the first values come from: for each virtual token those whose embeddings it starts as the mean of.

        Raises:
            Incompatible: where the model lacks what the start asks for: a tokenizer, names of its labels, a text.
        """
        tokenizer = processors.get(model)
        if self.init in ("classes", "text") and tokenizer is None:
            raise Incompatible(f'{self!r}: no tokenizer travels with the model, to read words with; give it one, or take init="vocabulary"')
        if self.init == "text":
            ids = tokenizer(self.text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise Incompatible(f'{self!r}: text is empty; write what the prompt shall start as, or take init="vocabulary"')
            return [[ids[i % len(ids)]] for i in range(self.length)]
        if self.init == "classes":
            names = [str(name) for name in (getattr(model.config, "id2label", None) or {}).values()]
            if not names or all(name == f"LABEL_{i}" for i, name in enumerate(names)):
                raise Incompatible(f'{self!r}: the labels of {type(model).__name__} have no names; load it for a task, or take init="vocabulary"')
            found = (tokenizer(name, add_special_tokens=False)["input_ids"] for name in names)
            return [ids for ids in found if ids][: self.length]
        return []


class SoftPrompt(virtual_tokens.VirtualTokens):
    """P, one row per virtual token."""

    def __init__(self, site: Site, *, places: Sequence[int], positions: str) -> None:
        super().__init__(site, places=places, positions=positions)
        self.tokens = nn.Parameter(torch.empty(len(places), site.in_features).uniform_(-0.5, 0.5))

    def virtual(self) -> Tensor:
        return self.tokens


def _sampled(model: nn.Module, n: int) -> list[list[int]]:
    """Ids of n of the most common words, drawn without repetition while there are enough."""
    size, tokenizer = model.get_input_embeddings().num_embeddings, processors.get(model)
    special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
    common = [i for i in range(min(size, COMMON)) if i not in special]
    drawn = [i for _ in range(0, n, len(common)) for i in torch.randperm(len(common)).tolist()]
    return [[common[i]] for i in drawn[:n]]


def vote(model: nn.Module, inputs: dict[str, Tensor], *, names: Sequence[str]) -> Tensor:
    """The class (B,) that most of the named prompts answer, all asked in one batch of one frozen model; the first of equals.

    Args:
        model: with a classifier's logits, and the prompts attached under these names.
        inputs: a batch of B rows.

    Raises:
        Incompatible: for a name that is not attached, or an adapter that cannot serve single rows.
    """
    asked = {key: tensor.repeat_interleave(len(names), 0) for key, tensor in inputs.items()}
    rows = len(next(iter(inputs.values())))
    with surgery.rows(model, list(names) * rows), torch.no_grad():
        logits = model(**asked).logits  # (B · prompts, C)
    ballots = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).view(rows, len(names), -1)
    return ballots.sum(1).argmax(-1)

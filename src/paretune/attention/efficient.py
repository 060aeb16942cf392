"""Attention by other means: how a transform replaces a loaded model's self-attention and keeps its weights.

A replacement is a patch at the attention call, behind rotary positions, caches and the split into heads. It stands in the
seam's group `efficient`, which belongs to the model as its weights do: no switch turns it off, merge keeps it, `full` trains
what it brings, and `from_pretrained` rebuilds it from its spelling in the config. Shapes as in the package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from paretune import anatomy, attention, hub, seams, surgery
from paretune.anatomy import Site
from paretune.attention import Attend, Call
from paretune.errors import Incompatible
from paretune.patches import Patch
from paretune.roles import Examples, Method, Trail, Transform


class AttentionTransform(Transform):
    """A transform that replaces every self-attention of a model; a method says `patch`, and `check` what it cannot take."""

    def follow(self, trail: Trail) -> Trail:
        if trail.attention:
            raise Incompatible(f"{trail.attention} | {self!r}: {trail.attention} has replaced the attention already; leave one of the two out")
        inside = next((m for m in trail.attached if m.attends), None)
        if inside is not None:
            raise Incompatible(f"{inside!r} | {self!r}: {inside.spelling()} acts inside the attention that {self.spelling()} replaces; leave one of the two out")
        return trail.replace(attention=repr(self))

    def sites(self, model: nn.Module) -> list[Site]:
        """Every self-attention call."""
        return attention.sites(model, "self.attention_call", asked_by=repr(self))

    def decided(self, model: nn.Module, sites: list[Site]) -> Self:
        """The method with what it leaves to the machine or the model decided, as the saved model shall have it."""
        return self

    def check(self, model: nn.Module, sites: list[Site]) -> None:
        """Refuses, with Incompatible, a model that the method cannot take; nothing has changed yet."""

    def patch(self, site: Site) -> Replacement:
        """A fresh replacement for one attention call."""
        raise AssertionError(f"{self!r} says no other means")

    def shared(self, model: nn.Module) -> nn.Module | None:
        """Tensors that all replacements have in common, as `patch.shared`; stored once."""
        return None

    def unused(self, model: nn.Module) -> list[str]:
        """Paths of modules whose output it goes around."""
        return []

    def start(self, model: nn.Module, patches: list[Any]) -> None:
        """First values that come from the model's own weights."""

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        sites = self.sites(model)
        _require_free(model, sites, by=self)
        self.check(model, sites)
        method = self.decided(model, sites)
        learns = next(model.parameters()).requires_grad
        surgery.share(model, seams.ATTENTION, method=method)
        patches = [surgery.install(model, seams.ATTENTION, method=method, site=site) for site in sites]
        with contextlib.ExitStack() as undo:
            undo.callback(seams.drop, model, seams.ATTENTION)
            method.start(model, patches)
            rehearse(model, patches, by=method)
            undo.pop_all()
        for name, parameter in model.named_parameters():
            if seams.is_attention(name):
                parameter.requires_grad_(learns)
        surgery.settle(model)
        hub.refresh(model)
        return model


class Replacement(Patch):
    """Attention by other means at one call; a method says `compute`."""

    attends = True
    weighs = False  # does it make attention weights where eager attention does?
    longest: int | None = None  # tokens of the longest input that it can take, where it has a limit of its own

    def __init__(self, site: Site | None = None) -> None:
        super().__init__(site)
        self.calls = 0  # how often the model has asked it

    def attend(self, attend: Attend, call: Call) -> tuple[Tensor, Tensor | None]:
        """By `compute`.

        Raises:
            Incompatible: for an implementation whose masks are not known, or weights that were asked for and are not made.
        """
        self.calls += 1
        call.require_known(f"hands its masks to {self.method!r} in a form that is not known there")
        if asks_weights(call) and not (self.weighs and call.implementation == "eager"):
            way = "call model.set_attn_implementation('eager') for them" if self.weighs else "leave output_attentions out, or look at the model before it"
            raise Incompatible(f"{self.method!r}: attention weights were asked for, and it makes none under {call.implementation!r}; {way}")
        return self.compute(attend, without_room(call))

    def compute(self, attend: Attend, call: Call) -> tuple[Tensor, Tensor | None]:
        """The output (B, T, H, D) and, where they are made, the weights (B, H, T, S); `attend(call)` is the model's own way."""
        raise AssertionError(f"{type(self).__name__} does not say how to attend")


def _require_free(model: nn.Module, sites: list[Site], *, by: Transform) -> None:
    for site in sites:
        seam = seams.seam_of(model.get_submodule(site.path))
        for group, _, patch in seam.patches() if seam else ():
            if patch.attends:
                why = "has replaced the attention already" if group == seams.ATTENTION else "acts inside the attention that would be replaced"
                raise Incompatible(f"{by!r}: {patch.method!r} {why}; leave one of the two out")


def require_own(model: nn.Module, sites: list[Site], *, by: Method) -> None:
    """Refuses, with Incompatible, an attention that was replaced, for what would act inside it."""
    for site in sites:
        seam = seams.seam_of(model.get_submodule(site.path))
        for _, _, patch in seam.patches([seams.ATTENTION]) if seam else ():
            raise Incompatible(f"{by!r}: {patch.method!r} has replaced the attention that it would act inside; use lora or adapter")


def rehearse(model: nn.Module, patches: list[Any], *, by: Transform) -> None:
    """Runs one small input through the model and sees that it asks every replacement.

    Raises:
        Incompatible: if it goes around one, or a replacement meets what it cannot do.
    """
    with as_it_is(model):
        model.base_model(**anatomy.small_input(model))
    idle = next((p.site.path for p in patches if not p.calls), None)
    if idle is not None:
        raise Incompatible(f"{by!r}: {type(model).__name__} computed a forward pass and never asked the attention at {idle}, so that nothing would change")
    for patch in patches:
        patch.calls = 0


@contextlib.contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode and has no gradients; afterwards its modules' modes and torch's random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training


# --- what a call may ask --------------------------------------------------------------------------------------------------------


def hides_later(model: nn.Module, site: Site) -> bool:
    """Does the attention at this site hide later tokens, as its module says?"""
    return bool(getattr(model.get_submodule(site.path), "is_causal", False))


def is_causal(call: Call) -> bool:
    """Does this attention hide later tokens, by a mask or by a flag?"""
    said = call.more.get("is_causal")
    return bool(getattr(call.module, "is_causal", False) if said is None else said)


def asks_weights(call: Call) -> bool:
    """Will the model hand out the weights of this call (`output_attentions`)? Some families do not tell the call, so their collector is asked, too."""
    return bool(call.more.get("output_attentions")) or "attentions" in (output_capturing._active_collector.get() or ())


def padding(call: Call, *, by: Transform) -> Tensor | None:
    """Which keys are tokens (B or 1, S), True or False; None where all are. Causality is `is_causal`'s to say.

    Raises:
        Incompatible: for a mask that says more than that, such as several texts in one row.
    """
    return None if call.mask is None else tokens_of(call.mask, causal=is_causal(call), by=by)


def tokens_of(mask: Tensor, *, causal: bool, by: Transform) -> Tensor | None:
    """`padding` of a mask (B or 1, 1, T, S) alone."""
    seen = visible(mask)[:, 0]  # (B or 1, T, S)
    keys = seen[:, -1]  # the last query sees every token
    if seen.stride(1) != 0 and seen.shape[1] > 1:
        queries, count = seen.shape[1:]
        plain = keys[:, None, :]
        if causal:
            plain = plain & torch.ones(queries, count, dtype=torch.bool, device=seen.device).tril(count - queries)
        if not torch.equal(seen, plain.expand_as(seen)):  # rows that see nothing (padding before the text) stay as they are
            differs = (seen != plain) & seen.any(-1, keepdim=True)
            if differs.any():
                raise Incompatible(f"{by!r}: the attention mask says more than which tokens are padding; give one text per row and a 2-D attention_mask")
    return None if bool(keys.all()) else keys


def require_text_first(keep: Tensor, *, by: Transform) -> None:
    """Refuses, with Incompatible, padding in front of a text, for what goes by a token's place; `keep` (B, S) is True where tokens are."""
    if bool((~keep[:, 0] & keep.any(-1)).any()):
        raise Incompatible(f'{by!r}: a row has padding in front of its text, where the first tokens\' places are; pad behind it, as with tokenizer.padding_side="right"')


def without_room(call: Call) -> Call:
    """The call without the keys behind its last query, where a cache of fixed size has room for tokens to come: queries are the last positions then."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    if queries == keys or not is_causal(call):
        return call
    if call.mask is not None:
        count = torch.arange(1, keys + 1, device=call.mask.device)
        last = (visible(call.mask)[:, 0] * count).amax((0, 2))  # (T), one more than the last key that a query sees: itself, unless it is padding
        keys = max(queries, queries - 1 + int((last - count[:queries] + 1).max()))
    elif call.is_triangular():
        keys = queries
    more = {name: value[..., :keys] if name == "position_bias" and value is not None else value for name, value in call.more.items()}
    mask = None if call.mask is None else call.mask[..., :keys]
    return call._replace(key=call.key[:, :, :keys], value=call.value[:, :, :keys], mask=mask, more=more)


def visible(mask: Tensor) -> Tensor:
    """A mask (B or 1, 1, T, S) as True where seen: bool as it is, additive where it is not the lowest number; stride 0 stays stride 0.

    Raises:
        Incompatible: for a mask of another form, such as FlexAttention's.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise Incompatible("the attention mask has a form that is not known here; call model.set_attn_implementation('sdpa') or ('eager') first")
    if mask.dtype == torch.bool:
        return mask
    flat = mask[:, :, :1] if mask.stride(2) == 0 else mask
    return (flat > torch.finfo(mask.dtype).min / 2).expand(mask.shape)


def repeated(call: Call) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, S, D), those of a group repeated for each of its query heads."""
    times = call.query.shape[1] // call.key.shape[1]
    if times == 1:
        return call.key, call.value
    return call.key.repeat_interleave(times, 1), call.value.repeat_interleave(times, 1)


FURTHER = {  # what a call brings, what it is, and what a user may do
    "position_bias": ("adds a bias by distance to every score", "use longformer or blockwise"),
    "softcap": ("caps its scores", "use longformer"),
    "sliding_window": ("has a sliding window of its own", "use longformer, or set sliding_window to None in its config"),
    "s_aux": ("has sinks beside its scores", "leave its attention as it is"),
}


def refuse_further(call: Call, *, by: Transform, allowed: tuple[str, ...] = ()) -> None:
    """Refuses, with Incompatible, what some families do with scores and a method cannot; a short input shows it already, so that the rehearsal meets it."""
    for name, (what, hint) in FURTHER.items():
        if call.more.get(name) is not None and name not in allowed and not (name == "sliding_window" and _hides_none(call)):
            raise Incompatible(f"{by!r}: {type(call.module).__name__} {what}, which this attention cannot keep; {hint}")


def _hides_none(call: Call) -> bool:
    """Is the family's own window as wide as its longest input?"""
    return call.more["sliding_window"] >= getattr(call.module.config, "max_position_embeddings", float("inf"))


# --- what a model is ------------------------------------------------------------------------------------------------------------


def require_encoder(model: nn.Module, *, by: Transform, why: str) -> None:
    """Refuses a model whose tokens must not see later ones, with the reason why this attention shows them."""
    calls = attention.sites(model, "self.attention_call", asked_by=repr(by))
    if {site.stack for site in calls} != {"encoder"} or any(hides_later(model, site) for site in calls):  # a BERT may be a decoder
        raise Incompatible(f"{by!r}: {type(model).__name__} is causal in all layers or in some, and {why}; use it on an encoder such as BERT or ViT")


def longest(model: nn.Module) -> int | None:
    """How many tokens, or patches with what stands before them, an input can have; None where there is no limit."""
    tables = [p for n, p in model.named_parameters() if n in anatomy.embeddings(model).positions]  # of images and sound
    return tables[0].shape[1] if tables else anatomy.positions(model)[1]


def require_room(model: nn.Module, tokens: int, *, by: Transform) -> None:
    """Refuses inputs of more tokens than a replaced attention takes."""
    short = next((p for p in replaced(model) if p.longest is not None and p.longest < tokens), None)
    if short is not None:
        raise Incompatible(f"{by!r}: {short.method!r} takes up to {short.longest} tokens, and an input will have {tokens}; put {by.spelling()} before it")


def on_latents(model: nn.Module) -> bool:
    """Do the model's layers compute on latents in the place of tokens?"""
    return any(p.wraps for p in replaced(model))


def replaced(model: nn.Module) -> list[Any]:
    """What stands in the place of the model's own attention, call by call."""
    return [p for _, _, seam in seams.seams_of(model) for _, _, p in seam.patches([seams.ATTENTION])]

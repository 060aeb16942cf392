"""Fewer heads: each attention keeps those that the task's loss depends on most.

    MHAtt(x) = Σ_h ξ_h Att_h(x),      I_h = E_x |∂L(x)/∂ξ_h| at ξ = 1 = E_x |Att_h(x)ᵀ ∂L/∂Att_h(x)|;      the n highest stay

Head h is its rows of query, key and value and its columns of the output map. Where several heads share keys and values
(GQA), whole groups stay or go. Michel et al. 2019, arXiv:1905.10650, equation 2 and section 4.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from paretune import anatomy, hub, seams, surgery
from paretune.anatomy import Attention, Site
from paretune.card import Card, knob
from paretune.errors import Incompatible
from paretune.roles import Examples
from paretune.weights.maps import cut_and_mark, mark, require_bare, rewritable
from paretune.weights.narrowing import Narrowing, highest, rows_of


@dataclasses.dataclass(frozen=True, repr=False)
class AttentionHeads(Narrowing):
    """Cuts the least important heads out of every attention."""

    card = Card(
        title="Fewer attention heads",
        paper="Michel, Levy & Neubig 2019, Are Sixteen Heads Really Better than One?",
        arxiv="1905.10650",
        equation="I_h = E |∂L/∂ξ_h|",
        lowers="E",
        why="Attention's maps and its work over pairs of tokens fall with the number of heads; many heads can go at little loss.",
        note="The paper ranks heads over all layers; here every layer keeps as many, and T5, whose layers share a bias per head, the same ones. The size "
        "of a head stays; where the config can say that (Llama, T5, ViT), the folder opens with transformers alone, else "
        "(BERT, GPT-2) with paretune, too. Importance is that for the trained task.",
    )

    keep: int | float = knob(0.5, "how many heads (or groups of heads that share keys) stay: a share up to 1.0, or a number", search="0.2..1.0")
    samples: int = knob(128, "training examples that importance is measured on", low=1)

    def apply(self, model: nn.Module, examples: Examples | None = None) -> nn.Module:
        assert examples is not None
        sites = rewritable(model, "attention", by=self)
        attentions = anatomy.attentions(model)
        self._check(model, attentions, sites)
        units = {a.output.path: a.groups for a in attentions}
        scores = self.importance(model, list(units), examples=examples, units=units)
        surgery.settle(model)
        for table in dict.fromkeys(a.table for a in attentions if a.table):  # one choice for all that read one table
            together = [a.output.path for a in attentions if a.table == table]
            scores |= dict.fromkeys(together, torch.stack([scores[path] for path in together]).sum(0))
        for attention in attentions:
            self._cut(model, attention, highest(scores[attention.output.path], self.number(attention.groups)))
        if anatomy.say_heads(model):
            for path in (path for a in attentions for path in (a.path, *a.weights)):
                model.get_submodule(path).__dict__.pop("resized", None)
        hub.refresh(model)
        return model

    def _check(self, model: nn.Module, attentions: list[Attention], sites: list[Site]) -> None:
        name = type(model).__name__
        if not attentions or not all(anatomy.calls_attention(seams.base_of(model.get_submodule(a.path))) for a in attentions):
            raise Incompatible(f"{self!r}: {name} computes attention in a way of its own, which does not say how its heads lie; use ffn or keep_layers")
        fused = next((s for s in sites if s.rows and (not seams.contiguous(s.rows) or s.out_features * 3 != _features(model, s))), None)
        if fused is not None:
            raise Incompatible(f"{self!r}: {name} reads the heads of {fused.path} by counts of its config, which would no longer fit; use ffn or keep_layers")
        require_bare(model, [*(s.path for s in sites), *(a.path for a in attentions)], by=self)

    def _cut(self, model: nn.Module, attention: Attention, groups: Tensor) -> None:
        wide, size = attention.query.out_features // attention.groups, attention.size  # features of a group's queries, and of its keys
        queries, keys = _features_of(groups, wide), _features_of(groups, size)
        rows: dict[str, list[Tensor]] = {}
        for site, chosen in ((attention.query, queries), (attention.key, keys), (attention.value, keys)):
            rows.setdefault(site.path, []).append(rows_of(site, chosen))
        for path, parts in rows.items():
            cut_and_mark(model.get_submodule(path), rows=torch.cat(parts).sort().values)
        cut_and_mark(model.get_submodule(attention.output.path), columns=queries)
        module = model.get_submodule(attention.path)
        sizes = anatomy.head_attributes(module, heads=len(queries) // size, size=size)
        module.__dict__.update(sizes)
        mark(module, sizes)
        if attention.table and attention.table.startswith(f"{attention.path}."):
            cut_and_mark(model.get_submodule(attention.table), columns=groups)


def _features(model: nn.Module, site: Site) -> int:
    return len(anatomy.weight(model.get_submodule(site.path)))


def _features_of(groups: Tensor, size: int) -> Tensor:
    """The features of these groups, `size` in each: g·size, ..., g·size + size − 1."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()

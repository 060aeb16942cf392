"""Blockwise attention: the text in b equal blocks, of which each head lets a block see one alone, its own or a distant one.

    head h:  Y_i = softmax(s Q_i K_π(i)ᵀ) V_π(i),    π_h(i) = i + shift_h mod b,    i = 0 .. b − 1;      n²/b d_h products, not n² d_h

Shift 0 is a local head, any other a distant one. Qiu et al. 2020, arXiv:1911.02972, section 3. Blocks are of a row's own
tokens: padding does not move them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretune.anatomy import Site
from paretune.attention import Attend, Call, efficient
from paretune.attention.efficient import AttentionTransform, Replacement
from paretune.card import Card, knob
from paretune.errors import Incompatible, RecipeError


@dataclasses.dataclass(frozen=True, repr=False)
class Blockwise(AttentionTransform):
    """Replaces an encoder's self-attention by attention from block to block, and keeps its weights."""

    card = Card(
        title="Blockwise attention",
        paper="Qiu et al. 2020, Blockwise Self-Attention for Long Document Understanding",
        arxiv="1911.02972",
        equation="softmax(s Q_i K_π(i)ᵀ) V_π(i)",
        lowers="E",
        why="Attention costs n²/b products a feature instead of n²; the square stays, and what no head's blocks join meets in later layers alone.",
        note="Exact at its limit: one block is the model's own attention, bit for bit. The paper trains it from the start; a pretrained model needs training after it. "
        "Every input is cut into b blocks, the short ones, too; its heads' shares are 10:2 of 12 for two blocks in the paper. "
        "From 1,024 to 4,096 tokens a training step's CPU time grew as n^1.4, full attention's as n^1.8 (docs/long_range.md).",
    )

    blocks: int = knob(2, "b: parts of a text", low=1, search="2..8")
    permutations: str = knob("per-head", 'shifts from block to block: "per-head" deals them out by `local`; or one for each equal group of heads, as in "0,0,1"')
    local: float = knob(0.75, "share of the heads whose blocks see themselves, at least one head; the others take the shifts 1, 2, .. b − 1 in turn", low=0.0, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.permutations != "per-head" and not all(word.strip().isdecimal() for word in self.permutations.split(",")):
            raise RecipeError(f'{self!r}: permutations is "per-head", or whole numbers from 0, as in "0,0,1"')

    def shifts(self, heads: int) -> list[int]:
        """shift_h of every head.

        Raises:
            Incompatible: for a list that does not make equal groups of the heads.
        """
        if self.permutations != "per-head":
            listed = [int(word) for word in self.permutations.split(",")]
            if heads % len(listed):
                raise Incompatible(f"{self!r}: {heads} heads do not make {len(listed)} equal groups; list as many shifts as divide {heads}")
            return [shift for shift in listed for _ in range(heads // len(listed))]
        local = max(1, round(self.local * heads)) if self.blocks > 1 else heads
        return [0] * local + [1 + i % (self.blocks - 1) for i in range(heads - local)]

    def check(self, model: nn.Module, sites: list[Site]) -> None:
        efficient.require_encoder(model, by=self, why="a shift sends late blocks to early ones, and leaves early ones nothing that they may see")

    def patch(self, site: Site) -> Blocks:
        return Blocks(site)


class Blocks(Replacement):
    """Attention from block to block at one call."""

    method: Blockwise

    def compute(self, attend: Attend, call: Call) -> tuple[Tensor, Tensor | None]:
        shifts = self.method.shifts(call.query.shape[1])
        if self.method.blocks == 1:
            return attend(call)
        efficient.refuse_further(call, by=self.method, allowed=("position_bias",))
        keep = efficient.padding(call, by=self.method)
        if keep is None:
            return self._blocks(call, shifts).transpose(1, 2), None
        keep = keep.expand(len(call.query), -1)  # (B, n), True where a token is
        counts, places, parts = keep.sum(-1), [], []
        for count in counts[counts > 0].unique():  # rows of as many tokens together
            row = (counts == count).nonzero()  # (R, 1)
            at = keep[row[:, 0]].nonzero()[:, 1].unflatten(0, (len(row), -1))  # (R, m)
            places.append(torch.stack([row.expand_as(at), at]).flatten(1))
            parts.append(self._blocks(_of_tokens(call, row, at=at), shifts).transpose(1, 2).flatten(0, 1))
        (row, at), out = torch.cat(places, 1), torch.cat(parts)  # (tokens), (tokens, H, D)
        return out.new_zeros(*keep.shape, *out.shape[1:]).index_put((row, at), out), None  # padding gets zeros

    def _blocks(self, call: Call, shifts: list[int]) -> Tensor:
        """(B, H, n, D)"""
        key, value = efficient.repeated(call)
        bias, how = call.more.get("position_bias"), {"dropout_p": call.more.get("dropout", 0.0), "scale": call.more.get("scaling")}
        parts = [range(p[0], p[-1] + 1) for p in torch.arange(key.shape[2]).tensor_split(min(self.method.blocks, key.shape[2]))]
        heads = []
        for shift, own in _groups(shifts):
            out = []
            for i, rows in enumerate(parts):
                columns = parts[(i + shift) % len(parts)]
                q, (k, v) = call.query[:, own, rows.start : rows.stop], (t[:, own, columns.start : columns.stop] for t in (key, value))
                added = None if bias is None else bias[:, own, rows.start : rows.stop, columns.start : columns.stop]
                out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=added, **how))
            heads.append(torch.cat(out, 2))
        return torch.cat(heads, 1)


def _of_tokens(call: Call, row: Tensor, *, at: Tensor) -> Call:
    """The call of some rows (R, 1), and in each of its tokens (R, m) alone."""
    more, bias = dict(call.more), call.more.get("position_bias")
    if bias is not None:
        bias = bias.permute(0, 2, 3, 1)  # (1 or B, n, n, H)
        more["position_bias"] = bias[row[:, :, None] if len(bias) > 1 else 0, at[:, :, None], at[:, None]].permute(0, 3, 1, 2)
    query, key, value = (x.transpose(1, 2)[row, at].transpose(1, 2) for x in (call.query, call.key, call.value))  # (R, H or N, m, D)
    return call._replace(query=query, key=key, value=value, mask=None, more=more)


def _groups(shifts: list[int]) -> list[tuple[int, slice]]:
    """Heads that lie next to each other and have one shift."""
    bounds = [h for h in range(len(shifts)) if not h or shifts[h] != shifts[h - 1]] + [len(shifts)]
    return [(shifts[a], slice(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]

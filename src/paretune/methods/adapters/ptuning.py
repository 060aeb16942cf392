"""P-tuning: virtual tokens at chosen places of the input, made by a small network while they are trained.

    h = MLP([→LSTM(e); ←LSTM(e)]),  or  MLP(e),  or  e itself;   e (length, D) learns, and so does the network

What is kept of it is h: the network is gone when the phase ends. Liu et al. 2021, arXiv:2103.10385, section 3.2 (equation 4)
and the ablations of the prompt encoder and of the places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paretune import virtual_tokens
from paretune.anatomy import Site
from paretune.card import Card, knob
from paretune.roles import Adapter
from paretune.seams import Patch


@dataclasses.dataclass(frozen=True, repr=False)
class PTuning(Adapter):
    """Trains virtual tokens through a prompt encoder."""

    card = Card(
        title="P-tuning",
        paper="Liu et al. 2021, GPT Understands, Too",
        arxiv="2103.10385",
        equation="h = MLP([LSTM forward(e); LSTM backward(e)])",
        lowers="E",
        why="No weight gradient of the backbone is formed; every call reads so many tokens more, and nothing of the encoder is left.",
        lr=1e-3,
        note="Virtual tokens are attended to before any training, so the output moves at the start. "
        "The paper's experiments also tune the model; that is ptuning + full. In a decoder the virtual tokens stand first: a text that is being "
        "written has no end to count from, and places within it would move from step to step.",
    )
    foldable = False
    additive = True  # rows of a batch meet in no layer, and each may have its own virtual tokens

    length: int = knob(20, "virtual tokens", low=1, search="5..100 log")
    encoder: str = knob("lstm", "what makes them: two LSTM layers both ways and an MLP, the MLP alone, or nothing", choices=("lstm", "mlp", "embedding"))
    hidden: int | None = knob(None, "width of the encoder; None is the embedding's", low=2)
    template: tuple[int, ...] | None = knob(None, "places of equal groups: behind k tokens of the input, before -k of its end; None: as prompt's auto")
    positions: str = knob("tokens", "what a position counts: tokens alone, or padding on their left, too, as PEFT does", choices=("tokens", "all"))

    def sites(self, model: nn.Module) -> list[Site]:
        return virtual_tokens.sites(model, self, length=self.length, places=self.template or (0,))

    def patch(self, site: Site) -> Patch:
        template = self.template or (int(site.place == virtual_tokens.CLASS),)
        places = [place for part, place in zip(torch.arange(self.length).tensor_split(len(template)), template, strict=True) for _ in part]
        return virtual_tokens.Memory(site, places=places) if site.place == virtual_tokens.MEMORY else Encoded(site, places=places, knobs=self)


class Encoded(virtual_tokens.VirtualTokens):
    """h, from e through the encoder; once settled, h alone."""

    def __init__(self, site: Site, *, places: Sequence[int], knobs: PTuning) -> None:
        super().__init__(site, places=places, positions=knobs.positions)
        width, hidden = site.in_features, knobs.hidden or site.in_features
        self.e = nn.Parameter(torch.randn(knobs.length, width))
        self.lstm = nn.LSTM(width, hidden // 2, num_layers=2, bidirectional=True) if knobs.encoder == "lstm" else None
        into = hidden // 2 * 2 if self.lstm is not None else width
        self.mlp = nn.Sequential(nn.Linear(into, hidden), nn.ReLU(), nn.Linear(hidden, width)) if knobs.encoder != "embedding" else nn.Identity()

    def virtual(self) -> Tensor:
        if self.settled:
            return self.tokens
        return self.mlp(self.e if self.lstm is None else self._both_ways(self.lstm))  # (P, D)

    def _both_ways(self, lstm: nn.LSTM) -> Tensor:
        """(P, hidden), in fp32 at least: some processors have no LSTM in 16 bits."""
        dtype = torch.promote_types(self.e.dtype, torch.float32)
        with torch.autocast(self.e.device.type, enabled=False):
            out, _ = torch.func.functional_call(lstm, {name: p.to(dtype) for name, p in lstm.named_parameters()}, (self.e.to(dtype),))
        return out.to(self.e.dtype)

    def settle(self) -> dict[str, Tensor]:
        return {"tokens": self.virtual()}

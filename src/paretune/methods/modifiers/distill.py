"""Knowledge distillation: the model learns from a teacher's answers and, if asked, from what goes on inside it.

    L = (1 − mix) L_task + mix (logits · L_KD + hidden · L_hid + attention · L_att + relation · L_rel)

    L_KD  = T² KL(softmax(z^t / T) ‖ softmax(z^s / T))                  Hinton et al. 2015, arXiv:1503.02531, section 2
    L_hid = Σ_m MSE(H^s_m W, H^t_g(m)),  or  Σ_m 1 − cos                Jiao et al. 2019 (TinyBERT), arXiv:1909.10351, equations 8 and 9;
                                                                        Sanh et al. 2019 (DistilBERT), arXiv:1910.01108, section 3
    L_att = Σ_m 1/h Σ_a MSE(A^s_(m,a), A^t_(g(m),a)),  A = Q Kᵀ / √d    TinyBERT, equation 7
    L_rel = 1/h Σ_a KL(softmax(A^t_a) ‖ softmax(A^s_a)) + KL(softmax(V V^tᵀ / √d) ‖ ...)   of the last layers: Wang et al. 2020 (MiniLM),
                                                                        arXiv:2002.10957, equations 6 to 9

Layer m of the student learns from layer g(m) of the teacher. W learns along where the widths differ, and is dropped after the phase.

Shapes: B rows, T tokens, M layers compared, D features, H heads, d features of a head.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from paretune import processors, sight
from paretune.card import Card, knob
from paretune.errors import Incompatible, RecipeError
from paretune.roles import After, Modifier
from paretune.sight import Sight
from paretune.step import probe
from paretune.teachers import LOGITS, Teacher, targets
from paretune.training import Events, Loop


@dataclasses.dataclass(frozen=True, repr=False)
class Distill(Modifier):
    """Adds the distance from a teacher to the loss."""

    card = Card(
        title="Knowledge distillation",
        paper="Hinton et al. 2015, Distilling the Knowledge in a Neural Network",
        arxiv="1503.02531",
        equation="L = (1 − mix) L_task + mix · T² KL(softmax(z_t / T) ‖ softmax(z_s / T))",
        lowers="E",
        why="A smaller model comes closer to a larger one than the labels alone would bring it; the teacher's forward passes are added to its training.",
        note="The teacher's outputs are kept on disk for the time of the phase, in fp32, and the size is said first: little for classes, for a language "
        "model the hidden state before its logits, much for hidden states and attention. A layer's hidden state is what it hands to the next one.",
    )

    teacher: After | str = knob(After(0), "who teaches: @0 (the backbone), @k (the model after phase k), a folder or a hub id")
    logits: float = knob(1.0, "weight of the answers' Kullback-Leibler divergence", low=0.0)
    hidden: float = knob(0.0, "weight of the distance of hidden states", low=0.0)
    attention: float = knob(0.0, "weight of the distance of attention scores", low=0.0)
    relation: float = knob(0.0, "weight of the divergence of attention and value relations in the last layer", low=0.0)
    temperature: float = knob(2.0, "T, which softens both answers", low=0.01, search="1..8")
    mix: float = knob(0.5, "the teacher's share of the loss; the task's is 1 - mix", low=0.0, high=1.0, search="0.1..1.0")
    layers: str | tuple[int, ...] = knob("even", 'what teaches each layer: "even" spreads, "last" compares the last alone, or the teacher\'s numbers from 0')
    hidden_by: str = knob("mse", "the distance of hidden states", choices=("mse", "cosine"))
    cache: bool = knob(True, "compute the teacher's outputs once and keep them on disk; False asks it at every step")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers, str) and self.layers not in ("even", "last"):
            raise RecipeError(f'{self!r}: layers is "even", "last" or a list of the teacher\'s layers, as in layers=[1, 3, 5]')
        if self.mix and not (self.logits or self.inside):
            raise RecipeError(f"{self!r}: nothing is compared; give logits, hidden, attention or relation a weight, or mix=0.0")

    @property
    def inside(self) -> bool:
        """Does it compare more than answers?"""
        return bool(self.hidden or self.attention or self.relation)

    @property
    def heads(self) -> bool:
        """Does it compare attention heads?"""
        return bool(self.attention or self.relation)

    @property
    def keeps_outputs(self) -> bool:
        return self.cache

    def models(self) -> list[tuple[After | str, bool]]:
        return [(self.teacher, self.logits > 0)] if self.mix else []

    def events(self, loop: Loop) -> Events:
        return _Distilling(self, loop) if self.mix else Events()

    def pairs(self, mine: int, its: int) -> list[tuple[int, int]]:
        """Which hidden state of a student of `mine` layers learns from which of a teacher of `its`; 0 is the embeddings.

        Raises:
            Incompatible: for a list that does not fit.
        """
        if self.layers == "last":
            return [(mine, its)]
        if self.layers == "even":
            return [(m, -(-m * its // mine)) for m in range(mine + 1)]  # g(m) = ⌈m N / M⌉
        if len(self.layers) != mine or not all(0 <= int(n) < its for n in self.layers):
            raise Incompatible(f"{self!r}: layers names one of the teacher's layers, 0 to {its - 1}, for each of the student's {mine}")
        return [(0, 0), *((m, int(n) + 1) for m, n in enumerate(self.layers, 1))]


# --- the distances --------------------------------------------------------------------------------------------------------------


def softened(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T² Σ KL(softmax(z^t / T) ‖ softmax(z^s / T)) of logits (targets, C); with C = 1, a regression, Σ (z^s − z^t)²."""
    if student.shape[-1] == 1:
        return F.mse_loss(student, teacher, reduction="sum")
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (student, teacher))
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="sum")


def state_distance(student: Tensor, teacher: Tensor, *, by: str) -> Tensor:
    """Σ_m MSE(H^s_m, H^t_m), or Σ_m 1 − cos(H^s_m, H^t_m), at each token: (B, T, M, D) twice to (B, T)."""
    if by == "cosine":
        return (1 - F.cosine_similarity(student, teacher, dim=-1)).sum(-1)
    return (student - teacher).square().mean(-1).sum(-1)


def score_distance(student: Tensor, teacher: Tensor, *, sees: Tensor) -> Tensor:
    """Σ_m 1/h Σ_a (A^s − A^t)², A = Q Kᵀ / √d, mean over the keys that a token sees: (B, T, 2, M, H, d), twice, sees (B, T, T), to (B, T)."""
    apart = _products(*student.unbind(2)) - _products(*teacher.unbind(2))  # (B, M, H, T, T)
    each = (apart.square() * sees[:, None, None]).sum(-1) / sees.sum(-1)[:, None, None].clamp(min=1)
    return each.mean(2).sum(1)


def relation_divergence(student: Tensor, teacher: Tensor, *, sees: Tensor) -> Tensor:
    """KL of softmax(Q Kᵀ / √d) and of softmax(V Vᵀ / √d), mean over heads: Q / √d, K and V (B, T, 3, 1, H, d), twice, to (B, T)."""
    total = torch.zeros(student.shape[:2], device=student.device)
    for relate in (lambda q, k, v: _products(q, k), lambda q, k, v: _products(v, v) / math.sqrt(v.shape[-1])):
        log_q, log_p = (relate(*x.unbind(2)).masked_fill(~sees[:, None, None], -1e9).log_softmax(-1) for x in (student, teacher))
        total = total + F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean((1, 2))
    return total


def _padded(matrices: list[Tensor], tokens: int) -> Tensor:
    """(B, T, features) of matrices of fewer rows, with zeros behind them."""
    found = pad_sequence(matrices, batch_first=True)
    return F.pad(found, (0, 0, 0, tokens - found.shape[1]))


def _products(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("btmhd,bsmhd->bmhts", left, right)


# --- at work --------------------------------------------------------------------------------------------------------------------


class _Distilling(Events):
    """One phase with a teacher."""

    def __init__(self, knobs: Distill, loop: Loop) -> None:
        self.knobs, self.kind, self.watch = knobs, loop.task.kind, contextlib.ExitStack()
        self.maps: list[nn.Parameter] = []  # W of the embeddings and W of the layers, where the widths differ
        self.student, self.outputs = self._probe(loop)
        self.output: nn.Module | None = None  # the teacher's map onto a vocabulary, behind what is kept of it
        self.teacher = Teacher(knobs.teacher, loop, read=self._read, keep=knobs.cache)
        self._check_lengths(loop)
        if knobs.hidden:
            self._map_widths(loop)

    def inputs(self, loop: Loop, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.knobs.inside:
            self.seen = self.watch.enter_context(sight.watching(loop.model, heads=self.knobs.heads))
        return batch

    def loss(self, loop: Loop, batch: dict[str, Tensor], *, outputs: Any, loss: Tensor) -> Tensor:
        self.watch.close()
        knobs, taught, answers = self.knobs, self.teacher.outputs(loop.indices), self.kind.answered(outputs, batch)
        total = torch.zeros((), device=loss.device)
        if knobs.logits:
            total = knobs.logits * softened(torch.cat(answers).float(), self._logits(loop, taught), temperature=knobs.temperature)
        if knobs.inside:
            total = total + self._apart(batch, taught, targets=[len(a) for a in answers])
        total = (1 - knobs.mix) * loss + knobs.mix * total if knobs.mix < 1 else total
        if not total.requires_grad:
            raise Incompatible(f"{knobs!r}: what learns in this phase changes nothing of what is compared; let more learn, as in full + {knobs!r}")
        return total

    def _logits(self, loop: Loop, taught: dict[str, list[Tensor]]) -> Tensor:
        """The teacher's, of all targets: (targets, C)."""
        kept = torch.cat(taught[LOGITS])
        with torch.no_grad(), probe.autocast(loop.pace):
            return (kept if self.output is None else self.output(kept)).float()

    def flops(self) -> float | None:
        return self.teacher.flops()

    def _apart(self, batch: dict[str, Tensor], taught: dict[str, list[Tensor]], *, targets: list[int]) -> Tensor:
        """The distances inside, as a mean over the tokens of each example, summed over its targets as the task's loss is."""
        knobs, mine = self.knobs, self._inside(self.seen, [m for m, _ in self.places], self.maps)
        its = {name: _padded(taught[name], x.shape[1]).view(*x.shape[:-1], -1) for name, x in mine.items()}
        real = sight.real(self.seen, batch)
        sees = sight.sees(self.seen, real)
        total = torch.zeros(real.shape, device=real.device)
        if knobs.hidden:
            total = total + knobs.hidden * state_distance(mine["hidden"], its["hidden"], by=knobs.hidden_by)
        if knobs.attention:
            total = total + knobs.attention * score_distance(mine["attention"], its["attention"], sees=sees)
        if knobs.relation:
            total = total + knobs.relation * relation_divergence(mine["relation"], its["relation"], sees=sees)
        return ((total * real).sum(1) / real.sum(1) * torch.tensor(targets, device=real.device)).sum()

    def _inside(self, seen: Sight, places: list[int], maps: list[nn.Parameter]) -> dict[str, Tensor]:
        """Hidden states (B, T, M, D), Q and K (B, T, 2, M, H, d), and the last layer's Q, K and V (B, T, 3, 1, H, d), in fp32."""
        found = {}
        if self.knobs.hidden:
            states = ((m, seen.states[m].float()) for m in places)
            found["hidden"] = torch.stack([F.linear(h, maps[min(m, 1)]) if maps else h for m, h in states], 2)
        if self.knobs.attention:
            found["attention"] = torch.stack([torch.stack(seen.heads[m - 1][:2], 2) for m in places if m], 3).float()
        if self.knobs.relation:
            found["relation"] = torch.stack(seen.heads[-1], 2)[:, :, :, None].float()
        return found

    def _read(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """The teacher's matrices for each example of a batch."""
        output = model.get_output_embeddings() if self.knobs.cache else None
        with sight.entering(output) as entered:
            seen, outputs = self._seen(model, batch)
        self._check_shapes(seen, outputs)
        if not hasattr(self, "teacher") and entered and torch.equal(output(entered[-1]), outputs.logits):
            self.output = output  # a hidden state is kept in place of its many logits
        kept = outputs if self.output is None else types.SimpleNamespace(logits=entered[-1])
        found = {LOGITS: self.kind.answered(kept, batch)} if self.knobs.logits else {}
        if self.knobs.inside:
            self.places = self.knobs.pairs(self.student.depth, seen.depth)
            lengths = sight.real(seen, batch).sum(1).tolist()
            for name, values in self._inside(seen, [n for _, n in self.places], []).items():
                found[name] = [value[:n].flatten(1) for value, n in zip(values, lengths, strict=True)]
        return found

    def _seen(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Sight, Any]:
        with sight.watching(model, heads=self.knobs.heads) if self.knobs.inside else contextlib.nullcontext(Sight()) as seen:
            outputs = model(**self.kind.inputs(batch))
        if seen.states and batch.get("input_ids", seen.states[0][..., 0]).shape != seen.states[0].shape[:2]:
            raise Incompatible(f"{self.knobs!r}: the tokens inside this model are not those of its input; compare logits alone")
        return seen, outputs

    def _probe(self, loop: Loop) -> tuple[Sight, Any]:
        """What is seen in the student, and its outputs, for the first training example."""
        batch, training = self.kind.collate(loop.encodings[:1], processors.get(loop.model)), loop.model.training
        with torch.no_grad():
            found = self._seen(loop.model.eval(), {k: v.to(loop.accelerator.device) for k, v in batch.items()})
        loop.model.train(training)
        return found

    def _check_shapes(self, seen: Sight, outputs: Any) -> None:
        its, mine = outputs.logits.shape[-1], self.outputs.logits.shape[-1]
        if self.knobs.logits and its != mine:
            raise Incompatible(f"{self.knobs!r}: the teacher gives {its} logits and the student {mine}; give one of the same answers, or logits=0.0")
        if self.knobs.heads:
            its, mine = seen.heads[0][0].shape[2], self.student.heads[0][0].shape[2]
            if its != mine:
                raise Incompatible(f"{self.knobs!r}: attention is compared head by head, and the teacher has {its} heads, the student {mine}; use hidden")

    def _check_lengths(self, loop: Loop) -> None:
        size = self.kind.length if self.knobs.inside else targets
        its, mine = ([size(e) for e in encodings] for encodings in (self.teacher.encodings, loop.encodings))
        if its != mine:
            row = next((i for i, (a, b) in enumerate(zip(its, mine, strict=False)) if a != b), min(len(its), len(mine)))
            raise Incompatible(f"{self.knobs!r}: teacher and student read training example {row} as other tokens, which cannot be compared one by one")

    def _map_widths(self, loop: Loop) -> None:
        """W (D^t, D^s), with the start of a linear map, by the run's seed."""
        mine, its = self.student.states[0].shape[-1], self.teacher.outputs([0])["hidden"][0].shape[-1] // len(self.places)
        random = torch.Generator().manual_seed(loop.settings.seed)
        for name in ("embeddings", "layers") if mine != its else ():
            start = (2 * torch.rand(its, mine, generator=random) - 1) / math.sqrt(mine)
            self.maps.append(nn.Parameter(start.to(loop.accelerator.device)))
            if min(m for m, _ in self.places) == 0 or name == "layers":
                loop.learn(f"distill.{name}", self.maps[-1])

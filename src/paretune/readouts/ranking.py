"""A language model that ranks answers: a prompt in, the log-probability of each answer's tokens out.

    log p(y | x) = Σ_t log p(y_t | x, y_<t),   β(y) = log p(y | x) / |y|

A readout that speaks puts `Ranked` around the forward of a decoder or an encoder-decoder; called with a row's tokens, the
model then gives (B, C) scores of its C answers, as a classifier would. A prompt is read once for all its answers.
Calls with a cache, decoder tokens or labels (`generate`, language modeling) go to the model as they are.

Shapes: B rows, C answers of a row, L tokens of the longest answer, T tokens of the longest prompt, V pieces.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from paretune import seams
from paretune.errors import Incompatible
from paretune.patches import owner
from paretune.roles import Method
from paretune.seams import Patch

PASSED_ON = {"past_key_values", "use_cache", "decoder_input_ids", "encoder_outputs", "inputs_embeds", "labels"}
CELLS = 2**28  # numbers that may be held at a time for the answers of a batch: their caches and logits
SHARED = 8  # tokens that all prompts of a batch begin with, from which on a call of their own pays
NONE = -1  # fills up answers of fewer tokens


@dataclasses.dataclass
class Scores(ModelOutput):
    """What a model that ranks answers gives."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, C), as the readout has them
    log_probs: Tensor | None = None  # (B, C, L) of each token, 0 behind an answer's end
    lengths: Tensor | None = None  # (B, C)

    @property
    def normalized(self) -> Tensor:
        """β (B, C): each answer's mean log-probability per token."""
        return self.log_probs.sum(-1) / self.lengths  # type: ignore[union-attr]


class Ranked(Patch):
    """Around a language model's call: a row's tokens become a prompt, and answers are scored behind it.

    Tensors: `before` and `after`, the tokens around a row; `special`, tokens of a row to leave out; `answers` (C, L), those of
    every row; `room`, how many tokens of a row (and, in a decoder, of its longest answer) fit; and what the readout adds.
    """

    wraps = True

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if PASSED_ON & kwargs.keys() or len(args) > 1:
            return forward(*args, **kwargs)
        ids = args[0] if args else kwargs["input_ids"]  # (B, T), or (B, C, T) where rows have answers of their own
        mask = kwargs.get("attention_mask", torch.ones_like(ids)).bool()
        rows, answers = self._split(ids, mask, kwargs.get("answer_mask"))
        written = self.site.place == "encoder-decoder"
        room = int(self.room) - (0 if written else answers.shape[-1])
        prompts = [self._prompt(row, room) for row in rows]
        seam = seams.seam_of(owner(forward))
        before = len(self.before) if seam is None or seam.rows is None else 0  # rows with adapters of their own have no tokens in common
        log_probs = _written(forward, prompts, answers, self.start) if written else _continued(forward, prompts, answers, before)
        log_probs = log_probs.masked_fill(answers == NONE, 0.0)
        lengths = (answers != NONE).sum(-1)
        return Scores(logits=self.method.read(log_probs, lengths, patch=self), log_probs=log_probs, lengths=lengths)

    def _split(self, ids: Tensor, mask: Tensor, answer: Tensor | None) -> tuple[list[list[int]], Tensor]:
        """Rows' own tokens, and answers (B, C, L)."""
        if answer is None:
            return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)], self.answers.expand(len(ids), *self.answers.shape)
        marked = answer.bool() & mask  # (B, C, T)
        rows = [row[0][kept[0] & ~of[0]].tolist() for row, kept, of in zip(ids, mask, marked, strict=True)]
        own = [[choice[of].tolist() for choice, of in zip(choices, of_row, strict=True)] for choices, of_row in zip(ids, marked, strict=True)]
        return rows, padded_answers(own).to(ids.device)

    def _prompt(self, row: list[int], room: int) -> list[int]:
        left_out = set(self.special.tolist())
        row = [i for i in row if i not in left_out][:room]
        return [*self.before.tolist(), *row, *self.after.tolist()]


def padded_answers(answers: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """(B, C, L) from the answers' tokens, filled up with NONE."""
    longest = max(len(answer) for own in answers for answer in own)
    return torch.tensor([[[*answer, *[NONE] * (longest - len(answer))] for answer in own] for own in answers])


def _padded(prompts: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """(tokens (B, T), mask (B, T))."""
    longest = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), longest, dtype=torch.long) for _ in range(2))
    for i, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if left else slice(len(prompt))
        ids[i, place], mask[i, place] = torch.tensor(prompt), 1
    return ids.to(device), mask.to(device)


def _gathered(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p of tokens (..., L) under logits (..., L, V), fp32."""
    return logits.float().log_softmax(-1).gather(-1, tokens.clamp(min=0)[..., None])[..., 0]


def _continued(forward: Callable[..., Any], prompts: Sequence[Sequence[int]], answers: Tensor, before: int) -> Tensor:
    """log p (B, C, L) by a decoder: the prompts' keys and values are made once, then repeated for groups of answers.

    The first `before` tokens are those of every prompt; in a batch they are read once for all rows.
    """
    rows, count, length = answers.shape
    shared = before if rows > 1 and before >= SHARED and min(map(len, prompts)) > before else 0
    ids, mask = _padded([prompt[shared:] for prompt in prompts], answers.device, left=True)
    positions = shared + (mask.cumsum(-1) - 1).clamp(min=0)
    given: dict[str, Any] = {"use_cache": length > 1}
    if shared:
        given = {"use_cache": True, "past_key_values": _repeated(_read(forward, prompts[0][:shared], mask), rows)}
        mask = torch.cat([mask.new_ones(rows, shared), mask], 1)
    out = forward(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **given)
    first = out.logits[:, -1].float().log_softmax(-1).gather(1, answers[..., 0].clamp(min=0))[..., None]  # (B, C, 1)
    if length == 1:
        return first
    cache = _cache_of(out)
    held = 2 * sum(layer.keys.numel() for layer in cache.layers) + rows * length * out.logits.shape[-1]
    rest = []
    for group in answers.split(max(1, CELLS // held), dim=1):
        inputs, n = group[..., :-1].flatten(0, 1), group.shape[1]  # (B·n, L − 1)
        behind = positions[:, -1:].repeat_interleave(n, 0) + torch.arange(1, length, device=ids.device)
        seen = torch.cat([mask.repeat_interleave(n, 0), (inputs != NONE).long()], 1)
        logits = forward(
            input_ids=inputs.clamp(min=0), attention_mask=seen, position_ids=behind, past_key_values=_repeated(cache, n), use_cache=True
        ).logits
        rest.append(_gathered(logits, group[..., 1:].flatten(0, 1)).view(rows, n, length - 1))
    return torch.cat([first, torch.cat(rest, 1)], -1)


def _read(forward: Callable[..., Any], tokens: Sequence[int], like: Tensor) -> Any:
    """The keys and values of one row of tokens."""
    ids = torch.tensor([tokens], device=like.device)
    positions = torch.arange(len(tokens), device=like.device)[None]
    return _cache_of(forward(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=True, logits_to_keep=1))


def _cache_of(out: Any) -> Any:
    if out.past_key_values is None:
        raise Incompatible("ranking answers reads a prompt once and keeps its keys and values, which gradient checkpointing gives up; train without it")
    return out.past_key_values


def _repeated(cache: Any, n: int) -> Any:
    """The cache with each row n times; the original stays as it is."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    twin.batch_repeat_interleave(n)
    return twin


def _written(forward: Callable[..., Any], prompts: Sequence[Sequence[int]], answers: Tensor, start: Tensor) -> Tensor:
    """log p (B, C, L) by an encoder-decoder: the encoder runs once, the decoder over groups of answers."""
    rows, count, length = answers.shape
    ids, mask = _padded(prompts, answers.device, left=False)
    begin = start.view(1, 1).expand(rows, 1)
    model = owner(forward)
    states = model.get_encoder()(input_ids=ids, attention_mask=mask)[0]  # (B, T, D), virtual tokens among them
    found = []
    for group in answers.split(max(1, CELLS // (states.numel() + rows * length * model.config.vocab_size)), dim=1):
        tokens, n = group.flatten(0, 1), group.shape[1]  # (B·n, L)
        shifted = torch.cat([begin.repeat_interleave(n, 0), tokens[:, :-1].clamp(min=0)], 1)
        logits = forward(
            encoder_outputs=(states.repeat_interleave(n, 0),), attention_mask=mask.repeat_interleave(n, 0), decoder_input_ids=shifted, use_cache=False
        ).logits
        found.append(_gathered(logits, tokens).view(rows, n, length))
    return torch.cat(found, 1)


def require(model: nn.Module, method: Method) -> None:
    """Refuses a loss over answers for a model that ranks none."""
    readout = seams.readout(model)
    if readout is None or not readout.speaks:
        raise Incompatible(f"{method!r}: it compares the answers of a language model, and {type(model).__name__} ranks none; fit choices to one first")

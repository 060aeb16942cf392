"""Reformer's attention against its sets of tokens, taken one by one; its limit, and what padding may not change."""

from __future__ import annotations

import copy
import math

import pytest
import steps
import tiny
import torch
import work
from torch.utils.flop_counter import FlopCounterMode

from paretune import phases, seams
from paretune.errors import Incompatible
from paretune.methods.transforms import reformer
from paretune.methods.transforms.reformer import Hashed, Reformer

B, H, D = 2, 2, 4


def tensors(length: int, *, rounds: int = 2, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    x, v = (torch.randn(B, H, length, D, generator=random, dtype=torch.float64) for _ in range(2))
    return x, v, torch.randn(rounds, D, 8, generator=random, dtype=torch.float64)


def padded(length: int, pad: int = 4) -> torch.Tensor:
    real = torch.ones(B, length, dtype=torch.bool)
    real[1, length - pad :] = False
    return real


def by_hand(x, v, *, R, size: int, real) -> torch.Tensor:
    """Each round sorts a row's own tokens in Python; a token's set is what has its bucket in its chunk and the one before."""
    out = torch.zeros_like(v)
    for b in range(B):
        n = int(real[b].sum())
        halves = min(math.ceil(n / (2 * size)), R.shape[-1])
        for h in range(H):
            found = {i: [] for i in range(n)}  # with repetition: a pair counts as often as rounds find it
            for rotation in R:
                turned = x[b, h, :n] @ rotation[:, :halves]
                hashed = torch.cat([turned, -turned], -1).argmax(-1).tolist() if n > size else [0] * n
                order = sorted(range(n), key=lambda i: (hashed[i], i))  # noqa: B023
                chunk = {i: place // size for place, i in enumerate(order)}
                for i in range(n):
                    found[i] += [j for j in range(n) if hashed[j] == hashed[i] and chunk[i] - 1 <= chunk[j] <= chunk[i]]
            for i, others in found.items():
                others = [j for j in others if j != i] or [i]
                s = torch.stack([x[b, h, i] @ x[b, h, j] / x[b, h, j].norm() for j in others])
                out[b, h, i] = torch.softmax(s, 0) @ v[b, h, others]
    return out


@pytest.mark.parametrize("length, size, rounds", [(13, 3, 1), (13, 3, 3), (24, 4, 2), (7, 8, 2), (9, 1, 2)])
def test_it_is_its_sets_of_tokens(length, size, rounds):
    x, v, R = tensors(length, rounds=rounds)
    real = padded(length)
    found = reformer.attention(x, v, R=R, size=size, real=real)
    wanted = by_hand(x, v, R=R, size=size, real=real)
    assert torch.allclose(found[0], wanted[0], atol=1e-10)
    n = int(real[1].sum())
    assert torch.allclose(found[1, :, :n], wanted[1, :, :n], atol=1e-10) and found.isfinite().all()


@pytest.mark.parametrize("rounds", [1, 3])
def test_one_chunk_of_the_whole_length_is_dense_attention_of_shared_queries_and_keys(rounds):
    x, v, R = tensors(10, rounds=rounds)
    scores = x @ torch.nn.functional.normalize(x, dim=-1).transpose(-1, -2)
    wanted = torch.softmax(scores.masked_fill(torch.eye(10, dtype=torch.bool), -1e5), -1) @ v
    assert torch.allclose(reformer.attention(x, v, R=R, size=10, real=torch.ones(B, 10, dtype=torch.bool)), wanted, atol=1e-10)


def test_near_tokens_share_a_bucket_more_often_than_others():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 400, 16, generator=random)
    near = x + 0.1 * torch.randn(x.shape, generator=random)
    real, R = torch.ones(1, 400, dtype=torch.bool), torch.randn(4, 16, 8, generator=random)
    one, two = (reformer.buckets(t, R, size=25, real=real) for t in (x, near))  # 16 buckets
    assert set(one.unique().tolist()) == set(range(16))
    assert (one == two).float().mean() > 0.7 > 0.2 > (one == two.roll(1, -1)).float().mean()


@pytest.mark.parametrize("length, size", [(6, 2), (8, 3)])
def test_gradients_and_theirs_are_those_of_differences(length, size):
    x, v, R = tensors(length)
    x, v = (t[1:, :1].clone().requires_grad_(True) for t in (x, v))

    def attend(x, v):
        return reformer.attention(x, v, R=R, size=size, real=padded(length, 1)[1:])

    assert torch.autograd.gradcheck(attend, (x, v)) and torch.autograd.gradgradcheck(attend, (x, v))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_padding_changes_no_result(family):
    model = phases.shrink(work.ready(family), Reformer(bucket_size=3, rounds=2), None)
    ids = tiny.inputs(family, batch=1, length=11)["input_ids"]
    longer, mask = torch.cat([ids, torch.full((1, 6), 9)], 1), torch.tensor([[1] * 11 + [0] * 6])
    if family == "roberta":
        longer[:, 11:] = tiny.PAD  # its positions count what is not padding
    with torch.no_grad():
        alone, padded_ = model(input_ids=ids).logits, model(input_ids=longer, attention_mask=mask).logits
    assert torch.allclose(alone, padded_, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_model_uses_the_mean_of_its_two_maps(family):
    """With equal query and key maps, and all in one chunk, the layers are dense attention with queries as keys."""
    model = phases.shrink(work.ready(family), Reformer(bucket_size=64, rounds=2), None)
    seen = []
    for _, _, seam in seams.seams_of(model):
        for _, _, patch in seam.patches():
            assert isinstance(patch, Hashed)
            patch.compute = lambda attend, call, compute=patch.compute: seen.append((call, compute(attend, call)[0])) or (seen[-1][1], None)
    steps.logits(model, family, batch=1)
    call, out = seen[0]
    x = (call.query + call.key) / 2
    scores = x @ (x / x.norm(dim=-1, keepdim=True)).transpose(-1, -2)
    wanted = torch.softmax(scores.masked_fill(torch.eye(x.shape[2], dtype=torch.bool), -1e5), -1) @ call.value
    assert torch.allclose(out.transpose(1, 2), wanted, atol=1e-5)


def test_all_weights_learn_and_decoders_are_refused():
    model = copy.deepcopy(phases.shrink(work.ready("bert"), Reformer(bucket_size=2), None)).requires_grad_(True)
    steps.loss(model, "bert").backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".layer." in n)
    for family in ("gpt2", "t5"):
        with pytest.raises(Incompatible, match="later ones"):
            phases.shrink(work.ready(family), Reformer(), None)


@pytest.mark.parametrize("length", [16, 32])
def test_its_products_are_those_that_the_card_declares(length):
    x, v, R = tensors(length, rounds=3)
    with FlopCounterMode(display=False) as counted:
        reformer.attention(x, v, R=R, size=4, real=torch.ones(B, length, dtype=torch.bool))
    assert counted.get_total_flops() == 2 * B * H * 3 * length * (4 * 4 + length // (2 * 4)) * D

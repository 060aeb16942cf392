"""Based against the sums that define it, pair by pair; its limit, its recurrent form, and what it must not see."""

from __future__ import annotations

import copy

import pytest
import steps
import tiny
import torch
import work
from torch.utils.flop_counter import FlopCounterMode

from paretune import anatomy, phases, seams
from paretune.attention import taylor
from paretune.attention.chunks import beside, chunks, places_beside
from paretune.attention.taylor import Heads
from paretune.errors import Incompatible
from paretune.methods.adapters.full import Full
from paretune.methods.transforms.based import Based, fixed_state, nearest

B, H, D, LOW = 2, 3, 4, 3


def heads(length: int, *, seed: int = 0, real: torch.Tensor | None = None) -> Heads:
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, length, D, generator=random, dtype=torch.float64) for _ in range(3))
    low_q, low_k = (torch.randn(B, H, length, LOW, generator=random, dtype=torch.float64) for _ in range(2))
    real = torch.ones(B, 1, length, dtype=torch.bool) if real is None else real
    return Heads(q, k, taylor.counted(v, real), low_q, low_k, real)


def by_hand(h: Heads, *, window: int, causal: bool) -> torch.Tensor:
    """The definition, one pair after the other."""
    length = h.key.shape[2]
    out = torch.zeros(B, H, length, D, dtype=torch.float64)
    for b in range(B):
        for i in range(length):
            seen = [j for j in range(i + 1 if causal else length) if h.real[b, 0, j]]
            for head in range(H):
                weights = []
                for j in seen:
                    low = h.low_query[b, head, i] @ h.low_key[b, head, j]
                    near = abs(i - j) < window
                    weights.append(torch.exp(h.query[b, head, i] @ h.key[b, head, j]) if near else 1 + low + low**2 / 2)
                if seen:
                    w = torch.stack(weights)
                    out[b, head, i] = (w[:, None] * h.value[b, head, seen, :-1]).sum(0) / w.sum()
    return out


def padded(length: int) -> torch.Tensor:
    real = torch.ones(B, 1, length, dtype=torch.bool)
    real[1, :, length - 3 :] = False
    return real


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length, window", [(11, 3), (7, 1), (9, 4), (5, 8)])
def test_both_forms_are_the_definition(length, window, causal):
    h = heads(length, real=padded(length))
    wanted = by_hand(h, window=window, causal=causal)
    for form in (taylor.parallel, taylor.pairwise):
        assert torch.allclose(form(h, window=window, causal=causal), wanted, atol=1e-10), form


def test_features_are_the_expansion():
    x, y = torch.randn(2, 5, LOW, dtype=torch.float64)
    s = (x * y).sum(-1)
    assert torch.allclose((taylor.features(x) * taylor.features(y)).sum(-1), 1 + s + s.square() / 2, rtol=1e-11, atol=0)
    assert taylor.features(x).shape[-1] == 1 + LOW + LOW * (LOW + 1) // 2
    pairs, times = x @ y.T, torch.rand(5, 1, dtype=torch.float64)
    assert torch.allclose(taylor.expansion(x, y, times=times), (1 + pairs + pairs.square() / 2) * times, rtol=1e-11, atol=0)


def test_large_scores_stay_finite():
    h = heads(9)
    h.query, h.low_query = 400 * h.query.float(), 400 * h.low_query.float()
    h.key, h.value, h.low_key = h.key.float(), h.value.float(), h.low_key.float()
    assert taylor.parallel(h, window=2, causal=True).isfinite().all()


def test_chunks_have_their_neighbors_and_zeros_outside():
    x = torch.arange(1.0, 8.0)[:, None]
    assert chunks(x, 3)[..., 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert beside(chunks(x, 3), back=1, ahead=1)[1, :, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 0]
    assert places_beside(7, 3, back=1, like=x).tolist() == [[-1, -1, -1, 0, 1, 2], [0, 1, 2, 3, 4, 5], [3, 4, 5, 6, -1, -1]]


def test_the_maps_are_the_best_of_their_rank():
    random = torch.Generator().manual_seed(1)
    q, k = (torch.randn(H, D, 10, generator=random, dtype=torch.float64) for _ in range(2))
    for d in (1, 2, D):
        P_q, P_k = nearest(q, k, features=d)
        whole = q.transpose(1, 2) @ k
        error = (whole - q.transpose(1, 2) @ P_q @ P_k.transpose(1, 2) @ k).flatten(1).norm(dim=1)
        assert torch.allclose(error, torch.linalg.svdvals(whole)[:, d:].norm(dim=1), atol=1e-10)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_window_as_long_as_the_text_is_the_backbone(family):
    model = work.ready(family)
    before = steps.logits(model, family)
    phases.shrink(model, Based(window=7), None)
    assert torch.equal(steps.logits(model, family), before)
    short = phases.shrink(work.ready(family), Based(window=2), None)
    assert not torch.equal(steps.logits(short, family), before)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_later_token_changes_no_earlier_output(family):
    model = phases.shrink(work.ready(family, "causal"), Based(window=3), None)
    ids = tiny.inputs(family, batch=1, length=12)["input_ids"]
    other = ids.clone()
    other[0, 8] = (other[0, 8] + 1) % tiny.SIZE
    with torch.no_grad():
        one, two = model(input_ids=ids).logits, model(input_ids=other).logits
    assert torch.allclose(one[:, :8], two[:, :8], atol=1e-6) and not torch.allclose(one[:, 8:], two[:, 8:], atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_is_the_same_without_cache_with_one_and_from_a_state_of_fixed_size(family):
    model = phases.shrink(work.ready(family, "causal"), Based(window=3, feature_dim=3), None).double()
    ids = tiny.inputs(family, batch=3, length=9)
    given = {"input_ids": ids["input_ids"].flip(1), "attention_mask": ids["attention_mask"].flip(1)}  # padding on the left
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    state = fixed_state(model)
    found = [model.generate(**given, **how, **more) for more in ({"use_cache": False}, {}, {"past_key_values": state})]
    for other in found[1:]:
        assert torch.equal(other.sequences, found[0].sequences)
        assert torch.allclose(torch.stack(other.logits), torch.stack(found[0].logits), atol=1e-9)
    assert {layer.keys.shape[2] for layer in state.layers} == {2} and state.get_seq_length() == 16
    assert all(layer.sums.shape[2] == 1 + 3 + 6 for layer in state.layers)


def test_beams_take_their_state_along():
    model = phases.shrink(work.ready("gpt2", "causal"), Based(window=3), None).double()
    ids = tiny.inputs("gpt2", batch=2, length=6)["input_ids"]
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **how, past_key_values=fixed_state(model)), model.generate(ids, **how, use_cache=False))


def test_full_trains_the_maps_and_what_has_none_is_refused():
    model = work.ready("bert")
    with pytest.raises(Incompatible, match="apply based first"):
        fixed_state(model)
    phases.shrink(model, Based(window=2), None)
    names = Full().selection(model)
    assert sum(n.endswith((".P_q", ".P_k")) for n in names) == 2 * len(anatomy.layers(model))
    twin = copy.deepcopy(model).requires_grad_(True)
    steps.loss(twin, "bert").backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, _, seam in seams.seams_of(twin) for p in seam.parameters())


def test_a_bias_by_distance_is_refused():
    with pytest.raises(Incompatible, match="bias by distance"):
        phases.shrink(work.ready("t5"), Based(window=2), None)


@pytest.mark.parametrize("length", [16, 32])
def test_its_products_are_those_that_the_card_declares(length):
    w, pairs = 4, LOW * (LOW + 1) // 2
    f = 1 + LOW + pairs
    with FlopCounterMode(display=False) as counted:
        taylor.parallel(heads(length), window=w, causal=True)
    each = 2 * w * (D + LOW + 1) + 2 * w * (D + 1) + 2 * f * (D + 1) + 4 * LOW * pairs  # scores of both kinds, their values, sums in and out, features
    assert counted.get_total_flops() == 2 * B * H * length * each

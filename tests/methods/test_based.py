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
from paretune.methods.transforms.based import Based, TaylorAttention, fixed_state, nearest

B, H, D, LOW = 2, 3, 4, 3


def heads(length: int, *, seed: int = 0, real: torch.Tensor | None = None) -> Heads:
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, length, D, generator=random, dtype=torch.float64) for _ in range(3))
    low_q, low_k = (torch.randn(B, H, length, LOW, generator=random, dtype=torch.float64) for _ in range(2))
    real = torch.ones(B, 1, length, dtype=torch.bool) if real is None else real
    return Heads(q, k, taylor.counted(v, real), low_q, low_k, real)


def by_hand(h: Heads, *, window: int, causal: bool) -> torch.Tensor:
    """The definition, one pair after the other."""
    batch, count, length, size = h.query.shape
    out = torch.zeros(batch, count, length, size, dtype=h.query.dtype)
    for b in range(batch):
        for i in range(length):
            seen = [j for j in range(i + 1 if causal else length) if h.real[b, 0, j]]
            for head in range(count):
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


def test_heads_of_a_group_attend_to_the_keys_and_values_that_they_share(monkeypatch):
    model = phases.shrink(work.ready("llama"), Based(window=3, feature_dim=2), None).double()
    steps.disturb(model.requires_grad_(True), std=0.5)
    compute, asked = TaylorAttention.compute, []

    def recorded(self, attend, call):
        out, weights = compute(self, attend, call)
        asked.append((self, call, out.transpose(1, 2)))
        return out, weights

    monkeypatch.setattr(TaylorAttention, "compute", recorded)
    given = tiny.inputs("llama", length=11)
    steps.logits(model, "llama", length=11)
    assert len(asked) == 2
    real = given["attention_mask"].bool()[:, None]
    for patch, call, found in asked:
        assert (call.query.shape[1], call.key.shape[1]) == (4, 2)
        key, value = (torch.stack([x[:, head // 2] for head in range(4)], 1) for x in (call.key, call.value))  # heads 0 and 1 have the first
        query = call.query / 4**0.5
        low_query, low_key = (torch.einsum("bhnd,hdr->bhnr", x, P) for x, P in ((query, patch.P_q), (key, patch.P_k)))
        wanted = by_hand(Heads(query, key, taylor.counted(value, real), low_query, low_key, real), window=3, causal=True)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_the_maps_of_a_group_are_the_best_for_the_keys_that_it_shares():
    model = phases.shrink(work.ready("llama"), Based(window=3, feature_dim=2), None).double()
    patches = [m for m in model.modules() if isinstance(m, TaylorAttention)]
    for layer, patch in zip(model.model.layers, patches, strict=True):
        q, k = (m.weight.unflatten(0, (-1, D)) for m in (layer.self_attn.q_proj, layer.self_attn.k_proj))  # (4, D, 16), (2, D, 16)
        for head in range(4):
            whole = q[head].T @ k[head // 2]
            error = whole - q[head].T @ patch.P_q[head] @ patch.P_k[head].T @ k[head // 2]
            torch.testing.assert_close(error.norm(), torch.linalg.svdvals(whole)[2:].norm(), rtol=1e-4, atol=0)  # the maps were made in single precision


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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_padded_text_gives_what_it_gives_alone(family, side):
    model = phases.shrink(work.ready(family, "base"), Based(window=3, feature_dim=2), None).double()
    steps.disturb(model.requires_grad_(True), std=0.5)
    ids = torch.randint(5, tiny.SIZE, (2, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    own = slice(5, 13) if side == "left" else slice(8)
    short = ids[1:, own]
    mask[1, slice(5) if side == "left" else slice(8, 13)] = 0

    def outputs(ids, mask):
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).last_hidden_state

    alone = outputs(short, torch.ones_like(short))
    torch.testing.assert_close(outputs(ids.masked_fill(mask == 0, tiny.PAD), mask)[1:, own], alone, rtol=1e-9, atol=1e-9)
    if side == "left" or family == "bert":  # what stands behind moves no decoder
        assert not torch.allclose(outputs(ids, torch.ones_like(mask))[1:, own], alone, atol=1e-2)


@pytest.mark.parametrize("cut", [2, 5, 8])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prompt_in_pieces_and_a_state_of_fixed_size_give_its_logits(family, cut):
    model = phases.shrink(work.ready(family, "causal"), Based(window=3, feature_dim=2), None).double()
    steps.disturb(model.requires_grad_(True), std=0.5)
    ids = torch.randint(5, tiny.SIZE, (2, 13), generator=torch.Generator().manual_seed(cut))
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = tiny.PAD, 0
    state = fixed_state(model)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        pieces = [model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=state).logits for a, b in ((0, cut), (cut, cut + 3), (cut + 3, 13))]
    real = mask.bool()  # a place before the text has nothing to see
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], rtol=1e-9, atol=1e-9)
    assert {layer.keys.shape[2] for layer in state.layers} == {2} and state.get_seq_length() == 13


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


def test_scores_far_below_zero_lose_no_weight():
    h = heads(9, real=padded(9))
    h.query, h.key = -40 * h.query.abs(), h.key.abs()
    assert (h.query @ h.key.mT).amin() < -110  # single precision ends at e^-87
    single = Heads(*(t.float() for t in (h.query, h.key, h.value, h.low_query, h.low_key)), h.real)
    for causal in (True, False):
        wanted = by_hand(h, window=3, causal=causal).float()
        for form in (taylor.parallel, taylor.pairwise):
            torch.testing.assert_close(form(single, window=3, causal=causal), wanted, rtol=1e-4, atol=1e-5)


def test_a_call_that_is_refused_leaves_no_state_behind():
    model = phases.shrink(work.ready("gpt2", "causal"), Based(window=3), None)
    with pytest.raises(Incompatible, match="attention weights were asked for"), torch.no_grad():
        model(torch.full((1, 9), 7), past_key_values=fixed_state(model), output_attentions=True)
    assert all(patch.recurrent is None for patch in model.modules() if isinstance(patch, TaylorAttention))


def test_an_encoder_with_a_decoder_has_no_fixed_state():
    model = phases.shrink(tiny.model("bart", "seq2seq"), Based(window=3), None)
    with pytest.raises(Incompatible, match="keys of its encoder"):
        fixed_state(model)

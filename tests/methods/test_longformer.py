"""Longformer against attention written out with its window, its limit, caches, global tokens, and positions that are copies."""

from __future__ import annotations

import pytest
import steps
import tiny
import torch
import work
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from paretune import anatomy, inference, phases, processors, surgery
from paretune.attention import windows
from paretune.errors import Incompatible, RecipeError
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.prefix import Prefix
from paretune.methods.transforms.longformer import Longformer, Window
from paretune.recipe import parse

POSITIONS = {"t5": {}, "gpt2": {"n_positions": 256}, "gemma2": {"max_position_embeddings": 256, "attn_logit_softcapping": 0.1}}
POSITIONS["mistral"] = {"max_position_embeddings": 256, "sliding_window": 12}


def windowed(family, task="classification", **knobs):
    model = steps.model(family, task)
    Longformer(**{"dense_below": 0, **knobs}).apply(model)
    return model


def long(model, family, n=150):
    """Logits of two texts of n tokens, the second shorter; on models that read so many."""
    ids = torch.randint(5, tiny.SIZE, (2, n), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(n) < torch.tensor([[n], [n - 40]])).long()
    with torch.no_grad():
        ids[range(2), mask.sum(1) - 1] = tiny.SEP  # where T5 classifies
        return model.eval()(input_ids=ids.masked_fill(mask == 0, tiny.PAD), attention_mask=mask).logits


@pytest.mark.parametrize("family", [f for f in tiny.ALL if f != "deberta-v2"])
def test_at_its_limit_it_is_the_model_itself(family):
    model = steps.model(family)
    before = steps.logits(model, family)
    Longformer(window=32, global_tokens=0, dense_below=0).apply(model)
    assert torch.equal(steps.logits(model, family), before)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "gemma2", "mistral"])
@pytest.mark.parametrize("knobs", [{"window": 9}, {"window": "4/20", "dilation": "3/1"}, {"window": "5,30"}], ids=str)
def test_chunks_and_masks_give_the_same(family, knobs):
    """Two ways to one definition: overlapping views of keys, and all pairs with a mask."""
    config = POSITIONS.get(family, {"max_position_embeddings": 256})
    made = [tiny.model(family, config=config) for _ in range(2)]
    for model, below in zip(made, (0, 10**6), strict=True):
        Longformer(dense_below=below, **knobs).apply(model)
    torch.testing.assert_close(long(made[0], family), long(made[1], family), rtol=1e-4, atol=1e-5)


SPELLED = {  # (window, dilation) of each of four heads, for each of two layers, as a user means it
    ("9,40", 1): [[(9, 1)] * 4, [(40, 1)] * 4],
    ("4/20", "3/1"): [[(4, 3)] * 2 + [(20, 1)] * 2] * 2,
    ("7/30,70", "2,1/3"): [[(7, 2)] * 2 + [(30, 2)] * 2, [(70, 1)] * 2 + [(70, 3)] * 2],
}


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("window, dilation", SPELLED)
def test_each_layer_and_group_of_heads_has_the_window_that_is_spelled_for_it(family, window, dilation, monkeypatch):
    """Every call of a model against softmax over all pairs with a mask written here; 400 tokens are several chunks, with some that have all their blocks."""
    model = tiny.model(family, config={"max_position_embeddings": 512})
    Longformer(window=window, dilation=dilation, global_tokens=0, dense_below=0).apply(model)
    model.double().requires_grad_(True)
    steps.disturb(model, std=0.3)
    compute, asked = Window.compute, []

    def recorded(self, attend, call):
        out, weights = compute(self, attend, call)
        asked.append((self.site, call, out))
        return out, weights

    monkeypatch.setattr(Window, "compute", recorded)
    ids = torch.randint(5, tiny.SIZE, (1, 400), generator=torch.Generator().manual_seed(0))
    ids[0, -1] = tiny.SEP  # where T5 classifies
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert [(site.stack, site.layer) for site, _, _ in asked] == [(stack, k) for stack in STACKS[family] for k in range(2)]
        for site, call, found in asked:
            torch.testing.assert_close(found, by_hand(call, SPELLED[window, dilation][site.layer], causal=site.stack == "decoder"), rtol=1e-9, atol=1e-9)


STACKS = {"bert": ["encoder"], "llama": ["decoder"], "t5": ["encoder", "decoder"]}


def by_hand(call, reaches, *, causal):
    """(B, T, H, D): the softmax over all pairs, of which each head's mask hides those that are not |i − j| ≤ w d with d | i − j."""
    key, value = (torch.stack([x[:, h * x.shape[1] // 4] for h in range(4)], 1) for x in (call.key, call.value))
    scores = torch.einsum("bhid,bhjd->bhij", call.query, key) * (1 if call.more.get("position_bias") is not None else 0.5)  # T5's have no 1/√D
    if call.more.get("position_bias") is not None:
        scores = scores + call.more["position_bias"]
    apart = torch.arange(scores.shape[-1])[:, None] - torch.arange(scores.shape[-1])
    for head, (window, dilation) in enumerate(reaches):
        seen = (apart.abs() <= window * dilation) & (apart % dilation == 0) & ((apart >= 0) | (not causal))
        scores[:, head].masked_fill_(~seen, -torch.inf)
    return torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), value)


def moved_by_the_fifth(model):
    """The places whose logits another token at place 5 moves."""
    ids = torch.randint(5, tiny.SIZE, (1, 20), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 5] = (ids[0, 5] - 4) % (tiny.SIZE - 5) + 5
    with torch.no_grad():
        moved = (model(ids).logits - model(other).logits).abs().amax((0, 2)) > 0
    return moved.nonzero().flatten().tolist()


def test_a_layer_reaches_as_far_as_its_window():
    model = steps.model("gpt2", "causal")
    Longformer(window=3).apply(model)
    assert moved_by_the_fifth(model) == list(range(5, 12))  # two layers of three


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_generates_with_a_cache_what_it_generates_without(family):
    model = windowed(family, "seq2seq", window=2).double()
    steps.disturb(model.requires_grad_(True), std=0.5)  # that every step has something to say
    how = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, without = (model.generate(**tiny.inputs(family, batch=2, length=9), **how, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached.sequences, without.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(without.logits), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_generates_with_a_cache_what_it_generates_without(family, cache):
    model = windowed(family, "causal", window=3, dilation=2)
    tokens = {k: v for k, v in tiny.inputs(family, batch=2, length=9).items()}
    tokens["input_ids"], tokens["attention_mask"] = tokens["input_ids"].flip(1), tokens["attention_mask"].flip(1)  # padded left
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": tiny.PAD}
    cached = model.generate(**tokens, **how, **({"cache_implementation": "static"} if cache == "static" else {}))
    assert torch.equal(cached, model.generate(**tokens, **how, use_cache=False))


def test_a_global_token_sees_all_by_its_own_maps_and_is_seen_by_all():
    model = windowed("bert", "base", window=2, global_tokens=1)
    site = anatomy.resolve(model, "attention_call")[0]
    module = model.get_submodule(site.path)
    patch = next(p for p in module.modules() if isinstance(p, Window))
    x = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        patch.key_global.weight.mul_(1.5)
        found = module(x)[0].unflatten(-1, (4, 4))[0]  # (n, H, D)
        maps = [*module.named_children(), *patch.named_children()]
        heads = {n: m(x)[0].unflatten(-1, (4, 4)) for n, m in maps if isinstance(m, torch.nn.Linear)}
        scores = torch.einsum("hd,jhd->hj", heads["query_global"][0], heads["key_global"]) / 2
        first = torch.einsum("hj,jhd->hd", scores.softmax(-1), heads["value_global"])
        near = [0, *range(8, 13)]  # token 10 sees the global one and two on each side
        ten = torch.einsum("hd,jhd->hj", heads["query"][10], heads["key"][near]) / 2
        tenth = torch.einsum("hj,jhd->hd", ten.softmax(-1), heads["value"][near])
    torch.testing.assert_close(found[0], first)
    torch.testing.assert_close(found[10], tenth)


def test_global_maps_start_as_copies_and_full_trains_them():
    model = windowed("bert", window=4)
    names = [n for n in dict(model.named_parameters()) if "_global" in n]
    assert len(names) == 2 * (3 + 2)  # the keys have no bias of their own: it would change nothing
    for n in names:
        local = n.replace(".paretune.efficient.longformer", "").replace("_global", "")
        assert torch.equal(model.get_parameter(n), model.get_parameter(local))
    surgery.attach(model, [Full()], name="phase_1")
    before = steps.parameters(model)
    assert set(names) <= set(steps.learning(model))
    steps.descend(model, "bert", steps=2)
    assert all(not torch.equal(before[n], model.get_parameter(n)) for n in names if "value_global" in n)


def test_a_short_encoder_reads_long_texts_and_is_saved_so(tmp_path):
    model = work.ready("roberta")
    before = steps.tensors(model)
    phases.shrink(model, Longformer(window=8, length=300, dense_below=0))
    table = model.get_parameter("roberta.embeddings.position_embeddings.weight")
    old = before["roberta.embeddings.position_embeddings.weight"]
    offset, count = tiny.PAD + 1, len(old) - tiny.PAD - 1
    assert len(table) == offset + 300 and torch.equal(table[: len(old)], old)
    assert all(torch.equal(table[offset + i], old[offset + i % count]) for i in range(300))
    assert processors.get(model).model_max_length == 300
    phases.save_model(model, tmp_path)
    loaded = inference.open_model(tmp_path, work.task("roberta"))
    assert torch.equal(long(loaded, "roberta", n=290), long(model, "roberta", n=290))


@pytest.mark.parametrize("family, n, longer", [("bert", 64, 300), ("distilbert", 64, 300), ("bert", 512, 4096)])
def test_the_longest_input_is_read_and_a_short_one_gives_the_same(family, n, longer, tmp_path):
    """BERT and DistilBERT keep numbers of positions and of token types beside their tables."""
    model = tiny.model(family, config={"max_position_embeddings": n})
    processors.put(model, tiny.tokenizer())
    phases.shrink(model, Longformer(window=8, dense_below=0))
    before = steps.logits(model, family)
    other = tiny.model(family, config={"max_position_embeddings": n})
    processors.put(other, tiny.tokenizer())
    phases.shrink(other, Longformer(window=8, length=longer, dense_below=0))
    assert torch.equal(steps.logits(other, family), before)
    out = long(other, family, n=longer)
    phases.save_model(other, tmp_path)
    assert out.isfinite().all() and torch.equal(long(inference.open_model(tmp_path, work.task(family)), family, n=longer), out)
    with torch.no_grad():  # a token in the last window before the end reaches the classification through the global one
        ids = torch.full((1, longer), 7)
        one = other(input_ids=ids).logits
        ids[0, -3] = 9
        assert not torch.equal(other(input_ids=ids).logits, one)


@pytest.mark.parametrize("window, g", [(64, 0), (128, 1), (64, 3), (300, 2)])
def test_its_products_are_those_that_the_card_declares(window, g):
    """Between two lengths the ends of the text cancel: n (2m + 1)(c + g) d_h products of scores and of values, and g n D for each map of the global tokens."""
    model = tiny.model("bert", "base", config={"max_position_embeddings": 4096})
    Longformer(window=window, global_tokens=g, dense_below=0).apply(model)
    found = []
    for n in (2048, 2048 + 512):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            model(input_ids=torch.full((1, n), 7))
        found.append(counted.get_flop_counts()["Global"][torch.ops.aten.bmm])  # maps are addmm
    layers, heads, size, width, c, m = 2, 4, 4, 16, min(window, 256), -(-window // 256)
    assert found[1] - found[0] == 2 * layers * heads * 512 * (2 * (2 * m + 1) * (c + g) * size + 2 * g * width)


def test_padding_changes_nothing():
    model = windowed("bert", window=2, global_tokens=2)
    ids = tiny.inputs("bert", batch=1, length=8)["input_ids"]
    longer = torch.cat([ids, torch.full((1, 20), tiny.PAD)], 1)
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        padded = model(input_ids=longer, attention_mask=(torch.arange(28) < 8).long()[None]).logits
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize("family", ["bert", "gemma2"])
def test_eager_attention_is_in_chunks_unless_its_weights_are_asked_for(family, monkeypatch):
    """Gemma 2 has no other: without chunks it would never have a window."""
    model = windowed(family, "base", window=9, global_tokens=0)
    model.set_attn_implementation("eager")
    chunked, banded = [], windows.banded
    monkeypatch.setattr(windows, "banded", lambda *args, **kwargs: chunked.append(1) or banded(*args, **kwargs))
    ids = torch.randint(5, tiny.SIZE, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        assert len(chunked) == 2
        asked = model(ids, output_attentions=True)
    assert len(chunked) == 2 and len(asked.attentions) == 2
    torch.testing.assert_close(asked.last_hidden_state, plain, rtol=1e-4, atol=1e-5)


def test_eager_attention_gives_the_weights_of_the_window():
    model = windowed("bert", "base", window=2, global_tokens=0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(torch.arange(5, 25)[None], output_attentions=True).attentions[0]
    apart = (torch.arange(20)[:, None] - torch.arange(20)).abs()
    assert (weights[..., apart > 2] == 0).all() and (weights[..., apart <= 2] > 0).all()


@pytest.mark.parametrize(
    "family, knobs, says",
    [("bert", {"window": "2,3,4"}, "3 layers"), ("bert", {"window": "1/2/3"}, "3 equal groups"), ("bert", {"length": 20}, "64 tokens already"),
     ("vit", {"length": 99}, "images"), ("deberta-v2", {}, "its own code")],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_changes_nothing(family, knobs, says):
    model = work.ready(family)
    before = steps.tensors(model)
    with pytest.raises(Incompatible, match=says):
        phases.shrink(model, Longformer(**{"dense_below": 0, **knobs}))
    assert steps.same(before, steps.tensors(model)) and not list(surgery.seams_of(model))


def test_a_bert_that_hides_later_tokens_has_no_global_ones():
    model = tiny.model("bert", "causal", config={"is_decoder": True})
    before = steps.tensors(model)
    with pytest.raises(Incompatible, match="BertLMHeadModel hides later tokens from its first ones.*give global_tokens=0"):
        Longformer(window=3, dense_below=0).apply(model)
    assert steps.same(before, steps.tensors(model)) and not list(surgery.seams_of(model))
    Longformer(window=3, global_tokens=0, dense_below=0).apply(model)
    assert moved_by_the_fifth(model) == list(range(5, 12))  # two layers of three


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_decoder_has_no_global_tokens(family):
    model = windowed(family, global_tokens=2)
    found = [(p.site.stack, p.first, len(list(p.parameters()))) for p in model.modules() if isinstance(p, Window)]
    assert found == {"gpt2": [("decoder", 0, 0)] * 2, "t5": [("encoder", 2, 3)] * 2 + [("decoder", 0, 0)] * 2}[family]


def test_what_acts_inside_the_attention_does_not_compose():
    for text in ("prefix | longformer", "longformer | prefix", "longformer | longformer"):
        with pytest.raises(Incompatible):
            parse(text).check()
    model = windowed("bert")
    with pytest.raises(Incompatible):
        surgery.attach(model, [Prefix()])
    with pytest.raises(RecipeError, match="whole number"):
        Longformer(window="3,x")


def test_a_model_that_never_asks_is_refused(monkeypatch):
    """A swap that a forward pass goes around would be no swap."""
    model = steps.model("bert")
    layer = model.get_submodule("bert.encoder.layer.1.attention")
    layer.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
    with pytest.raises(Incompatible, match="never asked"):
        Longformer(dense_below=0).apply(model)
    assert not list(surgery.seams_of(model))


def test_padding_in_front_of_a_text_is_refused_where_its_first_tokens_are_global():
    model, ids, mask = windowed("roberta", global_tokens=1), torch.full((2, 9), 7), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    with pytest.raises(Incompatible, match="padding in front of its text"), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        assert windowed("roberta", global_tokens=0)(input_ids=ids, attention_mask=mask).logits.isfinite().all()

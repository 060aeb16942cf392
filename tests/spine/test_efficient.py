"""What every attention by other means is asked, whatever its method: caches with room behind the text, weights, masks of other forms, families' own ways."""

from __future__ import annotations

import copy

import pytest
import steps
import tiny
import torch
import work
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from paretune import phases, seams, surgery
from paretune.errors import Incompatible
from paretune.methods.transforms.based import Based
from paretune.methods.transforms.blockwise import Blockwise
from paretune.methods.transforms.linformer import Linformer
from paretune.methods.transforms.longformer import Longformer
from paretune.methods.transforms.perceiver import Perceiver
from paretune.methods.transforms.reformer import Reformer

WAYS = [Longformer(window=3), Longformer(window=3, dilation=2, dense_below=0), Longformer(window=30, dense_below=0), Based(window=3, feature_dim=3)]


REPLACED = [Longformer(window=3, dense_below=0), Based(window=3), Blockwise(), Linformer(k=3), Reformer(bucket_size=3)]


def telling(model):
    """The model with weights by which attention says more than a token or less would hide."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and not name.endswith(("wte.weight", "wpe.weight", "embed_tokens.weight")):
                weight.mul_(8)
    return model


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("method", WAYS, ids=repr)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_room_behind_the_text_moves_no_logit(family, method, length, padded):
    model = telling(phases.shrink(work.ready(family, "causal"), method, None).double().eval())
    ids = torch.randint(5, tiny.SIZE, (2, length + padded), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    if padded:
        ids[1, 0], mask[1, 0] = tiny.PAD, 0
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "attention_mask": mask}
    plain = model.generate(ids, **how, use_cache=False)
    for more in ({}, {"cache_implementation": "static", "disable_compile": True}):
        cached = model.generate(ids, **how, **more)
        assert torch.equal(cached.sequences, plain.sequences)
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("room", [False, True])
@pytest.mark.parametrize("cut", [1, 4, 9])
@pytest.mark.parametrize("method", WAYS, ids=repr)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prompt_in_two_pieces_gives_the_logits_of_one(family, method, cut, room):
    """The second piece has more keys than queries, and more queries than one, whether or not the cache has room behind them."""
    model = telling(phases.shrink(work.ready(family, "causal"), method, None).double().eval())
    ids = torch.randint(5, tiny.SIZE, (2, 13), generator=torch.Generator().manual_seed(cut))
    mask = torch.ones_like(ids)
    ids[1, 0], mask[1, 0] = tiny.PAD, 0
    cache = StaticCache(model.config, max_cache_len=20) if room else DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        first = model(ids[:, :cut], attention_mask=mask[:, :cut], past_key_values=cache).logits
        rest = model(ids[:, cut:], attention_mask=mask, past_key_values=cache).logits
        unseen = model(ids[:, cut:], attention_mask=mask[:, cut:], position_ids=torch.arange(cut, 13)[None]).logits
    real = mask.bool()  # a place before the text has nothing to see
    torch.testing.assert_close(torch.cat([first, rest], 1)[real], whole[real], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(unseen, rest, atol=1e-2)


@pytest.mark.parametrize("method, family", [(m, "bert") for m in REPLACED] + [(m, f) for m in REPLACED[:2] for f in ("gpt2", "llama")], ids=str)
def test_weights_that_are_not_made_are_refused_where_they_are_asked_for(method, family):
    """GPT-2 tells its attention nothing of the question."""
    model = phases.shrink(work.ready(family), method, None)
    with torch.no_grad():
        model(**tiny.inputs(family))
        with pytest.raises(Incompatible, match="attention weights were asked for"):
            model(**tiny.inputs(family), output_attentions=True)
        model.set_attn_implementation("eager")
        if isinstance(method, Longformer):
            assert len(model(**tiny.inputs(family), output_attentions=True).attentions) == 2
        else:
            with pytest.raises(Incompatible, match="leave output_attentions out"):
                model(**tiny.inputs(family), output_attentions=True)


@pytest.fixture(params=["blocks", "rows"])
def foreign(request):
    """An implementation whose masks are no tensor, as FlexAttention's, or (B, n), as flash attention's; FlexAttention's own are compiled for a minute."""
    name = f"tests_{request.param}"
    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, lambda attention_mask=None, **how: attention_mask if request.param == "rows" else object())
    return name


@pytest.mark.parametrize("method", [*REPLACED, Perceiver(latents=3)], ids=repr)
def test_masks_of_another_form_are_refused(method, foreign):
    model = phases.shrink(work.ready("bert"), method, None)
    model.set_attn_implementation(foreign)
    with pytest.raises(Incompatible, match="set_attn_implementation"), torch.no_grad():
        model(**tiny.inputs("bert"))


def test_a_model_that_is_set_so_is_refused_before_anything_changes(foreign):
    model = work.ready("bert")
    model.set_attn_implementation(foreign)
    with pytest.raises(Incompatible, match=foreign):
        phases.shrink(model, Blockwise(), None)
    assert not list(surgery.seams_of(model))


@pytest.mark.parametrize("width, refused", [(32, True), (64, False)])
def test_a_window_that_the_family_has_itself_is_kept_or_refused_at_once(width, refused):
    """An input of eight tokens would not show it; at 64, all positions there are, it hides nothing."""
    model = tiny.model("mistral", config={"sliding_window": width})
    ids = torch.full((1, 60), 7)
    if refused:
        before = steps.tensors(model)
        with pytest.raises(Incompatible, match="sliding window.*use longformer"):
            Based(window=4).apply(model)
        assert steps.same(before, steps.tensors(model)) and not list(surgery.seams_of(model))
        Longformer(window=4, dense_below=0).apply(model)
    else:
        Based(window=4).apply(model)
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()


def test_capped_scores_are_refused_by_what_cannot_cap_them():
    with pytest.raises(Incompatible, match="caps its scores"):
        Based(window=4).apply(steps.model("gemma2"))


# A token near two buckets may change between them by rounding: there are few, and with three mixtures or windows of three, more tokens tell more.
NARROW = [(m, f) for m in (*REPLACED[:-1], Reformer(bucket_size=24), Perceiver(latents=3)) for f in ("bert", "llama") if f == "bert" or isinstance(m, Longformer | Based)]


def made(method, family, *, dtype=torch.float32):
    """A model with attention that matters, which the method has changed in this number format."""
    model = work.ready(family).requires_grad_(True)
    steps.disturb(model, std=0.3)
    model.to(dtype)
    torch.manual_seed(0)  # of new weights
    return model if method is None else phases.shrink(model, method, None)


def apart(found, wanted):
    """How far a model's logits are from others, as a share of those."""
    return float((found.detach().float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("how", ["made in bf16", "cast", "autocast"])
@pytest.mark.parametrize("method, family", NARROW, ids=str)
def test_in_bf16_it_answers_as_in_fp32_but_for_rounding(method, family, how):
    exact = made(method, family)
    model = made(method, family, dtype=torch.bfloat16) if how == "made in bf16" else copy.deepcopy(exact)
    if how == "cast":
        model.bfloat16()
    batch = {"batch": 12, "length": 50}
    wanted = steps.logits(exact, family, **batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = model.eval()(**steps.inputs(model, family, **batch)).logits
    assert 0 < apart(found, wanted) < 0.05
    assert apart(steps.logits(made(None, family), family, **batch), wanted) > 0.15  # the method says more than rounding does
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    own = [p for n, p in model.named_parameters() if seams.is_attention(n)]
    assert all(p.grad.any() for p in own)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("method", [*REPLACED, *(Longformer(window=3, global_tokens=0, dense_below=n) for n in (0, 99)), Perceiver(latents=3)], ids=repr)
def test_in_training_each_token_drops_weights_unless_the_card_says_that_none_does(method, share):
    model = tiny.model("bert", "base", config={"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": share})
    phases.shrink(model, method, None)
    tokens = tiny.inputs("bert", batch=1, length=15)
    torch.manual_seed(0)
    with torch.no_grad():
        first, second = (model.train()(**tokens).last_hidden_state[0] for _ in range(2))
        third, fourth = (model.eval()(**tokens).last_hidden_state[0] for _ in range(2))
    assert torch.equal(third, fourth)
    none = not share or "Attention weights have no dropout" in method.card.note
    for other in (second, third):
        assert torch.equal(first, other) if none else (first != other).any(-1).all()


@pytest.mark.parametrize("method", [Blockwise(), Linformer(k=3), Reformer(bucket_size=3), Perceiver(latents=3)], ids=repr)
def test_a_bert_that_hides_later_tokens_is_no_encoder(method):
    model = tiny.model("bert", "causal", config={"is_decoder": True})
    before = steps.tensors(model)
    with pytest.raises(Incompatible, match="BertLMHeadModel is causal"):
        phases.shrink(model, method, None)
    assert steps.same(before, steps.tensors(model)) and not list(surgery.seams_of(model))

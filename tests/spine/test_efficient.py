"""What every attention by other means is asked, whatever its method: caches with room behind the text, weights, masks of other forms, families' own ways."""

from __future__ import annotations

import pytest
import steps
import tiny
import torch
import work
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from paretune import phases, surgery
from paretune.errors import Incompatible
from paretune.methods.transforms.based import Based
from paretune.methods.transforms.blockwise import Blockwise
from paretune.methods.transforms.linformer import Linformer
from paretune.methods.transforms.longformer import Longformer
from paretune.methods.transforms.perceiver import Perceiver
from paretune.methods.transforms.reformer import Reformer

WAYS = [Longformer(window=3), Longformer(window=3, dilation=2, dense_below=0), Longformer(window=30, dense_below=0), Based(window=3, feature_dim=3)]


REPLACED = [Longformer(window=3, dense_below=0), Based(window=3), Blockwise(), Linformer(k=3), Reformer(bucket_size=3)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("method", WAYS, ids=repr)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_room_behind_the_text_moves_no_logit(family, method, length, padded):
    model = phases.shrink(work.ready(family, "causal"), method, None).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and not name.endswith(("wte.weight", "wpe.weight", "embed_tokens.weight")):
                weight.mul_(8)  # attention that a token more or less moves
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

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification

import paretune  # noqa: F401
from paretune import surgery
from paretune.errors import Incompatible
from paretune.methods.adapters.bitfit import BitFit
from paretune.methods.adapters.lora import LoRA
from paretune.methods.transforms.merge import Merge
from paretune.recipe import parse


def disturb(model, seed=0):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_the_merged_weights_are_w_plus_s_b_a(family, tmp_path):
    model = tiny.model(family)
    surgery.attach(model, [LoRA(r=2, alpha=3.0, targets="qkv")])
    disturb(model)
    inputs = tiny.inputs(family)
    with torch.no_grad():
        wanted = model(**inputs).logits
        assert Merge().apply(model) is model
        merged = model(**inputs).logits
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-5)
    assert set(dict(model.named_parameters())) == set(dict(tiny.model(family).named_parameters()))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForSequenceClassification.from_pretrained(tmp_path)(**inputs).logits, merged)


def test_one_weight_by_hand():
    model = tiny.model("bert")
    surgery.attach(model, [LoRA(r=2, alpha=3.0, targets="query")])
    disturb(model)
    query = model.bert.encoder.layer[0].attention.self.query
    low_rank = query.paretune.default.lora
    before, change = query.weight.clone(), 3.0 / 2 * low_rank.B @ low_rank.A
    Merge().apply(model)
    torch.testing.assert_close(query.weight, before + change)


def test_a_selection_only_loses_its_originals():
    model = tiny.model("bert")
    surgery.attach(model, [BitFit()])
    disturb(model)
    trained = {n: p.clone() for n, p in model.named_parameters()}
    Merge().apply(model)
    assert not list(surgery.seams_of(model))
    assert all(torch.equal(p, trained[n]) for n, p in model.named_parameters())
    with pytest.raises(Incompatible, match="no adapter is active"):
        Merge().apply(model)


def test_merging_can_be_undone_exactly():
    model = tiny.model("gpt2")
    surgery.attach(model, [LoRA(r=2)])
    disturb(model)
    before = copy.deepcopy(model.state_dict())
    Merge().apply(model)
    surgery.unmerge(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("merge", "no adapter is attached"),
        ("adapter | merge", "cannot be folded"),
        ("lora | int8 | merge", "put merge before int8"),
        ("lora | merge | merge", "no adapter"),
    ],
)
def test_recipes_that_cannot_merge(text, reason):
    with pytest.raises(Incompatible, match=reason):
        parse(text)

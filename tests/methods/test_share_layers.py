from __future__ import annotations

import copy

import pytest
import steps
import tiny
import torch
import work
from test_keep_layers import COUNT

from paretune import anatomy, inference, phases, surgery, training
from paretune.errors import Incompatible
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.lora import LoRA
from paretune.methods.transforms.keep_layers import KeepLayers
from paretune.methods.transforms.share_layers import ShareLayers
from paretune.recipe import parse


def deep(family, layers=4):
    model = tiny.model(family, config=dict.fromkeys(COUNT.get(family, ("num_hidden_layers",)), layers))
    phases.processors.put(model, work.processor(family))
    return model


def own(layer):
    return {n: p for n, p in layer.named_parameters() if "relative_attention_bias" not in n and "paretune" not in n.split(".")}


@pytest.mark.parametrize("values", ["mean", "first"])
@pytest.mark.parametrize("groups, leaders", [(1, [0, 0, 0, 0]), (2, [0, 0, 2, 2]), (3, [0, 0, 2, 3])])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_group_computes_with_one_set(family, groups, leaders, values, tmp_path):
    model = deep(family)
    copied = copy.deepcopy(model)
    before = sum(p.numel() for p in model.parameters())
    saved = 0
    for found in anatomy.layer_lists(copied):
        layers = list(copied.get_submodule(found.path))
        old = [{n: p.detach().clone() for n, p in own(layer).items()} for layer in layers]
        for j, layer in enumerate(layers):
            group = [k for k in range(4) if leaders[k] == leaders[j]]
            saved += sum(p.numel() for p in own(layer).values()) * (j != group[0])
            for name, parameter in own(layer).items():
                parameter.data = torch.stack([old[k][name] for k in group]).mean(0) if values == "mean" else old[group[0]][name].clone()
    assert ShareLayers(groups=groups, values=values).apply(model) is model
    assert torch.equal(steps.logits(model, family), steps.logits(copied, family))
    assert before - sum(p.numel() for p in model.parameters()) == saved
    phases.save_model(copied, tmp_path / "copied")
    phases.save_model(model, tmp_path / "shared")
    assert phases.loads_with(tmp_path / "shared") == "transformers+paretune"
    file, whole = ((tmp_path / n / "model.safetensors").stat().st_size for n in ("shared", "copied"))
    assert whole - file >= 4 * saved
    loaded = inference.open_model(tmp_path / "shared", work.task(family))
    assert torch.equal(steps.logits(loaded, family), steps.logits(model, family))
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_group_trains_as_one_and_is_saved_so(tmp_path):
    model, task = deep("bert"), work.text_task()
    ShareLayers(groups=2).apply(model)
    before = steps.logits(model, "bert")
    surgery.attach(model, [Full()])
    names = set(steps.learning(model))
    assert any(".layer.0." in n for n in names) and not any(".layer.1." in n for n in names)
    work.fitted(model, task)
    surgery.freeze(model)
    surgery.settle(model)
    assert not torch.equal(steps.logits(model, "bert"), before)
    layers = model.bert.encoder.layer
    assert all(layers[0].get_parameter(n) is p for n, p in layers[1].named_parameters()) and not torch.equal(
        layers[0].output.dense.weight, layers[2].output.dense.weight
    )
    phases.save_model(model, tmp_path)
    assert torch.equal(steps.logits(inference.open_model(tmp_path, task), "bert"), steps.logits(model, "bert"))


def test_layers_go_and_the_rest_stay_tied(tmp_path):
    for family in ("bert", "t5"):
        model, task = deep(family), work.task(family)
        ShareLayers(groups=2).apply(model)
        KeepLayers(layers="1,2,3").apply(model)  # the first of a group goes
        phases.save_model(model, tmp_path / family)
        loaded = inference.open_model(tmp_path / family, task)
        assert torch.equal(steps.logits(loaded, family), steps.logits(model, family))
        assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_adapters_are_each_layers_own_and_do_not_merge(tmp_path):
    model, task = deep("bert"), work.text_task()
    ShareLayers().apply(model)
    surgery.attach(model, [LoRA(r=2)])
    steps.disturb(model)
    surgery.freeze(model)
    surgery.settle(model)
    deltas = [p for n, p in model.named_parameters() if n.endswith("query.paretune.default.lora.B")]
    assert len(deltas) == 4 and not torch.equal(deltas[0], deltas[1])
    phases.save_model(model, tmp_path)
    assert torch.equal(steps.logits(inference.open_model(tmp_path, task), "bert"), steps.logits(model, "bert"))
    with pytest.raises(Incompatible, match="is tied to"):
        surgery.merge(model)
    with pytest.raises(Incompatible, match="would undo what share_layers fixed"):
        parse("share_layers | lora | merge").check()


def test_a_trimmed_vocabulary_and_sixteen_bits_go_with_it(tmp_path):
    model, task = work.ready("bert"), work.text_task()
    for text in ("share_layers", "vocabulary", "cast"):
        phases.shrink(model, parse(text).phases[0][0], task)
    phases.save_model(model, tmp_path)
    found, again = (training.predict(m, task, rows=task.test) for m in (model, inference.open_model(tmp_path, task)))
    assert found == again


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(Incompatible, match="share one set of weights"):
        ShareLayers().apply(work.ready("albert"))
    for text in ("magnitude", "low_rank"):
        with pytest.raises(Incompatible, match="has changed the form"):
            ShareLayers().apply(phases.shrink(work.ready("bert"), parse(text).phases[0][0]))
    model = phases.shrink(work.ready("bert"), ShareLayers())
    with pytest.raises(Incompatible, match="codes cannot be shared"):
        phases.shrink(model, parse("int8").phases[0][0])
    for text in ("magnitude", "ffn", "low_rank"):
        with pytest.raises(Incompatible, match="shared with another module"):
            phases.shrink(model, parse(text).phases[0][0], work.text_task())


@pytest.mark.parametrize("text", ["int8", "full | int4", "full | magnitude | nf4"])
def test_packing_is_refused_before_anything_trains(text):
    with pytest.raises(Incompatible, match="share_layers left layers that share their parameters, and codes cannot be shared"):
        parse(f"full | share_layers | {text}")

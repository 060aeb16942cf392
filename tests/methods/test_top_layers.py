from __future__ import annotations

import pytest
import steps

from paretune import surgery
from paretune.errors import Incompatible, RecipeError
from paretune.methods.adapters.top_layers import TopLayers
from paretune.recipe import parse

LAYERS = {
    "bert": "bert.encoder.layer.1.",
    "roberta": "roberta.encoder.layer.1.",
    "gpt2": "transformer.h.1.",
    "llama": "model.layers.1.",
    "vit": "vit.layers.1.",
}


@pytest.mark.parametrize("family", LAYERS)
def test_the_last_k_layers_learn(family):
    model = steps.model(family)
    learns = surgery.attach(model, [TopLayers(k=1)], head=False)
    assert learns == [n for n, _ in steps.model(family).named_parameters() if n.startswith(LAYERS[family])] and learns


def test_both_stacks_of_t5():
    learns = surgery.attach(steps.model("t5"), [TopLayers(k=1)], head=False)
    assert {".".join(n.split(".")[:4]) for n in learns} == {"transformer.encoder.block.1", "transformer.decoder.block.1"}


@pytest.mark.parametrize("knobs, layers", [({}, {"0", "1"}), ({"k": 2}, {"0", "1"}), ({"freeze": 1}, {"1"}), ({"freeze": 0}, {"0", "1"})])
def test_k_counts_from_the_output_and_freeze_from_the_input(knobs, layers):
    learns = surgery.attach(steps.model("bert"), [TopLayers(**knobs)], head=False)
    assert {n.split(".")[3] for n in learns} == layers


@pytest.mark.parametrize("knobs", [{"k": 3}, {"freeze": 2}])
def test_more_layers_than_there_are(knobs):
    with pytest.raises(Incompatible, match="has 2 layers, so k is 1 to 2"):
        surgery.attach(steps.model("bert"), [TopLayers(**knobs)])


def test_one_of_the_two():
    with pytest.raises(Incompatible, match="not both"):
        parse("top_layers(k=1, freeze=1)")
    with pytest.raises(RecipeError, match="at least 1"):
        parse("top_layers(k=0)")


def test_the_backward_pass_ends_at_the_lowest_trained_layer():
    model = steps.model("bert")
    surgery.attach(model, [TopLayers(k=1)], head=False)
    asked = {}
    for k, layer in enumerate(model.bert.encoder.layer):
        layer.register_forward_hook(lambda m, i, o, k=k: asked.__setitem__(k, (o[0] if isinstance(o, tuple) else o).requires_grad))
    steps.loss(model, "bert").backward()
    assert asked == {0: False, 1: True}

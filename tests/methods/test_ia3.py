from __future__ import annotations

import pytest
import steps
import torch
from torch.nn import functional as F

from paretune import surgery
from paretune.methods.adapters.ia3 import IA3, InputScale, OutputScale


def adapted(family="bert", **knobs):
    model = steps.model(family)
    surgery.attach(model, [IA3(**knobs)], head=False)
    return model


def test_keys_and_values_are_rescaled_and_the_inner_activations_before_the_last_map():
    model = adapted()
    steps.disturb(model)
    layer, x = model.bert.encoder.layer[0], torch.randn(2, 3, 16)
    for module in (layer.attention.self.key, layer.attention.self.value):
        torch.testing.assert_close(module(x), module.paretune.default.ia3.scale * F.linear(x, module.weight, module.bias))
    down, h = layer.output.dense, torch.randn(2, 3, 32)
    torch.testing.assert_close(down(h), F.linear(down.paretune.default.ia3.scale * h, down.weight, down.bias))
    assert not hasattr(layer.attention.self.query, "paretune") and not hasattr(layer.intermediate.dense, "paretune")


def test_all_vectors_start_at_one():
    assert all(bool((p == 1).all()) for p in steps.learning(adapted()).values())


@pytest.mark.parametrize("family, count", [("bert", 2 * (16 + 16 + 32)), ("llama", 2 * (8 + 8 + 32)), ("gpt2", 2 * (16 + 16 + 32)), ("t5", 2 * (3 * 32 + 2 * 32))])
def test_the_count_is_three_vectors_a_layer(family, count):
    """Llama's keys and values are half as wide (two of four heads); T5's decoder has cross-attention, too."""
    assert surgery.count(adapted(family)) == (count, 0)


def test_other_targets():
    model = adapted(targets="up query")
    layer = model.bert.encoder.layer[0]
    assert isinstance(layer.intermediate.dense.paretune.default.ia3, InputScale)
    assert isinstance(layer.attention.self.query.paretune.default.ia3, OutputScale)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_merged_weights_are_rescaled_rows_and_columns(family):
    model = adapted(family)
    steps.disturb(model, std=0.3)
    wanted = steps.logits(model, family)
    surgery.merge(model)
    torch.testing.assert_close(steps.logits(model, family), wanted, rtol=1e-4, atol=1e-5)

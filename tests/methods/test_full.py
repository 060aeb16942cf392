from __future__ import annotations

import pytest
import steps
import tiny
import torch

from paretune import surgery
from paretune.methods.adapters.full import Full


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_everything_learns(family):
    model = steps.model(family)
    surgery.attach(model, [Full()])
    assert sum(surgery.count(model)) == sum(p.numel() for p in steps.model(family).parameters())


def test_a_step_is_plain_gradient_descent():
    ours, plain = steps.model("bert"), steps.model("bert")
    surgery.attach(ours, [Full()])
    assert steps.descend(ours, "bert", steps=4) == steps.descend(plain, "bert", steps=4)
    assert all(torch.equal(p, ours.get_parameter(n)) for n, p in plain.named_parameters())


def test_tied_embeddings_learn_as_one_and_come_back_as_one():
    model = steps.model("gpt2", "causal")
    surgery.attach(model, [Full()])
    steps.disturb(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    trained = model.lm_head.weight.detach().clone()
    surgery.switch(model)
    assert torch.equal(model.lm_head.weight, steps.model("gpt2", "causal").lm_head.weight)
    assert model.lm_head.weight is model.transformer.wte.weight and not torch.equal(trained, model.lm_head.weight)


def test_a_later_phase_trains_no_adapter_of_an_earlier_one():
    from paretune.methods.adapters.lora import LoRA

    model = steps.model("bert")
    surgery.attach(model, [LoRA(r=2)], name="first")
    learns = surgery.attach(model, [Full()], name="second", on_top=True)
    assert not [n for n in learns if "paretune" in n.split(".")]

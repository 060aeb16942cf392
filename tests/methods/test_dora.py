from __future__ import annotations

import warnings

import pytest
import steps
import torch

from paretune import surgery
from paretune.errors import Incompatible
from paretune.methods.adapters.dora import DoRA
from paretune.methods.adapters.lora import LoRA
from paretune.methods.transforms.int8 import Int8
from paretune.recipe import parse

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(method, family="bert"):
    model = steps.model(family)
    torch.manual_seed(3)
    surgery.attach(model, [method], head=False)
    return model


def query(model):
    return model.bert.encoder.layer[0].attention.self.query


def test_rows_have_length_m_and_the_direction_of_lora_s_sum():
    model = adapted(DoRA(r=2, targets="query"))
    steps.disturb(model)
    patch, weight = query(model).paretune.default.dora, query(model).weight
    patch.stretch.data.abs_()  # a negative length would turn a row around
    effective = weight + patch.delta(weight, None)[0]
    torch.testing.assert_close(effective.norm(dim=1), weight.norm(dim=1) + patch.stretch)
    summed = weight + 2 * patch.B @ patch.A
    torch.testing.assert_close(torch.cosine_similarity(effective, summed), torch.ones(16))


def test_a_weight_of_zeros_stays_without_a_nan():
    model = adapted(DoRA(r=2, targets="query"))
    with torch.no_grad():
        query(model).weight[3] = 0
    assert steps.logits(model, "bert").isfinite().all()


@pytest.mark.parametrize("family, theirs, ours", [("bert", ["query", "value"], "query value"), ("gpt2", ["c_attn"], "c_attn")])
def test_logits_and_gradients_are_pefts(family, theirs, ours):
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft sets fan_in_fan_out for Conv1D itself, and says so
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=theirs, use_dora=True, fan_in_fan_out=family == "gpt2")
        reference = peft.get_peft_model(steps.model(family), config)
    mine = adapted(DoRA(r=4, alpha=6.0, targets=ours), family)
    steps.disturb(mine)
    names = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "stretch": "lora_magnitude_vector.default.weight"}
    pairs = []
    for path, module, seam in surgery.seams_of(mine):
        (patch,) = (p for _, _, p in seam.patches())
        lengths = module.weight.norm(dim=0 if family == "gpt2" else 1)
        for own, name in names.items():
            other = reference.get_parameter(f"base_model.model.{path}.{name}")
            with torch.no_grad():
                other.copy_(getattr(patch, own) + (lengths if own == "stretch" else 0))
            pairs.append((getattr(patch, own), other))
    torch.testing.assert_close(steps.logits(mine, family), steps.logits(reference, family), rtol=1e-5, atol=1e-5)
    for model in (mine, reference):
        steps.loss(model, family).backward()
    assert len(pairs) >= 6
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-6)
        assert other.grad.any()


def test_the_count_is_lora_s_and_one_number_per_output():
    assert surgery.count(adapted(DoRA(r=2, targets="query up")))[0] == surgery.count(adapted(LoRA(r=2, targets="query up")))[0] + 2 * (16 + 32)


def test_weights_it_computes_with_cannot_be_packed_under_it():
    with pytest.raises(Incompatible, match=r"computes with .* put merge before int8"):
        parse("dora | int8").check()
    with pytest.raises(Incompatible, match="query computes with its weight.*merge first"):
        Int8().apply(adapted(DoRA(targets="query")))
    parse("dora | merge | int8").check()

"""Our bottlenecks compute what those of the `adapters` library compute; `oracles.py` made the fixtures with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification

from paretune import surgery
from paretune.methods.adapters.adapter import ACTIVATIONS, Adapter

FIXTURES = Path(__file__).parent / "fixtures"
FORMS = ("bert_houlsby", "bert_pfeiffer", "bert_parallel", "roberta_houlsby", "roberta_pfeiffer", "roberta_parallel")
VERSIONS = {"adapters": "1.3.0", "transformers": "4.57.6", "torch": "2.13.0"}  # that made the fixtures
TOLERANCE = 1e-9  # of values of the order of 1, in float64: the two transformers may sum in another order, and no more
SHOWS = 1e-2  # what a bottleneck at another place would change, at least


def fixture(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(how the fixture was made, its tensors)."""
    path = FIXTURES / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["oracle"])
    return about, load_file(path)


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def plain(about: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The fixture's model without adapters, in float64."""
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(about["family"], **about["config"])).eval()
    model.load_state_dict(below(tensors, "model."))
    return model.double()


def adapted(about: dict[str, Any], tensors: dict[str, Tensor], form: str) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The fixture's model with our adapter of a form and the library's weights in it; the parameters by the fixture's names."""
    model = plain(about, tensors)
    method = Adapter(bottleneck=about["bottleneck"], form=form, activation=about["activation"], scale=about["scale"], norms=False)
    surgery.attach(model, [method], head=False)
    model.double()
    parameters = {}
    for name, weights in below(tensors, "adapter.").items():
        layer, block, tensor = name.split(".", 2)
        end = {"attention": "attention.output.dropout", "ffn": "output.dropout"}[block]
        patch = model.get_submodule(f"{about['family']}.encoder.layer.{layer}.{end}").paretune.default.adapter
        parameters[name] = patch.get_parameter(tensor)
        parameters[name].data.copy_(weights)
    assert sum(p.numel() for p in parameters.values()) == surgery.count(model)[0]  # no more and no fewer than the library's
    return model, parameters


def outputs(model: nn.Module, tensors: dict[str, Tensor]) -> Any:
    return model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"], output_hidden_states=True)


def far(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of two tensors of one shape."""
    assert found.shape == wanted.shape
    return float((found - wanted).detach().abs().max())


@pytest.mark.parametrize("name", FORMS)
def test_outputs_and_gradients_are_the_librarys(name):
    about, tensors = fixture(name)
    assert about["versions"] == VERSIONS
    model, parameters = adapted(about, tensors, about["form"])
    out = outputs(model, tensors)
    assert far(torch.stack(out.hidden_states), tensors["hidden_states"]) < TOLERANCE
    assert far(out.logits, tensors["logits"]) < TOLERANCE
    assert far(outputs(plain(about, tensors), tensors).logits, tensors["logits"]) > SHOWS, "the adapter matters"
    F.cross_entropy(out.logits, tensors["labels"]).backward()
    gradients = below(tensors, "gradient.")
    assert gradients.keys() == parameters.keys()
    assert max(far(parameters[key].grad, gradients[key]) for key in gradients) < TOLERANCE


@pytest.mark.parametrize("name", FORMS)
def test_the_bottleneck_sits_behind_the_blocks_dropout(name):
    about, tensors = fixture(name)
    model, _ = adapted(about, tensors, about["form"])
    for path, module in model.named_modules():
        if path.endswith("output.dropout"):
            module.register_forward_pre_hook(lambda _, x: (x[0] * tensors["keep"],))
    assert far(outputs(model, tensors).logits, tensors["logits_dropped"]) < TOLERANCE
    assert far(tensors["logits_dropped"], tensors["logits"]) > SHOWS


def test_pfeiffer_et_als_own_bottleneck_reads_the_following_layer_norm():
    """The card's note: with z = x + y before the layer norm, ours is LN(z + s U σ(D y)), and theirs LN(z + s U σ(D LN(z)))."""
    about, tensors = fixture("bert_madx")
    assert about["versions"] == VERSIONS and about["library_config"] == "SeqBnConfig"
    ours, _ = adapted(about, tensors, "pfeiffer")
    assert far(outputs(ours, tensors).logits, tensors["logits"]) > SHOWS

    model, weights = plain(about, tensors), {name: w.double() for name, w in below(tensors, "adapter.").items()}

    def theirs(layer: int, norm: nn.Module, z: Tensor, normed: Tensor) -> Tensor:
        down, up = ((weights[f"{layer}.ffn.{which}.weight"], weights[f"{layer}.ffn.{which}.bias"]) for which in ("down", "up"))
        return norm.forward(z + about["scale"] * F.linear(ACTIVATIONS[about["activation"]](F.linear(normed, *down)), *up))

    for k, layer in enumerate(model.bert.encoder.layer):
        layer.output.LayerNorm.register_forward_hook(lambda norm, z, normed, k=k: theirs(k, norm, z[0], normed))
    assert far(outputs(model, tensors).logits, tensors["logits"]) < TOLERANCE

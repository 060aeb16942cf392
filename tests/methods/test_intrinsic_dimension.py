from __future__ import annotations

import math

import pytest
import steps
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

import paretune  # noqa: F401 - lets transformers open our folders
from paretune import surgery
from paretune.errors import Incompatible
from paretune.methods.adapters.intrinsic_dimension import Dense, Fastfood, IntrinsicDimension, hadamard
from paretune.methods.transforms.keep_layers import KeepLayers


def adapted(method, family="bert", **how):
    model = steps.model(family)
    torch.manual_seed(3)
    surgery.attach(model, [method], head=False, **how)
    return model


def patches(model):
    return [p for _, _, seam in surgery.seams_of(model) for _, _, p in seam.patches()]


def made(projection, rows, columns, seed=0):
    return projection(rows, columns, generator=torch.Generator().manual_seed(seed), device=torch.device("cpu"))


# --- the projection -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128])
def test_the_hadamard_transform_is_its_matrix(size):
    """H_ij = (−1)^(number of ones that i and j have in common in binary) / √p."""
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / math.sqrt(size)
    x = torch.randn(3, size)
    torch.testing.assert_close(hadamard(x), x @ matrix)


def test_fastfood_is_the_product_of_its_factors():
    rows, columns = 70, 11  # five blocks of 16, the last one cut off
    fast, found = made(Fastfood, rows, columns), []
    theta, eye = torch.randn(columns), hadamard(torch.eye(16))
    for block in range(5):
        signs, gains = torch.diag(fast.signs[block].float()), torch.diag(fast.gains[block])
        order = torch.eye(16)[fast.order.view(5, 16)[block].long() - 16 * block]
        assert order.sum(0).eq(1).all() and order.sum(1).eq(1).all() and set(fast.signs[block].tolist()) == {-1, 1}
        found.append(eye @ gains @ order @ eye @ signs @ F.pad(theta, (0, 5)))
    torch.testing.assert_close(fast(theta), torch.cat(found)[:rows])


@pytest.mark.parametrize("projection", [Dense, Fastfood])
def test_directions_are_kept_apart_and_lengths_on_average(projection):
    rows, columns = 4096, 24
    matrix = torch.stack([made(projection, rows, columns)(e) for e in torch.eye(columns)], 1)  # P (D, d)
    assert torch.linalg.matrix_rank(matrix) == columns
    gram = matrix.T @ matrix
    assert float(gram.diagonal().mean()) == pytest.approx(1.0, abs=0.1)
    assert float((gram - torch.diag(gram.diagonal())).abs().max()) < 0.15
    assert not torch.equal(made(projection, rows, columns, seed=1)(torch.ones(columns)), matrix.sum(1))


# --- the adapter ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["fastfood", "dense"])
@pytest.mark.parametrize("structure_aware", [False, True])
def test_the_map_is_its_start_plus_a_scaled_projection(projection, structure_aware):
    model = adapted(IntrinsicDimension(d=20, projection=projection, structure_aware=structure_aware, targets="query"))
    steps.disturb(model, std=1.0)
    theta = model.get_parameter("paretune.default.intrinsic_dimension_shared.theta").detach()
    for layer in (0, 1):
        module, x = model.bert.encoder.layer[layer].attention.self.query, torch.randn(3, 16)
        seed = int(module.paretune.default.intrinsic_dimension.plan[0])
        project = made(Dense if projection == "dense" else Fastfood, 16 * 16 + 16, 18 if structure_aware else 20, seed)
        change = (1 + theta[18 + layer]) * project(theta[:18]) if structure_aware else project(theta)
        weight, bias = module.weight + change[:256].view(16, 16), module.bias + change[256:]
        torch.testing.assert_close(module(x), F.linear(x, weight, bias))


def test_d_numbers_learn_in_a_model_of_any_size():
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(transformers.BertConfig())
        assert surgery.attach(model, [IntrinsicDimension(d=200)], head=False) == ["paretune.default.intrinsic_dimension_shared.theta"]
    assert surgery.count(model) == (200, 0)


def test_a_file_holds_the_d_numbers_once_and_seeds(tmp_path):
    model = adapted(IntrinsicDimension(d=64))
    steps.disturb(model)
    wanted = steps.logits(model, "bert")
    model.save_pretrained(tmp_path)
    ours = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if "paretune" in n.split(".")}
    assert sorted(tuple(t.shape) for t in ours.values()) == [(3,)] * 12 + [(64,)]
    assert len({int(t[0]) for t in ours.values() if len(t) == 3}) == 12, "each map has a projection of its own"
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(steps.logits(loaded, "bert"), wanted)


def test_a_model_that_answered_first_can_still_learn():
    model = adapted(IntrinsicDimension(d=64))
    with torch.inference_mode():
        model(**steps.inputs(model, "bert"))
    steps.loss(model, "bert").backward()
    assert all(p.grad.any() for p in steps.learning(model).values())


def test_layers_that_stay_keep_their_scales_when_others_are_dropped(tmp_path):
    model = adapted(IntrinsicDimension(d=20))
    steps.disturb(model)
    kept = model.bert.encoder.layer[1].attention.self.query
    x = torch.randn(2, 16)
    wanted = kept(x)
    KeepLayers(layers="1").apply(model)
    model.save_pretrained(tmp_path)
    for each in (model, type(model).from_pretrained(tmp_path)):
        torch.testing.assert_close(each.bert.encoder.layer[0].attention.self.query(x), wanted)


def test_every_layer_needs_a_number():
    with pytest.raises(Incompatible, match="each of the 2 layers takes one of the d numbers"):
        adapted(IntrinsicDimension(d=2))
    assert surgery.count(adapted(IntrinsicDimension(d=2, structure_aware=False))) == (2, 0)
    t5 = adapted(IntrinsicDimension(d=20), "t5")  # layers of both stacks
    assert {tuple(p.plan[1:].tolist()) for p in patches(t5)} == {(i, 4) for i in range(4)}

from __future__ import annotations

import math

import pytest
import steps
import tiny
import torch
import work
from torch import nn

from paretune import anatomy, inference, phases, processors, surgery, training
from paretune.errors import Incompatible, RecipeError
from paretune.methods.adapters.dora import DoRA
from paretune.methods.adapters.lora import LoRA
from paretune.methods.transforms.low_rank import LowRank, Thin, factors
from paretune.recipe import parse
from paretune.roles import Examples
from paretune.weights import calibration


def product(pair):
    first, second = pair
    return second @ first


def matrix(out=24, inside=40, seed=0):
    return torch.randn(out, inside, generator=torch.Generator().manual_seed(seed))


def skewed(n=200, inside=40, *, rank=None):
    """Inputs whose features are mixed and of very different size; in fewer dimensions where asked."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(n, rank or inside, generator=random) * torch.logspace(0, -2, rank or inside)
    return x @ torch.randn(rank or inside, inside, generator=random)


@pytest.mark.parametrize("rank", [1, 5, 14])
def test_the_plain_error_is_that_of_the_tail_of_singular_values(rank):
    w = matrix()
    error = (w - product(factors(w, LowRank(rank=rank)))).norm()
    assert float(error) == pytest.approx(float(torch.linalg.svdvals(w.double())[rank:].norm()), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 5, 14])
def test_the_activation_aware_error_is_the_least_there_is_on_the_inputs(rank):
    """Eckart and Young for Y = X Wᵀ: no W' of that rank comes nearer than the tail of the singular values of Y itself."""
    w, x = matrix(), skewed()
    aware, plain = (factors(w, LowRank(rank=rank), moment=m) for m in (x.T @ x / len(x), None))
    errors = [float((x @ (w - product(p)).T).norm()) for p in (aware, plain)]
    assert errors[0] == pytest.approx(float(torch.linalg.svdvals((x @ w.T).double())[rank:].norm()), rel=1e-3)
    assert errors[0] < errors[1]


def test_inputs_in_few_dimensions_lose_nothing():
    w, x = matrix(), skewed(rank=6)
    pair = factors(w, LowRank(rank=6), moment=x.T @ x / len(x))
    assert float((x @ (w - product(pair)).T).norm()) < 1e-2 * float((x @ w.T).norm())


def test_the_rank_is_the_share_the_number_or_the_energy():
    w = matrix()
    assert len(factors(w, LowRank(keep=0.5))[0]) == math.floor(0.5 * 24 * 40 / (24 + 40))
    assert len(factors(w, LowRank(rank=3))[0]) == 3
    squares = torch.linalg.svdvals(w.double()) ** 2
    for energy in (0.3, 0.7):
        r = len(factors(w, LowRank(energy=energy))[0])
        assert squares[:r].sum() >= energy * squares.sum() > squares[: r - 1].sum()
    assert factors(w, LowRank(rank=15)) is None and factors(w, LowRank(energy=1.0)) is None  # 15 · (24 + 40) = 24 · 40


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("aware", [False, True])
def test_a_model_computes_with_the_products(family, aware, tmp_path):
    model, whole, task = work.ready(family), work.ready(family), work.task(family)
    before = sum(p.numel() for p in model.parameters())
    phases.shrink(model, LowRank(activation_aware=aware, samples=8), task)
    thin = {path: module for path, module in model.named_modules() if isinstance(module, Thin)}
    assert set(thin) == {s.path for s in anatomy.resolve(whole, "linear", kind="linear")}
    saved = 0
    for path, module in thin.items():
        weight = anatomy.weight(whole.get_submodule(path))
        r = math.floor(0.5 * weight.numel() / sum(weight.shape))
        assert [tuple(p.shape) for p in (module.first.weight, module.second.weight)] == [(r, weight.shape[1]), (weight.shape[0], r)]
        saved += weight.numel() - r * sum(weight.shape)
        with torch.no_grad():
            weight.copy_(module.second.weight @ module.first.weight)
    torch.testing.assert_close(steps.logits(model, family), steps.logits(whole, family), rtol=1e-4, atol=1e-5)
    assert before - sum(p.numel() for p in model.parameters()) == saved
    phases.save_model(model, tmp_path)
    assert torch.equal(steps.logits(inference.open_model(tmp_path, task), family), steps.logits(model, family))


def test_a_models_outputs_of_each_map_are_nearer_with_its_inputs():
    task = work.text_task()
    whole = work.ready("bert")
    path = "bert.encoder.layer.0.intermediate.dense"
    batches = calibration.unpadded(whole, Examples(task, processors.get(whole)), count=24)
    moment = calibration.second_moments(whole, [path], batches=batches, kind=task.kind)[path]
    errors = []
    for aware in (True, False):
        model = phases.shrink(work.ready("bert"), LowRank(rank=4, activation_aware=aware), task)
        change = whole.get_submodule(path).weight - anatomy.weight(model.get_submodule(path))
        errors.append(float((change @ moment @ change.T).trace().detach()))  # E‖(W − W_r) x‖²
    assert errors[0] < errors[1]


def test_what_saves_nothing_stays(tmp_path):
    model = work.ready("bert")
    LowRank(rank=9).apply(model)  # 9 · (16 + 16) > 16 · 16, and 9 · (16 + 32) < 16 · 32
    assert {p.rpartition(".")[0].rpartition(".")[2] for p, m in model.named_modules() if isinstance(m, Thin)} == {"intermediate", "output"}
    with pytest.raises(Incompatible, match="no fewer parameters"):
        LowRank(rank=14).apply(work.ready("bert"))


def test_both_factors_learn_and_adapters_stand_on_them(tmp_path):
    model, task = work.ready("bert"), work.task("bert")
    phases.shrink(model, LowRank(), task)
    for adapter in (LoRA(targets="linear"), DoRA(r=2)):
        surgery.attach(model, [adapter], name=adapter.spelling(), on_top=True)
        wanted = steps.logits(model, "bert")
        steps.disturb(model)
        assert not torch.equal(steps.logits(model, "bert"), wanted)
    with pytest.raises(Incompatible, match="has fixed the form"):
        surgery.merge(model)
    for adapter in ("dora", "lora"):
        surgery.remove(model, adapter)
    surgery.attach(model, [parse("full").phases[0][0]])
    assert {"first.weight", "second.weight"} <= {".".join(n.split(".")[-2:]) for n in steps.learning(model)}


def test_dora_on_factors_is_dora_on_their_product():
    thin, whole = work.ready("bert"), work.ready("bert")
    LowRank(rank=4, targets="query").apply(thin)
    for path, module in thin.named_modules():
        if isinstance(module, Thin):
            whole.get_submodule(path).weight = nn.Parameter(anatomy.weight(module).detach())
    for model in (thin, whole):
        torch.manual_seed(0)
        surgery.attach(model, [DoRA(r=2, targets="query")])
        steps.disturb(model)
    torch.testing.assert_close(steps.logits(thin, "bert"), steps.logits(whole, "bert"), rtol=1e-4, atol=1e-5)


def test_int8_packs_both_factors(tmp_path):
    model, task = work.ready("bert"), work.task("bert")
    for text in ("attention_heads", "low_rank", "int8"):
        phases.shrink(model, parse(text).phases[0][0], task)
    assert all(hasattr(m.first, "packed_by") and hasattr(m.second, "packed_by") for m in model.modules() if isinstance(m, Thin))
    phases.save_model(model, tmp_path)
    found, again = (training.predict(m, task, rows=task.test) for m in (model, inference.open_model(tmp_path, task)))
    assert found == again


def test_mistakes_are_refused():
    with pytest.raises(RecipeError, match="give rank or energy"):
        LowRank(rank=2, energy=0.9)
    with pytest.raises(Incompatible, match="would undo"):
        parse("low_rank | lora | merge").check()
    with pytest.raises(Incompatible, match="give the task"):
        phases.shrink(tiny.model("bert"), LowRank(activation_aware=True))
    model = work.ready("bert")
    LowRank().apply(model)
    with pytest.raises(Incompatible, match="has changed the form"):
        LowRank().apply(model)

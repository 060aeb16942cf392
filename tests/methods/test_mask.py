from __future__ import annotations

import pytest
import steps
import tiny
import torch
import work
from safetensors.torch import load_file
from torch.nn import functional as F

import paretune  # noqa: F401 - lets transformers open our folders
from paretune import surgery
from paretune.errors import RecipeError
from paretune.methods.adapters.mask import Mask


def adapted(method=Mask(targets="query"), family="bert"):  # noqa: B008
    model = steps.model(family)
    surgery.attach(model, [method], head=False)
    return model


def query(model):
    return model.bert.encoder.layer[0].attention.self.query


def test_the_map_is_w_masked_and_the_gradient_goes_straight_through():
    model = adapted(Mask(targets="query", threshold=0.5, init=0.7))
    steps.disturb(model, std=0.5)
    module, x = query(model), torch.randn(3, 16)
    patch = module.paretune.default.mask
    mask = (patch.scores > 0.5).float()
    assert 0.2 < mask.mean() < 0.9
    torch.testing.assert_close(module(x), F.linear(x, module.weight * mask, module.bias))
    module(x).sum().backward()
    mask.requires_grad_()  # the gradient of the mask is the gradient of the scores, for every weight, on or off
    F.linear(x, module.weight.detach() * mask, module.bias.detach()).sum().backward()
    torch.testing.assert_close(patch.scores.grad, mask.grad)


def test_weights_go_off_where_they_hurt_and_come_on_again():
    """Each output is the sum of 16 weights of 1/16: the target 0 asks for none of them, the target 1 for all."""
    model = adapted(Mask(targets="query", threshold=0.0, init=0.05))
    module, patch = query(model), query(model).paretune.default.mask
    with torch.no_grad():
        module.weight.fill_(1 / 16)
        module.bias.zero_()
    optimizer = torch.optim.SGD([patch.scores], lr=1.0)
    shares = []
    for target in (0.0, 1.0):
        for _ in range(60):
            optimizer.zero_grad()
            F.mse_loss(module(torch.ones(1, 16)), torch.full((1, 16), target)).backward()
            optimizer.step()
        shares.append(float((patch.scores > 0).float().mean()))
    assert shares == [0.0, 1.0]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_after_the_phase_a_weight_costs_one_bit(family, tmp_path):
    model = adapted(Mask(targets="value up"), family)
    steps.disturb(model)
    wanted, weights = steps.logits(model, family), surgery.count(model)[0]
    surgery.freeze(model)
    surgery.settle(model)
    assert torch.equal(steps.logits(model, family), wanted)
    model.save_pretrained(tmp_path)
    ours = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if "paretune" in n.split(".")}
    assert weights == 2 * (16 * 16 + 16 * 32) and sum(t.nbytes for t in ours.values()) * 8 == weights
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(steps.logits(loaded, family), wanted)
    for each in (model, loaded):
        surgery.merge(each)
        torch.testing.assert_close(steps.logits(each, family), wanted, rtol=1e-4, atol=1e-5)
        surgery.unmerge(each)
        assert torch.equal(steps.logits(each, family), wanted)
        surgery.remove(each, "default")
        assert steps.same(steps.tensors(each), steps.tensors(steps.model(family)))


def test_training_resumes_from_the_scores(tmp_path):
    """A checkpoint holds scores: killed after any step, training goes on bit for bit."""
    straight, killed = (adapted(Mask(), "bert") for _ in range(2))
    given = work.text_task()
    for model in (straight, killed):
        work.processors.put(model, tiny.tokenizer())
    work.fitted(straight, given)

    def stop(info):
        if info["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.fitted(killed, given, folder=tmp_path, report=stop)
    work.fitted(killed, given, folder=tmp_path)
    assert steps.same(steps.tensors(killed), steps.tensors(straight))


def test_a_mask_that_starts_all_off_is_refused():
    with pytest.raises(RecipeError, match="init is above the threshold"):
        Mask(init=0.01)

"""Linformer against its equation; its limit, its sharing, and what padding may not change."""

from __future__ import annotations

import pytest
import steps
import tiny
import torch
import work
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from paretune import anatomy, inference, phases, seams
from paretune.errors import Incompatible
from paretune.methods.adapters.full import Full
from paretune.methods.transforms.keep_layers import KeepLayers
from paretune.methods.transforms.linformer import Linformer, Mixtures, mean_of_runs, shares


def changed(family: str = "bert", **knobs):
    return phases.shrink(work.ready(family), Linformer(**knobs), None)


def tables(model):
    return torch.nn.ModuleList(m for m in model.modules() if isinstance(m, Mixtures))


@pytest.mark.parametrize("family", ["bert", "roberta", "vit"])
def test_as_many_mixtures_as_tokens_are_the_backbone(family):
    before = steps.logits(work.ready(family), family)
    assert torch.allclose(steps.logits(changed(family), family), before, atol=1e-6)  # k is cut to n: the identity, and padding
    assert not torch.equal(steps.logits(changed(family, k=2), family), before)


def test_it_is_the_papers_equation_at_full_length():
    """The attention of a layer by hand, from its own queries, keys and values, with random E and F for each head."""
    model = changed("vit", k=3, share="none")
    with torch.no_grad():
        for p in tables(model).parameters():
            p.normal_()
    seen = {}
    site = anatomy.resolve(model, "attention_call", kind="call")[0]
    module = model.get_submodule(site.path)
    patch = next(p for _, _, p in seams.seam_of(module).patches())
    compute = patch.compute

    def watch(attend, call):
        seen["call"], seen["out"] = call, compute(attend, call)[0]
        return seen["out"], None

    patch.compute = watch
    steps.logits(model, "vit")
    q, k, v = (t.double() for t in (seen["call"].query, seen["call"].key, seen["call"].value))
    E, F = (t.double() for t in tables(model)[0].parameters())
    for h in range(q.shape[1]):
        wanted = torch.softmax(q[:, h] @ (E[h] @ k[:, h]).transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ (F[h] @ v[:, h])
        assert torch.allclose(seen["out"][:, :, h].double(), wanted, atol=1e-5)


def test_runs_are_means_of_equal_length():
    table = mean_of_runs(3, length=7)
    assert torch.allclose(table.sum(1), torch.ones(3)) and ((table > 0).sum(0) == 1).all() and (table > 0).sum(1).tolist() == [3, 2, 2]
    assert torch.equal(mean_of_runs(5, length=5), torch.eye(5))


def test_a_mixture_weighs_by_its_share_of_tokens():
    E = torch.tensor([[[0.5, -0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]])
    real = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    assert torch.allclose(shares(E, real).exp()[:, 0, 0], torch.tensor([[1.0, 0.5, 0.75], [0.5, 0.0, 0.25]]))


@pytest.mark.parametrize("share", ["none", "headwise", "kv", "layerwise"])
def test_padding_changes_no_result(share):
    model = changed(k=3, share=share)
    steps.disturb(model.requires_grad_(True))
    ids = tiny.inputs("bert", batch=1, length=5)["input_ids"]
    longer = torch.cat([ids, torch.full((1, 4), 9)], 1)
    mask = torch.tensor([[1] * 5 + [0] * 4])
    with torch.no_grad():
        alone, padded = model(input_ids=ids).logits, model(input_ids=longer, attention_mask=mask).logits
        seen = model(input_ids=longer).logits
    assert torch.allclose(alone, padded, atol=1e-6) and not torch.allclose(alone, seen, atol=1e-5)


@pytest.mark.parametrize("share, count", [("none", 2 * 2 * 4), ("headwise", 2 * 2), ("kv", 2), ("layerwise", 1)])
def test_sharing_is_counted_and_learned(share, count):
    model = changed(k=8, share=share)  # two layers of four heads, 64 positions
    assert sum(p.numel() for p in tables(model).parameters()) == count * 8 * 64
    model.requires_grad_(True)
    steps.loss(model, "bert").backward()
    assert all(p.grad.abs().sum() > 0 for p in tables(model).parameters())
    assert {n for n, _ in model.named_parameters() if "linformer" in n} <= set(Full().selection(model))


def test_what_cannot_be_is_refused():
    with pytest.raises(Incompatible, match="later ones"):
        phases.shrink(work.ready("gpt2"), Linformer(), None)
    with pytest.raises(Incompatible, match="put max_length before it"):
        changed(k=2, length=8)
    model = changed(k=2)
    tables(model)[0].E = torch.nn.Parameter(mean_of_runs(2, length=8)[None])  # as of a model without a limit
    with pytest.raises(Incompatible, match="9 tokens"):
        model(**tiny.inputs("bert", length=9))
    with pytest.raises(Incompatible, match="padding in front of its text"):
        changed(k=2)(**tiny.inputs("bert", batch=1, length=3) | {"attention_mask": torch.tensor([[0, 1, 1]])})


@pytest.mark.parametrize("share", ["none", "layerwise"])
def test_without_a_layer_it_is_saved_and_opened(share, tmp_path):
    model = phases.shrink(changed(k=4, share=share), KeepLayers(layers="1"), None)
    phases.save_model(model, tmp_path)
    again = inference.open_model(tmp_path, work.task("bert"))
    torch.testing.assert_close(steps.logits(again, "bert"), steps.logits(model, "bert"))


@pytest.mark.parametrize("length", [16, 48])
def test_its_products_are_those_that_the_card_declares(length):
    """What a model's pass takes without attention, and 4 n k D for each of its 2 · 4 heads of width 4."""
    whole, none = (phases.shrink(work.ready("bert"), Linformer(k=k), None) for k in (8, 4))
    found = []
    for model in (whole, none):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            model(input_ids=torch.full((1, length), 7))
        found.append(counted.get_total_flops())
    masks = 2 * length * (8 - 4)  # the shares of tokens, once for a layer's heads
    assert found[0] - found[1] == 2 * (2 * 4 * 4 * length * (8 - 4) * 4 + masks)

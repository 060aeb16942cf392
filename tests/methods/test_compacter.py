from __future__ import annotations

import copy

import pytest
import steps
import torch
import transformers
from torch.nn import functional as F

from paretune import anatomy, surgery
from paretune.errors import Incompatible
from paretune.methods.adapters.compacter import Compacter


def adapted(method=Compacter(bottleneck=8), family="bert", name="default"):
    model = steps.model(family)
    torch.manual_seed(3)
    surgery.attach(model, [method], name=name, head=False)
    return model


def patches(model):
    return [p for _, _, seam in surgery.seams_of(model) for _, key, p in seam.patches() if key == "compacter" and hasattr(p, "down")]


def matrix(part, A):
    """Σ_i A_i ⊗ (s_i t_i), of shape (in, out)."""
    return sum(torch.kron(a, s @ t) for a, s, t in zip(A, part.s, part.t, strict=True))


@pytest.mark.parametrize("n, rank, bottleneck", [(4, 1, 8), (2, 3, 6), (1, 1, 5), (8, 2, 24)])
def test_the_update_is_a_bottleneck_of_kronecker_sums(n, rank, bottleneck):
    model = adapted(Compacter(n=n, rank=rank, bottleneck=bottleneck, norms=False))
    steps.disturb(model)
    patch, y = patches(model)[0], torch.randn(2, 5, 16)
    A = patch.shared.A
    wanted = y + F.gelu(y @ matrix(patch.down, A) + patch.down.bias) @ matrix(patch.up, A) + patch.up.bias
    torch.testing.assert_close(patch(torch.empty(0), y), wanted)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("form, each", [("compacter", 2), ("compacter++", 1)])
def test_how_many_there_are_and_that_one_rule_serves_all(family, form, each):
    model = adapted(Compacter(form=form, bottleneck=8, norms=False), family)
    layers = len(anatomy.layers(model))
    assert len(patches(model)) == each * layers and len({id(p.shared.A) for p in patches(model)}) == 1
    assert surgery.count(model) == (each * layers * 3 * (16 + 8) + 4**3, 0)  # s, t and the bias of either map: 2 (d + m) + d + m
    assert sum("compacter_shared" in n for n in model.state_dict()) == 1


def test_a_copy_shares_among_itself():
    model = adapted()
    twin = copy.deepcopy(model)
    (rule,) = {p.shared for p in patches(twin)}
    assert rule is not patches(model)[0].shared and any(p is rule.A for p in twin.parameters())


def test_two_of_them_have_each_its_own_rule():
    model = adapted(name="a")
    surgery.attach(model, [Compacter(bottleneck=8)], name="b", head=False)
    assert len({p.shared for p in patches(model)}) == 2


def test_the_start_is_the_papers_but_for_the_zero_of_up():
    for patch in patches(adapted(Compacter(bottleneck=8, norms=False))):
        assert not patch.up.t.any() and not patch.up.bias.any() and not patch.down.bias.any()
        for factor in (*patch.down.s, *patch.down.t, *patch.up.s):
            bound = (6 / sum(factor.shape)) ** 0.5  # Glorot's uniform range
            assert 0 < float(factor.detach().abs().max()) <= bound
    rule = torch.stack([patches(adapted(Compacter(n=8, bottleneck=8)))[0].shared.A.detach()])
    assert abs(float(rule.std()) - 0.01) < 0.002


@pytest.mark.parametrize("form, published", [("compacter", 0.073), ("compacter++", 0.047)])
def test_the_share_that_learns_of_t5_base_is_the_published_one(form, published):
    """Table 1 of the paper, in per cent: n = 4, bottleneck 24, all layer norms trained, the last ones of each stack among them."""
    with torch.device("meta"):
        config = transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        everything = sum(p.numel() for p in model.parameters())
        surgery.attach(model, [Compacter(form=form)])
    norms = (12 * 2 + 1 + 12 * 3 + 1) * 768
    adapters = {"compacter": 48, "compacter++": 24}[form] * 3 * (768 + 24) + 4**3
    assert surgery.count(model) == (adapters + norms, 0)
    assert round(100 * (adapters + norms) / everything, 3) == published


def test_sizes_that_n_does_not_divide():
    with pytest.raises(Incompatible, match="multiple of n = 4"):
        Compacter(bottleneck=6)
    with pytest.raises(Incompatible, match="multiple of n = 3"):
        adapted(Compacter(n=3, bottleneck=6))


def test_loaded_and_thawed_its_rule_learns_on(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not steps.learning(loaded)
    surgery.thaw(loaded)
    assert steps.learning(loaded).keys() == steps.learning(model).keys() and any("compacter_shared" in n for n in steps.learning(loaded))

from __future__ import annotations

import pytest
import steps
import torch

import paretune as pt
from paretune import anatomy, surgery
from paretune.errors import Incompatible
from paretune.methods.adapters.bitfit import BitFit
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.ia3 import IA3
from paretune.methods.adapters.lora import LoRA
from paretune.methods.adapters.top_layers import TopLayers

arithmetic = pt.arithmetic


def adapted(family="bert", *, methods=(LoRA(r=2), LoRA(r=3, alpha=1.0)), head=False):
    """A model with trained adapters a, b, ... on it, none active."""
    model = steps.model(family)
    torch.manual_seed(3)
    for i, method in enumerate(methods):
        surgery.attach(model, [method], name="abc"[i], head=head)
        steps.disturb(model, seed=i + 1)
    surgery.switch(model)
    return model


def deltas(model, name):
    """Σ s B A (O, I) per module, by the matrix path."""
    found = {}
    for path, module, seam in surgery.seams_of(model):
        total = torch.zeros_like(anatomy.weight(module)) if anatomy.is_linear(module) else None
        for _, _, patch in seam.patches([name]):
            if isinstance(patch, surgery.Selected):
                continue
            rows = list(range(len(total))) if patch.site.rows is None else list(patch.site.rows)
            total[rows] += patch.delta(None, None)[0].detach()
            found[path] = total
    return found


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_weighted_sum_is_that_of_the_full_updates(family):
    model = adapted(family)
    arithmetic.combine(model, {"a": 0.7, "b": -1.3}, name="c")
    a, b, c = (deltas(model, n) for n in "abc")
    assert a.keys() == c.keys()
    for path in c:
        torch.testing.assert_close(c[path], 0.7 * a[path] - 1.3 * b[path])


def test_an_adapter_minus_itself_is_nothing():
    """The weighted sum of the factors, as other tools have it, is (A − A)(B − B) only if both terms are of one sign: [1, −1] gives B A twice."""
    model = adapted(methods=(LoRA(r=2), LoRA(r=2)))
    for (_, _, seam) in surgery.seams_of(model):
        (_, _, a), (_, _, b) = seam.patches()
        b.load_state_dict(a.state_dict())
    arithmetic.combine(model, {"a": 1.0, "b": -1.0}, name="c")
    for path, delta in deltas(model, "c").items():
        assert float(delta.norm()) < 1e-6 * float(deltas(model, "a")[path].norm())
    torch.testing.assert_close(steps.logits(model, "bert"), steps.logits(steps.model("bert"), "bert"))


def test_average_and_negation():
    model = adapted()
    arithmetic.average(model, ["a", "b"], name="c")
    arithmetic.negate(model, "c", name="d")
    a, b, c, d = (deltas(model, n) for n in "abcd")
    for path in c:
        torch.testing.assert_close(c[path], (a[path] + b[path]) / 2)
        torch.testing.assert_close(d[path], -c[path])
    assert surgery.state(model).active == ("d",)


def test_what_is_trained_in_place_is_summed_from_the_original():
    model, start = adapted(head=True), steps.model("bert").classifier.weight
    heads = {}
    for name in "ab":
        surgery.switch(model, name)
        heads[name] = model.classifier.weight.detach().clone()
    arithmetic.combine(model, {"a": 2.0, "b": -0.5}, name="c")
    torch.testing.assert_close(model.classifier.weight, start + 2 * (heads["a"] - start) - 0.5 * (heads["b"] - start))
    surgery.switch(model, "a")
    assert torch.equal(model.classifier.weight, heads["a"])
    surgery.switch(model)
    assert torch.equal(model.classifier.weight, start)


@pytest.mark.parametrize("method", [BitFit(), Full(), TopLayers(k=1)], ids=str)
def test_adapters_that_train_the_backbone_s_own_parameters(method, tmp_path):
    model, start, own = adapted(methods=(method, method), head=True), steps.tensors(steps.model("bert")), {}
    for name in "ab":
        surgery.switch(model, name)
        own[name] = steps.tensors(model)
    arithmetic.combine(model, {"a": 0.7, "b": -0.3}, name="c")
    found, wanted = steps.tensors(model), steps.logits(model, "bert")
    for n, t in start.items():
        torch.testing.assert_close(found[n], t + 0.7 * (own["a"][n] - t) - 0.3 * (own["b"][n] - t))
    assert surgery.state(model).adapters["c"] == (method,)
    model.save_pretrained(tmp_path)
    assert torch.equal(steps.logits(type(model).from_pretrained(tmp_path), "bert"), wanted)


def test_the_result_is_an_adapter_like_any(tmp_path):
    model = adapted(head=True)
    arithmetic.combine(model, {"a": 0.5, "b": 0.5}, name="c")
    wanted = steps.logits(model, "bert")
    model.save_pretrained(tmp_path)
    assert torch.equal(steps.logits(type(model).from_pretrained(tmp_path), "bert"), wanted)
    assert steps.descend(model, "bert", steps=6)[-1] < steps.descend(model, "bert", steps=1)[0] + 1 and steps.learning(model)
    surgery.remove(model, "c")
    surgery.remove(model, "b")
    surgery.remove(model, "a")
    assert steps.same(steps.tensors(model), steps.tensors(steps.model("bert")))


@pytest.mark.parametrize("family, r", [("bert", 1), ("bert", 3), ("gpt2", 2), ("bert", 9)])
def test_truncation_keeps_the_largest_singular_values(family, r):
    model = adapted(family, methods=(LoRA(r=5, targets="linear"),))
    lost = arithmetic.truncate(model, "a", r=r, name="b")
    for path, delta in deltas(model, "a").items():
        parts = [list(s.rows) if s.rows else list(range(len(delta))) for s in anatomy.resolve(model, "linear") if s.path == path]
        tails = []
        for rows in parts:
            U, sigma, V = torch.linalg.svd(delta[rows].double(), full_matrices=False)
            torch.testing.assert_close(deltas(model, "b")[path][rows].double(), U[:, :r] * sigma[:r] @ V[:r], rtol=1e-4, atol=1e-6)
            tails.append(sigma[r:])
        assert lost[path] == pytest.approx(float(torch.cat(tails).norm()), abs=1e-6)
    assert all(len(p.A) <= r for _, _, s in surgery.seams_of(model) for _, _, p in s.patches(["b"]))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_what_was_made_by_a_lora_is_extracted_whole(family):
    tuned, plain = adapted(family, methods=(LoRA(r=2, targets="linear"),), head=True), steps.model(family)
    surgery.switch(tuned, "a")
    surgery.merge(tuned)
    left = arithmetic.extract(plain, tuned, r=2)
    assert max(left.values(), default=0.0) < 1e-5
    torch.testing.assert_close(steps.logits(plain, family), steps.logits(tuned, family), rtol=1e-4, atol=1e-5)
    surgery.switch(plain)
    assert torch.equal(steps.logits(plain, family), steps.logits(steps.model(family), family))


def test_what_rank_r_cannot_hold_is_said():
    plain, tuned = steps.model("bert"), steps.model("bert")
    steps.disturb(tuned)
    query = "bert.encoder.layer.0.attention.self.query"
    sigma = torch.linalg.svdvals((tuned.get_submodule(query).weight - plain.get_submodule(query).weight).detach().double())
    left = arithmetic.extract(plain, tuned, r=3, targets="query")
    assert left[f"{query}.weight"] == pytest.approx(float(sigma[3:].norm()), rel=1e-6)
    apart = (tuned.bert.embeddings.word_embeddings.weight - plain.bert.embeddings.word_embeddings.weight).detach().double()
    assert left["bert.embeddings.word_embeddings.weight"] == pytest.approx(float(apart.norm()), rel=1e-6)
    assert not [n for n in left if n.startswith("classifier")] and torch.equal(plain.classifier.weight, tuned.classifier.weight)


@pytest.mark.parametrize(
    "do, words",
    [
        (lambda m: arithmetic.combine(m, {"a": 1.0, "x": 1.0}, name="d"), "'x' is not on the model"),
        (lambda m: arithmetic.combine(m, {"a": 1.0}, name="b"), "on the model already"),
        (lambda m: arithmetic.combine(m, {}, name="d"), "no adapter is named"),
        (lambda m: arithmetic.average(m, ["a", "b"], name="d"), "bert.encoder.layer.0.attention.self.key"),
        (lambda m: arithmetic.negate(m, "c", name="d"), "ia3 is no sum of thin matrices"),
        (lambda m: arithmetic.extract(m, adapted(), r=2, name="d"), "merge them first"),
        (lambda m: arithmetic.extract(m, steps.model("roberta"), r=2, name="d"), r"bert.embeddings.LayerNorm.bias \(\(16,\) and absent\)"),
    ],
)
def test_what_cannot_be_added_is_refused_and_nothing_changes(do, words):
    model = adapted(methods=(LoRA(r=2), LoRA(r=2, targets="query"), IA3()))
    surgery.switch(model, "b")
    before, wanted = steps.tensors(model), steps.logits(model, "bert")
    with pytest.raises(Incompatible, match=words):
        do(model)
    assert steps.same(before, steps.tensors(model)) and surgery.state(model).active == ("b",)
    assert torch.equal(steps.logits(model, "bert"), wanted)

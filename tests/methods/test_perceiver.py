"""Perceiver against its equation; its limit, in which the latents are the tokens; and what padding may not change."""

from __future__ import annotations

import contextlib

import pytest
import steps
import tiny
import torch
import transformers
import work
from torch.utils.flop_counter import FlopCounterMode

from paretune import anatomy, phases, seams, surgery
from paretune.errors import Incompatible
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.head import Head
from paretune.methods.transforms.keep_layers import KeepLayers
from paretune.methods.transforms.perceiver import Perceiver, Reading


def changed(family: str, latents: int = 5):
    return phases.shrink(work.ready(family), Perceiver(latents=latents), None)


def reading(model) -> Reading:
    return next(m for _, _, m in seams.seam_of(model).shared())


def lengths(model, inputs) -> list[int]:
    """How many places each layer computes on."""
    seen = []
    hooks = [model.get_submodule(ref.path).register_forward_hook(lambda _, args, out: seen.append(out.shape[1])) for ref in anatomy.layers(model)]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def embedded(model, inputs) -> torch.Tensor:
    """What the first layer reads."""
    seen = []
    hook = model.get_submodule(anatomy.layers(model)[0].path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


def test_the_reading_is_its_equation():
    torch.manual_seed(0)
    made, x = Reading(3, width=8).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        for p in made.parameters():
            p.normal_()
        found = made(x, keep)
    norm = torch.nn.functional.layer_norm
    for b, n in enumerate((5, 3)):
        q = norm(made.L, (8,), made.of_latents.weight, made.of_latents.bias) @ made.W_q.weight.T
        k = norm(x[b, :n], (8,), made.of_input.weight, made.of_input.bias) @ made.W_k.weight.T
        wanted = made.L + torch.softmax(q @ k.T / 8**0.5, -1) @ x[b, :n] @ made.W_v.weight.T @ made.W_o.weight.T
        assert torch.allclose(found[b], wanted)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "vit"])
def test_latents_that_are_the_tokens_are_the_backbone(family):
    plain = work.ready(family)
    inputs = {k: v for k, v in steps.inputs(plain, family, batch=1).items() if k != "attention_mask"}
    x = embedded(plain, inputs)
    model = changed(family, latents=x.shape[1])
    with torch.no_grad():
        reading(model).L.copy_(x[0])
        reading(model).W_o.weight.zero_()
        assert torch.allclose(model(**inputs).logits, plain(**inputs).logits, atol=1e-6)
        reading(model).L.copy_(x[0].flip(0))
        assert not torch.equal(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("family", ["bert", "roberta", "vit"])
def test_every_layer_computes_on_latents(family):
    model = changed(family)
    assert lengths(model, steps.inputs(model, family)) == [5, 5]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_padding_changes_no_result(family):
    model = changed(family)
    steps.disturb(model.requires_grad_(True))
    ids = tiny.inputs(family, batch=1, length=6)["input_ids"]
    filler = torch.full((1, 4), tiny.PAD if family == "roberta" else 9)  # RoBERTa's positions count what is not padding
    longer, mask = torch.cat([ids, filler], 1), torch.tensor([[1] * 6 + [0] * 4])
    with torch.no_grad():
        alone, padded, seen = model(input_ids=ids), model(input_ids=longer, attention_mask=mask), model(input_ids=longer, attention_mask=torch.ones_like(longer))
    assert torch.allclose(alone.logits, padded.logits, atol=1e-6) and not torch.equal(alone.logits, seen.logits)


def test_the_layers_that_stay_are_read_for():
    model = phases.shrink(changed("bert"), KeepLayers(layers="1"), None)
    assert lengths(model, tiny.inputs("bert")) == [5]


def test_all_of_it_learns():
    model = changed("bert").requires_grad_(True)
    assert {n for n, _ in model.named_parameters() if "perceiver" in n} <= set(Full().selection(model))
    steps.loss(model, "bert").backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in reading(model).parameters())


@pytest.mark.parametrize(
    "family, task, why",
    [("gpt2", "classification", "later tokens"), ("t5", "classification", "later tokens"), ("bert", "tokens", "each token"), ("albert", "classification", "one layer")],
)
def test_what_cannot_be_is_refused(family, task, why):
    with pytest.raises(Incompatible, match=why):
        phases.shrink(work.ready(family, task), Perceiver(), None)


def headed(name: str):
    """A tiny BERT, ELECTRA, RoBERTa or DistilBERT with the head that transformers calls so."""
    family = next(f for f in ("electra", "roberta", "distilbert", "bert") if name.lower().startswith(f))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, name)(tiny.model(family, "base", labels=2).config).eval()


@pytest.mark.parametrize("name", ["BertForQuestionAnswering", "DistilBertForQuestionAnswering", "ElectraForPreTraining", "BertForMaskedLM", "BertForPreTraining"])
@pytest.mark.parametrize("form", [True, False])
def test_every_head_with_an_answer_for_each_token_is_refused(name, form):
    model = headed(name)
    model.config.return_dict = form
    with pytest.raises(Incompatible, match="answers for each token.*use longformer or linformer"):
        phases.shrink(model, Perceiver(latents=3), None)


def test_as_many_classes_as_tokens_of_a_trial_are_no_answers_for_tokens():
    for count in (7, 8):
        model = phases.shrink(tiny.model("bert", labels=count), Perceiver(latents=3), None)
        assert model(**tiny.inputs("bert", batch=2)).logits.shape == (2, count)


@pytest.mark.parametrize("name", ["BertForMultipleChoice", "RobertaForMultipleChoice", "DistilBertForMultipleChoice", "ElectraForMultipleChoice"])
def test_each_choice_is_read_by_itself(name):
    model = phases.shrink(headed(name), Perceiver(latents=3), None)
    steps.disturb(model.requires_grad_(True))
    given = tiny.inputs("bert", batch=3)
    with torch.no_grad():
        together = model(**{k: v[None] for k, v in given.items()}).logits
        apart = [model(input_ids=ids[mask == 1][None, None], attention_mask=mask[mask == 1][None, None]).logits for ids, mask in zip(*given.values(), strict=True)]
    assert together.shape == (1, 3) and torch.allclose(together, torch.cat(apart, 1), atol=1e-6)
    assert lengths(model, {k: v[None] for k, v in given.items()}) == [3, 3]


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_a_trial_moves_nothing(name):
    model = headed(name).train()
    model.bert.embeddings.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    seen = []

    def draw(model, args):
        """As a model does that draws at random in evaluation mode, too."""
        seen.append((model.training, torch.rand(1)))

    hook = model.register_forward_pre_hook(draw)
    with contextlib.suppress(Incompatible):
        Perceiver().check(model, Perceiver().sites(model))
    hook.remove()
    assert seen and not any(training for training, _ in seen)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_several_texts_in_one_row_are_refused(way):
    model = changed("bert")
    model.set_attn_implementation(way)
    given = tiny.inputs("bert", batch=1, length=6)["input_ids"]
    texts = torch.tensor([0, 0, 0, 1, 1, 1])
    for apart in (texts[:, None] == texts, torch.ones(6, 6, dtype=torch.bool).tril()):
        mask = apart[None, None] if way == "sdpa" else torch.zeros(1, 1, 6, 6).masked_fill(~apart, torch.finfo(torch.float32).min)
        with pytest.raises(Incompatible, match="perceiver.*says more than which tokens are padding"), torch.no_grad():
            model(input_ids=given, attention_mask=mask)
    seen = (torch.arange(6) < 4).expand(6, 6)
    mask = seen[None, None] if way == "sdpa" else torch.zeros(1, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        told = model(input_ids=given, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]])).logits
        assert torch.allclose(model(input_ids=given, attention_mask=mask).logits, told, atol=1e-6)


def test_pooled_features_are_the_mean_of_the_latents_whatever_the_padding():
    model = changed("bert", latents=6)
    surgery.attach(model, [Head(pooling="mean")])
    ids = tiny.inputs("bert", batch=2, length=6)["input_ids"]
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])  # as long as there are latents
    short = model(input_ids=ids[1:, :2]).logits
    assert torch.allclose(model(input_ids=ids, attention_mask=mask).logits[1:], short, atol=1e-6)
    with pytest.raises(Incompatible, match="take the last"):
        surgery.attach(model, [Head(features="weighted_sum")], name="b")
    plain = work.ready("bert")
    surgery.attach(plain, [Head(pooling="mean")])
    with pytest.raises(Incompatible, match="put perceiver before it"):
        phases.shrink(plain, Perceiver(), None)


@pytest.mark.parametrize("n", [16, 48])
def test_its_products_are_those_that_the_card_declares(n):
    made, m, d = Reading(4, width=8), 4, 8
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        made(torch.randn(1, n, d), None)
    assert counted.get_total_flops() == 2 * (2 * n * d**2 + 2 * n * m * d + 2 * m * d**2)

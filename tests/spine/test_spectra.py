"""The spectra of attention against the matrices that transformers gives out, and what the verb and its picture show."""

from __future__ import annotations

import csv
import json

import numpy
import pytest
import tiny
import torch
import work
from click.testing import CliRunner
from PIL import Image

from paretune import anatomy, phases, processors, surgery
from paretune.attention import spectra
from paretune.cli.analyze import analyze
from paretune.errors import Incompatible
from paretune.methods.adapters.prefix import Prefix
from paretune.methods.transforms.longformer import Longformer
from paretune.methods.transforms.perceiver import Perceiver
from paretune.reports import spectra as picture
from paretune.step import short_attention

OWN_WAYS = {"gemma2": {"sliding_window": 3, "attn_logit_softcapping": 0.5}, "mistral": {"sliding_window": 3}}  # of making a matrix, where a text shows them


def ready(family: str):
    """A model with its processor; scores of one that has its own ways are large enough for a cap to change them."""
    if family not in OWN_WAYS:
        return work.ready(family)
    model = tiny.model(family, config=OWN_WAYS[family])
    with torch.no_grad():
        for site in anatomy.resolve(model, "query"):
            model.get_submodule(site.path).weight.mul_(30)
    processors.put(model, work.processor(family))
    return model


def given(family: str):
    """(the attention matrices of every row alone, from transformers' eager attention, the model)."""
    model, task = ready(family), work.text_task(train=5)
    model.set_attn_implementation("eager")
    rows = task.encode(task.train, processors.get(model), config=model.config)
    matrices = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            matrices.append([layer[0].double().numpy() for layer in model(input_ids=ids, output_attentions=True).attentions])
    return matrices, ready(family), task


WAYS = [(family, "sdpa") for family in ("bert", "gpt2", "llama", "albert", "mistral")] + [("gemma2", "eager"), ("mistral", "eager"), ("llama", short_attention.NAME)]


@pytest.mark.parametrize("family, way", WAYS)
def test_they_are_the_singular_values_of_the_models_own_matrices(family, way):
    matrices, model, task = given(family)
    model.set_attn_implementation(way)
    found = spectra.of_attention(model, task, count=5)
    wanted = numpy.zeros(found.cumulative.shape)
    for layers in matrices:
        for i, heads in enumerate(layers):
            for j, a in enumerate(heads):
                values = numpy.linalg.svd(a, compute_uv=False)
                rising = numpy.concatenate([[0.0], numpy.cumsum(values) / values.sum()])
                wanted[i, j] += numpy.interp(found.at.numpy(), numpy.arange(len(a) + 1) / len(a), rising) / len(matrices)
    assert numpy.allclose(found.cumulative.numpy(), wanted, atol=1e-5)
    assert sorted(found.lengths) == sorted(len(layers[0][0]) for layers in matrices)


def test_a_matrix_of_rank_one_and_the_identity_are_the_ends():
    flat, eye = spectra.cumulative(torch.full((8, 8), 1 / 8)), spectra.cumulative(torch.eye(8))
    x = torch.linspace(0, 1, spectra.POINTS, dtype=torch.float64)
    assert torch.allclose(eye, x) and torch.allclose(flat, (8 * x).clamp(max=1), atol=1e-6)
    found = spectra.Spectra((8,), torch.stack([flat, eye])[None])
    assert torch.allclose(found.share_for(0.9), torch.tensor([[0.9 / 8, 0.9]], dtype=torch.float64), atol=2e-3)
    assert torch.allclose(found.reached(0.25), torch.tensor([[1.0, 0.25]], dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("method", [Longformer(window=3, dense_below=0), Perceiver(latents=4)], ids=repr)
def test_a_replaced_attention_is_refused(method):
    model = phases.shrink(work.ready("bert"), method, None)
    with pytest.raises(Incompatible, match=rf"{method.spelling()}.* has replaced the attention"):
        spectra.of_attention(model, work.text_task(), count=2)


def test_what_acts_inside_the_attention_is_refused_while_it_does():
    model = work.ready("bert")
    plain = spectra.of_attention(model, work.text_task(), count=2)
    surgery.attach(model, [Prefix(length=2)])
    with pytest.raises(Incompatible, match="prefix.* acts inside the attention.*switch it off"):
        spectra.of_attention(model, work.text_task(), count=2)
    surgery.switch(model)
    assert torch.equal(spectra.of_attention(model, work.text_task(), count=2).cumulative, plain.cumulative)


def test_the_model_is_as_before():
    model = work.ready("bert")
    before = {name: (type(module), module.training) for name, module in model.train().named_modules()}
    assert spectra.of_attention(model, work.text_task(), count=2).cumulative.shape[:2] == (2, 4)
    assert {name: (type(module), module.training) for name, module in model.named_modules()} == before


def test_an_encoder_decoder_is_refused():
    with pytest.raises(Incompatible, match="encoder and a decoder"):
        spectra.of_attention(work.ready("t5"), work.text_task(), count=2)


def test_the_picture_names_its_layers_and_its_numbers():
    figure = picture.draw(spectra.Spectra((8, 9), torch.linspace(0, 1, spectra.POINTS, dtype=torch.float64).expand(3, 2, -1)), title="a model")
    left, right = figure.axes[:2]
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["layer 0", "layer 1", "layer 2", "all alike"]
    assert [t.get_text() for t in right.texts] == ["25"] * 6 and "2 examples of 8 to 9 tokens" in figure._suptitle.get_text()


def test_the_verb_writes_a_picture_and_the_numbers(tmp_path):
    tiny.model("bert", "base").save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("review", "stars"), *zip(*[work.text_task(train=40).train.column(c) for c in ("text", "label")], strict=True)])
    stated = ["--text", "review", "--label", "stars", "--backbone", str(tmp_path / "bert"), "--examples", "4", "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(analyze, ["attention", str(tmp_path / "reviews.csv"), *stated], obj=["analyze"], catch_exceptions=False)
    assert said.exit_code == 0, said.output
    record = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert record["examples"] == 4 and numpy.shape(record["cumulative"]) == (2, 4, spectra.POINTS)
    with Image.open(tmp_path / "out" / "attention.png") as image:
        assert image.size[0] > 1000
    assert f"{numpy.mean(record['at_a_quarter']):.1%}" in said.output

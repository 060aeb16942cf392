from __future__ import annotations

import pytest
import steps

from paretune import surgery
from paretune.errors import Incompatible, TargetError
from paretune.methods.adapters.bitfit import BitFit


def learns(family, **knobs):
    model = steps.model(family)
    return surgery.attach(model, [BitFit(**knobs)], head=False)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "vit"])
def test_all_biases_outside_the_head_and_nothing_else(family):
    model = steps.model(family)
    wanted = {n for n, _ in model.named_parameters() if n.endswith("bias") and not n.startswith(("classifier", "score", "bert.pooler"))}
    assert set(learns(family)) == wanted and wanted


def test_the_paper_s_subset():
    """Query biases and those of the feed-forward's first map, table 2's b_q and b_m2."""
    found = learns("bert", biases="query up")
    assert sorted(found) == sorted(f"bert.encoder.layer.{k}.{p}.bias" for k in (0, 1) for p in ("attention.self.query", "intermediate.dense"))
    assert sorted(learns("bert", biases=("query", "up"))) == sorted(found)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_models_without_biases_are_refused_with_a_way_out(family):
    with pytest.raises(Incompatible, match="bitfit: .* has no bias terms; use lora or ia3"):
        learns(family)


def test_one_part_of_a_fused_bias_is_refused():
    with pytest.raises(Incompatible, match="c_attn.bias holds the biases of query and of other places"):
        learns("gpt2", biases="query")
    assert learns("gpt2", biases="qkv") == [f"transformer.h.{k}.attn.c_attn.bias" for k in (0, 1)]


def test_an_unknown_place():
    with pytest.raises(TargetError, match="quary"):
        learns("bert", biases="quary")

"""Anatomy against the models themselves: shapes from the config, values from the attention call, blocks from the residual stream."""

from __future__ import annotations

import time
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from paretune import anatomy
from paretune.anatomy import Block, Family, Stack
from paretune.anatomy.families import FAMILIES
from paretune.errors import Incompatible, TargetError

POST_NORM = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "deberta-v2", "bart")
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "mt5")
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")
SIDE_BY_SIDE = ("phi", "gpt_neox")  # attention and feed-forward read the same residual stream; in Phi also the same norm
SPY = "paretune_spy"


def run(model: PreTrainedModel, family: str) -> Any:
    with torch.no_grad():
        return model(**tiny.inputs(family))


def first_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def test_tiny_models_cover_the_table():
    assert set(tiny.ALL) == set(FAMILIES)


@pytest.mark.parametrize("name", tiny.ALL)
def test_every_place_has_the_shape_that_the_config_says(name):
    model = tiny.model(name)
    shapes = dict.fromkeys(("query", "output"), (16, 16)) | dict.fromkeys(("key", "value"), (8 if name in GROUPED else 16, 16))
    shapes |= {"up": (32, 16), "down": (16, 32)} | ({"gate": (32, 16)} if name in GATED else {})
    sites = anatomy.resolve(model, "linear")
    self_attention = [s for s in sites if not s.cross]
    for ref in anatomy.layers(model):
        found = {s.place: (s.out_features, s.in_features) for s in self_attention if (s.stack, s.layer) == (ref.stack, ref.index)}
        assert found == shapes
    for site in sites:
        module = model.get_submodule(site.path)
        rows = slice(None) if site.rows is None else torch.tensor(site.rows)
        assert anatomy.is_linear(module)
        assert anatomy.weight(module)[rows].shape == (site.out_features, site.in_features)
    cross = [s.place for s in sites if s.cross]
    assert len(cross) == (8 if name in tiny.SEQ2SEQ else 0)


@pytest.mark.parametrize("name", sorted({"phi3", "gpt_neox", "gpt2"}))
def test_fused_parts_cover_their_module_once(name):
    model = tiny.model(name)
    parts: dict[str, list[int]] = {}
    for site in anatomy.resolve(model, "linear"):
        parts.setdefault(site.path, []).extend(site.rows or range(site.out_features))
    for path, rows in parts.items():
        assert sorted(rows) == list(range(anatomy.weight(model.get_submodule(path)).shape[0]))


@pytest.mark.parametrize("name", [n for n in tiny.ALL if n not in ("deberta-v2", "qwen3")])  # own attention; a norm between map and call
def test_query_key_and_value_are_what_the_attention_call_gets(name):
    """At position 0, where rotary embeddings turn by nothing, q = W_q x + b_q with the rows that the site names."""
    calls: dict[nn.Module, dict[str, Tensor]] = {}
    inputs: dict[str, Tensor] = {}

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> tuple[Tensor, None]:
        calls[module] = {"query": query, "key": key, "value": value}  # each (B, heads, T, head size)
        return torch.zeros_like(query.transpose(1, 2)), None

    AttentionInterface.register(SPY, spy)
    model = tiny.model(name)
    model.set_attn_implementation(SPY)
    sites = anatomy.resolve(model, "qkv")
    for site in sites:
        model.get_submodule(site.path).register_forward_pre_hook(lambda m, args, path=site.path: inputs.update({path: args[0]}))
    run(model, name)
    paths = {p: m for p, m in model.named_modules() if m in calls}
    for site in sites:
        owner = max((p for p in paths if site.path.startswith(f"{p}.")), key=len)
        module, got = model.get_submodule(site.path), calls[paths[owner]][site.place][:, :, 0].flatten(1)
        rows = slice(None) if site.rows is None else torch.tensor(site.rows)
        bias = 0 if module.bias is None else module.bias[rows]
        if name == "opt" and site.place == "query":
            got = got * 2  # OPT divides by √(head size) before the call
        torch.testing.assert_close(got, (inputs[site.path] @ anatomy.weight(module)[rows].T + bias)[:, 0])


@pytest.mark.parametrize("name", GATED)
def test_the_inner_activation_is_linear_in_up_and_not_in_gate(name):
    inner = {}
    for place in (None, "up", "gate"):
        model = tiny.model(name)
        path = anatomy.resolve(model, "down")[0].path
        model.get_submodule(path).register_forward_pre_hook(lambda m, args, key=place: inner.update({key: args[0]}))
        if place:
            site = anatomy.resolve(model, place)[0]
            rows = slice(None) if site.rows is None else torch.tensor(site.rows)
            with torch.no_grad():
                anatomy.weight(model.get_submodule(site.path))[rows] *= 2
        run(model, name)
    torch.testing.assert_close(inner["up"], 2 * inner[None])
    assert not torch.allclose(inner["gate"], 2 * inner[None], rtol=1e-3)


@pytest.mark.parametrize("name", tiny.ALL)
def test_blocks_are_what_the_residual_stream_receives_and_reads(name):
    """If every block gives 1, a layer is h + 1 + 1 (norms before) or norm(norm(h + 1) + 1) (behind); sources read what stands between."""
    model = tiny.model(name, "base" if name == "bart" else "classification")
    norms, blocks, seen, layers = anatomy.resolve(model, "norm"), anatomy.resolve(model, "block"), {}, {}
    for norm in norms:
        nn.init.uniform_(model.get_submodule(norm.path).weight)  # so that no norm is mistaken for another
    for site in blocks:
        model.get_submodule(site.path).register_forward_hook(
            lambda m, args, out: (torch.ones_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.ones_like(out)
        )
        model.get_submodule(site.source).register_forward_pre_hook(
            lambda m, args, kwargs, key=site: seen.update({key: first_input(args, kwargs)}), with_kwargs=True
        )
    refs = anatomy.layers(model)
    for ref in refs:
        model.get_submodule(ref.path).register_forward_hook(
            lambda m, args, kwargs, out, key=ref: layers.update({key: (first_input(args, kwargs), out[0] if isinstance(out, tuple) else out)}),
            with_kwargs=True,
        )
    run(model, name)
    for ref in refs:
        start, out = layers[ref]
        h = start
        mine = [s for s in blocks if (s.stack, s.layer) == (ref.stack, ref.index)]
        for site in sorted(mine, key=lambda s: (s.place == "ffn_block", s.cross)):
            norm = model.get_submodule(next(n.path for n in norms if n.layer == ref.index and (name == "phi" or _same_sublayer(n, site))))
            read = h if name in POST_NORM else norm(start if name in SIDE_BY_SIDE else h)
            torch.testing.assert_close(seen[site].reshape(h.shape), read)
            h = norm(h + 1) if name in POST_NORM else h + 1
        torch.testing.assert_close(out, h)


def _same_sublayer(norm: anatomy.Site, block: anatomy.Site) -> bool:
    place = norm.place.replace("norm", "block")
    return (norm.stack, norm.layer, norm.cross, place) == (block.stack, block.layer, block.cross, block.place)


def test_specs_name_places_groups_stacks_and_paths():
    t5, bert = tiny.model("t5"), tiny.model("bert")
    count = {spec: len(anatomy.resolve(t5, spec)) for spec in ("query", "encoder.query", "decoder.query", "cross.query", "self.query", "block")}
    assert count == {"query": 6, "encoder.query": 2, "decoder.query": 4, "cross.query": 2, "self.query": 4, "block": 10}
    assert anatomy.resolve(bert, "value query") == anatomy.resolve(bert, ("query", "value")) == anatomy.resolve(bert, "query, value, query")
    assert [s.place for s in anatomy.resolve(bert, "attention")] == ["query", "key", "value", "output"] * 2  # the model's order
    assert [s.path for s in anatomy.resolve(bert, "*.layer.1.*.query")] == ["bert.encoder.layer.1.attention.self.query"]
    assert anatomy.resolve(bert, "attention.self.query") == anatomy.resolve(bert, "query")
    (classifier,) = anatomy.resolve(bert, "classifier")
    assert (classifier.place, classifier.layer, classifier.out_features) == ("other", None, 3)


@pytest.mark.parametrize(("name", "path"), [("gpt2", "c_attn"), ("gpt_neox", "query_key_value"), ("phi3", "qkv_proj")])
def test_a_path_to_a_fused_module_takes_it_whole(name, path):
    model = tiny.model(name)
    whole = anatomy.resolve(model, path)
    assert [(s.rows, s.out_features, s.layer) for s in whole] == [(None, 32 if name == "phi3" else 48, i) for i in range(2)]
    assert {s.place for s in whole} == {"query+key+value"}
    assert anatomy.resolve(model, f"query {path}") == whole


def test_what_hits_nothing_is_an_error_that_lists_what_exists():
    bert = tiny.model("bert")
    with pytest.raises(TargetError, match=r"'querry' hits nothing in BertForSequenceClassification \(did you mean query\?\); there are query, key"):
        anatomy.resolve(bert, "value querry")
    with pytest.raises(TargetError, match=r"'q_proj' hits nothing .* bert\.encoder\.layer\.0\.attention\.self\.query"):
        anatomy.resolve(bert, "q_proj")
    for spec in ("gate", "decoder.query", "cross.query", "*.layer.7.*", "bert.encoder", "Query"):
        with pytest.raises(TargetError, match="hits nothing"):
            anatomy.resolve(bert, spec)
    with pytest.raises(TargetError, match="'block' hits no linear map"):
        anatomy.resolve(bert, "block", kind="linear")
    with pytest.raises(TargetError, match="empty"):
        anatomy.resolve(bert, " ")


def test_published_counts_on_the_meta_device():
    with torch.device("meta"):
        bert = transformers.BertForSequenceClassification(transformers.BertConfig())
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    start = time.perf_counter()
    assert len(anatomy.resolve(bert, "linear")) == 72
    assert len(anatomy.resolve(bert, "block")) == 24
    assert time.perf_counter() - start < 1
    assert sum(8 * (s.in_features + s.out_features) for s in anatomy.resolve(bert, "query value")) == 294_912  # LoRA r=8
    assert sum(4 * (s.in_features + s.out_features) for s in anatomy.resolve(gpt2, "query value")) == 393_216  # LoRA r=4
    biases = sum(bert.get_parameter(n).numel() for n in anatomy.bias_names(bert))
    assert biases == 768 + 12 * (7 * 768 + 3072)  # embedding norm; per layer four maps, two norms, up (3072) and down
    assert round(100 * biases / bert.num_parameters(), 1) == 0.1  # BitFit's "about 0.1 %"


@pytest.mark.parametrize("name", tiny.ALL)
def test_targets_are_lines_in_the_models_order(name):
    model = tiny.model(name)
    lines = anatomy.targets(model, "down query")
    paths = list(dict(model.named_modules()))
    assert [paths.index(t.path) for t in lines] == sorted(paths.index(t.path) for t in lines)
    assert {t.shape for t in lines} == {(16, 16), (16, 32)}


@pytest.mark.parametrize("name", [n for n in tiny.ALL if n != "albert"])
def test_layers_and_their_counters(name):
    model = tiny.model(name, "base")
    lists = anatomy.layer_lists(model)
    for found in lists:
        assert getattr(model.config, found.counter) == len(model.get_submodule(found.path)) == 2
        assert all(len(getattr(model.config, field)) == 2 for field in found.per_layer)
    assert [r.path for r in anatomy.layers(model)] == [f"{found.path}.{i}" for found in lists for i in range(2)]
    assert [found.stack for found in lists] == (["encoder", "decoder"] if name in tiny.SEQ2SEQ else [lists[0].stack])


def test_half_of_an_encoder_decoder_has_half_of_the_places():
    encoder = transformers.T5EncoderModel(tiny.model("t5").config)
    assert {s.stack for s in anatomy.resolve(encoder, "linear block norm")} == {"encoder"}
    decoder = tiny.model("bart", "causal")
    assert {s.stack for s in anatomy.resolve(decoder, "linear block norm")} == {"decoder"}
    assert anatomy.embeddings(decoder).positions == ("model.decoder.embed_positions",)


def test_shared_layers_cannot_be_counted_one_by_one():
    with pytest.raises(Incompatible, match="share one set of weights"):
        anatomy.layer_lists(tiny.model("albert"))


@pytest.mark.parametrize("name", tiny.ALL)
def test_embeddings(name):
    model = tiny.model(name)
    found = anatomy.embeddings(model)
    if name not in tiny.IMAGES + tiny.AUDIO:
        assert model.get_submodule(found.tokens).weight.shape[0] == tiny.SIZE
        assert all(model.get_submodule(p).weight is model.get_submodule(found.tokens).weight for p in found.copies)
        for path in found.positions:
            rows = getattr(model.config, found.length) + (0 if found.counted else found.offset)
            assert model.get_submodule(path).weight.shape[0] == rows
    else:
        patches = 16
        assert found.tokens is None
        assert model.get_parameter(found.positions[0]).shape[1] == patches + found.offset
    assert len(found.copies) == (2 if name in tiny.SEQ2SEQ else 0)


@pytest.mark.parametrize("name", ["roberta", "opt", "bart", "bert"])
def test_the_first_position_has_the_row_of_the_offset(name):
    """A row of the table matters to a one-token text exactly if it is the first position's."""
    model = tiny.model(name, "base")
    found = anatomy.embeddings(model)
    table = model.get_submodule(found.positions[0]).weight
    one = {"input_ids": torch.tensor([[tiny.SEP]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    table.requires_grad_(True)
    model(**one)[0].square().sum().backward()
    assert table.grad.abs().sum(1).nonzero().flatten().tolist() == [found.offset]


def test_output_embeddings_and_ties():
    for name, task, tied in (("bert", "masked", True), ("gpt2", "causal", True), ("llama", "causal", False), ("t5", "seq2seq", True)):
        model = tiny.model(name, task)
        found = anatomy.embeddings(model)
        assert model.get_submodule(found.output) is model.get_output_embeddings()
        assert found.tied is tied, name


@pytest.mark.parametrize("name", tiny.ALL)
def test_the_head_is_what_the_base_model_lacks(name):
    model, base = tiny.model(name), tiny.model(name, "base")
    inside = tuple(f"{p}." for p in anatomy.head(model))
    in_head = {n for n, _ in model.named_parameters() if n.startswith(inside)}
    prefix = f"{model.base_model_prefix}."
    backbone = {n.removeprefix(prefix) for n, _ in model.named_parameters()} - {n.removeprefix(prefix) for n in in_head}
    assert backbone == {n for n, _ in base.named_parameters() if not n.startswith("pooler.")}
    assert any(p.shape[0] == 3 for n, p in model.named_parameters() if n in in_head)
    assert anatomy.head(base) == []


@pytest.mark.parametrize(("name", "task"), [("bert", "masked"), ("gpt2", "causal"), ("llama", "causal"), ("t5", "seq2seq"), ("bart", "seq2seq")])
def test_a_language_models_output_is_no_task_head(name, task):
    assert anatomy.head(tiny.model(name, task)) == []


def test_biases():
    bert, gpt2 = tiny.model("bert"), tiny.model("gpt2")
    every = anatomy.bias_names(bert)
    assert every == [n for n, _ in bert.named_parameters() if n.endswith(".bias") and not n.startswith(("bert.pooler", "classifier"))]
    assert anatomy.bias_names(bert, "query up") == [n for n in every if n.endswith(("query.bias", "intermediate.dense.bias"))]
    assert set(anatomy.bias_names(bert, "norm")) == {f"{p}.bias" for p in anatomy.norms(bert)}
    assert anatomy.bias_names(gpt2, "qkv") == [f"transformer.h.{i}.attn.c_attn.bias" for i in range(2)]
    with pytest.raises(Incompatible, match="in one tensor"):
        anatomy.bias_names(gpt2, "query")
    with pytest.raises(Incompatible, match="has no bias terms"):
        anatomy.bias_names(tiny.model("llama"))


def test_the_weight_is_a_view_out_by_in():
    for name, path in (("gpt2", "transformer.h.0.mlp.c_fc"), ("bert", "bert.encoder.layer.0.intermediate.dense")):
        module = tiny.model(name).get_submodule(path)
        assert anatomy.weight(module).shape == (32, 16)
        with torch.no_grad():
            anatomy.weight(module)[5] = 0.0
        x = torch.randn(2, 16)
        assert torch.equal(module(x)[:, 5], module.bias[5].expand(2))


def test_text_encoders():
    encoders = [n for n in tiny.ALL if anatomy.is_text_encoder(tiny.model(n))]
    assert tuple(encoders) == tiny.MASKED


def test_adapters_on_the_model_are_no_anatomy():
    model = tiny.model("bert")
    before = anatomy.resolve(model, "*query*")
    model.get_submodule(before[0].path).add_module("paretune", nn.Linear(16, 16))
    assert anatomy.resolve(model, "*query*") == before
    assert not any("paretune" in n for n in anatomy.bias_names(model))


class Toy(PreTrainedModel):
    """A model of a family that nobody knows."""

    config_class = PreTrainedConfig
    base_model_prefix = "toy"

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig(hidden_size=4, num_hidden_layers=2))
        self.blocks = nn.ModuleList(nn.ModuleDict({"ask": nn.Linear(4, 4), "think": nn.Linear(4, 8), "drop": nn.Dropout()}) for _ in range(2))
        self.config.model_type = "toy"


def test_a_user_describes_a_family():
    model = Toy()
    assert [s.place for s in anatomy.resolve(model, "*.ask")] == ["other", "other"]  # paths need no description
    with pytest.raises(Incompatible, match=r"'toy' is not described.*there are albert.*anatomy\.register"):
        anatomy.resolve(model, "query")
    places = {"query": "ask", "up": "think", "gate": "wonder?", "ffn_block": Block("think", "drop")}
    try:
        anatomy.register("toy", Family((Stack("encoder", "blocks", places),)))
        assert [(s.place, s.path) for s in anatomy.resolve(model, "linear")] == [
            (place, f"blocks.{i}.{end}") for i in range(2) for place, end in (("query", "ask"), ("up", "think"))
        ]
        assert anatomy.resolve(model, "ffn_block")[1].source == "blocks.1.think"
        with pytest.raises(Incompatible, match="described already"):
            anatomy.register("toy", Family(()))
        FAMILIES["toy"] = Family((Stack("encoder", "blocks", {"query": "sak"}),))
        with pytest.raises(Incompatible, match=r"puts query at sak, and blocks\.0 has no such module"):
            anatomy.resolve(model, "query")
    finally:
        del FAMILIES["toy"]

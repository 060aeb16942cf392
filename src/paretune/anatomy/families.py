"""The table of model families: where each keeps its places. A new family is one entry here, or one call of `register`.

Paths of a stack's layers start at the base model, paths of places at one layer. In a path, `a|b` means whichever
exists, and a final `?` that it may be absent. A place with the prefix `cross.` belongs to cross-attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paretune.errors import Incompatible

Rows = Callable[[Any, int], Sequence[int]]  # (config, output features of the module) -> the features of one place


@dataclasses.dataclass(frozen=True)
class Part:
    """A place that is only some of a module's output features."""

    path: str
    rows: Rows


@dataclasses.dataclass(frozen=True)
class Block:
    """A sub-layer: `source`'s first input is what it reads, `path`'s output what it adds to the residual."""

    source: str
    path: str


Place = str | Part | Block | tuple[str, ...]  # a tuple where one layer has several, such as Gemma 2's norms


@dataclasses.dataclass(frozen=True)
class Stack:
    """One stack of layers: `name` is encoder or decoder, `layers` its ModuleList, `counter` the config field that counts it."""

    name: str
    layers: str
    places: Mapping[str, Place]
    counter: str | None = "num_hidden_layers"  # None where layers share their weights, so that none can be dropped
    inner: str = "intermediate_size"  # the config field with the width of the feed-forward block


@dataclasses.dataclass(frozen=True)
class Positions:
    """Where positions live: tables (modules or parameters), the config field with their length, rows before the first position."""

    paths: tuple[str, ...] = ()
    field: str | None = "max_position_embeddings"
    offset: int | None = 0  # None: one more than the padding token's id, as RoBERTa counts
    counted: bool = False  # does the config field count the offset's rows, too?


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family of models is built."""

    stacks: tuple[Stack, ...]
    positions: Positions = Positions()


def register(model_type: str, description: Family) -> None:
    """Describes a family that the table lacks, under its `config.model_type`.

        anatomy.register("mymodel", Family((Stack("encoder", "blocks", {"query": "attn.q", "key": "attn.k", ...}),)))

    Raises:
        Incompatible: if the model type is described already.
    """
    if model_type in FAMILIES:
        raise Incompatible(f"model type {model_type!r} is described already; describe yours under its own config.model_type")
    FAMILIES[model_type] = description


def share(index: int, of: int) -> Rows:
    """The part `index` of `of` equal parts that lie one after the other."""
    return lambda config, out: range(index * out // of, (index + 1) * out // of)


def grouped(index: int) -> Rows:
    """Query (0), key (1) or value (2) one after the other, where keys and values may have fewer heads (Phi-3)."""

    def rows(config: Any, out: int) -> Sequence[int]:
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        size = out // (heads + 2 * shared)
        bounds = (0, heads * size, (heads + shared) * size, out)
        return range(bounds[index], bounds[index + 1])

    return rows


def per_head(index: int) -> Rows:
    """Query (0), key (1) and value (2) of the first head, then of the second, and so on (GPT-NeoX)."""

    def rows(config: Any, out: int) -> Sequence[int]:
        size = out // (3 * config.num_attention_heads)
        return tuple(i for first in range(index * size, out, 3 * size) for i in range(first, first + size))

    return rows


def _attention(path: str, names: str, prefix: str = "") -> dict[str, Place]:
    places = ("query", "key", "value", "output")
    return {prefix + place: f"{path}.{name}" for place, name in zip(places, names.split(), strict=True)}


def _fused(path: str, rows: Callable[[int], Rows], output: str) -> dict[str, Place]:
    return {"query": Part(path, rows(0)), "key": Part(path, rows(1)), "value": Part(path, rows(2)), "output": output}


_BERT_REST: dict[str, Place] = {
    "up": "intermediate.dense",
    "down": "output.dense",
    "attention_block": Block("attention", "attention.output.dropout"),
    "ffn_block": Block("intermediate", "output.dropout"),
    "attention_norm": "attention.output.LayerNorm",
    "ffn_norm": "output.LayerNorm",
}


def _bert(names: str = "self.query self.key self.value output.dense", *, roberta: bool = False) -> Family:
    table = Positions(("embeddings.position_embeddings?",), offset=None if roberta else 0, counted=roberta)
    return Family((Stack("encoder", "encoder.layer", {**_attention("attention", names), **_BERT_REST}),), table)


_GATED: dict[str, Place] = {"up": "mlp.up_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"}
_PRE_NORM: dict[str, Place] = {
    "attention_block": Block("self_attn", "self_attn"),
    "ffn_block": Block("mlp", "mlp"),
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _llama(**changes: Place) -> Family:
    places = {**_attention("self_attn", "q_proj k_proj v_proj o_proj"), **_GATED, **_PRE_NORM, **changes}
    return Family((Stack("decoder", "layers", places),))


def _phi() -> Family:
    places = {**_attention("self_attn", "q_proj k_proj v_proj dense"), "up": "mlp.fc1", "down": "mlp.fc2", **_PRE_NORM}
    del places["ffn_norm"]  # attention and feed-forward stand side by side behind one norm
    return Family((Stack("decoder", "layers", places),))


def _phi3() -> Family:
    fused: dict[str, Place] = {**_fused("self_attn.qkv_proj", grouped, "self_attn.o_proj"), **_PRE_NORM}
    ffn: dict[str, Place] = {
        "gate": Part("mlp.gate_up_proj", share(0, 2)),
        "up": Part("mlp.gate_up_proj", share(1, 2)),
        "down": "mlp.down_proj",
    }
    return Family((Stack("decoder", "layers", {**fused, **ffn}),))


def _gpt2() -> Family:
    places: dict[str, Place] = {
        **_fused("attn.c_attn", lambda i: share(i, 3), "attn.c_proj"),
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
        "attention_block": Block("attn", "attn"),
        "ffn_block": Block("mlp", "mlp"),
        "attention_norm": "ln_1",
        "ffn_norm": "ln_2",
    }
    return Family((Stack("decoder", "h", places, "n_layer", "n_inner"),), Positions(("wpe",), "n_positions"))


def _gpt_neox() -> Family:
    places: dict[str, Place] = {
        **_fused("attention.query_key_value", per_head, "attention.dense"),
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
        "attention_block": Block("attention", "post_attention_dropout"),
        "ffn_block": Block("mlp", "post_mlp_dropout"),
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    return Family((Stack("decoder", "layers", places),))


_FAIRSEQ: dict[str, Place] = {  # OPT and BART
    **_attention("self_attn", "q_proj k_proj v_proj out_proj"),
    "up": "fc1",
    "down": "fc2",
    "attention_block": Block("self_attn", "self_attn"),
    "ffn_block": Block("fc1", "fc2"),
    "attention_norm": "self_attn_layer_norm",
    "ffn_norm": "final_layer_norm",
}


def _bart() -> Family:
    cross: dict[str, Place] = {
        **_attention("encoder_attn", "q_proj k_proj v_proj out_proj", "cross."),
        "cross.attention_block": Block("encoder_attn", "encoder_attn"),
        "cross.attention_norm": "encoder_attn_layer_norm",
    }
    encoder = Stack("encoder", "encoder.layers", _FAIRSEQ, "encoder_layers", "encoder_ffn_dim")
    decoder = Stack("decoder", "decoder.layers", {**_FAIRSEQ, **cross}, "decoder_layers", "decoder_ffn_dim")
    return Family((encoder, decoder), Positions(("encoder.embed_positions?", "decoder.embed_positions?"), offset=2))


def _t5_sublayer(path: str, attention: str, prefix: str = "") -> dict[str, Place]:
    return {
        **_attention(f"{path}.{attention}", "q k v o", prefix),
        f"{prefix}attention_block": Block(f"{path}.{attention}", f"{path}.dropout"),
        f"{prefix}attention_norm": f"{path}.layer_norm",
    }


def _t5_ffn(path: str) -> dict[str, Place]:
    return {
        "up": f"{path}.DenseReluDense.wi|{path}.DenseReluDense.wi_1",
        "gate": f"{path}.DenseReluDense.wi_0?",  # T5 1.1 and later
        "down": f"{path}.DenseReluDense.wo",
        "ffn_block": Block(f"{path}.DenseReluDense", f"{path}.dropout"),
        "ffn_norm": f"{path}.layer_norm",
    }


def _t5() -> Family:
    own = _t5_sublayer("layer.0", "SelfAttention")
    cross = _t5_sublayer("layer.1", "EncDecAttention", "cross.")
    encoder = Stack("encoder", "encoder.block", {**own, **_t5_ffn("layer.1")}, "num_layers", "d_ff")
    decoder = Stack("decoder", "decoder.block", {**own, **cross, **_t5_ffn("layer.2")}, "num_decoder_layers", "d_ff")
    return Family((encoder, decoder), Positions(field=None))


def _vit(field: str, offset: int) -> Family:
    places: dict[str, Place] = {
        **_attention("attention", "q_proj k_proj v_proj o_proj"),
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "attention_block": Block("attention", "attention"),
        "ffn_block": Block("mlp", "mlp"),
        "attention_norm": "layernorm_before",
        "ffn_norm": "layernorm_after",
    }
    return Family((Stack("encoder", "layers", places),), Positions(("embeddings.position_embeddings",), field, offset))


def _distilbert() -> Family:
    places: dict[str, Place] = {
        **_attention("attention", "q_lin k_lin v_lin out_lin"),
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "attention_block": Block("attention", "attention"),
        "ffn_block": Block("ffn", "ffn"),
        "attention_norm": "sa_layer_norm",
        "ffn_norm": "output_layer_norm",
    }
    return Family((Stack("encoder", "transformer.layer", places, "n_layers", "hidden_dim"),), Positions(("embeddings.position_embeddings",)))


def _albert() -> Family:
    places: dict[str, Place] = {
        **_attention("attention", "query key value dense"),
        "up": "ffn",
        "down": "ffn_output",
        "attention_block": Block("attention", "attention.output_dropout"),
        "ffn_block": Block("ffn", "ffn_output"),
        "attention_norm": "attention.LayerNorm",
        "ffn_norm": "full_layer_layer_norm",
    }
    stack = Stack("encoder", "encoder.albert_layer_groups.*.albert_layers", places, None)
    return Family((stack,), Positions(("embeddings.position_embeddings",)))


def _gemma2() -> Family:
    return _llama(
        attention_block=Block("self_attn", "post_attention_layernorm"),  # here the norm behind the block is part of it
        ffn_block=Block("mlp", "post_feedforward_layernorm"),
        attention_norm=("input_layernorm", "post_attention_layernorm"),
        ffn_norm=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    )


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("bert", "electra"), _bert()),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), _bert(roberta=True)),
    "deberta-v2": _bert("self.query_proj self.key_proj self.value_proj output.dense"),
    "distilbert": _distilbert(),
    "albert": _albert(),
    "gpt2": _gpt2(),
    "gpt_neox": _gpt_neox(),
    "opt": Family((Stack("decoder", "decoder.layers", _FAIRSEQ, inner="ffn_dim"),), Positions(("decoder.embed_positions",), offset=2)),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _llama()),
    "gemma2": _gemma2(),
    "phi": _phi(),
    "phi3": _phi3(),
    **dict.fromkeys(("t5", "mt5"), _t5()),
    "bart": _bart(),
    "vit": _vit("image_size", 1),  # the class token's row
    "deit": _vit("image_size", 2),  # and the distillation token's
    "audio-spectrogram-transformer": _vit("max_length", 2),
}

"""Virtual tokens and prefixes in PEFT's files: one tensor, prompt_embeddings.

    prompt, p-tuning   (S · P, D): the tokens before the input; an encoder-decoder's file has S = 2, whose second half nothing reads
    prefix             (P, layers · 2 · N · D): layer l's keys at 2l, its values at 2l + 1; tokens count from behind the prefix
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paretune import anatomy, virtual_tokens
from paretune.errors import Incompatible, StoreError
from paretune.methods.adapters.prefix import KeysAndValues, Prefix, Shift
from paretune.methods.adapters.prompt import Prompt, SoftPrompt
from paretune.methods.adapters.ptuning import Encoded, PTuning
from paretune.peft_format.files import Found, Piece, Slot, task_type

TENSOR = "prompt_embeddings"
OF_PROMPT = (SoftPrompt, Encoded, virtual_tokens.Memory)
OF_PREFIX = (KeysAndValues, Shift)
TWICE = "SEQ_2_SEQ_LM"


def _config(model: nn.Module, *, kind: str, length: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "peft_type": kind, "num_virtual_tokens": length, "token_dim": width, "num_attention_heads": heads,
        "num_layers": model.config.num_hidden_layers, "num_transformer_submodules": _submodules({"task_type": task_type(model)}),
    }  # fmt: skip


def _length(config: dict[str, Any], source: Path) -> int:
    length = config.get("num_virtual_tokens")
    if not isinstance(length, int) or length < 1:
        raise StoreError(f"{source}: num_virtual_tokens={length!r} is no number of virtual tokens; the config is damaged")
    return length


def _submodules(config: dict[str, Any]) -> int:
    return config.get("num_transformer_submodules") or (2 if config.get("task_type") == TWICE else 1)


def _refuse_trained(found: Found) -> None:
    if found.trained:
        raise Incompatible(f"a prompt's file of PEFT's holds no other parameters of the model, and {found.trained[0]} was trained")


def write_prompt(model: nn.Module, found: Found) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All virtual tokens in one row; a later phase's stand behind an earlier one's."""
    _refuse_trained(found)
    own = [patch for _, patch in found.patches if isinstance(patch, virtual_tokens.VirtualTokens)]
    if any(set(patch.places) != {0} for patch in own):
        raise Incompatible('PEFT has virtual tokens before the input alone; place="before" (template=[0]) puts them there')
    tokens = torch.cat([patch.virtual().detach().float() for patch in own])
    kind = "P_TUNING" if all(isinstance(patch, Encoded) for patch in own) else "PROMPT_TUNING"
    config = _config(model, kind=kind, length=len(tokens), width=tokens.shape[1], heads=model.config.num_attention_heads)
    more = {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": tokens.shape[1]} if kind == "P_TUNING" else {"prompt_tuning_init": "RANDOM"}
    unread = tokens.new_zeros(tokens.shape).repeat(config["num_transformer_submodules"] - 1, 1)
    return config | more, {TENSOR: torch.cat([tokens, unread])}


def read_prompt(config: dict[str, Any], model: nn.Module, *, source: Path) -> tuple[list[Piece], dict[str, str]]:
    """What a prompt's or p-tuning's file must hold for this model."""
    length = _length(config, source)
    method: Prompt | PTuning = Prompt(length=length, place="before", positions="all")
    attribute = "tokens"
    if config["peft_type"] == "P_TUNING":  # what PEFT kept is the output of its encoder
        method, attribute = PTuning(length=length, encoder="embedding", template=(0,), positions="all"), "e"
    pieces = []
    for site in method.sites(model):
        slot = Slot(TENSOR, (length * _submodules(config), site.in_features), lambda tensor: tensor[:length])
        pieces.append(Piece(site, method, {} if site.place == virtual_tokens.MEMORY else {attribute: slot}))
    return pieces, {}


def write_prefix(model: nn.Module, found: Found) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The keys and values of all layers, side by side."""
    _refuse_trained(found)
    own = [patch for _, patch in found.patches if isinstance(patch, KeysAndValues)]
    _refuse_prefix(model, own)
    tokens = torch.cat([t.detach().float() for patch in own for t in patch.front()], 1)  # (P, layers · 2 · N · D)
    width = own[0].front()[0].shape[1]
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    config = _config(model, kind="PREFIX_TUNING", length=len(tokens), width=width, heads=heads)
    return config | {"prefix_projection": False, "encoder_hidden_size": width}, {TENSOR: tokens}


def _refuse_prefix(model: nn.Module, own: list[KeysAndValues]) -> None:
    methods = {patch.method for patch in own}
    if len({layer.stack for layer in anatomy.layers(model)}) == 2:
        raise Incompatible(f"PEFT's prefix of {type(model).__name__} is before its decoder's own attention alone, with positions, and read twice over")
    if any(m.positions != "shifted" or m.gate or m.zero_start for m in methods) or len(own) != len(anatomy.layers(model)):
        raise Incompatible('PEFT has one plain prefix before each layer, behind which tokens count; prefix(positions="shifted") is that')


def read_prefix(config: dict[str, Any], model: nn.Module, *, source: Path) -> tuple[list[Piece], dict[str, str]]:
    """What a prefix's file must hold for this model."""
    if config.get("prefix_projection") and not config.get("inference_mode", True):
        raise Incompatible(f"{source} was saved with its MLP; save it with PEFT's save_pretrained, which keeps keys and values alone")
    if len({layer.stack for layer in anatomy.layers(model)}) == 2:
        raise Incompatible(f"{source}: PEFT's prefixes of encoder-decoder models cannot be read: layers share them, and half is never read; train one here")
    length = _length(config, source)
    method = Prefix(length=length, reparametrize="none", positions="shifted")
    sites = method.sites(model)
    calls = [site for site in sites if site.place == "attention_call"]
    whole = (length, sum(2 * site.out_features for site in calls))
    pieces, start = [], 0
    for site in sites:
        slots = {}
        if site in calls:
            for attribute in ("keys", "values"):
                slots[attribute] = Slot(TENSOR, whole, _columns(start, start := start + site.out_features))
        pieces.append(Piece(site, method, slots))
    return pieces, {}


def _columns(start: int, stop: int) -> Any:
    return lambda tensor: tensor[:, start:stop]

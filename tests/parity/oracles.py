"""Runs the `adapters` library on tiny models and writes what it computes to fixtures/; `make oracles` gives it its own environment.

The library pins an older transformers than ours, so the tests cannot import it. Each fixture holds float32 weights and,
computed from them in float64, the answers; its metadata says how it was made and with which versions. Tensors:

    model.<name>                                  the plain model's state dict
    adapter.<layer>.<attention|ffn>.<down|up>.<weight|bias>
    gradient.<the same names>                     of the cross-entropy with `labels`
    input_ids, attention_mask, labels; logits (B, C), hidden_states (layers + 1, B, T, d)
    logits_dropped (B, C)                         with `keep` (d) times the input of each block's own dropout
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from pathlib import Path

import adapters
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification

FIXTURES = Path(__file__).parent / "fixtures"
LIBRARIES = ("adapters", "transformers", "torch")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "num_labels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "pad_token_id": 0,
}
BOTTLENECK = 4
# the form here, the library's configuration and what is changed in it
FORMS = {
    "houlsby": ("DoubleSeqBnConfig", {}),
    "pfeiffer": ("DoubleSeqBnConfig", {"mh_adapter": False}),  # Houlsby's bottleneck after the feed-forward only
    "parallel": ("ParBnConfig", {}),
    "madx": ("SeqBnConfig", {}),  # Pfeiffer et al.'s own
}
# family, form, σ, s
CASES = (
    ("bert", "houlsby", "silu", 1.0),
    ("bert", "pfeiffer", "relu", 0.5),
    ("bert", "parallel", "relu", 4.0),
    ("bert", "madx", "relu", 0.5),
    ("roberta", "houlsby", "gelu", 0.5),
    ("roberta", "pfeiffer", "gelu", 1.0),
    ("roberta", "parallel", "silu", 2.0),
)


def randomize(module: nn.Module, spread: float, random: torch.Generator) -> None:
    """Gives every parameter a value that shows in the output; weights of a layer norm stay near 1."""
    for name, parameter in module.named_parameters():
        parameter.data.copy_(spread * torch.randn(parameter.shape, generator=random) + ("LayerNorm.weight" in name))


def bottlenecks(model: nn.Module) -> dict[str, nn.Linear]:
    """The adapter's linear maps by the names of the fixture."""
    places = {"mh_adapter": "attention", "output_adapter": "ffn"}
    found = {}
    for layer, modules in model.get_adapter("oracle").items():
        for place, module in modules.items():
            found[f"{layer}.{places[place]}.down"] = module.adapter_down[0]
            found[f"{layer}.{places[place]}.up"] = module.adapter_up
    return found


def batch(random: torch.Generator) -> dict[str, Tensor]:
    """Three texts of 7, 5 and 2 tokens."""
    lengths = torch.tensor([7, 5, 2])
    mask = (torch.arange(7) < lengths[:, None]).long()
    return {"input_ids": torch.randint(2, 40, (3, 7), generator=random) * mask, "attention_mask": mask}


def answers(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """What the adapted model computes: outputs, gradients, and outputs with a fixed pattern in place of dropout."""
    out = model(**inputs, output_hidden_states=True)
    F.cross_entropy(out.logits, labels).backward()
    found = {"logits": out.logits.detach(), "hidden_states": torch.stack(out.hidden_states).detach()}
    for name, linear in bottlenecks(model).items():
        found |= {f"gradient.{name}.{tensor}": parameter.grad for tensor, parameter in linear.named_parameters()}
    for name, module in model.named_modules():
        if name.endswith("output.dropout"):  # at the end of an attention block and of a feed-forward block
            module.register_forward_pre_hook(lambda _, x: (x[0] * keep,))
    with torch.no_grad():
        return found | {"logits_dropped": model(**inputs).logits}


def fixture(family: str, form: str, activation: str, scale: float) -> dict[str, Tensor]:
    """The tensors of one case."""
    random = torch.Generator().manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **SIZES)).eval()
    randomize(model, 0.3, random)
    tensors = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    adapters.init(model)
    name, changes = FORMS[form]
    changes = changes | {"reduction_factor": SIZES["hidden_size"] / BOTTLENECK, "non_linearity": activation, "scaling": scale}
    model.add_adapter("oracle", config=getattr(adapters, name)(**changes))
    model.set_active_adapters("oracle")
    for name, linear in bottlenecks(model).items():
        randomize(linear, 0.5, random)
        tensors |= {f"adapter.{name}.{tensor}": value.detach().clone() for tensor, value in linear.named_parameters()}
    inputs, labels = batch(random), torch.tensor([0, 1, 2])
    keep = torch.tensor([0.0, 2.0] * (SIZES["hidden_size"] // 2), dtype=torch.float64)
    return tensors | inputs | {"labels": labels, "keep": keep} | answers(model.double(), inputs, labels, keep)


def main() -> None:
    """Writes one file per case; the same versions on the same machine write the same bytes."""
    torch.set_num_threads(1)
    logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns of an inactive adapter while it adds one
    FIXTURES.mkdir(exist_ok=True)
    versions = {library: importlib.metadata.version(library).partition("+")[0] for library in LIBRARIES}
    for family, form, activation, scale in CASES:
        theirs, changes = FORMS[form]
        about = {"family": family, "form": form, "activation": activation, "scale": scale, "bottleneck": BOTTLENECK, "config": SIZES}
        about |= {"library_config": theirs, "library_changes": changes, "versions": versions}
        tensors = {name: tensor.contiguous() for name, tensor in fixture(family, form, activation, scale).items()}
        save_file(tensors, FIXTURES / f"{family}_{form}.safetensors", metadata={"oracle": json.dumps(about, sort_keys=True)})


if __name__ == "__main__":
    main()

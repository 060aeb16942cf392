"""Files for PEFT give PEFT's logits; files from PEFT give ours; and what PEFT passes over in silence is an error."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paretune import hub, peft_format, surgery
from paretune.errors import Incompatible, StoreError
from paretune.recipe import parse

peft = pytest.importorskip("peft")

# peft 0.21 asks transformers 5.23 for a property by its old name, in every PeftModel it makes
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOLERANCE = 6e-6
OURS = (
    "lora(r=4)",
    'lora(r=3, targets="query")',
    'lora(r=3, targets="query value") | lora(r=5, alpha=7.0, targets="value ffn")',
    'lora(rank_stabilized=True, targets="linear")',
    "dora(r=4)",
    'dora(r=3, targets="query") + dora(r=2, targets="value")',
    "ia3",
    'ia3(targets="query up down") | ia3(targets="down")',
)


def backbone(family: str, task: str = "classification") -> nn.Module:
    """A tiny model with matrices ten times as large as at its start (T5's are large then), so that a layer shows in the logits."""
    model = tiny.model(family, task)
    for parameter in model.parameters():
        parameter.data.mul_(10 if parameter.ndim > 1 and family != "t5" else 1)
    return model


def adapted(plain: nn.Module, recipe: str) -> nn.Module:
    """A copy with the adapters of a recipe on it, and every value that would learn moved by chance."""
    model = copy.deepcopy(plain)
    random = torch.Generator().manual_seed(1)
    for k, phase in enumerate(parse(recipe).phases):
        surgery.attach(model, list(phase), name=f"phase_{k}", on_top=True)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
        surgery.settle(model)
    return model.eval()


def answer(model: nn.Module, family: str) -> Tensor:
    dtype = next(model.parameters()).dtype
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tiny.inputs(family).items()}
    if model.config.is_encoder_decoder and hasattr(model, "lm_head"):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        out = model.eval()(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def opened_by_peft(plain: nn.Module, folder: Path) -> nn.Module:
    """PEFT's model, after the check that its own tensors are those of the file, one for one."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder)
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert {n: t.shape for n, t in expected.items()} == {n: t.shape for n, t in load_file(folder / peft_format.WEIGHTS).items()}
    return model


@pytest.mark.parametrize("recipe", OURS)
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "t5", "vit"])
def test_peft_computes_what_we_wrote(family: str, recipe: str, tmp_path: Path) -> None:
    plain = backbone(family)
    model = adapted(plain, recipe)
    peft_format.save(model, tmp_path, base="somewhere")
    theirs = opened_by_peft(plain, tmp_path)
    with theirs.disable_adapter():
        assert (answer(theirs, family) - answer(plain, family)).abs().max() == 0
    theirs, model = theirs.double(), model.double()  # in fp32 T5 is farther than that from itself in double, theirs and ours
    assert torch.allclose(answer(theirs, family), answer(model, family), rtol=0, atol=TOLERANCE)
    surgery.switch(model)
    assert (answer(theirs, family) - answer(model, family)).abs().max() > 1e-2, "the adapters do something beyond the head"


@pytest.mark.parametrize("family, kind, task", [
    ("bert", "tokens", "TOKEN_CLS"), ("bert", "base", None), ("gpt2", "causal", "CAUSAL_LM"), ("llama", "causal", "CAUSAL_LM"),
    ("t5", "seq2seq", "SEQ_2_SEQ_LM"), ("vit", "image", None),
])  # fmt: skip
def test_every_task_has_its_type(family: str, kind: str, task: str | None, tmp_path: Path) -> None:
    plain = backbone(family, kind)
    model = adapted(plain, "lora(r=2)")
    peft_format.save(model, tmp_path, base="somewhere")
    config = json.loads((tmp_path / peft_format.CONFIG).read_text())
    assert config["task_type"] == task
    assert (config["auto_mapping"] is None) == (task is not None)
    assert torch.allclose(answer(opened_by_peft(plain, tmp_path), family), answer(model, family), rtol=0, atol=TOLERANCE)


def test_one_rank_and_one_alpha_for_all(tmp_path: Path) -> None:
    model = adapted(backbone("gpt2"), OURS[2])
    peft_format.save(model, tmp_path, base="somewhere", revision="abc")
    config, tensors = json.loads((tmp_path / peft_format.CONFIG).read_text()), load_file(tmp_path / peft_format.WEIGHTS)
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {11} == {config["r"]}  # c_attn: query 3 + value 3, and 5 of the second phase
    assert (config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (11, {}, {})
    assert (config["base_model_name_or_path"], config["revision"], config["fan_in_fan_out"]) == ("somewhere", "abc", True)
    key_rows = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"][16:32]
    assert not key_rows.any()


LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "task_type": "SEQ_CLS"}
THEIRS: dict[str, tuple[str, Callable[[], Any]]] = {
    "ends": ("bert", lambda: peft.LoraConfig(**LORA, target_modules=["query", "dense"], modules_to_save=["pooler"])),
    "regex": ("llama", lambda: peft.LoraConfig(**LORA, target_modules=r".*\.1\..*(q|v)_proj")),
    "all-linear": ("t5", lambda: peft.LoraConfig(**LORA, target_modules="all-linear", exclude_modules=["wo"])),
    "patterns": ("roberta", lambda: peft.LoraConfig(
        **LORA, target_modules=["query", "value"], rank_pattern={"value": 2}, alpha_pattern={r"layer\.1\..*\.query": 9}, use_rslora=True)),
    "conv1d": ("gpt2", lambda: peft.LoraConfig(**LORA, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, lora_dropout=0.1)),
    "biases of the maps": ("bert", lambda: peft.LoraConfig(**LORA, target_modules=["query", "dense"], bias="lora_only")),
    "all biases": ("bert", lambda: peft.LoraConfig(**LORA, target_modules=["query"], bias="all", modules_to_save=["pooler"])),
    "dora": ("llama", lambda: peft.LoraConfig(**LORA, target_modules=["q_proj", "up_proj"], use_dora=True)),
    "dora conv1d": ("gpt2", lambda: peft.LoraConfig(**LORA, target_modules=["c_attn"], use_dora=True, use_rslora=True, fan_in_fan_out=True)),
    "ia3": ("bert", lambda: peft.IA3Config(
        task_type="SEQ_CLS", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])),
    "ia3 on outputs alone": ("t5", lambda: peft.IA3Config(task_type="SEQ_CLS", target_modules=["k", "v", "wi"], feedforward_modules=[])),
    "ia3 on inputs alone": ("vit", lambda: peft.IA3Config(
        target_modules=["q_proj", "fc2"], feedforward_modules=["q_proj", "fc2"], modules_to_save=["classifier"])),
    "ia3 conv1d": ("gpt2", lambda: peft.IA3Config(
        task_type="SEQ_CLS", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True)),
}  # fmt: skip


def trained_by_peft(plain: nn.Module, family: str, config: Any, folder: Path) -> nn.Module:
    """PEFT's model after three steps, saved in a folder."""
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        out = model(**tiny.inputs(family)).logits
        nn.functional.cross_entropy(out, torch.arange(len(out)) % out.shape[-1]).backward()
        optimizer.step()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", THEIRS)
def test_we_compute_what_peft_wrote(case: str, tmp_path: Path) -> None:
    family, config = THEIRS[case]
    plain = backbone(family)
    theirs = trained_by_peft(plain, family, config(), tmp_path / "peft")
    model = copy.deepcopy(plain)
    assert peft_format.read_peft(model, tmp_path / "peft", name="theirs") is model
    assert torch.allclose(answer(model, family), answer(theirs, family), rtol=0, atol=TOLERANCE)
    assert (answer(model, family) - answer(plain, family)).abs().max() > 1e-2

    hub.install()
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(answer(type(plain).from_pretrained(tmp_path / "ours"), family), answer(model, family)), "our own folder holds it, too"
    surgery.merge(model)
    merged = theirs.merge_and_unload().state_dict()
    assert merged.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, merged[name], rtol=0, atol=TOLERANCE), name
    surgery.unmerge(model)
    surgery.remove(model, "theirs")
    assert torch.equal(answer(model, family), answer(plain, family)), "the head comes back, too"


def test_old_files_are_read_without_running_them(tmp_path: Path) -> None:
    plain = backbone("bert")
    theirs = trained_by_peft(plain, "bert", THEIRS["ends"][1](), tmp_path)
    torch.save(load_file(tmp_path / peft_format.WEIGHTS), tmp_path / peft_format.OLD_WEIGHTS)
    (tmp_path / peft_format.WEIGHTS).unlink()
    model = peft_format.read_peft(copy.deepcopy(plain), tmp_path)
    assert torch.allclose(answer(model, "bert"), answer(theirs, "bert"), rtol=0, atol=TOLERANCE)

    class Command:
        def __reduce__(self) -> Any:
            return (tmp_path / "ran").touch, ()

    (tmp_path / peft_format.OLD_WEIGHTS).write_bytes(pickle.dumps(Command(), protocol=2))
    with pytest.raises(StoreError, match="damaged, or holds more than tensors"):
        peft_format.read_peft(copy.deepcopy(plain), tmp_path)
    assert not (tmp_path / "ran").exists()


A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]
WRONG: dict[str, tuple[Change, str]] = {  # what is done to a good file -> what the message says
    "a tensor is missing": (lambda t, c: t.pop(A), f"lacks {A}"),
    "a head's tensor is missing": (lambda t, c: t.pop("base_model.model.classifier.bias"), "lacks base_model.model.classifier.bias"),
    "a tensor is left over": (lambda t, c: t.update(extra=torch.ones(1)), "has over extra"),
    "the prefix is gone": (lambda t, c: t.update({A.removeprefix("base_model."): t.pop(A)}), f"lacks {A} and has over model.bert"),
    "the shape is another": (lambda t, c: t.update({A: t[A].T.contiguous()}), r"has shape \(16, 4\); .* needs \(4, 16\)"),
    "a pattern cannot be read": (lambda t, c: c.update(target_modules="(query"), r"the pattern '\(query' cannot be read"),
    "the rank is another": (lambda t, c: c.update(r=2), r"needs \(2, 16\)"),
    "a target has a typo": (lambda t, c: c["target_modules"].append("qvery"), r"'qvery' hits nothing .*did you mean query\?"),
    "a target is an embedding": (lambda t, c: c["target_modules"].append("word_embeddings"), "an? Embedding"),
    "a saved module has a typo": (lambda t, c: c["modules_to_save"].append("poler"), "'poler' hits nothing"),
    "a pattern has a typo": (lambda t, c: c.update(rank_pattern={"qvery": 2}), "rank_pattern: 'qvery'"),
    "the adapter is not known": (lambda t, c: c.update(peft_type="LOHA"), "LOHA, which cannot be read"),
    "the adapter is another": (lambda t, c: c.update(peft_type="PREFIX_TUNING"), "num_virtual_tokens=None"),
    "a setting is not known": (lambda t, c: c.update(use_bdlora=True), "use_bdlora=True cannot be read"),
    "lengths are missing": (lambda t, c: c.update(use_dora=True), "lacks .*lora_magnitude_vector"),
    "biases are missing": (lambda t, c: c.update(bias="lora_only"), "lacks .*query.base_layer.bias"),
    "biases of an unknown kind": (lambda t, c: c.update(bias="some"), "bias='some' cannot be read"),
    "the backbone was changed": (lambda t, c: c.update(init_lora_weights="pissa"), "'pissa' changed the backbone"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    change, message = WRONG[case]
    plain = backbone("bert")
    trained_by_peft(plain, "bert", peft.LoraConfig(**LORA, target_modules=["query", "value"], modules_to_save=["pooler"]), tmp_path)
    tensors, config = load_file(tmp_path / peft_format.WEIGHTS), json.loads((tmp_path / peft_format.CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / peft_format.WEIGHTS)
    (tmp_path / peft_format.CONFIG).write_text(json.dumps(config))
    model = copy.deepcopy(plain)
    with pytest.raises((Incompatible, StoreError), match=message):
        peft_format.read_peft(model, tmp_path)
    assert model.state_dict().keys() == plain.state_dict().keys(), "the model is as it was"
    assert all(p.requires_grad for p in model.parameters())


UNTRAINED: dict[str, Callable[[str | None], Any]] = {
    "lora": lambda task: peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task),
    "dora": lambda task: peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task, use_dora=True),
    "ia3": lambda task: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type=task),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, task", [("causal", None), ("classification", "SEQ_CLS")])
@pytest.mark.parametrize("adapter", UNTRAINED)
def test_a_file_without_effect_is_refused(adapter: str, kind: str, task: str | None, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = backbone("llama", kind).to(dtype)
    peft.get_peft_model(copy.deepcopy(plain), UNTRAINED[adapter](task), autocast_adapter_dtype=False).save_pretrained(tmp_path)
    assert any("score" in n for n in load_file(tmp_path / peft_format.WEIGHTS)) == (task is not None), "a head as it was is no effect"
    with pytest.raises(StoreError, match="changes nothing"):
        peft_format.read_peft(copy.deepcopy(plain), tmp_path)


@pytest.mark.parametrize("tensor, size", [("lora_magnitude_vector", 0.01), ("lora_B", 0.3)])
def test_lengths_alone_or_directions_alone_are_an_effect(tensor: str, size: float, tmp_path: Path) -> None:
    plain = backbone("llama")
    peft.get_peft_model(copy.deepcopy(plain), UNTRAINED["dora"]("SEQ_CLS")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / peft_format.WEIGHTS)
    moved = next(n for n in tensors if tensor in n)
    tensors[moved] = tensors[moved] * (1 + size) + size
    save_file(tensors, tmp_path / peft_format.WEIGHTS)
    model, theirs = peft_format.read_peft(copy.deepcopy(plain), tmp_path), peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert not torch.equal(answer(model, "llama"), answer(plain, "llama"))
    assert torch.allclose(answer(model, "llama"), answer(theirs, "llama"), rtol=0, atol=TOLERANCE)


def test_a_published_lora_of_gpt2(shared_data: Path) -> None:
    folder = published(shared_data, "lora_gpt2_kto")
    config = transformers.GPT2Config(vocab_size=tiny.SIZE, n_positions=32, n_inner=8, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    plain = transformers.GPT2LMHeadModel(config).eval()
    model = peft_format.read_peft(copy.deepcopy(plain), folder)
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tensors = load_file(folder / peft_format.WEIGHTS)
    assert sum(p.numel() for p in learning.values()) == sum(t.numel() for t in tensors.values()) == 589_824
    theirs = peft.PeftModel.from_pretrained(plain, folder)
    assert torch.allclose(answer(model, "gpt2"), answer(theirs, "gpt2"), rtol=0, atol=TOLERANCE)


def test_a_published_ia3_of_mt0(shared_data: Path) -> None:
    folder = published(shared_data, "ia3_mt0_large")
    config = transformers.MT5Config(d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        model = transformers.MT5ForConditionalGeneration(config)
    peft_format.read_peft(model, folder)  # shapes alone: the backbone has 1.2 billion parameters
    tensors = torch.load(folder / peft_format.OLD_WEIGHTS, map_location="cpu", weights_only=True)
    learning = {n.partition(".paretune.")[0]: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {n.removeprefix(peft_format.PREFIX).removesuffix(".ia3_l"): t.numel() for n, t in tensors.items()}


def published(shared_data: Path, name: str) -> Path:
    folder = shared_data / "checkpoints" / "adapters" / name
    if not folder.is_dir():
        pytest.skip(f"the published adapter {name} is not among the data sets here")
    return folder

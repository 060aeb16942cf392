"""Files beyond LoRA and (IA)³: prompts, prefixes, trained biases, bare published tensors, and adapters that PEFT has not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import steps
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_peft_files import TOLERANCE, adapted, answer, backbone, opened_by_peft, published
from torch import nn

import paretune as pt
from paretune import anatomy, peft_format, registry, surgery
from paretune.errors import Incompatible, StoreError
from paretune.methods.adapters.bitfit import BitFit
from paretune.methods.adapters.lora import LoRA

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]


def unpadded(family: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """A batch without padding: behind virtual tokens PEFT lets a decoder's classifier read the last position, padding or not."""
    ids = tiny.inputs(family)["input_ids"][:1].repeat(2, 1)
    ids[1, :3] = torch.tensor([30, 31, 32])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


def both(ours: nn.Module, theirs: nn.Module, family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of our model and of PEFT's, without the places that PEFT leaves the virtual tokens in."""
    batch = unpadded(family, ours)
    with torch.no_grad():
        found, wanted = ours.eval()(**batch).logits, theirs.eval()(**batch).logits
    return found, wanted if wanted.dim() == 2 else wanted[:, -found.shape[1] :]


PROMPTS = [
    ('prompt(length=4, place="before")', "bert", "classification"), ('prompt(length=4, place="before")', "roberta", "classification"),
    ("prompt(length=4)", "gpt2", "classification"), ("prompt(length=4)", "llama", "causal"), ("prompt(length=4) | prompt(length=2)", "gpt2", "causal"),
    ("prompt(length=4)", "t5", "seq2seq"), ("ptuning(length=4)", "llama", "causal"), ('ptuning(length=4, encoder="mlp")', "t5", "seq2seq"),
    ("ptuning(length=4, template=[0])", "bert", "classification"),
    ('prefix(length=4, positions="shifted")', "gpt2", "causal"), ('prefix(length=4, positions="shifted")', "bert", "classification"),
    ('prefix(length=4, positions="shifted")', "llama", "causal"),
    ('prefix(length=4, positions="shifted", reparametrize="none")', "llama", "classification"),
]  # fmt: skip


@pytest.mark.parametrize("recipe, family, task", PROMPTS)
def test_peft_computes_what_we_wrote(recipe: str, family: str, task: str, tmp_path: Path) -> None:
    plain = backbone(family, task)
    model = adapted(plain, recipe)
    assert peft_format.save(model, tmp_path, base="somewhere") in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
    theirs = opened_by_peft(plain, tmp_path)
    found, wanted = both(model, theirs, family)
    assert torch.allclose(found, wanted, rtol=0, atol=TOLERANCE)
    surgery.switch(model)
    assert (both(model, theirs, family)[0] - wanted).abs().max() > 1e-3

    again = pt.read_peft(copy.deepcopy(plain), tmp_path)
    assert torch.allclose(both(again, theirs, family)[0], wanted, rtol=0, atol=TOLERANCE)
    assert any(p.requires_grad for p in again.parameters())


CONFIGS: dict[str, tuple[str, str, Any]] = {
    "prompt": ("bert", "classification", lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "prompt of a decoder": ("llama", "causal", lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prompt of an encoder-decoder": ("t5", "seq2seq", lambda: peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)),
    "p-tuning": ("gpt2", "causal", lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)),
    "prefix": ("gpt2", "causal", lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix with grouped heads": ("llama", "classification", lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "prefix with an mlp": ("llama", "causal", lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8)),
}  # fmt: skip


def made_by_peft(case: str, folder: Path) -> tuple[str, nn.Module, nn.Module]:
    """(family, the plain backbone, PEFT's model that was saved)."""
    family, task, config = CONFIGS[case]
    plain = backbone(family, task)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(plain), config()).eval()
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return family, plain, theirs


@pytest.mark.parametrize("case", CONFIGS)
def test_we_compute_what_peft_wrote(case: str, tmp_path: Path) -> None:
    family, plain, theirs = made_by_peft(case, tmp_path)
    model = pt.read_peft(copy.deepcopy(plain), tmp_path, name="theirs")
    found, wanted = both(model, theirs, family)
    assert torch.allclose(found, wanted, rtol=0, atol=TOLERANCE)
    surgery.remove(model, "theirs")
    assert steps.same(steps.tensors(model), steps.tensors(plain)), "the head comes back, too"


@pytest.mark.parametrize("case, change, message", [
    ("prompt", lambda t, c: t.pop("prompt_embeddings"), "lacks prompt_embeddings"),
    ("prompt", lambda t, c: t.update(mlp=torch.ones(1)), "has over mlp"),
    ("prompt", lambda t, c: c.update(num_virtual_tokens=4), r"has shape \(3, 16\).*needs \(4, 16\)"),
    ("prefix", lambda t, c: t.update(prompt_embeddings=torch.ones(3, 32)), r"needs \(3, 64\)"),
    ("prefix", lambda t, c: c.update(num_virtual_tokens=0), "num_virtual_tokens=0 is no number"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(case: str, change: Any, message: str, tmp_path: Path) -> None:
    _, plain, _ = made_by_peft(case, tmp_path)
    tensors, config = load_file(tmp_path / peft_format.WEIGHTS), json.loads((tmp_path / peft_format.CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / peft_format.WEIGHTS)
    (tmp_path / peft_format.CONFIG).write_text(json.dumps(config))
    model = copy.deepcopy(plain)
    with pytest.raises(StoreError, match=message):
        pt.read_peft(model, tmp_path)
    assert model.state_dict().keys() == plain.state_dict().keys() and surgery.state(model).adapters == {}


def test_a_prefix_of_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    plain = backbone("t5", "seq2seq")
    peft.get_peft_model(copy.deepcopy(plain), peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)).save_pretrained(tmp_path)
    with pytest.raises(Incompatible, match="half is never read"):
        pt.read_peft(plain, tmp_path)


# --- trained biases ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases, word", [("query", "lora_only"), ("all", "all")])
def test_biases_go_with_lora(biases: str, word: str, tmp_path: Path) -> None:
    plain = backbone("bert")
    model = copy.deepcopy(plain)
    surgery.attach(model, [LoRA(r=2, targets="query value"), BitFit(biases=biases)])
    steps.disturb(model)
    assert peft_format.save(model, tmp_path, base="somewhere") == "LORA"
    assert json.loads((tmp_path / peft_format.CONFIG).read_text())["bias"] == word
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert torch.allclose(answer(theirs, "bert"), answer(model, "bert"), rtol=0, atol=TOLERANCE)
    again = pt.read_peft(copy.deepcopy(plain), tmp_path)
    assert torch.allclose(answer(again, "bert"), answer(model, "bert"), rtol=0, atol=TOLERANCE)
    surgery.switch(again)
    assert torch.equal(answer(again, "bert"), answer(plain, "bert"))


# --- our own type -----------------------------------------------------------------------------------------------------------------

def written(model: nn.Module, plain: nn.Module, folder: Path) -> str:
    """The file's type; a settled model tells no more which of its own parameters were trained."""
    trained = tuple(n for n, p in plain.named_parameters() if not torch.equal(p, model.state_dict()[n]))
    return peft_format.save(model, folder, base="somewhere", trained=trained)


OWN = [n for n in registry.names("adapter") if n not in ("lora", "dora", "ia3", "prefix", "ptuning", "surgical")]  # surgical asks for a block


@pytest.mark.parametrize("recipe", [
    *OWN, 'surgical(blocks="0")', "prefix", "ptuning", "lora(r=2) + ia3", "lora(r=2) | adapter", "lora(r=2) + full", 'lora(targets="classifier")',
])  # fmt: skip
def test_what_peft_has_not_is_written_under_our_own_name(recipe: str, tmp_path: Path) -> None:
    plain = backbone("bert")
    model = adapted(plain, recipe)
    assert written(model, plain, tmp_path) == "PARETUNE"
    with pytest.raises((ValueError, KeyError), match="PARETUNE"):
        peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    again = pt.read_peft(copy.deepcopy(plain), tmp_path)
    assert torch.equal(answer(again, "bert"), answer(model, "bert"))
    for name in list(surgery.state(again).adapters):
        surgery.remove(again, name)
    assert steps.same(steps.tensors(again), steps.tensors(plain))


@pytest.mark.parametrize("recipe", ["adapter(norms=False)", "compacter(norms=False)", "diff_pruning", "mask", "bitfit", "lora(r=2) | adapter(norms=False)"])
def test_our_own_file_without_effect_is_refused(recipe: str, tmp_path: Path) -> None:
    plain = backbone("bert")
    model = copy.deepcopy(plain)
    for k, phase in enumerate(pt.parse(recipe).phases):
        surgery.attach(model, list(phase), name=f"phase_{k}", on_top=True)
    assert written(model, plain, tmp_path) == "PARETUNE"
    again = copy.deepcopy(plain)
    with pytest.raises(StoreError, match="changes nothing, as it was never trained"):
        pt.read_peft(again, tmp_path)
    assert steps.same(steps.tensors(again), steps.tensors(plain)) and surgery.state(again).adapters == {}


def test_our_own_file_is_checked_both_ways(tmp_path: Path) -> None:
    plain = backbone("bert")
    written(adapted(plain, "adapter"), plain, tmp_path)
    good = load_file(tmp_path / peft_format.WEIGHTS)
    name = next(n for n in good if "down.weight" in n)
    for change, message in (({name: None}, "lacks"), ({"more": torch.ones(1)}, "has over more"), ({name: torch.ones(2, 2)}, "has shape")):
        changed = {n: t for n, t in {**good, **change}.items() if t is not None}
        save_file(changed, tmp_path / peft_format.WEIGHTS)
        model = copy.deepcopy(plain)
        with pytest.raises(StoreError, match=message):
            pt.read_peft(model, tmp_path)
        assert steps.same(steps.tensors(model), steps.tensors(plain)) and surgery.state(model).adapters == {}
    save_file(good, tmp_path / peft_format.WEIGHTS)
    with pytest.raises(StoreError, match="another class of model"):
        pt.read_peft(backbone("gpt2"), tmp_path)


@pytest.mark.parametrize("recipe", ["lora(r=2)", "adapter", "prompt"])
def test_another_backbone_of_the_same_shape_is_refused(recipe: str, tmp_path: Path) -> None:
    plain, other = backbone("bert"), tiny.model("bert", seed=1)
    written(adapted(plain, recipe), plain, tmp_path)
    with pytest.raises(StoreError, match="another backbone.*load somewhere"):
        pt.read_peft(other, tmp_path)
    assert pt.read_peft(other, tmp_path, same_backbone=False) is other
    assert pt.read_peft(copy.deepcopy(plain).to(torch.bfloat16), tmp_path).dtype == torch.bfloat16, "rounding is no other backbone"


# --- published files of bare tensors -----------------------------------------------------------------------------------------------


def test_a_published_lora_of_loralib(shared_data: Path) -> None:
    file = published(shared_data, "lora_roberta_base_mnli") / "roberta_base_lora_mnli.bin"
    config = transformers.RobertaConfig(num_labels=3, vocab_size=tiny.SIZE, max_position_embeddings=16, intermediate_size=8, pad_token_id=1)
    torch.manual_seed(0)
    plain = transformers.RobertaForSequenceClassification(config).eval()
    with pytest.raises(Incompatible, match="give alpha"):
        pt.read_peft(plain, file)
    model = pt.read_peft(copy.deepcopy(plain), file, alpha=16)
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    learning = steps.learning(model)
    assert sum(p.numel() for p in learning.values()) == sum(t.numel() for t in tensors.values()) == 887_811
    path, x = "roberta.encoder.layer.3.attention.self.query", torch.randn(2, 768)
    A, B = tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]
    torch.testing.assert_close(model.get_submodule(path)(x), plain.get_submodule(path)(x) + 2 * x @ A.T @ B.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.get_parameter("classifier.out_proj.weight"), tensors["classifier.out_proj.weight"])


def test_a_published_ia3_of_t_few(shared_data: Path) -> None:
    file = published(shared_data, "ia3_t0_3b_tfew") / "t03b_ia3_finish.pt"
    config = transformers.T5Config(d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu", vocab_size=64)
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    pt.read_peft(model, file)
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    learning = {n.partition(".paretune.")[0]: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {n.removesuffix(".multi_lora_b"): t.numel() for n, t in tensors.items()} and sum(learning.values()) == 540_672
    kinds = {s.place for s in anatomy.resolve(model, list(learning)[:3])}
    assert kinds == {"key", "value", "up"}

"""Surgery: names, order, tied weights, seams that close, replaced and moved modules; what contracts do not ask of every method."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import subprocess
import sys

import pytest
import steps
import tiny
import torch
import young
from torch import nn

import paretune  # noqa: F401 - lets transformers open our folders
from paretune import anatomy, hub, roles, seams, surgery
from paretune.errors import Incompatible
from paretune.methods.adapters.adapter import Adapter
from paretune.methods.adapters.bitfit import BitFit
from paretune.methods.adapters.dora import DoRA
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.head import Head
from paretune.methods.adapters.ia3 import IA3
from paretune.methods.adapters.lora import LoRA
from paretune.methods.adapters.mask import Mask
from paretune.methods.transforms.keep_layers import KeepLayers
from paretune.recipe import Recipe
from paretune.step import probe


def adapted(*methods, family="bert", task="classification", **how):
    model = steps.model(family, task)
    torch.manual_seed(3)
    surgery.attach(model, methods, **how)
    steps.disturb(model)
    return model


@pytest.mark.parametrize("name", ["a b", "a.b", "", "1st", "forward", "parameters"])
def test_names_that_cannot_be_keys(name):
    with pytest.raises(Incompatible, match="a name is letters, digits and underscores"):
        surgery.attach(steps.model("bert"), [LoRA()], name=name)


def test_a_name_in_use_and_a_name_that_is_none():
    model = adapted(LoRA(r=2), name="first")
    with pytest.raises(Incompatible, match="'first' is on the model already"):
        surgery.attach(model, [IA3()], name="first")
    for verb in (surgery.switch, surgery.remove):
        with pytest.raises(Incompatible, match=r"did you mean first\?.*attached: first"):
            verb(model, "frist")
    with pytest.raises(Incompatible, match="attached: none"):
        surgery.switch(steps.model("bert"), "first")


def test_on_top_keeps_what_is_below_active_and_frozen():
    model = adapted(LoRA(r=2), name="below", head=False)
    below = steps.logits(model, "bert")
    learns = surgery.attach(model, [IA3()], name="above", on_top=True, head=False)
    assert all(".paretune.above." in n for n in learns) and surgery.state(model).active == ("below", "above")
    assert torch.equal(steps.logits(model, "bert"), below)
    before = steps.tensors(model)
    steps.descend(model, "bert", steps=2)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if ".above." not in n)
    both = steps.logits(model, "bert")
    surgery.merge(model)
    torch.testing.assert_close(steps.logits(model, "bert"), both, rtol=1e-4, atol=1e-5)
    surgery.unmerge(model)
    assert torch.equal(steps.logits(model, "bert"), both)
    surgery.switch(model, "below")
    assert torch.equal(steps.logits(model, "bert"), below)


def test_switching_keeps_the_order_of_attachment_and_exchanges_no_value_twice():
    """Two selections of the same biases: the second starts from what is on the model when it comes."""
    model = adapted(BitFit(), name="a", head=False)
    a = steps.logits(model, "bert")
    surgery.attach(model, [BitFit()], name="b", on_top=True, head=False)
    steps.disturb(model, seed=9)
    both = steps.logits(model, "bert")
    plain = steps.logits(steps.model("bert"), "bert")
    for names, wanted in ((("b", "a"), both), ((), plain), (("a",), a), (("a", "b"), both), (("a",), a), ((), plain)):
        surgery.switch(model, *names)
        assert torch.equal(steps.logits(model, "bert"), wanted), names
    surgery.switch(model, "a", "b")
    surgery.remove(model, "a")
    surgery.remove(model, "b")
    assert steps.same(steps.tensors(model), steps.tensors(steps.model("bert")))


def test_one_phase_of_several_adapters():
    model = adapted(LoRA(r=2), BitFit(), Adapter(bottleneck=4))
    assert {m for ms in surgery.state(model).adapters.values() for m in ms} == {LoRA(r=2), BitFit(), Adapter(bottleneck=4)}
    names = [n for n, _ in model.named_parameters()]
    assert len(names) == len(set(names))
    losses = steps.descend(model, "bert", steps=6)
    assert losses[-1] < losses[0]
    surgery.remove(model, "default")
    assert steps.same(steps.tensors(model), steps.tensors(steps.model("bert")))


def test_selecting_twice_keeps_one_original():
    """`full` and `bitfit` both train the biases; the original is kept once, and comes back."""
    model = adapted(Full(), BitFit())
    assert surgery.count(model)[0] == sum(p.numel() for n, p in steps.model("bert").named_parameters() if not n.startswith(("classifier", "bert.pooler")))
    surgery.switch(model)
    assert torch.equal(steps.logits(model, "bert"), steps.logits(steps.model("bert"), "bert"))


def test_settling_makes_trained_values_the_models_own():
    model = adapted(LoRA(r=2), BitFit())
    wanted = steps.logits(model, "bert")
    surgery.settle(model)
    assert torch.equal(steps.logits(model, "bert"), wanted)
    assert not any(isinstance(p, seams.Selected) for _, _, seam in surgery.seams_of(model) for _, _, p in seam.patches())
    biases = {n: p.clone() for n, p in model.named_parameters() if n.endswith("bias") and "paretune" not in n}
    surgery.remove(model, "default")
    assert all(torch.equal(model.get_parameter(n), t) for n, t in biases.items())


# --- merge ----------------------------------------------------------------------------------------------------------------------


def test_merge_says_what_stands_in_its_way():
    model = steps.model("bert")
    with pytest.raises(Incompatible, match="no adapter is active"):
        surgery.merge(model)
    surgery.attach(model, [LoRA(r=2)], name="a")
    surgery.attach(model, [LoRA(r=2)], name="b")
    before = steps.tensors(model)
    with pytest.raises(Incompatible, match="a is not active"):
        surgery.merge(model)
    surgery.switch(model, "a", "b")
    surgery.attach(model, [Head()], name="c", on_top=True)
    before = steps.tensors(model)
    with pytest.raises(Incompatible, match="head is no change of the weights"):
        surgery.merge(model)
    assert steps.same(before, steps.tensors(model))
    with pytest.raises(Incompatible, match="no merge of this model is remembered"):
        surgery.unmerge(model)


def test_tied_weights_are_not_merged():
    model = steps.model("gpt2", "causal")
    assert model.lm_head.weight is model.transformer.wte.weight
    surgery.attach(model, [LoRA(r=2, targets="lm_head")])
    steps.disturb(model)
    before = steps.tensors(model)
    with pytest.raises(Incompatible, match="tied to transformer.wte.weight"):
        surgery.merge(model)
    assert steps.same(before, steps.tensors(model))


def test_a_merge_of_several_patches_at_one_map_keeps_their_order():
    """W → (1 + l) ⊙ (W + s B A): the rescaling acts on the sum."""
    model = adapted(LoRA(r=2, targets="key"), IA3(targets="key"), head=False)
    wanted = steps.logits(model, "bert")
    key = model.bert.encoder.layer[0].attention.self.key
    lora, ia3 = key.paretune.default.lora, key.paretune.default.ia3
    weight = ia3.scale.detach()[:, None] * (key.weight + lora.scale * lora.B @ lora.A).detach()
    surgery.merge(model)
    torch.testing.assert_close(model.bert.encoder.layer[0].attention.self.key.weight, nn.Parameter(weight, requires_grad=False))
    torch.testing.assert_close(steps.logits(model, "bert"), wanted, rtol=1e-4, atol=1e-5)


def test_a_fused_map_is_patched_and_merged_in_its_part_alone():
    model = adapted(LoRA(r=2, targets="value"), family="gpt2", head=False)
    before = steps.model("gpt2").transformer.h[0].attn.c_attn.weight  # (I, 3 D): query, key, value
    surgery.merge(model)
    after = model.transformer.h[0].attn.c_attn.weight
    changed = (before != after).any(0).view(3, 16).any(1)
    assert changed.tolist() == [False, False, True]


# --- patches of the parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_patches_of_the_weight_come_first_whatever_was_attached_first(family):
    """W → W ⊙ m → (1 + l) ⊙ (W ⊙ m + s B A), also where mask is attached last, and where the map is a part of a fused one."""
    model = adapted(LoRA(r=2, targets="key"), IA3(targets="key"), Mask(targets="key"), family=family, head=False)
    wanted, before = steps.logits(model, family), steps.tensors(model)
    path, module, seam = next((p, m, s) for p, m, s in surgery.seams_of(model) if m is not model)
    lora, ia3, mask = (patch for _, _, patch in seam.patches())
    rows = list(mask.site.rows or range(16))
    weight = anatomy.weight(module).detach().clone()  # (O, I)
    weight[rows] = ia3.scale.detach()[:, None] * (weight[rows] * (mask.scores > 0.01) + (lora.scale * lora.B @ lora.A).detach())
    x = torch.randn(2, 3, 16)
    scale = torch.ones(len(weight)).index_copy(0, torch.tensor(rows), ia3.scale.detach())
    torch.testing.assert_close(module(x), nn.functional.linear(x, weight, module.bias * scale))
    surgery.merge(model)
    torch.testing.assert_close(anatomy.weight(model.get_submodule(path)), weight)
    torch.testing.assert_close(steps.logits(model, family), wanted, rtol=1e-4, atol=1e-5)
    surgery.unmerge(model)
    assert steps.same(steps.tensors(model), before) and torch.equal(steps.logits(model, family), wanted)


def test_a_patched_weight_is_never_written_to_the_module():
    """Other threads may run the module, in its own forward or a patched one, at any moment."""
    from concurrent.futures import ThreadPoolExecutor

    model = adapted(Mask(), head=False)
    stored = {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict().items()}
    wanted = [steps.logits(model, "bert", seed=s) for s in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda s: steps.logits(model, "bert", seed=s), range(8)))
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    assert all(t.data_ptr() == stored[n][0] and torch.equal(t, stored[n][1]) for n, t in model.state_dict().items())


def test_a_norm_is_a_map_of_the_parameter_seam_too():
    class Lift(seams.Patch):
        reweighs = True

        def delta(self, weight, bias):
            return weight, bias + 1

    model = steps.model("bert")
    (path, *_) = anatomy.norms(model)
    norm, x = model.get_submodule(path), torch.randn(2, 3, 16)
    wanted = 2 * norm(x) - norm.bias + 1
    seam = seams.open_seam(norm, working=True)
    seam.add("default", "lift", patch=Lift())
    seam.active = ("default",)
    torch.testing.assert_close(norm(x), wanted)


def test_bf16_working_copies_compute_near_the_fp32_truth():
    """The pace that trains with frozen weights in bf16 patches those; the fp32 weights come back unchanged."""
    model = adapted(Mask(), DoRA(), head=False)
    wanted, before = steps.logits(model, "bert"), steps.tensors(model)
    pace = probe.Pace("bf16")
    with probe.paced(model, pace), probe.autocast(pace):
        steps.loss(model, "bert").backward()
        torch.testing.assert_close(steps.logits(model, "bert").float(), wanted, rtol=0.1, atol=0.1)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any() for p in steps.learning(model).values())
    assert steps.same(steps.tensors(model), before)


# --- modules --------------------------------------------------------------------------------------------------------------------


def test_a_patched_module_is_still_what_it_was():
    model = adapted(LoRA(r=2))
    query = model.bert.encoder.layer[0].attention.self.query
    assert isinstance(query, nn.Linear) and type(query).__name__ == "Linear" and "Linear" in repr(query)
    assert type(pickle.loads(pickle.dumps(query))).__name__ == "Linear"
    assert torch.equal(steps.logits(pickle.loads(pickle.dumps(model)), "bert"), steps.logits(model, "bert"))


def test_a_replaced_module_takes_the_seam_over():
    model = adapted(LoRA(r=2, targets="query"), head=False)
    wanted, path = steps.logits(model, "bert"), "bert.encoder.layer.1.attention.self.query"
    old = model.get_submodule(path)
    twin = nn.Linear(16, 16)
    twin.load_state_dict({"weight": old.weight, "bias": old.bias})
    surgery.replace(model, [(path, twin)])
    assert model.get_submodule(path) is twin and isinstance(twin, seams.Adapted) and not isinstance(old, seams.Adapted)
    assert torch.equal(steps.logits(model, "bert"), wanted)
    surgery.remove(model, "default")
    assert type(twin) is nn.Linear


def test_counting_needs_no_memory():
    with torch.device("meta"):
        model = tiny.model("bert")
        surgery.attach(model, [LoRA(r=2, targets="query")])
    assert surgery.count(model) == (2 * 2 * (16 + 16), 16 * 16 + 16 + 16 * 3 + 3)


def test_beams_of_one_row_go_through_its_adapter():
    model = steps.model("gpt2", "causal")
    for name in ("a", "b"):
        surgery.attach(model, [LoRA(r=2)], name=name, head=False)
        steps.disturb(model, seed=ord(name), std=0.5)
    tokens = tiny.tokenizer()(["the film", "the book"], return_tensors="pt", padding=True)
    how = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    alone = []
    for name in ("a", "b"):
        surgery.switch(model, name)
        alone.append(model.generate(**tokens, **how))
    with surgery.rows(model, ["a", "b"]):
        together = model.generate(**tokens, **how)
    assert torch.equal(together, torch.stack([alone[0][0], alone[1][1]]))


def test_rows_end_with_the_block_even_after_an_error():
    model = adapted(LoRA(r=2), head=False)
    with pytest.raises(ZeroDivisionError), surgery.rows(model, ["default", None]):
        raise ZeroDivisionError
    assert surgery.state(model).active == ("default",)
    assert all(seam.rows is None for _, _, seam in surgery.seams_of(model))


def test_threads_do_not_share_what_a_parallel_adapter_waits_for():
    from concurrent.futures import ThreadPoolExecutor

    model = adapted(Adapter(bottleneck=4, form="parallel"))
    wanted = [steps.logits(model, "bert", seed=s) for s in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda s: steps.logits(model, "bert", seed=s), range(8)))
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


# --- what patches share, and what they give up ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False)
class Shifted(roles.Adapter):
    """y + a v: v is one for all maps, a is each map's own; settled, a map keeps the product."""

    gives_up: bool = False

    def sites(self, model):
        return anatomy.resolve(model, "query", kind="linear")

    def shared(self, model):
        return nn.ParameterDict({"v": nn.Parameter(torch.randn(16))})

    def patch(self, site):
        return Shift(site)


class Shift(seams.Patch):
    def __init__(self, site):
        super().__init__(site)
        self.a = nn.Parameter(torch.ones(1))

    def forward(self, x, y):
        return y + (self.b if self.settled else self.a * self.shared["v"])

    def settle(self):
        return {"b": self.a * self.shared["v"]} if self.method.gives_up else {}


@pytest.fixture
def shifted(monkeypatch):
    """A model with the toy on it, twice over as two methods of one phase; the toy is not in the catalogue, so its spelling is read here."""
    made = {m.spell(): Recipe(((m,),)) for m in (Shifted(), Shifted(gives_up=True))}
    monkeypatch.setattr("paretune.recipe.parse", made.__getitem__)
    return adapted(Shifted(gives_up=True), Shifted(), head=False)


def test_a_shared_tensor_is_one_in_training_copies_and_files(shifted, tmp_path):
    keys = [n for n, _ in shifted.named_parameters(remove_duplicate=False) if n.endswith(".v")]
    assert keys == ["paretune.default.test_surgery_shared.v", "paretune.default.test_surgery_shared_2.v"]
    assert surgery.count(shifted) == (2 * 16 + 4, 0)
    steps.descend(shifted, "bert", steps=2)
    wanted, (first, second) = steps.logits(shifted, "bert"), (shifted.get_parameter(k) for k in keys)
    assert not torch.equal(first, second)
    shifted.save_pretrained(tmp_path)
    loaded = type(shifted).from_pretrained(tmp_path)
    assert steps.same(steps.tensors(loaded), steps.tensors(shifted))
    for twin in (copy.deepcopy(shifted), pickle.loads(pickle.dumps(shifted)), loaded):
        assert torch.equal(steps.logits(twin, "bert"), wanted)
        with torch.no_grad():
            for key in keys:
                twin.get_parameter(key).zero_()
        assert torch.equal(steps.logits(twin, "bert"), steps.logits(steps.model("bert"), "bert"))  # of all maps of both methods
    assert torch.equal(steps.logits(shifted, "bert"), wanted)


def test_a_method_named_twice_shares_once(shifted):
    model = adapted(Shifted(), Shifted(), head=False)
    assert surgery.count(model) == (16 + 4, 0)
    steps.loss(model, "bert").backward()
    assert all(p.grad is not None for p in steps.learning(model).values())


def test_a_settled_patch_keeps_what_it_said_and_is_saved_so(shifted, tmp_path):
    wanted = steps.logits(shifted, "bert")
    surgery.freeze(shifted)
    surgery.settle(shifted)
    torch.testing.assert_close(steps.logits(shifted, "bert"), wanted)
    extra = shifted.state_dict().keys() - steps.model("bert").state_dict().keys()
    assert sorted({k.rpartition("paretune.")[2] for k in extra}) == ["default.test_surgery.b", "default.test_surgery_2.a", "default.test_surgery_shared_2.v"]
    shifted.save_pretrained(tmp_path)
    loaded, info = type(shifted).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and steps.same(steps.tensors(loaded), steps.tensors(shifted))
    assert torch.equal(steps.logits(loaded, "bert"), steps.logits(shifted, "bert"))
    surgery.settle(loaded)  # once more changes nothing
    assert steps.same(steps.tensors(loaded), steps.tensors(shifted))
    surgery.remove(loaded, "default")
    assert steps.same(steps.tensors(loaded), steps.tensors(steps.model("bert")))


def test_a_shared_tensor_outlives_a_dropped_layer(shifted):
    KeepLayers(layers="1").apply(shifted)
    surgery.freeze(shifted)
    key = "paretune.default.test_surgery_shared_2.v"
    assert key in shifted.state_dict()
    (patch,) = (p for _, _, seam in surgery.seams_of(shifted) for _, _, p in seam.patches() if not p.settled)
    assert patch.shared["v"] is shifted.get_parameter(key)


# --- files ----------------------------------------------------------------------------------------------------------------------

LOAD = """
{first}
import torch, sys
from transformers import AutoModelForSequenceClassification
sys.path.insert(0, {tests!r})
model = AutoModelForSequenceClassification.from_pretrained({folder!r}).eval()
import tiny
with torch.no_grad():
    torch.save(model(**tiny.inputs("bert")).logits, {answer!r})
"""


def _opening(folder, first=""):
    return LOAD.format(first=first, tests=os.path.dirname(tiny.__file__), folder=str(folder), answer=str(folder / "answer.pt"))


def loaded_without_paretune(folder):
    """(logits, what was said) of a process that opens a folder and imports nothing of ours."""
    child, answer = young.run(_opening(folder), folder), folder / "answer.pt"
    return (torch.load(answer, weights_only=True) if answer.exists() else None), child.stderr


@pytest.mark.parametrize("elsewhere", ["before transformers", "behind transformers"])
def test_importing_paretune_is_all_that_another_process_needs(elsewhere, tmp_path):
    model = adapted(LoRA(r=2), Adapter(bottleneck=4))
    model.save_pretrained(tmp_path)
    if elsewhere == "behind transformers":
        child = young.run(_opening(tmp_path, "import sys; assert 'transformers' in sys.modules; import paretune"), tmp_path)
    else:
        code = _opening(tmp_path, "import paretune; import sys; assert 'torch' not in sys.modules")
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert torch.equal(torch.load(tmp_path / "answer.pt", weights_only=True), steps.logits(model, "bert"))


@pytest.mark.parametrize("methods", [(LoRA(r=2),), (Adapter(bottleneck=4), BitFit())], ids=["lora", "adapter"])
@pytest.mark.parametrize("settled", [False, True])
def test_without_paretune_a_patched_model_does_not_open(methods, settled, tmp_path):
    """Trained norms or a trained head without the patches they were trained with would be a damaged model."""
    model = adapted(*methods)
    if settled:
        surgery.settle(model)
    model.save_pretrained(tmp_path)
    found, said = loaded_without_paretune(tmp_path)
    assert found is None and "import paretune before opening this folder" in said


def test_without_paretune_a_selection_opens_as_what_it_is(tmp_path):
    model = adapted(BitFit())
    model.save_pretrained(tmp_path)
    found, _ = loaded_without_paretune(tmp_path)
    assert torch.equal(found, steps.logits(model, "bert"))


def test_the_attention_asked_for_is_the_attention_used(tmp_path):
    model = adapted(LoRA(r=2))
    model.save_pretrained(tmp_path)
    for asked in (None, "eager", "sdpa"):
        loaded = type(model).from_pretrained(tmp_path, **({"attn_implementation": asked} if asked else {}))
        assert loaded.config._attn_implementation == (asked or model.config._attn_implementation)


def test_the_config_says_what_is_attached():
    model = adapted(LoRA(r=2, targets="query"), name="mine")
    about = model.config.quantization_config
    assert about["quant_method"] == hub.NAME and about["adapters"] == {"mine": ['lora(r=2, targets="query")']} and about["active"] == ["mine"]
    assert {p["site"]["place"] for p in about["patches"]} == {"query"} and len(about["patches"]) == 2
    surgery.switch(model)
    assert model.config.quantization_config["active"] == []
    surgery.remove(model, "mine")
    assert not hasattr(model.config, "quantization_config") or model.config.quantization_config is None


def test_a_switched_off_adapter_is_saved_and_comes_back(tmp_path):
    model = adapted(LoRA(r=2), name="a")
    on = steps.logits(model, "bert")
    surgery.switch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(steps.logits(loaded, "bert"), steps.logits(steps.model("bert"), "bert"))
    surgery.switch(loaded, "a")
    assert torch.equal(steps.logits(loaded, "bert"), on)

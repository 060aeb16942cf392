"""What users of the present tools complain about, and that it does not happen here: one test for each complaint that our methods could have.

A test is named by its section and number in the project's list of complaints (A: adapter libraries, T: trainers and serving, C: compression
libraries) and quotes it in a line. Where a whole contract stands against a complaint (tests/contracts), the test here is the smallest case of it.
"""

from __future__ import annotations

import ast
import errno
import gc
import json
import math
import re
import socket
import sys
import tomllib
import weakref
from pathlib import Path

import pytest
import steps
import tiny
import torch
import transformers
import work
from safetensors.torch import load_file, save_file

import paretune as pt
from paretune import arithmetic, backbones, exports, flow, inference, onnx_files, peft_format, phases, recipe, registry, store, surgery, training
from paretune.errors import BackboneError, BudgetError, Incompatible, StoreError, TargetError
from paretune.meters import flops
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.lora import LoRA
from paretune.methods.adapters.prefix import Prefix
from paretune.methods.adapters.prompt import Prompt
from paretune.methods.adapters.ptuning import PTuning
from paretune.methods.modifiers.distill import Distill
from paretune.methods.modifiers.schedule import Schedule
from paretune.methods.readouts.prototypes import Prototypes
from paretune.methods.transforms import low_rank
from paretune.methods.transforms.int8 import Int8
from paretune.methods.transforms.keep_layers import KeepLayers
from paretune.pareto import budgets
from paretune.planning import fitting
from paretune.seams import Adapted
from paretune.weights.packed import Packing

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def adapted(*methods, family="bert", kind="classification", **how):
    """A model with trained adapters and its tokenizer."""
    model = work.ready(family, kind)
    torch.manual_seed(3)
    surgery.attach(model, list(methods or [LoRA(r=2)]), **how)
    steps.disturb(model)
    return model


def saved(model, folder):
    phases.save_model(model, folder)
    return folder


# --- A: adapter libraries ---------------------------------------------------------------------------------------------------------


def saved_for_backward(model):
    """Bytes that the forward pass keeps for the backward pass, each storage once, without the model's own tensors."""
    own, kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = steps.loss(model, "bert")
    assert loss.requires_grad
    return sum(kept.values())


def test_a1_lora_is_less_work_than_full_and_its_card_says_why():
    """LoRA is not faster than full fine-tuning, and nobody explains why."""
    task = work.text_task()
    found = {m: training.flops_per_example(adapted(m), task) for m in (LoRA(r=2), Full())}
    assert found[LoRA(r=2)] < 0.9 * found[Full()]
    for name in registry.names("adapter"):
        card = registry.describe(name).card
        assert card.lowers and len(card.why.split()) > 5, "a card says how it lowers the cost, and at what price"


@pytest.mark.parametrize("targets", [("query", "valeu"), ("layer.0.*.query", "layer.7.*.query"), ("query", "attention.self")])
def test_a2_a_partly_wrong_target_is_an_error(targets):
    """Partly wrong target_modules accepted silently."""
    with pytest.raises(TargetError, match=targets[1]):
        surgery.attach(steps.model("bert"), [LoRA(targets=targets)])


@pytest.mark.parametrize("change", ["a tensor less", "a tensor more", "another prefix", "never trained"])
def test_a3_an_adapter_that_does_not_load_is_an_error(change, tmp_path):
    """Adapter silently not loaded: a warning wall, and the output of the base model."""
    peft_format.save(adapted(head=False), tmp_path, base="somewhere")
    tensors = load_file(tmp_path / peft_format.WEIGHTS)
    first = next(n for n in tensors if "lora_B" in n)
    if change == "a tensor less":
        del tensors[first]
    elif change == "a tensor more":
        tensors[first.replace("lora_B", "lora_C")] = tensors[first].clone()
    elif change == "another prefix":
        tensors = {n.removeprefix("base_model."): t for n, t in tensors.items()}
    else:
        tensors = {n: torch.zeros_like(t) if "lora_B" in n or "classifier" in n or "pooler" in n else t for n, t in tensors.items()}
        config = json.loads((tmp_path / peft_format.CONFIG).read_text()) | {"modules_to_save": None, "task_type": None}
        (tmp_path / peft_format.CONFIG).write_text(json.dumps(config))
        tensors = {n: t for n, t in tensors.items() if "lora_" in n}
    save_file(tensors, tmp_path / peft_format.WEIGHTS)
    with pytest.raises(StoreError):
        pt.read_peft(steps.model("bert"), tmp_path)


@pytest.mark.parametrize("method", [LoRA(r=2), registry.get("adapter")()], ids=lambda m: m.spelling())
def test_a4_modules_that_have_other_names_now_are_named(method, tmp_path):
    """transformers renames modules, and old adapters stop loading."""
    peft_format.save(adapted(method), tmp_path, base="somewhere")
    config, weights = tmp_path / peft_format.CONFIG, tmp_path / peft_format.WEIGHTS
    config.write_text(config.read_text().replace("encoder.layer.", "encoder.block."))
    save_file({n.replace("encoder.layer.", "encoder.block."): t for n, t in load_file(weights).items()}, weights)
    model = steps.model("bert")
    with pytest.raises((Incompatible, StoreError), match=r"encoder\.block"):
        pt.read_peft(model, tmp_path)
    assert steps.same(steps.tensors(model), steps.tensors(steps.model("bert")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a5_merging_ten_times_moves_no_bit(dtype):
    """Merge changes outputs: bf16 weights drift after ten times of merge and unmerge."""
    model = steps.model("bert").to(dtype)
    surgery.attach(model, [LoRA(r=2)])
    steps.disturb(model)
    before = steps.tensors(model)
    for _ in range(10):
        surgery.merge(model)
        surgery.unmerge(model)
    assert steps.same(before, steps.tensors(model))
    surgery.merge(model)  # once, and rounded once: the nearest number of the format to the fp32 sum
    name = "bert.encoder.layer.0.attention.self.query"
    delta = 2 * before[f"{name}.paretune.default.lora.B"].float() @ before[f"{name}.paretune.default.lora.A"].float()
    assert torch.equal(model.get_submodule(name).weight, (before[f"{name}.weight"].float() + delta).to(dtype))


def test_a6_a_tied_weight_is_not_merged():
    """Tied embeddings: merging lm_head also changes the embedding."""
    model = steps.model("gpt2", "causal")
    surgery.attach(model, [LoRA(r=2, targets="lm_head")])
    steps.disturb(model)
    before = steps.tensors(model)
    with pytest.raises(Incompatible, match="tied"):
        surgery.merge(model)
    assert steps.same(before, steps.tensors(model))


def test_a7_a_merge_takes_all_or_says_what_it_leaves():
    """Partial merge disables the other active adapters."""
    model = adapted(name="a", head=False)
    surgery.attach(model, [LoRA(r=2)], name="b", on_top=True, head=False)
    steps.disturb(model, seed=2)
    wanted = steps.logits(model, "bert")
    surgery.switch(model, "a")
    with pytest.raises(Incompatible, match="b is not active"):
        surgery.merge(model)
    surgery.switch(model, "a", "b")
    surgery.merge(model)
    torch.testing.assert_close(steps.logits(model, "bert"), wanted, rtol=1e-4, atol=1e-5)


def test_a8_switching_off_and_on_unfreezes_nothing(tmp_path):
    """disable_adapter() unfreezes adapters loaded for inference."""
    loaded = pt.load(str(saved(adapted(), tmp_path)), work.text_task())
    for names in ((), ("default",)):
        surgery.switch(loaded, *names)
        assert not steps.learning(loaded)


def test_a9_a_weighted_sum_of_adapters_is_that_of_their_updates():
    """Weighted merging mathematically wrong: cross terms, scales ignored ([1, -1] is 98.6 % off)."""
    model = adapted(name="a", head=False)
    surgery.attach(model, [LoRA(r=3, rank_stabilized=True)], name="b", head=False)
    steps.disturb(model, seed=2)
    arithmetic.combine(model, {"a": 1.0, "b": -1.0}, name="c")
    query = model.bert.encoder.layer[0].attention.self.query
    a, b, c = (query.paretune.get_submodule(f"{name}.lora").delta(query.weight, None)[0] for name in "abc")
    torch.testing.assert_close(c, a - b)


def test_a10_training_what_is_frozen_is_an_error(tmp_path):
    """A loaded adapter is frozen by default, and nothing is trained without a word."""
    task = work.text_task()
    loaded = pt.load(str(saved(adapted(), tmp_path)), task)
    with pytest.raises(Incompatible, match="nothing learns"):
        pt.fit(loaded, task)
    pt.thaw(loaded)
    assert steps.learning(loaded).keys() == steps.learning(adapted()).keys()
    before = {name: value.detach().clone() for name, value in steps.learning(loaded).items()}
    pt.fit(loaded, task, Schedule(epochs=2.0))
    assert all((value != before[name]).any() for name, value in steps.learning(loaded).items()), "and then it moves"
    peft_format.save(adapted(), tmp_path, base="somewhere")
    assert steps.learning(pt.read_peft(steps.model("bert"), tmp_path)), "what PEFT wrote is read ready to train"


ROWS = [{"input_ids": [0, 5 + i, 2], "attention_mask": [1, 1, 1], "labels": i % 3} for i in range(6)]
PROMPTS = pytest.mark.parametrize("method", [Prefix(length=3), Prompt(length=3), PTuning(length=3)], ids=lambda m: m.spelling())


def settings(folder, **more):
    return transformers.TrainingArguments(folder, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", **more)


@PROMPTS
def test_a11_prompts_are_resumed_continued_and_removed_like_any_adapter(method, tmp_path):
    """Prompt-type adapters cannot be resumed; deleting and merging them raises unrelated errors."""

    def fresh():
        model = work.ready("bert")
        torch.manual_seed(3)
        surgery.attach(model, [method])
        return model

    straight, again = fresh(), fresh()
    transformers.Trainer(straight, settings(tmp_path, max_steps=3, save_steps=1), train_dataset=ROWS).train()
    trainer = transformers.Trainer(again, settings(tmp_path, max_steps=3, save_steps=1), train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in steps.tensors(again).items():
        torch.testing.assert_close(tensor, straight.state_dict()[name], rtol=1e-6, atol=1e-7)
    loaded = pt.load(str(saved(straight, tmp_path / "whole")), work.text_task())
    assert not steps.learning(loaded)
    pt.thaw(loaded)
    assert steps.learning(loaded).keys() == steps.learning(straight).keys()
    with pytest.raises(Incompatible, match="cannot be folded"):
        pt.merge(loaded)
    pt.remove(loaded, "default")
    assert steps.same(steps.tensors(loaded), steps.tensors(work.ready("bert")))


@PROMPTS
def test_a12_prompts_work_with_caches_and_checkpointing(method, tmp_path):
    """Prefix tuning broken by each change of the caches; not with gradient checkpointing."""
    model = adapted(method, family="llama", kind="causal", head=False).eval()
    cached, without = (model.generate(**tiny.inputs("llama"), use_cache=c, max_new_tokens=5, min_new_tokens=5, do_sample=False) for c in (True, False))
    assert torch.equal(cached, without)
    model = work.ready("llama")
    surgery.attach(model, [method])
    before = steps.parameters(model)
    transformers.Trainer(model, settings(tmp_path, max_steps=2, activation_checkpointing=True, save_strategy="no"), train_dataset=ROWS).train()
    assert all(not torch.equal(p, before[n]) for n, p in steps.learning(model).items())


def test_a13_a_bf16_backbone_computes_in_bf16_and_trains_in_fp32():
    """dtype surprise: fp32 adapters on a bf16 base."""
    model = steps.model("bert").to(torch.bfloat16)
    surgery.attach(model, [LoRA(r=2)])
    seen = []
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(lambda m, args, out: seen.append((out[0] if isinstance(out, tuple) else out).dtype))
    steps.logits(model, "bert")
    assert set(seen) == {torch.bfloat16} and {p.dtype for n, p in steps.learning(model).items() if "lora" in n} == {torch.float32}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a14_gradient_checkpointing_moves_lora(reentrant, tmp_path):
    """Gradient checkpointing leaves LoRA at zero."""
    model = steps.model("bert")
    surgery.attach(model, [LoRA(r=2)])
    how = settings(tmp_path, max_steps=2, save_strategy="no", activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": reentrant})
    transformers.Trainer(model, how, train_dataset=ROWS).train()
    assert all(p.any() for n, p in steps.learning(model).items() if n.endswith(".B"))


def test_a15_an_adapter_whose_values_lie_elsewhere_is_not_saved_empty(tmp_path):
    """DeepSpeed ZeRO-3 and FSDP save empty adapters (a file of 40 bytes)."""
    model = adapted()
    for parameter in steps.learning(model).values():
        parameter.data = torch.empty(0)  # what ZeRO-3 leaves of a parameter outside of a forward pass
    with pytest.raises(StoreError, match=r"attention.*\.A is empty"):
        peft_format.save(model, tmp_path, base="somewhere")
    assert not list(tmp_path.iterdir())


def test_a16_a_module_that_is_no_linear_map_is_refused_at_once():
    """Unsupported modules raise late, and containers match."""
    for target in ("bert.encoder.layer.0.attention", "word_embeddings", "LayerNorm"):
        with pytest.raises(TargetError, match="no linear map"):
            surgery.attach(steps.model("bert"), [LoRA(targets=target)])


def test_a17_a_family_with_fused_experts_is_refused_and_not_skipped():
    """Fused MoE experts are plain parameters: LoRA silently skips them."""
    config = transformers.MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for targets in ("ffn", "model.layers.0.mlp.experts.*"):
        with pytest.raises((Incompatible, TargetError), match=r"mixtral|experts"):
            surgery.attach(model, [LoRA(targets=targets)])


def test_a18_the_tenth_adapter_installs_as_many_patches_as_the_first(monkeypatch):
    """Attaching is slow and grows with the adapters there are."""
    calls, model = [], steps.model("bert")
    install = surgery.install
    monkeypatch.setattr(surgery, "install", lambda *args, **named: calls.append(args) or install(*args, **named))
    counts = []
    for i in range(10):
        calls.clear()
        surgery.attach(model, [LoRA(r=1)], name=f"a{i}")
        counts.append(len(calls))
    assert len(set(counts)) == 1


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a19_a_merged_model_is_the_plain_one(family):
    """Unmerged inference is 1.5 to 2 times slower."""
    model = adapted(family=family, head=False)
    surgery.merge(model)
    assert not [m for m in model.modules() if isinstance(m, Adapted)]
    assert [type(m) for m in model.modules()] == [type(m) for m in steps.model(family).modules()]


def test_a20_the_model_stays_the_same_object_and_can_be_had_back():
    """get_peft_model mutates the base in place."""
    model = steps.model("bert")
    before, modules, ids = steps.tensors(model), dict(model.named_modules()), {n: id(p) for n, p in model.named_parameters()}
    assert pt.adapt(model, "lora + bitfit") is model
    steps.disturb(model)
    pt.remove(model, "default")
    assert steps.same(before, steps.tensors(model)) and ids == {n: id(p) for n, p in model.named_parameters()}
    assert all(module is modules[n] for n, module in model.named_modules())


def test_a21_a_removed_adapter_is_freed_and_mixed_rows_never_miss_a_head():
    """Memory of deleted adapters is never freed; a mixed batch ignores the adapters' own heads."""
    model = adapted(name="a")
    patch = weakref.ref(model.bert.encoder.layer[0].attention.self.query.paretune.a.lora)
    with pytest.raises(Incompatible, match="head"), surgery.rows(model, ["a", None, "a"]):
        pass
    surgery.remove(model, "a")
    gc.collect()
    assert patch() is None


def test_a22_a_file_holds_the_adapter_alone_and_saving_asks_nobody(tmp_path, monkeypatch):
    """Huge checkpoints, or calls of the hub, at save time."""
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("saving went to the network"))
    model = adapted()
    peft_format.save(model, tmp_path, base="no/such-model")
    saved(model, tmp_path / "whole")
    learning = sum(p.numel() for p in steps.learning(model).values())
    assert sum(t.numel() for t in load_file(tmp_path / peft_format.WEIGHTS).values()) == learning


def test_a23_an_adapter_whose_start_changed_the_backbone_is_not_put_on_the_unchanged_one(tmp_path):
    """PiSSA and OLoRA mutate the base; conversion doubles r."""
    peft_format.save(adapted(head=False), tmp_path, base="somewhere")
    config = tmp_path / peft_format.CONFIG
    for start in ("pissa", "olora"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": start}))
        with pytest.raises(Incompatible, match="changed the backbone"):
            pt.read_peft(steps.model("bert"), tmp_path)


def test_a24_other_servers_need_no_patterns(tmp_path):
    """vLLM and others drop rank_pattern, alpha_pattern, rsLoRA and DoRA."""
    model = adapted(LoRA(r=2, targets="query"), LoRA(r=3, targets="value", rank_stabilized=True))
    peft_format.save(model, tmp_path, base="somewhere")
    config = json.loads((tmp_path / peft_format.CONFIG).read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"] and not config["use_dora"]
    assert {t.shape[0] for n, t in load_file(tmp_path / peft_format.WEIGHTS).items() if "lora_A" in n} == {config["r"]}


def test_a25_bottleneck_adapters_are_there():
    """Bottleneck adapters wanted (open since 2023); ladder side tuning, wanted too, is not here."""
    assert {"adapter", "compacter", "houlsby"} <= set(registry.names())


def test_a26_switching_a_merged_adapter_is_an_error_and_the_config_follows():
    """Hot swap: a silent no-op when merged; a stale config."""
    model = adapted(name="a", head=False)
    surgery.switch(model)
    assert model.config.quantization_config["active"] == []
    surgery.switch(model, "a")
    assert model.config.quantization_config["active"] == ["a"]
    surgery.merge(model)
    with pytest.raises(Incompatible, match="'a' is not on the model"):
        surgery.switch(model, "a")
    assert getattr(model.config, "quantization_config", None) is None


def test_a27_nothing_is_pinned_from_above():
    """Stuck on old transformers."""
    assert not [d for d in PROJECT["dependencies"] if any(sign in d for sign in ("<", "==", "~="))]


def test_a28_an_attached_adapter_is_active_in_both_stacks():
    """Adapters available but none activated; T5 adapters not updated."""
    model = steps.model("t5")
    plain = steps.logits(model, "t5")
    surgery.attach(model, [LoRA(r=2)], head=False)
    steps.disturb(model)
    assert not torch.equal(steps.logits(model, "t5"), plain)
    steps.loss(model, "t5").backward()
    for stack in ("encoder", "decoder"):
        mine = [p for n, p in steps.learning(model).items() if n.startswith(f"transformer.{stack}.")]
        assert mine and all(p.grad.any() for p in mine)


def test_a29_a_reloaded_model_answers_the_same(tmp_path):
    """Reloaded model worse than the one that was saved."""
    model, task = adapted(), work.text_task()
    again = inference.open_model(saved(model, tmp_path), task)
    assert training.predict(again, task, rows=task.test) == training.predict(model.eval(), task, rows=task.test)


def test_a30_counts_are_of_numbers_and_not_of_bytes():
    """Parameter counts of 4-bit models wrong."""
    plain, packed = steps.model("bert"), work.ready("bert")
    phases.shrink(packed, registry.get("nf4")(), work.text_task())
    with torch.device("meta"):
        empty = type(plain)(plain.config)
    for model in (plain, packed, empty):
        surgery.attach(model, [LoRA(r=2)], head=False)
    assert surgery.count(plain) == surgery.count(packed) == surgery.count(empty) == (2 * 2 * (4 * (16 + 16) + 2 * (16 + 32)), 0)


# --- T: trainers and serving ------------------------------------------------------------------------------------------------------


def test_t1_memory_is_known_before_training(monkeypatch):
    """No estimate of memory before training; where there is one, it counts the states of frozen parameters for LoRA."""
    monkeypatch.setattr(fitting, "resident_b", lambda device: 0.0)
    loop = training.Loop(adapted(), work.text_task(), Schedule(lr=1e-3, dtype="fp32"), training.Settings())
    learning, numbers = sum(p.numel() for p in loop.parameters.values()), sum(p.numel() for p in loop.model.parameters())
    cut = fitting.choose(loop, 1e6)
    held = fitting.worst(fitting._hungriest(loop, checkpointing=False), loop.lengths, batch=32, tokens=cut.tokens)
    states = 1e6 * cut.peak_mb - fitting.SLACK * held
    assert 16 * learning <= states < 16.5 * learning < 0.2 * 16 * numbers  # two moments, the best value and the gradient of each that learns
    with pytest.raises(BudgetError, match="are the least"):
        fitting.choose(loop, 12e-6 * learning)


def test_t2_a_frontier_without_recipes_runs_ours():
    """Which rank, which method?"""
    assert len(flow.DEFAULT_RECIPES) >= 10 and all(recipe.parse(text).check() for text in flow.DEFAULT_RECIPES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_t4_a_half_precision_checkpoint_trains_on_the_cpu(dtype, tmp_path):
    """No fine-tuning on a CPU (T3); `addmm_impl_cpu_ not implemented for Half`."""
    steps.model("bert").to(dtype).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    task = work.text_task()
    model = pt.adapt(pt.load(str(tmp_path), task), "lora(r=2)")
    before = {n: p.detach().clone() for n, p in steps.learning(model).items()}
    fitted = pt.fit(model, task, Schedule(lr=5e-3, epochs=2.0, batch=8))
    assert all(math.isfinite(epoch["loss"]) for epoch in fitted.epochs)
    assert before and all(p.isfinite().all() and not torch.equal(p, before[n]) for n, p in steps.learning(model).items())


def test_t5_a_merged_model_is_as_good_and_brings_its_tokenizer(tmp_path):
    """Merged model worse than the adapter; tokenizer not saved."""
    model, task = adapted(), work.text_task()
    wanted = torch.tensor(training.predict(model.eval(), task, rows=task.test))
    surgery.merge(model)
    found = inference.open_model(saved(model, tmp_path), task)
    torch.testing.assert_close(torch.tensor(training.predict(found, task, rows=task.test)), wanted, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "tokenizer.json").is_file() and phases.loads_with(tmp_path) == "transformers"


def test_t6_an_export_that_fails_leaves_the_run_and_no_half_of_a_folder(tmp_path, monkeypatch):
    """Export fails after training succeeded: disk full, no memory to merge, no such format."""

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    saved(adapted(), tmp_path / "run" / "model")
    run = store.Run(tmp_path / "run", {"id": "a-run", "backbone": str(tmp_path), "task_definition": work.text_task().define(), "loads_with": "paretune"})
    before = {path: path.read_bytes() for path in run.model.iterdir()}
    with pytest.raises(Incompatible, match="hf"):
        exports.write(run, tmp_path / "to", to="gguf")
    monkeypatch.setattr(exports.card, "save", full)
    with pytest.raises(StoreError, match="the disk is full"):
        exports.write(run, tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and before == {path: path.read_bytes() for path in run.model.iterdir()}


def test_t7_many_adapters_in_a_batch_are_as_much_work_as_one():
    """Serving adapters is slow beside the merged model (which A19 shows to be the plain one)."""
    model = adapted(name="a", head=False)
    surgery.attach(model, [LoRA(r=2)], name="b", head=False)

    def work_of():
        return flops.forward(lambda: model(**steps.inputs(model, "bert")), model).value

    surgery.switch(model)
    plain = work_of()
    surgery.switch(model, "a")
    one = work_of()
    with surgery.rows(model, ["a", "b", "a"]):
        assert plain < work_of() == one


def test_t8_accumulated_gradients_are_those_of_the_whole_batch():
    """Loss and gradient accumulation are not equivalent."""
    losses = []
    for micro in (None, 1):
        model = work.ready("bert")
        torch.manual_seed(3)
        surgery.attach(model, [LoRA(r=2)])
        losses.append([e["loss"] for e in work.fitted(model, work.text_task(), batch=8, micro_batch=micro, dropout=False).epochs])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_t9_rows_of_a_batch_do_not_see_each_other():
    """Packing contaminates examples, or changes the loss."""
    model, task = adapted().eval(), work.text_task()
    together, alone = (torch.tensor(training.predict(model, task, rows=task.test, batch=batch)) for batch in (6, 1))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_t10_a_resumed_training_has_its_optimizer(tmp_path):
    """Resume loses the optimizer's state: the loss jumps."""

    def stop(info):
        if info["step"] == 7:
            raise KeyboardInterrupt

    finals = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        for attempt in range(1 + interrupted):
            model = work.ready("bert")
            torch.manual_seed(3)
            surgery.attach(model, [LoRA(r=2)])
            if interrupted and attempt == 0:
                with pytest.raises(KeyboardInterrupt):
                    work.fitted(model, work.text_task(), folder=folder, report=stop)
            else:
                work.fitted(model, work.text_task(), folder=folder)
        finals.append(steps.tensors(model))
    assert steps.same(*finals)


def test_t11_a_file_is_a_task_without_a_registry(tmp_path):
    """Data set registry and format friction."""
    (tmp_path / "mine.csv").write_text("review,stars\n" + "".join(f"text {i},{i % 3}\n" for i in range(30)))
    task = pt.task(str(tmp_path / "mine.csv"), text="review", label="stars")
    assert task.labels == ("0", "1", "2")


def test_t12_nothing_that_must_be_compiled_is_a_dependency():
    """flash-attn or a CUDA installation breaks runs."""
    assert not [d for d in PROJECT["dependencies"] if any(word in d for word in ("flash", "bitsandbytes", "torchao", "xformers", "triton", "cuda"))]


def test_t13_lora_keeps_no_more_activations_than_full():
    """LoRA saves parameters but not activations (they doubled)."""
    found = {}
    for method in (LoRA(r=2, targets="query value"), Full()):
        model = steps.model("bert")
        surgery.attach(model, [method])
        found[method.spelling()] = saved_for_backward(model)
    assert found["lora"] <= found["full"]


def test_t14_twice_the_examples_are_twice_the_work():
    """Pairs of examples explode with their square."""
    rows = {}
    for n in (12, 24):
        model, seen = work.ready("bert"), []
        model.bert.embeddings.register_forward_hook(lambda m, args, out, seen=seen: seen.append(len(out)))
        phases.shrink(model, Prototypes(), work.text_task(train=n))
        rows[n] = sum(seen)
    assert rows[24] - rows[12] == 12


# --- C: compression libraries -----------------------------------------------------------------------------------------------------


def test_c1_where_packed_weights_are_slower_their_card_says_so():
    """Quantized is slower."""
    packings = [cls for cls in map(registry.get, registry.names("transform")) if issubclass(cls, Packing)]
    assert len(packings) >= 6 and not [cls for cls in packings if not re.search(r"takes? .* as long|times as long|slower", cls.card.note)]


def test_c2_fewer_layers_are_a_smaller_model(tmp_path):
    """Pruned model same size, same speed; and (C8) pruned models cannot be saved and loaded."""
    model, task = work.ready("bert"), work.text_task()
    before = sum(p.numel() for p in model.bert.encoder.parameters())
    phases.shrink(model, KeepLayers("0"))
    assert sum(p.numel() for p in model.bert.encoder.parameters()) == before // 2
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(saved(model, tmp_path))
    assert torch.equal(steps.logits(plain, "bert"), steps.logits(model, "bert")) and phases.loads_with(tmp_path) == "transformers"
    assert len(training.predict(model, task, rows=task.test)) == 6


def test_c3_no_adapter_is_merged_into_packed_weights():
    """Merging LoRA into quantized weights ruins quality."""
    with pytest.raises(Incompatible, match="int8"):
        recipe.parse("int8 | lora | merge")
    recipe.parse("lora | merge | int8")


def test_c9_a_packed_model_is_saved_and_loaded(tmp_path):
    """Save and reload of quantized models."""
    model, task = work.ready("bert"), work.text_task()
    phases.shrink(model, Int8())
    wanted = training.predict(model, task, rows=task.test)
    assert training.predict(inference.open_model(saved(model, tmp_path), task), task, rows=task.test) == wanted


def test_c4_damaged_weights_are_named(tmp_path):
    """Checkpoints break between versions: what does not fit is an error with names, never a model that is half random."""
    saved(adapted(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.encoder.layer.0.attention.self.query.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StoreError, match="query.weight"):
        inference.open_model(tmp_path, work.text_task())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BackboneError):
        backbones.find(str(tmp_path))


def test_c5_a_form_that_no_graph_holds_is_refused_before_anything_is_written(tmp_path):
    """Cannot export: ONNX from 4 or 8 bits (8 bits go, in tests/flow/test_onnx.py), GGUF."""
    model, task = work.ready("bert"), work.text_task()
    phases.shrink(model, registry.get("nf4")(), task)
    with pytest.raises(Incompatible, match="end the recipe with int8"):
        onnx_files.write(model, task, folder=tmp_path, name="nf4")
    assert not list(tmp_path.iterdir())


def test_c6_features_that_are_dead_break_no_factors():
    """GPTQ: Cholesky not positive definite; dead columns, damping by hand."""
    torch.manual_seed(0)
    weight, x = torch.randn(8, 8), torch.randn(5, 8)  # fewer tokens than features
    x[:, 3] = 0
    first, second = low_rank.factors(weight, low_rank.LowRank(rank=3, activation_aware=True), moment=x.T @ x / len(x))
    y = x @ weight.T
    assert (y - x @ (second @ first).T).norm() < 1.01 * torch.linalg.svdvals(y)[3:].norm()  # Eckart and Young: none is nearer than the latter


@pytest.mark.parametrize("rule", ["minmax", "percentile", "entropy"])
def test_c7_static_ranges_keep_the_answers(rule):
    """Static int8 calibration destroys BERT (percentile: F1 5.8)."""
    model = work.ready("bert")
    wanted = steps.logits(model, "bert")
    phases.shrink(model, Int8(mode="static", calibration=rule), work.text_task())
    assert (steps.logits(model, "bert") - wanted).norm() < 0.25 * wanted.norm()


def test_c11_what_is_optional_is_imported_when_it_is_used():
    """Trouble at import on a machine without a card: bitsandbytes, hub kernels."""
    core = {re.split(r"[><=~!;\[ ]", d)[0].lower().replace("-", "_").replace("scikit_learn", "sklearn") for d in PROJECT["dependencies"]}
    wrong = []
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text())
        later = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) or isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        inside = {id(n) for outer in later for n in ast.walk(outer)}
        at_once = [n for n in ast.walk(tree) if id(n) not in inside]
        names = [a.name for n in at_once if isinstance(n, ast.Import) for a in n.names]
        names += [n.module for n in at_once if isinstance(n, ast.ImportFrom) and n.module and not n.level]
        wrong += [(path.name, n) for n in names if n.split(".")[0] not in {*sys.stdlib_module_names, "paretune", *core}]
    assert not wrong


def test_c12_a_teacher_reads_with_its_own_tokenizer(tmp_path):
    """Distillation from a teacher with another tokenizer; memory (tests/methods/test_distill.py keeps hidden states for logits)."""
    tokenizer = tiny.bpe_tokenizer()
    tiny.model("bert", seed=3, config={"vocab_size": len(tokenizer)}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, task = work.ready("bert"), work.text_task()
    surgery.attach(model, [LoRA(r=2)])
    with pytest.raises(Incompatible, match="as other tokens"):
        pt.fit(model, task, Schedule(epochs=1.0), Distill(teacher=str(tmp_path), hidden=1.0))
    assert math.isfinite(pt.fit(model, task, Schedule(epochs=1.0), Distill(teacher=str(tmp_path))).epochs[0]["loss"])


def test_c13_a_goal_that_nothing_reaches_is_an_error_that_names_the_nearest():
    """The goal for accuracy is missed, and nothing says so."""
    runs = [
        {"recipe": recipe, "metric": "accuracy", "score": score, "validation_score": score, "cost": {"latency_p50_ms": ms, "reasons": {}}}
        for recipe, score, ms in (("full", 0.9, 9.0), ("full | int8", 0.7, 5.0))
    ]
    with pytest.raises(BudgetError, match=r"nothing fits.*nearest is full, whose score"):
        budgets.best(runs, budgets.parse("score=0.95, latency_p50_ms=20", "accuracy"))
    assert budgets.best(runs, budgets.parse("score=0.8, latency_p50_ms=20", "accuracy")) == 0


# --- the list ---------------------------------------------------------------------------------------------------------------------


DOES_NOT_APPLY = {
    "T15": "whether a project is kept up shows in its history, and in no test of it",
    "C10": "what we pack is written and read by our own code and torch, so no tool for quantization can be abandoned under it; C11 holds that",
}


def test_every_quoted_complaint_is_numbered():
    """By one test, by another's line in brackets, or by the reason why it cannot be ours."""
    tests = {n: f.__doc__ or "" for n, f in globals().items() if re.match(r"test_[atc]\d+_", n)}
    named = [n.split("_")[1].upper() for n in tests] + re.findall(r"\(([ATC]\d+)\)", " ".join(tests.values()))
    numbers = [f"{section}{i}" for section, last in (("A", 30), ("T", 15), ("C", 13)) for i in range(1, last + 1)]
    assert all(tests.values()) and sorted([*named, *DOES_NOT_APPLY]) == sorted(numbers)

"""Adapted models in other people's loops: Trainer, generate, pipeline, torch.compile, checkpointing, accelerate, threads.

Resuming a Trainer, deep copies, and checkpointed gradients of every method stand in tests/contracts; here is one case of each other kind.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import steps
import tiny
import torch
import transformers
import work
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from paretune import surgery
from paretune.methods.adapters.adapter import Adapter
from paretune.methods.adapters.compacter import Compacter
from paretune.methods.adapters.lora import LoRA
from paretune.methods.adapters.mask import Mask
from paretune.methods.adapters.prefix import Prefix
from paretune.methods.adapters.prompt import Prompt

METHODS = [LoRA(r=2), Adapter(bottleneck=4, form="parallel", norms=False), Compacter(bottleneck=8, norms=False), Prefix(length=3), Prompt(length=3)]
ROWS = [{"input_ids": [0, 5 + i, 6 + i % 4, 2], "attention_mask": [1, 1, 1, 1], "labels": i % 3} for i in range(12)]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.spelling())


def adapted(method, family="bert", kind="classification", *, head=False):
    model = work.ready(family, kind)
    torch.manual_seed(3)
    surgery.attach(model, [method], head=head)
    steps.disturb(model)
    return model.eval()


def settings(folder, **more):
    return transformers.TrainingArguments(folder, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", **more)


def right(answers):
    return {"accuracy": float((answers.predictions.argmax(-1) == answers.label_ids).mean())}


@every_method
def test_the_trainer_loads_the_best_model_at_the_end(method, tmp_path):
    model = adapted(method, head=True)
    seen = []

    class Wrecks(transformers.TrainerCallback):
        """Remembers what the first epoch learned, and spoils the second."""

        def on_epoch_end(self, args, state, control, model=None, **more):
            seen.append({n: p.detach().clone() for n, p in steps.learning(model).items()})

        def on_epoch_begin(self, args, state, control, model=None, **more):
            if seen:
                with torch.no_grad():
                    for parameter in steps.learning(model).values():
                        parameter.fill_(float("nan"))

    arguments = settings(
        tmp_path, num_train_epochs=2, learning_rate=5e-3, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="accuracy", per_device_train_batch_size=12,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:3], compute_metrics=right, callbacks=[Wrecks()])
    trainer.train()
    assert steps.same({n: p.detach() for n, p in steps.learning(model).items()}, seen[0])


@every_method
@pytest.mark.parametrize("family, kind", [("gpt2", "causal"), ("llama", "causal"), ("t5", "seq2seq")])
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_with_a_cache_is_generating_without(method, family, kind, beams):
    model, plain = adapted(method, family, kind), steps.model(family, kind)
    inputs = tiny.inputs(family, batch=2)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams, "output_scores": True, "return_dict_in_generate": True}
    cached, without = (model.generate(**inputs, use_cache=cache, **how) for cache in (True, False))
    assert torch.equal(cached.sequences, without.sequences)
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(without.scores), rtol=1e-4, atol=1e-4)
    assert not torch.equal(torch.stack(cached.scores), torch.stack(plain.generate(**inputs, **how).scores)), "the adapter takes part"


@every_method
def test_a_pipeline_answers_as_the_model(method):
    model, tokenizer, texts = adapted(method), tiny.tokenizer(), ["the film was good", "a dull plot"]
    answers = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)(texts)
    for text, answer in zip(texts, answers, strict=True):
        wanted = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        found = {a["label"]: a["score"] for a in answer}
        assert [found[model.config.id2label[i]] for i in range(3)] == pytest.approx(wanted.tolist(), abs=1e-6)


@every_method
def test_a_pipeline_writes_as_the_model(method):
    model, tokenizer, texts = adapted(method, "gpt2", "causal"), tiny.tokenizer(), ["the film was", "a dull plot in the"]
    how = {"max_new_tokens": 6, "do_sample": False}
    answers = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)(texts, return_tensors=True, **how)
    for text, (answer,) in zip(texts, answers, strict=True):
        assert answer["generated_token_ids"] == model.generate(**tokenizer(text, return_tensors="pt"), **how)[0].tolist()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("method, whole", [(METHODS[0], True), (METHODS[1], True), (METHODS[3], True), (METHODS[4], False), (Mask(targets="query"), False)], ids=str)
def test_a_compiled_model_has_the_same_outputs_and_gradients(method, whole):
    """Traced whole, or with breaks where a method says so; the backend that runs the traced graph as it is spares the tests a C++ compiler."""
    found = []
    for compiled in (False, True):
        model = adapted(method, head=True)
        run = torch.compile(model, fullgraph=whole, backend="aot_eager") if compiled else model
        loss = F.cross_entropy(run(**tiny.inputs("bert")).logits, torch.tensor([0, 1, 2]))
        loss.backward()
        found.append({"": loss.detach()} | {n: p.grad for n, p in steps.learning(model).items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_follows_a_switch():
    model = adapted(LoRA(r=2))
    run = torch.compile(model, backend="eager")
    on = run(**tiny.inputs("bert")).logits
    surgery.switch(model)
    torch.testing.assert_close(run(**tiny.inputs("bert")).logits, steps.logits(steps.model("bert"), "bert"))
    surgery.switch(model, "default")
    torch.testing.assert_close(run(**tiny.inputs("bert")).logits, on)


@every_method
def test_checkpointed_generation_models_learn_the_same(method):
    """A language model under transformers' own switch, whose caches and frozen embeddings have broken others."""
    gradients = []
    for checkpointing in (False, True):
        model = adapted(method, "llama", "causal")
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        ids = tiny.inputs("llama")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in steps.learning(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


LAUNCHED = """
import sys
sys.path[:0] = {paths!r}
import torch, transformers, accelerate, test_ecosystem
from safetensors.torch import save_file
torch.set_num_threads(1)
accelerator = accelerate.Accelerator(cpu=True)
assert accelerator.num_processes == 2
model = test_ecosystem.adapted(test_ecosystem.METHODS[{which}], head=True)
optimizer = torch.optim.SGD(test_ecosystem.steps.learning(model).values(), lr=0.1)
loader = torch.utils.data.DataLoader(test_ecosystem.ROWS, batch_size=6, collate_fn=transformers.default_data_collator)
run, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for _ in range(2):
    for batch in loader:
        accelerator.backward(run(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
if accelerator.is_main_process:
    save_file({{n: t.contiguous() for n, t in accelerator.unwrap_model(run).state_dict().items()}}, {file!r})
"""


@pytest.mark.parametrize("which", [pytest.param(i, marks=[] if i == 2 else pytest.mark.all) for i in range(len(METHODS))])
def test_two_processes_of_accelerate_are_one(which, tmp_path):
    """Two steps of plain gradient descent on all rows, in one process by hand; a shared tensor (Compacter's) is reduced once."""
    model = adapted(METHODS[which], head=True)
    start = steps.tensors(model)
    batch = transformers.default_data_collator(ROWS)
    for _ in range(2):
        gradients = torch.autograd.grad(model(**batch).loss, list(steps.learning(model).values()))
        with torch.no_grad():
            for parameter, gradient in zip(steps.learning(model).values(), gradients, strict=True):
                parameter -= 0.1 * gradient
    script, file, here = tmp_path / "launched.py", tmp_path / "trained.safetensors", Path(__file__).parent
    script.write_text(LAUNCHED.format(paths=[str(here.parent), str(here)], which=which, file=str(file)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert child.returncode == 0, child.stderr[-3000:]
    assert not steps.same(steps.tensors(model), start)
    for name, tensor in load_file(file).items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="DataParallel replicates on two CUDA devices; without them it calls the module itself")
def test_data_parallel():
    model = adapted(LoRA(r=2)).cuda()
    inputs = {k: v.cuda() for k, v in tiny.inputs("bert", batch=4).items()}
    torch.testing.assert_close(nn.DataParallel(model)(**inputs).logits, model(**inputs).logits)


@every_method
def test_copies_in_threads_do_not_disturb_each_other(method):
    """What DataParallel does, on a CPU: one copy per thread, all at work at once."""
    models = [adapted(method) for _ in range(4)]
    for i, model in enumerate(models):
        steps.disturb(model, seed=10 + i)
    copies = [copy.deepcopy(model) for model in models]
    wanted = [steps.logits(model, "bert", seed=i) for i, model in enumerate(models)]
    found, start = [None] * 4, threading.Barrier(4)

    def work_on(i):
        start.wait()
        for _ in range(5):
            found[i] = steps.logits(copies[i], "bert", seed=i)

    threads = [threading.Thread(target=work_on, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))

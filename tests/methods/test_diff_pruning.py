from __future__ import annotations

import math

import pytest
import steps
import tiny
import torch
import transformers
import work
from safetensors.torch import load_file
from torch.nn import functional as F

import paretune  # noqa: F401 - lets transformers open our folders
from paretune import surgery
from paretune.methods.adapters import diff_pruning
from paretune.methods.adapters.diff_pruning import DiffPruning


def adapted(method=DiffPruning(targets="query up"), family="bert", **how):  # noqa: B008
    model = steps.model(family)
    surgery.attach(model, [method], **how)
    return model


def patches(model):
    return [p for _, _, seam in surgery.seams_of(model) for _, _, p in seam.patches() if isinstance(p, diff_pruning.Difference)]


def ready(**knobs):
    model = adapted(DiffPruning(targets="query up", sparsity=0.01, **knobs), head=True)
    work.processors.put(model, tiny.tokenizer())
    return model


# --- the gates ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1.0, 3.0])
def test_a_gate_is_zero_and_one_as_often_as_its_distribution_says(alpha):
    """P(z = 0) = σ(log(−l/r) − α), P(z = 1) = σ(α − log((1 − l)/(r − 1))): Louizos et al., equations 11 and 12."""
    torch.manual_seed(0)
    z = diff_pruning.sampled(torch.full((40_000,), alpha))
    assert z.min() >= 0 and z.max() <= 1
    zero, one = 1 / (1 + math.exp(alpha)), 1 / (1 + math.exp(math.log(2.5 / 0.5) - alpha))
    assert float((z == 0).float().mean()) == pytest.approx(zero, abs=0.01)
    assert float((z == 1).float().mean()) == pytest.approx(one, abs=0.01)
    assert float(diff_pruning.chance(torch.tensor(alpha))) == pytest.approx(1 - zero, abs=1e-6)


@pytest.mark.parametrize("structured", [False, True])
def test_the_map_is_w_plus_gated_differences(structured):
    model = adapted(DiffPruning(targets="up", structured=structured), head=False).eval()
    steps.disturb(model, std=1.0)
    module, x = model.bert.encoder.layer[0].intermediate.dense, torch.randn(3, 16)
    patch = module.paretune.default.diff_pruning
    gates = torch.sigmoid(patch.alpha)
    weight, bias = (gates * patch.w)[:512].view(32, 16), (gates * patch.w)[512:]
    if structured:
        weight, bias = torch.sigmoid(patch.groups[0]) * weight, torch.sigmoid(patch.groups[1]) * bias
    torch.testing.assert_close(module(x), F.linear(x, module.weight + weight, module.bias + bias))
    assert patch.w.numel() == 32 * 16 + 32 and surgery.count(model)[0] == 2 * (2 * 544 + 2 * structured)
    model.train()
    torch.manual_seed(0)
    first, second = module(x), module(x)
    assert not torch.equal(first, second), "in training each pass draws gates of its own"


def test_the_gradient_of_the_penalty_closes_gates():
    """d/dα λ Σ σ(α) = λ σ(α) (1 − σ(α)), at any loss."""
    model = ready()
    loop = work.training.Loop(model, work.text_task(), work.Schedule(lr=1e-3), work.training.Settings())
    loop.total = 10
    events = DiffPruning(penalty=0.25).events(loop)
    events.before_step(loop)
    for patch in patches(model):
        open_ = torch.sigmoid(patch.alpha.detach())
        torch.testing.assert_close(patch.alpha.grad, 0.25 * open_ * (1 - open_))
        assert patch.w.grad is None


# --- the stages -----------------------------------------------------------------------------------------------------------------


def test_the_last_steps_train_the_kept_entries_alone():
    model, given, seen = ready(), work.text_task(), []

    def look(info):
        seen.append((info["step"], torch.cat([p.w.detach().clone() for p in patches(model)])))

    fitted = work.fitted(model, given, report=look)  # 12 steps, of which the last 30 % are the last three
    assert fitted.steps == 12 and fitted.best_epoch == 1, "an epoch before the projection is no best one"
    size = len(seen[0][1])
    nonzero = {step: int((w != 0).sum()) for step, w in seen}
    assert all(nonzero[step] > 0.9 * size for step in range(2, 9))
    assert [nonzero[step] for step in range(9, 13)] == [round(0.01 * size)] * 4
    before, after = seen[8][1], seen[11][1]
    assert torch.equal(before != 0, after != 0) and not torch.equal(before, after)


@pytest.mark.parametrize("killed_at", [4, 10])
def test_training_resumes_in_either_stage(tmp_path, killed_at):
    straight, killed, given = ready(), ready(), work.text_task()
    work.fitted(straight, given)

    def stop(info):
        if info["step"] == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.fitted(killed, given, folder=tmp_path, report=stop)
    work.fitted(killed, given, folder=tmp_path)
    assert steps.same(steps.tensors(killed), steps.tensors(straight))


def test_gates_have_a_rate_of_their_own():
    """Adam's first step is its rate: 1e-3 for w; 0.1 for α, whose gradient at the start is the penalty's alone."""
    model, first = ready(penalty=1e-3), {}

    def look(info):
        first.setdefault("alpha", torch.cat([p.alpha.detach().clone() for p in patches(model)]))
        first.setdefault("w", torch.cat([p.w.detach().clone() for p in patches(model)]))

    work.fitted(model, work.text_task(), epochs=0.5, lr=1e-3, warmup=0.0, decay="none", weight_decay=0.0, report=look)
    torch.testing.assert_close(first["alpha"], torch.full_like(first["alpha"], 4.9), rtol=0, atol=0.02)
    assert float(first["w"].abs().max()) == pytest.approx(1e-3, rel=0.01)


# --- what is kept ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_after_the_phase_the_largest_differences_are_kept_sparsely(family, tmp_path):
    model = adapted(DiffPruning(sparsity=0.03, targets="linear"), family, head=False)
    steps.disturb(model, std=0.5)
    every = torch.cat([(torch.sigmoid(p.alpha) * p.w).detach() for p in patches(model)])
    least = every.abs().sort(descending=True).values[round(0.03 * len(every)) - 1]
    wanted = torch.where(every.abs() >= least, every, 0.0)
    surgery.freeze(model)
    surgery.settle(model)
    torch.testing.assert_close(torch.cat([p.difference() for p in patches(model)]), wanted)
    model.save_pretrained(tmp_path)
    ours = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if "paretune" in n.split(".")}
    assert sum(t.numel() for n, t in ours.items() if n.endswith(".values")) == round(0.03 * len(every))
    assert sum(t.nbytes for t in ours.values()) == 8 * round(0.03 * len(every))
    loaded, logits = type(model).from_pretrained(tmp_path), steps.logits(model, family)
    assert torch.equal(steps.logits(loaded, family), logits)
    surgery.merge(loaded)
    torch.testing.assert_close(steps.logits(loaded, family), logits, rtol=1e-4, atol=1e-5)


def test_a_map_of_which_nothing_is_kept_is_saved_too(tmp_path):
    model = adapted(DiffPruning(sparsity=0.002, targets="query"), head=False)
    steps.disturb(model)
    surgery.freeze(model)
    surgery.settle(model)
    assert sorted(len(p.places) for p in patches(model)) == [0, 1]
    model.save_pretrained(tmp_path)
    assert torch.equal(steps.logits(type(model).from_pretrained(tmp_path), "bert"), steps.logits(model, "bert"))


@torch.no_grad()
def test_half_a_per_cent_of_the_linear_maps_of_bert_base_stays():
    """Of 85 million adapted entries exactly 425,088: 0.5 % of the weights and biases of the linear maps, of all parameters 0.39 %; the paper's share is of all."""
    method = DiffPruning()
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(transformers.BertConfig())
    everything = sum(p.numel() for p in model.parameters())
    adapted_entries = 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768)
    with torch.device("meta"):
        surgery.attach(model, [method])
    assert surgery.count(model)[0] == 2 * adapted_entries == 2 * sum(len(p.w) for p in patches(model))
    random, given = torch.Generator().manual_seed(0), patches(model)
    for patch in given:  # differences of its size; its own weights say nothing here and are left out
        patch.w = torch.nn.Parameter(torch.rand(patch.w.shape, generator=random) - 0.5)
        patch.alpha = torch.nn.Parameter(torch.full(patch.alpha.shape, diff_pruning.ALPHA))
    sizes = [p.w.detach().abs() for p in given]
    for patch, tensors in zip(given, method.settle(given), strict=True):
        patch.hold(tensors)
    kept = [p.difference() != 0 for p in given]
    assert sum(map(len, kept)) == adapted_entries and sum(int(k.sum()) for k in kept) == round(0.005 * adapted_entries) == 425_088
    assert min(size[k].min() for size, k in zip(sizes, kept, strict=True)) >= max(size.masked_fill_(k, 0).max() for size, k in zip(sizes, kept, strict=True))
    assert sum(t.nbytes for p in given for t in p.buffers()) == 8 * 425_088
    assert 425_088 / everything == pytest.approx(0.00388, abs=1e-5)

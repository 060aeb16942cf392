"""Packed texts learn what they learn apart: loss, answers and gradients of each example, on every family that can; who cannot is told why."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import steps
import tiny
import torch
import work

from paretune import batches, phases, surgery, training
from paretune.errors import Incompatible
from paretune.events import Events
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.lora import LoRA
from paretune.methods.adapters.prefix import Prefix
from paretune.methods.adapters.prompt import Prompt
from paretune.methods.transforms.perceiver import Perceiver
from paretune.planning import fitting
from paretune.step import packing, probe, short_attention
from paretune.tasks import Rows, Task
from paretune.tasks.kinds.language import Language

LENGTHS = (3, 17, 1, 8, 5, 17)


def batch(lengths=LENGTHS, *, seed=0):
    """Random texts of these lengths, padded."""
    random, longest = torch.Generator().manual_seed(seed), max(lengths)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    ids = torch.randint(5, tiny.SIZE, mask.shape, generator=random).masked_fill(mask == 0, tiny.PAD)
    return {"input_ids": ids, "attention_mask": mask}


def disturbed(family, kind):
    """A model whose answers depend on every token, far from what random weights of little size give."""
    model = steps.model(family, kind)
    steps.disturb(model, std=0.3)
    return model


def answers_and_gradients(model, inputs, weights):
    """(logits of real tokens, or of texts; gradients of one example's weighted sum of them)."""
    model.zero_grad()
    logits = model(**inputs).logits
    (logits * weights).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- the layout -----------------------------------------------------------------------------------------------------------------


def test_a_row_has_each_token_once_in_a_block_of_its_text():
    given = batch()
    mask, layout = given["attention_mask"], packing.Layout.of(given["attention_mask"])
    x = torch.randn(*mask.shape, 6)
    row = layout.pack(x.flatten(0, 1))
    assert len(row) % packing.ROUND == 0 and len(layout.pack.real) == int(mask.sum())
    assert torch.equal(layout.unpack(row).view_as(x)[mask == 1], x[mask == 1])
    assert sorted(int(i) for texts, _ in layout.blocks for i in texts) == list(range(len(LENGTHS)))
    blocks = layout.split(row.view(1, -1, 2, 3).transpose(1, 2))  # two heads
    for (texts, longest), block in zip(layout.blocks, blocks, strict=True):
        assert longest == max(LENGTHS[i] for i in texts) and block.shape == (len(texts), 2, longest, 3)
        for i, text in zip(texts, block.transpose(1, 2).flatten(2), strict=True):
            assert torch.equal(text[: LENGTHS[i]], x[i, : LENGTHS[i]])
    told = row.clone()
    told[sum(len(texts) * longest for texts, longest in layout.blocks) :] = 0.0
    assert torch.equal(layout.join([block.transpose(1, 2) for block in blocks]).flatten(2)[0], told)


@pytest.mark.parametrize("lengths", [(3, 17, 1, 8, 5, 17), (4, 4, 4), (9,), (1, 2, 3, 4, 5, 30, 31), (2, 2, 2, 2, 2, 2, 3)])
def test_blocks_are_those_of_the_least_cost(lengths):
    """By trying all ways to cut the sorted texts."""
    ordered, n = sorted(lengths), len(lengths)
    cuts = [[0, *(i + 1 for i in range(n - 1) if mask >> i & 1), n] for mask in range(2 ** (n - 1))]
    least = min(sum((b - a) * ordered[b - 1] + packing.CALL for a, b in itertools.pairwise(cut)) for cut in cuts)
    found = packing.groups(lengths)
    assert sum(len(texts) * longest + packing.CALL for texts, longest in found) == least
    assert sum(len(texts) * longest for texts, longest in found) <= packing.places(sum(lengths)) - packing.ROUND


def test_moved_rows_take_their_gradient_along_and_filling_has_none():
    layout = packing.Layout.of(batch()["attention_mask"])
    for move, rows in ((layout.pack, len(layout.unpack.source)), (layout.unpack, len(layout.pack.source))):
        x = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)
        given = torch.randn(len(move.source), 2, dtype=torch.float64)
        told = torch.zeros_like(x)
        for p in move.real.tolist():
            told[move.source[p]] += given[p]
        assert torch.equal(torch.autograd.grad(move(x), x, given)[0], told)


# --- models ---------------------------------------------------------------------------------------------------------------------


FAMILIES = [("bert", "classification"), ("bert", "tokens"), ("roberta", "classification"), ("albert", "classification"), ("gpt2", "causal"),
            ("gpt2", "classification"), ("llama", "causal"), ("llama", "classification"), ("opt", "causal")]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "kind", "kernel"),
    [(*model, "sdpa") for model in FAMILIES] + [(*model, kernel) for model in FAMILIES[::6] for kernel in ("eager", short_attention.NAME)],
)
def test_each_example_has_the_answers_and_gradients_that_it_has_alone(family, kind, kernel):
    model, given = disturbed(family, kind), batch()
    own = model.config._attn_implementation
    alone = [{k: v[i : i + 1, :n] for k, v in given.items()} for i, n in enumerate(LENGTHS)]
    told = [answers_and_gradients(model, inputs, 1.0) for inputs in alone]
    model.set_attn_implementation(packing.name(kernel))
    with packing.rows(model):
        for i, n in enumerate(LENGTHS):
            inputs = packing.laid_out(given, packing.name(kernel))
            mine = torch.zeros(len(LENGTHS), *(1,) * told[i][0][0].dim())
            mine[i] = 1.0
            if told[i][0].dim() == 3:  # an answer for each token
                mine = mine * given["attention_mask"][..., None]
            logits, gradients = answers_and_gradients(model, inputs, mine)
            mine_alone = logits[i : i + 1, :n] if logits.dim() == 3 else logits[i : i + 1]
            assert torch.allclose(mine_alone, told[i][0], rtol=1e-4, atol=1e-4)
            for name, gradient in gradients.items():
                assert torch.allclose(gradient, told[i][1][name], rtol=1e-3, atol=1e-3 * max(1.0, float(told[i][1][name].abs().max()))), name
    model.set_attn_implementation(own)


def test_layers_compute_on_real_tokens_alone_and_the_head_on_texts():
    model, given, seen = steps.model("bert"), batch(), {}
    model.bert.encoder.layer[1].output.dense.register_forward_hook(lambda m, args, out: seen.update(layer=tuple(out.shape[:2])))
    model.bert.pooler.dense.register_forward_hook(lambda m, args, out: seen.update(head=len(out)))
    pace = probe.Pace(attention=packing.name("sdpa"))
    with probe.paced(model, pace):
        model(**packing.laid_out(given, pace.attention))
    assert seen == {"layer": (1, packing.ROUND), "head": len(LENGTHS)} and sum(LENGTHS) <= packing.ROUND < len(LENGTHS) * max(LENGTHS)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_activations_computed_again_stand_in_the_same_row():
    def gradients(*, again):
        model = disturbed("llama", "causal").train()
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.set_attn_implementation(packing.name(short_attention.NAME))
        with packing.rows(model):
            return answers_and_gradients(model, packing.laid_out(batch(), packing.name(short_attention.NAME)), 1.0)[1]

    told, found = gradients(again=False), gradients(again=True)
    assert found.keys() == told.keys() and all(torch.allclose(found[n], told[n], rtol=1e-4, atol=1e-4) for n in told)


# --- training -------------------------------------------------------------------------------------------------------------------


def language_task():
    """Texts of several words; blocks of at most eight tokens, the last one shorter."""
    made = [Rows({"text": t} for t, _ in work._texts(n, s)) for s, n in enumerate((9, 3, 3))]
    return Task("words", Language(), {"text": "text"}, (), "perplexity", *made)


@pytest.mark.parametrize(("family", "kind", "make"), [("bert", "classification", work.text_task), ("bert", "tokens", work.token_task),
                                                      ("gpt2", "causal", work.generation_task), ("llama", "causal", language_task)])  # fmt: skip
def test_a_packed_training_ends_where_the_padded_one_ends(family, kind, make, monkeypatch):
    monkeypatch.setattr(batches, "epoch_batches", lambda lengths, visited, *, schedule, random: [list(range(at, at + 4)) for at in range(0, len(lengths) - 3, 4)])
    ends = []
    for pack in (False, True):
        model, task = work.ready(family, kind), make()
        surgery.attach(model, [Full()])
        torch.manual_seed(0)
        fitted = work.fitted(model, dataclasses.replace(task, validation=Rows()), pack=pack, dropout=False, lr=1e-3, decay="none")
        ends.append(({n: p.detach() for n, p in model.named_parameters()}, [e["loss"] for e in fitted.epochs]))
        assert fitted.attention == (packing.name("sdpa") if pack else "")
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-4)
    assert all(torch.allclose(ends[1][0][n], ends[0][0][n], atol=2e-4) for n in ends[0][0])


def test_packed_batches_pass_real_tokens_to_what_caches_hold(monkeypatch):
    monkeypatch.setattr(batches, "CACHED", 40)
    seen = []
    own = packing.Layout.of.__func__
    monkeypatch.setattr(packing.Layout, "of", classmethod(lambda cls, mask: seen.append(int(mask.sum())) or own(cls, mask)))
    model = work.ready("bert")
    surgery.attach(model, [LoRA(r=2)])
    work.fitted(model, work.text_task(), pack=True, batch=8, epochs=1.0)
    assert len(seen) > 3 and max(seen) <= 40
    assert sum(seen[1:]) == sum(len(e["input_ids"]) for e in training.encode(work.text_task(), work.text_task().train, model=model)), "the first is the check's"


def test_what_a_row_holds_is_foretold_from_padded_examples():
    model, task = work.ready("bert"), work.text_task()
    model.set_attn_implementation("eager")
    surgery.attach(model, [Full()])
    loop = training.Loop(model, task, work.Schedule(lr=1e-3, pack=True), training.Settings())
    told = fitting.appetite(model, task.kind, encodings=loop.encodings, collate=loop.collate, pace=probe.Pace(), dropout=False)
    pace, rows = probe.Pace(attention=packing.name("eager")), sorted(range(24), key=loop.lengths.__getitem__)[::2]
    batch = loop.collate([loop.encodings[i] for i in rows])
    for p in loop.parameters.values():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with probe.paced(model, pace, dropout=False), fitting.Held() as held:
        loss, _ = task.kind.loss(model(**packing.laid_out(task.kind.inputs(batch), pace.attention)), batch)
        loss.backward()
    lengths = [loop.lengths[i] for i in rows]
    assert told.of_part(lengths, packed=False) > told.of_part(lengths, packed=True) == pytest.approx(held.peak, rel=0.25)


class Looking:
    """A modifier with a loss of its own."""

    def events(self, loop):
        return Look()


class Look(Events):
    def loss(self, loop, batch, *, outputs, loss):
        return 2 * loss


@pytest.mark.parametrize(
    ("family", "make", "adapter", "modifiers", "reason"),
    [("t5", work.text_task, LoRA(r=2), (), "encoder with a decoder"), ("vit", work.image_task, LoRA(r=2), (), "no texts"),
     ("deberta-v2", work.text_task, LoRA(r=2), (), "its own code"), ("bert", work.text_task, Prefix(), (), "inside the attention"),
     ("bert", work.text_task, Prompt(), (), "tokens enter the layers"),
     ("bert", work.text_task, LoRA(r=2), (Looking(),), "test_packing has a loss or inputs of its own")],
)  # fmt: skip
def test_what_cannot_stand_in_one_row_is_refused_by_name(family, make, adapter, modifiers, reason):
    model = work.ready(family)
    surgery.attach(model, [adapter])
    with pytest.raises(Incompatible, match=rf"schedule\(pack=True\): .*{reason}.*leave pack out"):
        work.fitted(model, make(), *modifiers, pack=True)


@pytest.mark.parametrize("latents", [3, 64])
def test_latents_are_no_row_of_texts(latents):
    model = phases.shrink(work.ready("bert"), Perceiver(latents=latents), None)
    surgery.attach(model, [Full()])
    with pytest.raises(Incompatible, match=r"schedule\(pack=True\): .*compute on latents.*leave pack out"):
        work.fitted(model, work.text_task(), pack=True)

"""A plan before the work and a limit of memory: counted against what torch holds, chosen parts against whole batches, and the verb from end to end."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import steps
import tiny
import torch
import work
from safetensors.torch import load_file
from torch import nn

from paretune import backbones, checkpoints, cli, phases, surgery, teachers, training
from paretune.errors import BudgetError
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.lora import LoRA
from paretune.methods.modifiers.schedule import Schedule
from paretune.options import Metering, Options, Training
from paretune.planning import fitting, plan, rehearsal
from paretune.planning.fitting import Appetite, Held
from paretune.planning.rehearsal import Took
from paretune.recipe import as_recipe
from paretune.step import probe

SCHEDULE = Schedule(lr=1e-3, epochs=2.0, batch=8, dtype="fp32", dropout=False)


# --- memory, counted ------------------------------------------------------------------------------------------------------------


def test_held_counts_what_a_chain_of_products_holds():
    """Of y = relu(x A) B, each of 4 N² bytes: y and what its backward pass needs, then gradients; views are nothing."""
    n = 32
    x, a, b = torch.randn(n, n), nn.Parameter(torch.randn(n, n)), nn.Parameter(torch.randn(n, n))
    with Held() as held:
        h = (x @ a).relu()  # the product is let go, as relu keeps its output
        assert held.now == 4 * n**2 and held.peak == 2 * 4 * n**2
        y = h.view(-1).view(n, n) @ b
        assert held.now == 2 * 4 * n**2
        del h, y
        assert held.now == 0
    assert held.peak == 2 * 4 * n**2


def test_held_is_at_least_what_the_backward_pass_keeps():
    """Counted another way: each storage that autograd saves, without the model's own."""
    model = work.ready("bert")
    surgery.attach(model, [LoRA(r=2)])
    own, kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    loop = _loop(model, SCHEDULE)
    batch = loop.collate(loop.encodings[:8])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), probe.paced(model, probe.Pace(), dropout=False):
        saved = loop.task.kind.loss(model.train()(**loop.task.kind.inputs(batch)), batch)
    held = fitting.held_b(model, loop.task.kind, batch=batch, pace=probe.Pace(), dropout=False)
    assert sum(kept.values()) <= held < 2 * sum(kept.values())
    assert saved and all(p.grad is None for p in model.parameters())


def test_an_appetite_foretells_other_batches():
    """From one and two middle examples and a long one, what eight of another length hold."""
    model = work.ready("bert")
    surgery.attach(model, [LoRA(r=2)])
    loop = _loop(model, SCHEDULE)
    kind = loop.task.kind
    found = fitting.appetite(model, kind, encodings=loop.encodings, collate=loop.collate, pace=probe.Pace("fp32", "eager"), dropout=False)
    for example in (min(loop.encodings, key=kind.length), max(loop.encodings, key=kind.length)):
        for n in (3, 8):
            held = fitting.held_b(model, kind, batch=loop.collate([example] * n), pace=probe.Pace("fp32", "eager"), dropout=False)
            assert found.of(n, kind.length(example)) == pytest.approx(held, rel=0.15)


def test_the_hungriest_part_is_found():
    """By trying all: n examples of T tokens with n T at most 40, or one."""
    found, lengths = Appetite(100.0, 3.0, 0.5), [5, 9, 21, 50]
    every = [found.of(n, t) for t in lengths for n in range(1, 9) if n * t <= 40 or n == 1]
    assert fitting.worst(found, lengths, batch=8, tokens=40) == max(every)


# --- a limit of memory ----------------------------------------------------------------------------------------------------------


def _loop(model, schedule, *, task=None):
    return training.Loop(model, task or work.text_task(), schedule, training.Settings())


@pytest.fixture
def bare(monkeypatch):
    """A process that holds nothing yet, so that limits in kilobytes mean the step alone."""
    monkeypatch.setattr(fitting, "resident_b", lambda device: 0.0)


def _needs(method, *, checkpointing, tokens):
    """MB that a step of so many tokens takes, by the module's own count."""
    model = work.ready("bert")
    surgery.attach(model, [method])
    loop = _loop(model, SCHEDULE)
    found = fitting._hungriest(loop, checkpointing=checkpointing)
    held = fitting.worst(found, loop.lengths, batch=SCHEDULE.batch, tokens=tokens)
    return fitting.peak_b(0.0, learning=sum(p.numel() for p in loop.parameters.values()), held=held, parts=True) / 1e6


def _fit(method, limit_mb):
    model = work.ready("bert")
    torch.manual_seed(5)
    surgery.attach(model, [method])
    with fitting.within(model, limit_mb) as limits:
        fitted = training.fit(model, work.text_task(), schedule=SCHEDULE, modifiers=limits)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    return fitted, steps.tensors(model), limits


@pytest.mark.parametrize("method", [LoRA(r=2), Full()], ids=str)
def test_a_limit_changes_how_and_not_what(method, bare):
    """First smaller parts, then gradient checkpointing; the losses and the trained values are those of whole batches."""
    plain, values, _ = _fit(method, None)
    longest = 13
    cut_mb, least_mb = (_needs(method, checkpointing=c, tokens=longest) for c in (False, True))
    assert least_mb < cut_mb
    for limit_mb, checkpointing in ((cut_mb * 1.001, False), (cut_mb * 0.999, True)):
        fitted, others, (limit,) = _fit(method, limit_mb)
        assert limit.cut.checkpointing is checkpointing and limit.cut.peak_mb <= limit_mb
        assert [e["loss"] for e in fitted.epochs] == pytest.approx([e["loss"] for e in plain.epochs], rel=1e-4)
        for name, value in values.items():
            torch.testing.assert_close(others[name], value, rtol=1e-3, atol=2e-5)


def test_parts_hold_no_more_tokens_than_chosen(bare, monkeypatch):
    limit_mb, seen = _needs(LoRA(r=2), checkpointing=False, tokens=30), []
    loss = training.Loop.loss
    monkeypatch.setattr(training.Loop, "loss", lambda loop, batch: seen.append([loop.lengths[i] for i in loop.indices]) or loss(loop, batch))
    _, _, (limit,) = _fit(LoRA(r=2), limit_mb)
    assert 13 <= limit.cut.tokens <= 30
    assert len(seen) > 6 and all(len(part) == 1 or len(part) * max(part) <= limit.cut.tokens for part in seen)


def test_what_fits_nothing_names_the_least(bare):
    least_mb = _needs(LoRA(r=2), checkpointing=True, tokens=1)
    with pytest.raises(BudgetError, match="are the least") as refused:
        _fit(LoRA(r=2), least_mb * 0.9)
    assert fitting.show(least_mb * 1e6, "B") in str(refused.value)


# --- time ----------------------------------------------------------------------------------------------------------------------


def test_seconds_are_scaled_to_all_rows_and_epochs():
    """Once + rows (encoding + first epoch + two further ones) + three validations."""
    second = Took(1.0, 2.0)
    found = rehearsal.Rehearsed(epochs=3.0, once=second, encode=second, first=second * 4, later=second * 2, watch=second * 10, answer=second)
    assert found.training(100, watched=5) == second * (1 + 100 * (1 + 4 + 2 * 2) + 3 * 5 * 10)
    half = dataclasses.replace(found, epochs=0.5)
    assert half.training(100, watched=0) == second * (1 + 100 * (1 + 2))


def test_a_rehearsal_leaves_out_what_a_subset_does(place):
    """An epoch of random_subset(keep=0.25) takes a quarter of the steps, and is timed so."""
    asked = place("full + random_subset(keep=0.25)")
    found = rehearsal.rehearse(phases.first_model(asked), asked, k=0)
    assert found.share == pytest.approx(0.25, abs=0.05) and found.later.cpu_s > 0


@pytest.fixture
def place(tmp_path):
    """Makes the plan of a recipe on a tiny backbone."""
    tiny.model("bert", "base").save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")

    def made(recipe, **how):
        backbone, task = backbones.find(str(tmp_path / "bert")), work.text_task(train=96)
        options = Options(Training(epochs=2, batch=8, dtype="fp32"), metering=Metering(power="idle=2W,busy=6W"), **how)
        complete = phases.complete(as_recipe(recipe), backbone, task=task, options=options)
        return phases.Plan(complete, task, backbone, 0, tmp_path / "out", options)

    return made


def test_a_plan_has_a_stage_for_each_phase_and_writes_nothing(place, tmp_path):
    asked = place("lora(r=2) | merge | int8")
    expected = plan.expect(asked)
    assert [stage.name.split("(")[0] for stage in expected.stages] == ["lora", "merge", "int8", "scoring, measuring"]
    assert expected.whole == expected.training + expected.stages[-1].took and expected.training.cpu_s > 0
    assert expected.stages[0].saved_mb > expected.stages[2].saved_mb > 0
    lora = expected.stages[0]
    assert lora.energy_j == pytest.approx(6 * lora.took.wall_s, rel=0.7)  # one thread, busy, as far as others let it
    assert expected.energy.low < expected.energy.value < expected.energy.high and expected.energy.estimate
    each = training.flops_per_example(_attached(asked), asked.task)
    assert lora.flops == pytest.approx(2 * 96 * each, rel=0.3)
    ((spelling, shape, times),) = expected.formats
    assert spelling.startswith("int8") and shape == (16, 16) and all(t.fp32 > 0 for t in times)
    (line,) = [text for text in plan.describe(expected) if text.startswith("int8: ")]
    for dtype in ("fp32", "bf16"):
        assert f"as in {dtype} (1: {getattr(times[0], dtype):.2g}, 8: {getattr(times[1], dtype):.2g}, " in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["full", "lora(r=8) + adam8", "head", "full | top_layers(k=1)"])
def test_a_plan_foretells_what_a_training_has_on_disk(recipe, place, monkeypatch):
    """At the end of its first epoch of two a phase has one checkpoint, frozen features, and what earlier phases left; the run, its models."""
    asked, seen, save = place(recipe), [], checkpoints.save
    expected = plan.expect(asked)

    def on_disk():
        """MB of all numbers in files, but for the random state."""
        tensors = [t for f in asked.out.rglob("*.safetensors") for name, t in load_file(f).items() if name != "random"]
        return sum(t.nbytes for t in (*tensors, *map(np.load, asked.out.rglob("*.npy")))) / 1e6

    monkeypatch.setattr(checkpoints, "save", lambda loop, cursor: save(loop, cursor=cursor) or seen.append(on_disk()))
    phases.walk(asked)
    trained = expected.stages[:-1]
    assert seen == pytest.approx([sum(s.saved_mb for s in trained[:k]) + s.work_mb for k, s in enumerate(trained)], rel=0.05)
    assert on_disk() == pytest.approx(expected.saved_mb, rel=0.05) and expected.disk_mb >= max(seen) * 0.95
    assert any(line.startswith("disk") and " at most, " in line and "[" in line for line in plan.describe(expected))


def test_what_full_has_on_disk_is_16_bytes_a_weight(place):
    """Values, Adam's two moments, and the best epoch's values; nothing where there is but one epoch and it is short."""
    (stage, _) = plan.expect(place("full + schedule(epochs=2)")).stages
    assert stage.work_mb == pytest.approx(4 * stage.saved_mb, rel=0.05)
    assert plan.expect(place("full + schedule(epochs=1)")).stages[0].work_mb == 0.0


def _attached(asked):
    model = phases.first_model(asked)
    surgery.attach(model, [LoRA(r=2)])
    return model


def test_the_verb_prints_a_plan_and_run_keeps_its_limit(place, tmp_path, capsys):
    place("full")
    rows = [f"{'a good' if i % 2 else 'the bad'} film {'was ' * (i % 5)},{i % 2}" for i in range(80)]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]))
    common = [str(tmp_path / "data.csv"), "--backbone", str(tmp_path / "bert"), "--out", str(tmp_path / "out"), "--dtype", "fp32", "--epochs", "1"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "bitfit", *common, "--power", "idle=2W,busy=6W", "--price", "0.30EUR"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and not (tmp_path / "out").exists()
    assert all(word in said for word in ("bitfit", "peak memory", "EUR [", "training", "estimates"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "bitfit", *common, "--max-memory", "1MB"])
    assert ended.value.code == 2 and "are the least" in capsys.readouterr().err and not list((tmp_path / "out").glob("runs/*/run.json"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "bitfit", *common, "--price", "cheap"])
    assert ended.value.code == 2 and "0.30EUR" in capsys.readouterr().err


def test_the_record_of_a_run_has_its_cut(place):
    asked = place("bitfit")
    limited = dataclasses.replace(asked.options, training=dataclasses.replace(asked.options.training, max_memory_mb=1e5))
    (record,) = phases.walk(dataclasses.replace(asked, options=limited))
    assert json.loads(json.dumps(record))["memory_cut"]["limit_mb"] == 1e5
    assert "memory_cut" not in phases.walk(dataclasses.replace(asked, out=asked.out.with_name("other")))[0]


@pytest.mark.parametrize("cache, epochs", [(True, 1), (False, 2)])
def test_a_teacher_is_rehearsed_with_its_pupil(cache, epochs, place, monkeypatch):
    """Its passes fall into the first epoch where they are kept, else into each; a pass of an example is one row of the teacher's outputs."""
    asked, visits, ask = place(f"full | full + distill(teacher=@1, cache={cache})"), [], teachers.Teacher._ask
    monkeypatch.setattr(teachers.Teacher, "_ask", lambda teacher, indices: visits.extend(indices) or ask(teacher, indices))
    model = phases.first_model(asked)
    rehearsal.rehearse(model, asked, k=0)
    found = rehearsal.rehearse(model, asked, k=1)
    assert found.first.cpu_s > 0 and len(visits) - cache == epochs * 3 * 8  # a kept one is asked once more, for the widths of its outputs

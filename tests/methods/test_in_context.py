from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
import work
from test_choices import scores

import paretune as pt
from paretune import inference, phases, processors, runs, seams, surgery, training
from paretune.errors import Incompatible
from paretune.meters.reading import missing
from paretune.methods.readouts.in_context import CONTENT_FREE, InContext
from paretune.options import Metering, Options, Training

TEXT = "{text}\n{label}"  # short, as the tiny models read 64 tokens


def fitted(family="gpt2", **knobs):
    model, task = work.ready(family, "causal"), work.text_task()
    phases.shrink(model, InContext(**{"template": TEXT, "shots": 2, **knobs}), task)
    return model, task


def prompt_of(model):
    return processors.get(model).decode(seams.readout(model).ranked(model).before, skip_special_tokens=True)


def by_hand(family, model, text, words):
    """p (C): the words' normalized joint probabilities behind the prompt and the text, by a plain model and one call per word."""
    tokenizer, plain = tiny.tokenizer(), work.ready(family, "causal")
    number = lambda t: tokenizer(t, add_special_tokens=False)["input_ids"]  # noqa: E731
    prompt, totals = [tiny.CLS, *number(prompt_of(model)), *number(text)], []
    for word in map(number, words):
        with torch.no_grad():
            log_p = plain(input_ids=torch.tensor([prompt + word[:-1]])).logits[0, -len(word) :].log_softmax(-1)
        totals.append(log_p[range(len(word)), word].sum())
    return torch.stack(totals).softmax(0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_calibrated_scores_are_by_hand(family):
    words = ("bad", "so fine", "good")  # of different lengths
    model, task = fitted(family, words=words)
    p_cf = torch.stack([by_hand(family, model, text, words) for text in CONTENT_FREE]).mean(0)
    p = torch.stack([by_hand(family, model, row["text"], words) for row in task.test])
    torch.testing.assert_close(scores(model, task, task.test), p / p_cf, rtol=1e-4, atol=1e-5)  # W p
    found = torch.tensor(training.predict(model, task, rows=task.test))
    torch.testing.assert_close(found, (p / p_cf).softmax(-1), rtol=1e-4, atol=1e-5)
    plain, _ = fitted(family, words=words, calibrate=False)
    torch.testing.assert_close(torch.tensor(training.predict(plain, task, rows=task.test)), p, rtol=1e-4, atol=1e-5)


def test_without_content_every_answer_is_as_likely(monkeypatch):
    monkeypatch.setattr("paretune.methods.readouts.in_context.CONTENT_FREE", ("N/A",))
    model, task = fitted()
    (answer,) = training.predict(model, task, rows=[{"text": "N/A"}])
    assert answer == pytest.approx([1 / 3] * 3, abs=1e-6)
    biased, _ = fitted(calibrate=False)
    (answer,) = training.predict(biased, task, rows=[{"text": "N/A"}])
    assert answer != pytest.approx([1 / 3] * 3, abs=1e-3)


def test_the_prompt_holds_the_shots_in_the_order_asked_for():
    task = work.text_task()
    held = {order: prompt_of(fitted(shots=4, order=order)[0]) for order in ("sorted", "in_turn", "random")}
    drawn = {order: InContext(shots=4, order=order)._drawn(task) for order in held}
    assert [k for k, _ in drawn["sorted"]] == [0, 0, 1, 2] and [k for k, _ in drawn["in_turn"]] == [0, 1, 2, 0]
    rows = {order: sorted((k, row["text"]) for k, row in shots) for order, shots in drawn.items()}
    assert rows["sorted"] == rows["in_turn"] == rows["random"]  # the order alone differs
    for order, shots in drawn.items():
        written = " ".join(f"{row['text']} {task.labels[k]}" for k, row in shots)
        assert held[order].split() == written.split()
    seeds = {tuple(row["text"] for _, row in InContext(shots=4, seed=seed)._drawn(task)) for seed in range(5)}
    assert len(seeds) > 1 and InContext(shots=4)._drawn(task) == drawn["random"]


def test_a_run_counts_its_shots_and_pays_for_its_prompt():
    short, task = fitted(shots=0)
    long, _ = fitted(shots=3)
    assert InContext(template=TEXT, shots=3).fit(work.ready("gpt2", "causal"), phases.Examples(task, tiny.tokenizer())) == 3
    few, many = (inference.Bench(model, task).flops().value for model in (short, long))
    tokens = [len(seams.readout(m).ranked(m).before) for m in (short, long)]
    assert tokens[0] == 1 and many > few * (tokens[1] / 12)  # a row has at most 12 tokens


def test_examples_in_the_prompt_and_trained_weights_meet_on_one_frontier(tmp_path, monkeypatch):
    work.ready("gpt2", "causal").save_pretrained(tmp_path / "gpt2")
    tiny.tokenizer().save_pretrained(tmp_path / "gpt2")
    recipes = ['in_context(shots=3, template="{text}: {label}")', "lora(r=2)"]
    options = Options(training=Training(epochs=1), metering=Metering(power="idle=2W,busy=6W"))
    monkeypatch.setattr(runs, "_peaks", lambda made, options, progress: [missing("MB", "not asked for")] * len(made))  # each takes a process
    front = pt.frontier(work.text_task(), backbone=str(tmp_path / "gpt2"), recipes=recipes, battery="15Wh", out=tmp_path / "out", options=options)
    prompted, trained = (next(point for point in front.all if point.recipe == recipe) for recipe in recipes)
    for figure in ("latency_p50_ms", "throughput_per_s", "energy_per_inference_j", "stored_mb"):
        assert prompted.value(figure) > 0 and trained.value(figure) > 0
    assert prompted.value("flops_per_inference") > 2 * trained.value("flops_per_inference")
    assert prompted.value("train_energy_j") < trained.value("train_energy_j")


def test_zero_shots_and_saved_prompts(tmp_path):
    model, task = fitted(shots=3)
    phases.save_model(model, tmp_path)
    loaded = inference.open_model(tmp_path, task)
    assert training.predict(loaded, task, rows=task.test) == training.predict(model, task, rows=task.test)
    assert prompt_of(loaded) == prompt_of(model) and type(loaded) is not type(work.ready("gpt2"))
    assert prompt_of(fitted(shots=0)[0]) == ""


def test_what_it_refuses():
    task = work.text_task()
    with pytest.raises(Incompatible, match="prompts of examples are for decoders"):
        phases.shrink(work.ready("t5", "seq2seq"), InContext(), task)
    with pytest.raises(Incompatible, match="take fewer shots"):
        fitted(shots=24)
    with pytest.raises(Incompatible, match="is a generation task"):
        phases.shrink(work.ready("gpt2", "causal"), InContext(), work.generation_task())
    model, _ = fitted()
    assert surgery.state(model).adapters == {} and dataclasses.asdict(seams.readout(model))["shots"] == 2

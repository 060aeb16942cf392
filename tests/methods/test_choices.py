from __future__ import annotations

import dataclasses
import functools

import pytest
import tiny
import torch
import work

import paretune
from paretune import backbones, phases, processors, seams, surgery, training
from paretune.errors import Incompatible, RecipeError
from paretune.methods.adapters.lora import LoRA
from paretune.methods.readouts.choices import Choices
from paretune.options import Options
from paretune.readouts import ranking
from paretune.tasks import Rows
from paretune.tasks.kinds.choice import Choice
from paretune.tasks.kinds.classification import Classification

SPEAKERS = (*(f for f in tiny.CAUSAL), *tiny.SEQ2SEQ)
WORDS = ("so bad", "fine", "very good film")  # of different lengths


def kind_of(family):
    return "seq2seq" if family in tiny.SEQ2SEQ else "causal"


def fitted(family, **knobs):
    model, task = work.ready(family, kind_of(family)), work.text_task()
    phases.shrink(model, Choices(**{"words": WORDS, **knobs}), task)
    return model, task


def scores(model, task, rows):
    return torch.stack(training.read(model, task, rows=rows, answers=lambda _, outputs: list(outputs.logits)))


def by_hand(family, text, word):
    """(Σ log p of the word's tokens behind the prompt, their number), by a plain model and one call per answer."""
    model, tokenizer = work.ready(family, kind_of(family)), tiny.tokenizer()
    plain = lambda t: tokenizer(t, add_special_tokens=False)["input_ids"]  # noqa: E731
    if family in tiny.SEQ2SEQ:
        prompt = [tiny.CLS, *plain(text), *plain("\nLabel:"), tiny.SEP]
        target = tokenizer(word)["input_ids"]
        start = model.config.decoder_start_token_id
        given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[start, *target[:-1]]])}
    else:
        prompt, target = [tiny.CLS, *plain(text), *plain("\nLabel:")], plain(word)
        given = {"input_ids": torch.tensor([prompt + target[:-1]])}
    with torch.no_grad():
        log_p = model(**given).logits[0, -len(target) :].log_softmax(-1)
    return float(log_p[range(len(target)), target].sum()), len(target)


@pytest.mark.parametrize("family", SPEAKERS)
def test_scores_are_log_likelihoods_by_hand(family):
    model, task = fitted(family)
    found = scores(model, task, task.test)
    for row, given in zip(task.test, found.tolist(), strict=True):
        wanted = [total / n for total, n in (by_hand(family, row["text"], word) for word in WORDS)]
        assert given == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    summed, _ = fitted(family, normalize=False)
    total = [by_hand(family, task.test[0]["text"], word)[0] for word in WORDS]
    assert scores(summed, task, task.test[:1])[0].tolist() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_answers_in_groups_and_alone_are_the_same(family, monkeypatch):
    model, task = fitted(family)
    wanted = scores(model, task, task.test)
    monkeypatch.setattr(ranking, "CELLS", 1)  # one answer after the other
    torch.testing.assert_close(scores(model, task, task.test), wanted, rtol=1e-4, atol=1e-5)
    one_by_one = torch.cat([scores(model, task, task.test[i : i + 1]) for i in range(len(task.test))])
    torch.testing.assert_close(one_by_one, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_rows_with_choices_of_their_own(family):
    options = [["bad", "a good film"], ["so dull", "fine"], ["scene", "plot"]]
    rows = Rows({"text": t, "options": o, "right": i % 2} for i, (t, o) in enumerate(zip(["a film", "the story was", "great"], options, strict=True)))
    task = dataclasses.replace(
        work.text_task(), kind=Choice(2), columns={"text": "text", "choices": "options", "label": "right"}, labels=(), train=rows, validation=rows, test=rows
    )
    model = phases.shrink(work.ready(family, kind_of(family)), Choices(), task)
    found = scores(model, task, task.test)
    for row, given in zip(task.test, found.tolist(), strict=True):
        assert given == pytest.approx([total / n for total, n in (by_hand(family, row["text"], option) for option in row["options"])], rel=1e-4)
    assert scores(model, task, [{"text": "film " * 100, "options": ["bad", "a good film"], "right": 0}]).isfinite().all()  # cut to what fits
    surgery.attach(model, [LoRA(r=2)], name="phase_2", on_top=True)
    assert work.fitted(model, task, epochs=1.0, warmup=0.0).steps == 1


def test_a_pair_is_two_lines_and_a_long_row_is_cut_at_its_end():
    task = dataclasses.replace(work.text_task(), columns={"text": "text", "pair": "pair", "label": "label"})
    model = phases.shrink(work.ready("gpt2", "causal"), Choices(words=WORDS), work.text_task())
    pair = [{"text": "a film", "pair": "it was good"}]
    assert scores(model, task, pair).tolist()[0] == pytest.approx([s / n for s, n in (by_hand("gpt2", "a film\nit was good", w) for w in WORDS)], rel=1e-4)
    long = [{"text": "the film " * 40}]
    room = 64 - len([tiny.CLS]) - len(tiny.tokenizer()("\nLabel:", add_special_tokens=False)["input_ids"]) - 3
    cut = " ".join(("the film " * 40).split()[:room])
    assert scores(model, work.text_task(), long).tolist()[0] == pytest.approx([s / n for s, n in (by_hand("gpt2", cut, w) for w in WORDS)], rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_the_model_still_writes(family):
    model, plain = fitted(family)[0], work.ready(family, kind_of(family))
    tokens = processors.get(plain)(["the film was"], return_tensors="pt", return_token_type_ids=False)
    assert torch.equal(model.generate(**tokens, max_new_tokens=4, do_sample=False), plain.generate(**tokens, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_training_behind_it_minimizes_the_right_answer_s_mean_nll(family):
    model, task = fitted(family)
    batch = task.kind.collate(training.encode(task, task.train[:4], model=model), processors.get(model))
    outputs = model(**task.kind.inputs(batch))
    loss, count = task.kind.loss(outputs, batch)
    right = [by_hand(family, row["text"], WORDS[task.labels.index(row["label"])]) for row in task.train[:4]]
    assert count == 4 and float(loss.detach()) == pytest.approx(-sum(total / n for total, n in right), rel=1e-4)
    surgery.attach(model, [LoRA(r=2)], name="phase_2", on_top=True)
    fit = work.fitted(model, task, epochs=8.0, lr=2e-2, warmup=0.0)
    assert fit.epochs[-1]["loss"] < fit.epochs[0]["loss"]


def test_what_it_refuses():
    task = work.text_task()
    for model, why in ((work.ready("gpt2"), "and GPT2ForSequenceClassification is none"), (tiny.model("bert", "masked"), "BertForMaskedLM is none")):
        processors.put(model, tiny.tokenizer())
        with pytest.raises(Incompatible, match=why):
            phases.shrink(model, Choices(), task)
    with pytest.raises(Incompatible, match="3 labels of tiny is needed, and 1 are given"):
        fitted("gpt2", words=("bad",))
    with pytest.raises(RecipeError, match="a template has"):
        Choices(template="{label} and {text}")
    with pytest.raises(Incompatible, match="put it first, as in choices"):
        paretune.parse("lora | choices")
    with pytest.raises(Incompatible, match="put vocabulary before it"):
        paretune.parse("choices | vocabulary")
    with pytest.raises(Incompatible, match="leaves 0 for a row"):
        fitted("gpt2", template="a " * 70 + "{text}\n{label}")
    assert isinstance(task.kind, Classification) and seams.readout(fitted("gpt2")[0]) == Choices(words=WORDS)


@pytest.mark.parametrize("recipe, family, why", [
    ("choices", "bert", "needed to score words, and Bert"), ("full | in_context", "bert", "put it first"), ("in_context | full", "bert", "needed to score words"),
    ("full + unlikelihood", "bert", "needed to score words"), ("in_context", "t5", "are for decoders"), ('choices(words=["a"]) | full', "gpt2", "and 1 are given"),
    ("choices | full", "gpt2", None), ("full + unlikelihood", "t5", None), ("full | prototypes", "bert", None),
])  # fmt: skip
def test_a_backbone_that_cannot_be_read_so_is_refused_before_anything_runs(recipe, family, why, tmp_path):
    tiny.model(family, "base").save_pretrained(tmp_path)
    plan = functools.partial(phases.complete, backbone=backbones.find(str(tmp_path)), task=work.text_task(), options=Options())
    if why is None:
        assert plan(paretune.recipe.as_recipe(recipe))
        return
    with pytest.raises(Incompatible, match=why):
        plan(paretune.recipe.as_recipe(recipe))


def test_a_saved_readout_is_a_backbone_that_speaks(tmp_path):
    phases.save_model(fitted("gpt2")[0], tmp_path)
    assert phases.complete(paretune.parse("choices | full"), backbones.find(str(tmp_path)), task=work.text_task(), options=Options())


def test_a_template_s_line_break_stands_in_a_recipe():
    method = Choices(template="{text}\n\\n {label}")
    assert "\n" not in repr(method) and paretune.parse(repr(method)) == method
    assert paretune.parse(r'choices(template="Review: {text}\nSentiment: {label}")') == Choices(template="Review: {text}\nSentiment: {label}")


@pytest.mark.parametrize("name", ["books-gpt2", "stories260K"])
def test_a_real_tokenizer_and_model(name, shared_data):
    """Template and row are read as one text would be, and scores are those of a plain call on it."""
    found, task = backbones.find(str(shared_data / "checkpoints" / name)), work.text_task()
    model = phases.shrink(backbones.load(found, task, speaks=True), Choices(template="{text}\nIt was {label}"), task)
    plain, tokenizer = backbones.load(found, task, speaks=True), processors.get(model)
    row = {"text": "There was a little dog who liked to play in the garden."}
    wanted = []
    for label in task.labels:
        prompt = tokenizer(f"{row['text']}\nIt was")["input_ids"]
        whole = tokenizer(f"{row['text']}\nIt was {label}")["input_ids"]
        assert whole[: len(prompt)] == prompt
        with torch.no_grad():
            log_p = plain(input_ids=torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        wanted.append(float(log_p[range(len(whole) - len(prompt)), whole[len(prompt) :]].mean()))
    assert scores(model, task, [row])[0].tolist() == pytest.approx(wanted, rel=1e-3)

from __future__ import annotations

import pytest
import torch
import work
from test_choices import WORDS, by_hand, fitted

import paretune
from paretune import flow, phases, processors, runs, surgery, training
from paretune.errors import Incompatible
from paretune.methods.adapters.ia3 import IA3
from paretune.methods.adapters.lora import LoRA
from paretune.methods.modifiers.length_norm import LengthNorm
from paretune.methods.modifiers.schedule import Schedule
from paretune.methods.modifiers.unlikelihood import Unlikelihood
from paretune.methods.readouts.choices import Choices
from paretune.recipe import parse
from paretune.registry import line_of


def losses(family, *modifiers):
    """(the loop's loss of four rows and its count, the gradient of what learns) with LoRA on a model that ranks choices."""
    model, task = fitted(family)
    torch.manual_seed(0)
    surgery.attach(model, [LoRA(r=2)], name="phase_2", on_top=True)
    loop = training.Loop(model.eval(), task, Schedule(lr=1e-3, dtype="fp32", batch=4), training.Settings())
    loop.events, loop.pace = [m.events(loop) for m in modifiers], None
    loop._forward = model
    batch = task.kind.collate(training.encode(task, task.train[:4], model=model), processors.get(model))
    loss, count = loop.loss(batch)
    loss.backward()
    return float(loss.detach()), count, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def token_probabilities(family, text, word):
    """p of each token of a word: as the model that ranks gives it, once its sum is the likelihood by hand."""
    model, task = fitted(family, words=(word, *WORDS[1:]))
    outputs = model(**task.kind.inputs(task.kind.collate(training.encode(task, [{"text": text, "label": "bad"}], model=model), processors.get(model))))
    n = int(outputs.lengths[0, 0])
    total, count = by_hand(family, text, word)
    assert n == count and float(outputs.log_probs[0, 0].sum().detach()) == pytest.approx(total, rel=1e-4)
    return outputs.log_probs[0, 0, :n].exp().detach()


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_the_losses_are_the_papers(family):
    task = work.text_task()
    lm = ul = ln = 0.0
    for row in task.train[:4]:
        right = task.labels.index(row["label"])
        beta = torch.tensor([total / n for total, n in (by_hand(family, row["text"], word) for word in WORDS)])
        wrong = torch.cat([token_probabilities(family, row["text"], word) for k, word in enumerate(WORDS) if k != right])
        lm += float(-beta[right])
        ul += float(-(1 - wrong).log().mean())  # −Σ log(1 − p) / Σ |y|
        ln += float(-beta.log_softmax(0)[right])
    for modifiers, wanted in (((), lm), ((Unlikelihood(),), lm + ul), ((LengthNorm(),), lm + ln), ((Unlikelihood(), LengthNorm()), lm + ul + ln)):
        found, count, _ = losses(family, *modifiers)
        assert count == 4 and found == pytest.approx(wanted, rel=1e-4)
    assert losses(family, Unlikelihood(weight=0.5), LengthNorm(weight=2.0))[0] == pytest.approx(lm + 0.5 * ul + 2 * ln, rel=1e-4)


def test_the_gradients_add_up():
    _, _, plain = losses("gpt2")
    _, _, unlikely = losses("gpt2", Unlikelihood())
    _, _, normed = losses("gpt2", LengthNorm())
    _, _, both = losses("gpt2", Unlikelihood(), LengthNorm())
    assert any(not torch.allclose(u, p) for u, p in zip(unlikely, plain, strict=True))
    for p, u, n, b in zip(plain, unlikely, normed, both, strict=True):
        torch.testing.assert_close(b, u + n - p, rtol=1e-3, atol=1e-6)


def test_the_gradient_of_a_wrong_token_is_its_odds():
    """∂(−log(1 − p)) / ∂ log p = p / (1 − p), and nothing for tokens of the right answer or behind an end."""
    from paretune.methods.modifiers.unlikelihood import _Unlikely
    from paretune.readouts.ranking import Scores

    log_p = torch.tensor([[[-0.5, -1.0], [-0.2, 0.0], [-3.0, -0.1]]], requires_grad=True)
    scores = Scores(log_probs=log_p, lengths=torch.tensor([[2, 1, 2]]))
    loss = _Unlikely(1.0).loss(None, {"labels": torch.tensor([0])}, outputs=scores, loss=torch.zeros(()))
    loss.backward()
    p = log_p.detach().exp()
    wanted = torch.tensor([[[0, 0], [1, 0], [1, 1]]]) * p / (1 - p).clamp(min=1e-9) / 3
    torch.testing.assert_close(log_p.grad, wanted)
    assert float(loss.detach()) == pytest.approx(-float((1 - p[0, [1, 2, 2], [0, 0, 1]]).log().sum()) / 3)


def test_a_certain_wrong_token_gives_a_finite_loss():
    from paretune.methods.modifiers.unlikelihood import _Unlikely
    from paretune.readouts.ranking import Scores

    scores = Scores(log_probs=torch.zeros(1, 2, 1), lengths=torch.ones(1, 2))
    assert _Unlikely(1.0).loss(None, {"labels": torch.tensor([0])}, outputs=scores, loss=torch.zeros(())).isfinite()


def test_without_answers_they_refuse():
    model, task = work.ready("bert"), work.text_task()
    surgery.attach(model, [LoRA(r=2)])
    for method in (Unlikelihood(), LengthNorm()):
        with pytest.raises(Incompatible, match="BertForSequenceClassification ranks none"):
            work.fitted(model, task, method)
        with pytest.raises(Incompatible, match="use choices in its place"):
            parse(f"prototypes | lora + {method}")


def test_t_few_is_ia3_with_both():
    assert parse("t_few") == IA3() + Unlikelihood() + LengthNorm() and "|" not in line_of("t_few")


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_t_few_runs_with_choices_put_first(family, tmp_path):
    made = work.ready(family, "seq2seq" if family == "t5" else "causal")
    phases.save_model(made, tmp_path / "backbone")
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in work.text_task(train=60).train))
    given = paretune.task(rows)
    ((text, plan),) = flow.plan_frontier(given, backbone=str(tmp_path / "backbone"), recipes=["t_few + schedule(epochs=1, batch=8)"], out=tmp_path / "out")
    assert [type(phase[0]) for phase in plan.recipe.phases] == [Choices, IA3] and text == "t_few + schedule(epochs=1.0, batch=8)"
    run = runs.make(plan, text)
    assert [phase["role"] for phase in run.record["phases"]] == ["readout", "training"] and run.cost.trainable_parameters > 0
    assert run.predict(["the film was good"])[0]["label"] in given.labels


def test_choices_cannot_come_after_the_losses():
    with pytest.raises(Incompatible, match="put it first, as in choices"):
        parse("ia3 + unlikelihood + length_norm | choices")

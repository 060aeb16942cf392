"""P-tuning: its encoders against the equations, its places against embeddings put together by hand."""

from __future__ import annotations

import pytest
import steps
import tiny
import torch
from torch.nn import functional as F

from paretune import surgery
from paretune.errors import Incompatible
from paretune.methods.adapters.prompt import Prompt
from paretune.methods.adapters.ptuning import PTuning

P = 5


def adapted(family="bert", task="classification", **knobs):
    model = steps.model(family, task)
    torch.manual_seed(3)
    surgery.attach(model, [PTuning(**{"length": P, **knobs})], head=False)
    return model.eval(), next(p for _, _, s in surgery.seams_of(model) for _, _, p in s.patches() if hasattr(p, "e"))


def lstm(x, cell, layer, *, reverse):
    """One direction of one LSTM layer, written out: gates i, f, g, o."""
    end = "_reverse" if reverse else ""
    w, u, b, c = (getattr(cell, f"{n}_l{layer}{end}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = s = torch.zeros(u.shape[1])
    found = []
    for step in x.flip(0) if reverse else x:
        i, f, g, o = (w @ step + b + u @ h + c).chunk(4)
        s = f.sigmoid() * s + i.sigmoid() * g.tanh()
        h = o.sigmoid() * s.tanh()
        found.append(h)
    return torch.stack(found[::-1] if reverse else found)


def test_the_lstm_reads_both_ways():
    _, patch = adapted(hidden=6)
    x = patch.e
    for layer in (0, 1):
        x = torch.cat([lstm(x, patch.lstm, layer, reverse=False), lstm(x, patch.lstm, layer, reverse=True)], -1)
    first, _, second = patch.mlp
    wanted = F.relu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias
    assert x.shape == (P, 6)
    torch.testing.assert_close(patch.virtual(), wanted)


def test_the_other_encoders():
    _, patch = adapted(encoder="mlp", hidden=6)
    first, _, second = patch.mlp
    torch.testing.assert_close(patch.virtual(), F.relu(patch.e @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    _, patch = adapted(encoder="embedding")
    assert torch.equal(patch.virtual(), patch.e) and len(list(patch.parameters())) == 1


@pytest.mark.parametrize("template, order", [
    ((0,), "vvvvvxxxxxxx"), ((1,), "xvvvvvxxxxxx"), ((0, 3), "vvvxxxvvxxxx"), ((1, -1), "xvvvxxxxxvvx"), ((0, 2, -2), "vvxxvvxxxvxx"),
])  # fmt: skip
def test_places_in_the_input(template, order):
    model, patch = adapted(task="base", template=template)
    plain, inputs = steps.model("bert", "base"), tiny.inputs("bert", batch=2)
    with torch.no_grad():
        out, virtual = model(**inputs).last_hidden_state, patch.virtual()
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)):
        x = plain.get_input_embeddings()(ids[mask])
        kinds = arranged(template, len(x))
        both = {"x": iter(x), "v": iter(virtual)}
        with torch.no_grad():
            wanted = plain(inputs_embeds=torch.stack([next(both[k]) for k in kinds])[None]).last_hidden_state[0]
        own = torch.tensor([k == "x" for k in kinds])
        torch.testing.assert_close(out[row, mask][1:], wanted[own][1:])
        torch.testing.assert_close(out[row, 0], wanted[0])
        if len(x) == 7:
            assert kinds == order


def arranged(template, n):
    """Which of x and v stands where, token by token."""
    groups = [len(part) for part in torch.arange(P).tensor_split(len(template))]
    before = {(n + place if place < 0 else place): size for place, size in zip(template, groups, strict=True)}
    return "".join("v" * before.get(i, 0) + "x" for i in range(n))


def test_when_the_phase_ends_the_output_of_the_encoder_is_all_there_is(tmp_path):
    model, patch = adapted(encoder="lstm")
    steps.descend(model, "bert", steps=3)
    with torch.no_grad():
        before, tokens = steps.logits(model, "bert"), patch.virtual()
    surgery.freeze(model)
    surgery.settle(model)
    assert {n: tuple(t.shape) for n, t in patch.state_dict().items()} == {"tokens": (P, 16)} and torch.equal(patch.tokens, tokens)
    assert torch.equal(steps.logits(model, "bert"), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(steps.logits(type(model).from_pretrained(tmp_path), "bert"), before)


def test_it_is_a_prompt_of_the_same_values():
    model, patch = adapted("gpt2", "causal")
    twin = steps.model("gpt2", "causal")
    surgery.attach(twin, [Prompt(length=P)], head=False)
    with torch.no_grad():
        twin.get_parameter("transformer.paretune.default.prompt.tokens").copy_(patch.virtual())
    torch.testing.assert_close(model(**tiny.inputs("gpt2")).logits, twin(**tiny.inputs("gpt2")).logits)
    ids = tiny.inputs("gpt2", batch=1)["input_ids"]
    assert torch.equal(model.generate(ids, max_new_tokens=5, num_beams=2), twin.generate(ids, max_new_tokens=5, num_beams=2))


def test_a_decoder_has_no_places_but_the_first():
    with pytest.raises(Incompatible, match="go before its input"):
        adapted("gpt2", template=(0, 3))

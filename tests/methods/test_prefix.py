"""Prefix tuning: the MLP and what stays of it, starts, gates, positions, published counts, and peft's logits and tokens.

That every call is attention over prefix and text is in tests/spine/test_attention.py.
"""

from __future__ import annotations

import warnings

import pytest
import steps
import tiny
import torch
import transformers
import work

import paretune  # noqa: F401 - lets transformers open our folders
from paretune import anatomy, processors, surgery
from paretune.errors import Incompatible, RecipeError
from paretune.methods.adapters.prefix import KeysAndValues, Prefix
from paretune.recipe import parse

LENGTH = 3


def adapted(method, family="bert", task="classification", *, processor=None, head=False):
    model = steps.model(family, task)
    processors.put(model, processor)
    torch.manual_seed(3)
    surgery.attach(model, [method], head=head)
    return model


def patches(model):
    return [p for _, _, seam in surgery.seams_of(model) for _, _, p in seam.patches() if isinstance(p, KeysAndValues)]


def logits(model, given, **how):
    with torch.no_grad():
        return model(**given, **how).logits


# --- the MLP --------------------------------------------------------------------------------------------------------------------


def test_keys_and_values_are_the_output_of_one_mlp_for_each_kind_of_attention():
    model = adapted(Prefix(length=LENGTH, hidden=5), "t5")
    trunks = model.paretune.default.prefix_shared
    assert sorted(trunks) == ["cross", "decoder", "encoder"] and len(patches(model)) == 6
    for kind, trunk in trunks.items():
        mine = [p for p in patches(model) if ("cross" if p.site.cross else p.site.stack) == kind]
        whole = torch.nn.Linear(5, 2 * 2 * 16)  # the paper's output map is that of all layers together: here 2, of width 16
        whole.weight.data = torch.cat([p.out.weight for p in mine])
        whole.bias.data = torch.cat([p.out.bias for p in mine])
        wanted = whole(torch.tanh(trunk.P @ trunk.W.weight.T + trunk.W.bias)).unflatten(-1, (2, 2, 16))  # (P, layers, K or V, N·D)
        for layer, patch in enumerate(mine):
            torch.testing.assert_close(torch.stack(patch.front(), 1), wanted[:, layer])


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_after_the_phase_the_mlp_is_gone_and_its_keys_and_values_stay(family, tmp_path):
    model = adapted(Prefix(length=LENGTH, zero_start=True, gate=True), family, head=True)
    steps.descend(model, family, steps=3, lr=1e-2)
    wanted, fronts = steps.logits(model, family), [p.front() for p in patches(model)]
    surgery.freeze(model)
    surgery.settle(model)
    own = {n: t.shape for n, t in model.state_dict().items() if "paretune" in n.split(".")}
    assert {n.rpartition(".")[2] for n in own} == {"keys", "values", "opening", "gate"}
    assert all(torch.equal(t, w) for p, front in zip(patches(model), fronts, strict=True) for t, w in zip(p.front(), front, strict=True))
    assert torch.equal(steps.logits(model, family), wanted)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(steps.logits(loaded, family), wanted) and steps.same(steps.tensors(loaded), steps.tensors(model))
    surgery.attach(loaded, [Prefix(length=2)], name="next", on_top=True)
    assert all(".next." in n or n.startswith(tuple(anatomy.head(loaded))) for n in steps.learning(loaded))


@pytest.mark.parametrize("hidden", [1, 512])
def test_published_counts(hidden):
    settings = transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    for length in (1, 10):
        with torch.device("meta"):
            model, twin = (transformers.GPT2LMHeadModel(settings) for _ in range(2))
        surgery.attach(model, [Prefix(length=length, reparametrize="none")])
        assert surgery.count(model) == (49_152 * length, 0)
        surgery.attach(twin, [Prefix(length=length, hidden=hidden)])
        assert surgery.count(twin)[0] == length * 1024 + (1024 + 1) * hidden + (hidden + 1) * 49_152


# --- starts ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("reparametrize", ["mlp", "none"])
def test_the_zero_start_is_the_backbone_bit_for_bit(family, reparametrize):
    for implementation in ("eager", "sdpa"):
        plain, model = steps.model(family), adapted(Prefix(length=LENGTH, reparametrize=reparametrize, zero_start=True), family)
        for one in (plain, model):
            one.set_attn_implementation(implementation)
        assert torch.equal(steps.logits(model, family), steps.logits(plain, family))
    assert Prefix(zero_start=True).exact_at_start and not Prefix().exact_at_start


def test_the_opened_gate_is_the_paper_s_prefix():
    """g = 1 is the prefix as it is, g between 0 and 1 goes straight from the output without it to that with it."""
    wanted = {}
    for opening in (0.0, 0.25, 1.0, None):
        model = adapted(Prefix(length=LENGTH, reparametrize="none", zero_start=opening is not None))
        seen = []
        model.bert.encoder.layer[0].attention.self.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[0]))
        for patch in patches(model):
            patch.values.data += 1.0
            if opening is not None:
                patch.opening.data.fill_(opening)
        steps.logits(model, "bert")
        wanted[opening] = seen[0]
    torch.testing.assert_close(wanted[1.0], wanted[None])
    torch.testing.assert_close(wanted[0.25], 0.75 * wanted[0.0] + 0.25 * wanted[None])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_token_s_gate_is_the_sigmoid_of_what_the_attention_reads(family):
    model = adapted(Prefix(length=LENGTH, reparametrize="none", gate=True, targets="attention_call"), family)
    patch = patches(model)[0]
    module = model.get_submodule(patch.site.path)
    for parameter in patch.parameters():
        parameter.data += torch.randn_like(parameter)
    seen = {}
    module.register_forward_hook(lambda m, a, k, out: seen.update(x=a[0] if a else k["hidden_states"], out=out[0]), with_kwargs=True)
    projection = anatomy.resolve(model, "output")[0].path
    model.get_submodule(projection).register_forward_pre_hook(lambda m, a: seen.update(out=a[0])) if family == "llama" else None
    outs = {}
    for bias in (-1e9, 1e9, None):  # closed, open, as it is
        kept = patch.gate.data[-1].clone()
        if bias is not None:
            patch.gate.data[-1] = bias
        steps.logits(model, family)
        outs[bias] = seen["out"]
        patch.gate.data[-1] = kept
    share = torch.sigmoid(seen["x"] @ patch.gate[:-1] + patch.gate[-1])[..., None]
    torch.testing.assert_close(outs[None], outs[-1e9] + share * (outs[1e9] - outs[-1e9]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_text_as_start_is_the_text_in_front(family):
    """With the positions behind it, the prefix of a text's activations says what the text itself would say."""
    text = "the movie was good"
    method = Prefix(length=4, reparametrize="none", text=text, positions="shifted")
    model, plain = adapted(method, family, "causal", processor=tiny.tokenizer()), steps.model(family, "causal")
    ids = torch.tensor([tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]])
    given = tiny.inputs(family, batch=1)
    both = torch.cat([ids, given["input_ids"]], 1)
    torch.testing.assert_close(logits(model, given), logits(plain, {"input_ids": both})[:, 4:], rtol=1e-4, atol=1e-5)
    cache = plain(ids).past_key_values
    for patch, layer in zip(patches(model), cache.layers, strict=True):
        torch.testing.assert_close(patch.keys, layer.keys[0].transpose(0, 1).flatten(1))
        torch.testing.assert_close(patch.values, layer.values[0].transpose(0, 1).flatten(1))
    assert sum(p.numel() for p in steps.learning(model).values()) == 2 * 4 * sum(p.site.out_features for p in patches(model))


@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
def test_a_short_text_is_repeated_and_a_long_one_cut(family):
    first = adapted(Prefix(length=5, reparametrize="none", text="good plot"), family, processor=tiny.tokenizer())
    again = adapted(Prefix(length=5, reparametrize="none", text="good plot good plot good story"), family, processor=tiny.tokenizer())
    found = [(p.front(), q.front()) for p, q in zip(patches(first), patches(again), strict=True)]
    assert all(torch.equal(a, b) and a.std() > 0 for fronts in found for a, b in zip(*fronts, strict=True))
    assert not first.training and torch.isfinite(steps.logits(first, family)).all()


def test_texts_that_cannot_be():
    with pytest.raises(RecipeError, match='a text gives keys and values.*add reparametrize="none"'):
        Prefix(text="good")
    start = Prefix(reparametrize="none", text="good")
    with pytest.raises(Incompatible, match="needs a text model with its tokenizer.*paretune.processors.put"):
        adapted(start)
    with pytest.raises(Incompatible, match="needs a text model with its tokenizer"):
        adapted(start, "vit", processor=work.processor("vit"))
    model = work.ready("bert")
    with pytest.raises(Incompatible, match="finds no token"):
        surgery.attach(model, [Prefix(reparametrize="none", text=" ")])
    assert steps.same(steps.tensors(model), steps.tensors(steps.model("bert")))
    assert parse(repr(start)).phases == ((start,),)


# --- learning -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("reparametrize", ["mlp", "none"])
def test_no_parameter_is_dead_in_an_encoder_decoder(family, reparametrize):
    model = adapted(Prefix(length=LENGTH, reparametrize=reparametrize), family, "seq2seq")
    steps.disturb(model)
    model(**tiny.inputs(family), labels=torch.tensor([[5, 6, 2]] * 3)).loss.backward()
    for name, parameter in steps.learning(model).items():
        dead = (parameter.grad == 0).all(-1) if name.endswith(("keys", "values", ".P")) else (parameter.grad == 0).all()
        assert not dead.any(), name


class Killed(Exception):
    """The process is gone."""


def test_a_killed_training_resumes_bit_for_bit(tmp_path):
    def report(info):
        if info["step"] == 4:
            raise Killed

    def model():
        return adapted(Prefix(length=LENGTH, hidden=8), "bert", processor=tiny.tokenizer(), head=True)

    straight, killed, again = model(), model(), model()
    work.fitted(straight, work.text_task(), dropout=True)
    with pytest.raises(Killed):
        work.fitted(killed, work.text_task(), folder=tmp_path, report=report, dropout=True)
    work.fitted(again, work.text_task(), folder=tmp_path, dropout=True)
    assert steps.same(steps.tensors(again), steps.tensors(straight))


# --- positions ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "gpt_neox", "opt", "llama", "phi3", "gemma2"])
def test_shifted_positions_begin_behind_the_prefix(family):
    shifted, unchanged = (adapted(Prefix(length=LENGTH, reparametrize="none", positions=p), family, "base") for p in ("shifted", "unchanged"))
    given = tiny.inputs(family, batch=1)
    with torch.no_grad():
        moved = unchanged(**given, position_ids=torch.arange(7)[None] + LENGTH).last_hidden_state
        torch.testing.assert_close(shifted(**given).last_hidden_state, moved)
    if family in ("bert", "gpt2"):  # where a shift of all tokens is seen at all: rotary models see distances alone
        assert not torch.allclose(shifted(**given).last_hidden_state, unchanged(**given).last_hidden_state)


@pytest.mark.parametrize("beams", [1, 2])
def test_each_row_counts_from_behind_its_own_prefix(beams):
    model = adapted(Prefix(length=2, reparametrize="none", positions="shifted"), "gpt2", "causal")
    surgery.attach(model, [Prefix(length=9, reparametrize="none", positions="shifted")], name="long", head=False)
    steps.disturb(model, std=1.0)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": tiny.PAD}
    names, alone = ["long", None, "default"], []
    for row, name in zip(ids, names, strict=True):
        surgery.switch(model, *([name] if name else []))
        alone.append(model.generate(row[None], attention_mask=torch.ones(1, 3).long(), **how))
    with surgery.rows(model, names):
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **how), torch.cat(alone))


def test_what_has_no_positions_to_shift_is_refused():
    with pytest.raises(Incompatible, match="a shift by 64 leaves no room for an input among the 64 positions of Bert"):
        adapted(Prefix(length=64, positions="shifted"))
    for family in ("t5", "bart", "vit"):
        with pytest.raises(Incompatible, match='no position ids that one prefix could shift; use positions="unchanged"'):
            adapted(Prefix(positions="shifted"), family)


# --- peft -----------------------------------------------------------------------------------------------------------------------

TASKS = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "qwen3": "CAUSAL_LM"}


def theirs(family, *, projection=False):
    peft = pytest.importorskip("peft")
    base = steps.model(family, "causal" if TASKS[family] == "CAUSAL_LM" else "classification")
    config = peft.PrefixTuningConfig(task_type=TASKS[family], num_virtual_tokens=LENGTH, prefix_projection=projection, encoder_hidden_size=6)
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config).eval()


def ours(family, reference, method):
    model = adapted(method, family, "causal" if TASKS[family] == "CAUSAL_LM" else "classification")
    with torch.no_grad():
        prompt = reference.prompt_encoder["default"](torch.arange(LENGTH)).view(LENGTH, len(patches(model)), 2, -1)  # (P, layers, K or V, N·D)
        for layer, patch in enumerate(patches(model)):
            patch.keys.copy_(prompt[:, layer, 0])
            patch.values.copy_(prompt[:, layer, 1])
    return model


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_shifted_it_has_pefts_logits(family, projection):
    reference = theirs(family, projection=projection)
    model = ours(family, reference, Prefix(length=LENGTH, reparametrize="none", positions="shifted"))
    given = tiny.inputs(family)
    if TASKS[family] == "CAUSAL_LM":
        keep = given["attention_mask"].bool()
        torch.testing.assert_close(logits(model, given)[keep], logits(reference, given)[keep], rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(logits(model, given), logits(reference, given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.filterwarnings("ignore")
def test_it_generates_pefts_tokens(family, beams):
    reference = theirs(family)
    model = ours(family, reference, Prefix(length=LENGTH, reparametrize="none", positions="shifted"))
    ids = torch.tensor([[tiny.PAD, tiny.PAD, 9, 12], [7, 8, 10, 11]])
    how = {"input_ids": ids, "attention_mask": (ids != tiny.PAD).long(), "max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": tiny.PAD}
    assert torch.equal(model.generate(**how), reference.generate(**how))

"""Prompt tuning against a forward pass with the virtual tokens written out by hand."""

from __future__ import annotations

import pytest
import steps
import tiny
import torch
import transformers
import work
from torch.nn import functional as F

import paretune as pt
from paretune import phases, surgery, training
from paretune.errors import Incompatible, RecipeError
from paretune.methods.adapters.prompt import Prompt
from paretune.methods.readouts.choices import Choices

P = 5


def adapted(method=None, family="bert", task="classification", **how):
    model = steps.model(family, task)
    torch.manual_seed(3)
    surgery.attach(model, [method or Prompt(length=P)], head=False, **how)
    return model.eval()


def tokens(model, name="default"):
    (patch,) = (p for _, _, s in surgery.seams_of(model) for _, _, p in s.patches([name]) if hasattr(p, "tokens"))
    return patch.tokens


def by_hand(family, prompt, inputs, task="base", at=0):
    """The backbone on [x[:at]; P; x[at:]] as embeddings, right padding only."""
    plain = steps.model(family, task)
    x = plain.get_input_embeddings()(inputs["input_ids"])
    x = torch.cat([x[:, :at], prompt.expand(len(x), -1, -1), x[:, at:]], 1)
    mask = torch.cat([torch.ones(len(x), len(prompt), dtype=torch.long), inputs["attention_mask"]], 1)
    with torch.no_grad():
        return plain(inputs_embeds=x, attention_mask=mask, output_hidden_states=True)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
def test_a_decoder_reads_prompt_and_input(family):
    model, inputs = adapted(family=family, task="causal"), tiny.inputs(family)
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, labels=inputs["input_ids"])
    wanted = by_hand(family, tokens(model), inputs, "causal")
    here = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.logits[here], wanted.logits[:, P:][here])
    for found, hand in zip(out.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(found[here], hand[:, P:][here])
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "albert"])
@pytest.mark.parametrize("place", ["before", "after_cls"])
def test_an_encoder_reads_them_before_or_behind_its_class_token(family, place):
    model, inputs = adapted(Prompt(length=P, place=place), family, "base"), tiny.inputs(family)
    with torch.no_grad():
        out = model(**inputs)
    wanted = by_hand(family, tokens(model), inputs, at=int(place == "after_cls"))
    here, hidden = inputs["attention_mask"].bool(), wanted.last_hidden_state
    torch.testing.assert_close(out.last_hidden_state[:, 1:][here[:, 1:]], hidden[:, P + 1 :][here[:, 1:]])
    torch.testing.assert_close(out.last_hidden_state[:, 0], hidden[:, 0])  # what stands first: P's first row, or the class token
    if out.get("pooler_output") is not None:
        torch.testing.assert_close(out.pooler_output, wanted.pooler_output)


def test_an_encoder_decoder_has_them_in_the_encoder_and_sees_them_from_the_decoder():
    model, inputs = adapted(family="t5", task="seq2seq"), tiny.inputs("t5")
    plain, start = steps.model("t5", "seq2seq"), inputs["input_ids"][:, :3]
    x = torch.cat([tokens(model).expand(3, -1, -1), plain.shared(inputs["input_ids"])], 1)
    mask = torch.cat([torch.ones(3, P, dtype=torch.long), inputs["attention_mask"]], 1)
    with torch.no_grad():
        found, wanted = model(**inputs, decoder_input_ids=start), plain(inputs_embeds=x, attention_mask=mask, decoder_input_ids=start)
    torch.testing.assert_close(found.logits, wanted.logits)
    torch.testing.assert_close(found.encoder_last_hidden_state, wanted.encoder_last_hidden_state[:, P:])
    assert surgery.count(model) == (P * 16, 0)
    written = plain.generate(inputs_embeds=x, attention_mask=mask, max_new_tokens=6, num_beams=3)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, num_beams=3), written)


@pytest.mark.parametrize("family", ["t5", "mt5", "bart"])
def test_no_output_of_an_encoder_decoder_has_them(family):
    """Two prompts of two phases, and padding on the left: what is left of each output is what the backbone says of the input's own places."""
    model, inputs = adapted(family=family, task="seq2seq"), padded(ROWS, "left", 7)
    surgery.attach(model, [Prompt(length=2)], name="second", on_top=True, head=False)
    x = torch.cat([torch.cat([tokens(model), tokens(model, "second")]).expand(3, -1, -1), model.get_input_embeddings()(inputs["input_ids"])], 1)
    mask = torch.cat([torch.ones(3, P + 2, dtype=torch.long), inputs["attention_mask"]], 1)
    order = torch.cat([torch.ones(3, P + 2, dtype=torch.long), 2 * inputs["attention_mask"]], 1).argsort(dim=1, stable=True)  # padding, V, x
    places = order.argsort(1)[:, P + 2 :]
    plain, how = steps.model(family, "seq2seq"), {"decoder_input_ids": inputs["input_ids"][:, -3:], "output_hidden_states": True, "output_attentions": True}
    for each in (model, plain):
        each.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**inputs, **how)
        wanted = plain(inputs_embeds=x.take_along_dim(order[..., None], 1), attention_mask=mask.take_along_dim(order, 1), **how)
        again = model(**inputs, **how, return_dict=False)
        handed = model(encoder_outputs=model.get_encoder()(**inputs), attention_mask=inputs["attention_mask"], **how)
    torch.testing.assert_close(found.logits, wanted.logits)
    here = inputs["attention_mask"].bool()
    for h, w in zip((*found.encoder_hidden_states, found.encoder_last_hidden_state, handed.encoder_last_hidden_state),
                    (*wanted.encoder_hidden_states, *[wanted.encoder_last_hidden_state] * 2), strict=True):  # fmt: skip
        torch.testing.assert_close(h[here], w.take_along_dim(places[..., None], 1)[here])
    for a, w in zip(found.encoder_attentions, wanted.encoder_attentions, strict=True):
        assert a.shape == (3, a.shape[1], 7, 7)
        torch.testing.assert_close(a, w.take_along_dim(places[:, None, :, None], 2).take_along_dim(places[:, None, None], 3))
    for a, w in zip(found.cross_attentions, wanted.cross_attentions, strict=True):
        torch.testing.assert_close(a, w.take_along_dim(places[:, None, None], 3))
    assert torch.equal(again[0], found.logits) and again[-1][0].shape == found.encoder_attentions[0].shape
    assert torch.equal(handed.logits, found.logits)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_decoder_writes_the_same_with_and_without_a_cache_and_tells_of_the_input_alone(family, beams):
    model, batch = adapted(family=family, task="seq2seq"), padded(ROWS, "right", 7)
    model.set_attn_implementation("eager")
    how = {"num_beams": beams, "max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
    written = model.generate(**batch, **how)
    assert torch.equal(written.sequences, model.generate(**batch, **how, use_cache=False).sequences)
    assert {h.shape[1] for h in written.encoder_hidden_states} == {a.shape[-1] for a in written.encoder_attentions} == {7}
    assert {a.shape[-1] for step in written.cross_attentions for a in step} == {7}
    plain, table = steps.model(family, "seq2seq"), model.get_input_embeddings()
    x, mask = torch.cat([tokens(model).expand(3, -1, -1), table(batch["input_ids"])], 1), torch.ones(3, P, dtype=torch.long)
    by_hand = plain.generate(inputs_embeds=x, attention_mask=torch.cat([mask, batch["attention_mask"]], 1), **how).sequences
    assert torch.equal(written.sequences, by_hand)


def test_states_of_the_input_alone_are_no_encoder_outputs():
    model, inputs, start = adapted(family="t5", task="seq2seq"), tiny.inputs("t5"), torch.zeros(3, 1, dtype=torch.long)
    told = model(**inputs, decoder_input_ids=start).encoder_last_hidden_state
    with pytest.raises(Incompatible, match="states of 7 tokens, .* without the 5 virtual ones"):
        model(encoder_outputs=(told,), attention_mask=inputs["attention_mask"], decoder_input_ids=start)


def padded(ids, side, width):
    """One batch of rows of different length, padded on a side."""
    fill = [[tiny.PAD] * (width - len(i)) for i in ids]
    rows = [f + i if side == "left" else i + f for i, f in zip(ids, fill, strict=True)]
    mask = [[0] * len(f) + [1] * len(i) if side == "left" else [1] * len(i) + [0] * len(f) for i, f in zip(ids, fill, strict=True)]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


ROWS = [[9, 8, 7, 6, 5, 2], [11, 12, 2], [20, 21, 22, 23, 2]]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "roberta", "opt"])
def test_padding_on_either_side_gives_equal_logits(family):
    model = adapted(family=family)
    with torch.no_grad():
        right, left = (model(**padded(ROWS, side, 8)).logits for side in ("right", "left"))
        alone = torch.cat([model(torch.tensor([row])).logits for row in ROWS])
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(alone, right)


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_an_encoder_reads_them_next_to_its_input_on_whichever_side_it_is_padded(family):
    model, start = adapted(family=family, task="seq2seq"), torch.tensor([[0, 9, 8]])
    with torch.no_grad():
        right, left = (model(**padded(ROWS, side, 8), decoder_input_ids=start.expand(3, -1)).logits for side in ("right", "left"))
        alone = torch.cat([model(torch.tensor([row]), decoder_input_ids=start).logits for row in ROWS])
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(alone, right)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("beams", [1, 4])
def test_a_padded_row_is_continued_as_it_is_alone_with_and_without_a_cache(family, beams):
    model, how = adapted(family=family, task="causal"), {"num_beams": beams, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    batch = padded(ROWS, "left", 6)
    written = model.generate(**batch, **how)
    assert torch.equal(written, model.generate(**batch, **how, use_cache=False)) and torch.equal(written[:, :6], batch["input_ids"])
    for row, ids in zip(written, ROWS, strict=True):
        assert torch.equal(model.generate(torch.tensor([ids]), **how)[0, len(ids) :], row[6:])


def test_attentions_have_the_inputs_shape_at_every_step():
    model, inputs = adapted(family="gpt2", task="causal"), tiny.inputs("gpt2")
    model.set_attn_implementation("eager")
    first = model(**inputs, output_attentions=True, use_cache=True)
    assert first.attentions[0].shape == (3, 4, 7, 7) and first.past_key_values.get_seq_length() == 7 + P
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    then = model(inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=first.past_key_values, output_attentions=True)
    assert then.attentions[0].shape == (3, 4, 1, 8) and then.logits.shape[1] == 1


def test_two_prompts_of_two_phases_both_stand_before_the_input():
    model = adapted(family="gpt2", task="causal")
    surgery.attach(model, [Prompt(length=2)], name="second", on_top=True, head=False)
    inputs = tiny.inputs("gpt2")
    wanted = by_hand("gpt2", torch.cat([tokens(model), tokens(model, "second")]), inputs, "causal").logits[:, P + 2 :]
    here = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[here], wanted[here])


# --- how it starts ---------------------------------------------------------------------------------------------------------------


def test_random_values_lie_between_minus_and_plus_a_half():
    drawn = tokens(adapted(Prompt(length=60), "llama")).detach()
    assert 0.45 < float(drawn.max()) <= 0.5 and -0.5 <= float(drawn.min()) < -0.45 and abs(float(drawn.mean())) < 0.05


def start(init, *, length=P, family="bert", **knobs):
    model = work.ready(family)
    model.config.id2label = {0: "bad", 1: "so good"}
    torch.manual_seed(0)
    surgery.attach(model, [Prompt(length=length, init=init, **knobs)], head=False)
    return tokens(model), model.get_input_embeddings().weight


def test_words_of_the_vocabulary():
    drawn, table = start("vocabulary")
    ids = [int((table == row).all(1).nonzero()[0]) for row in drawn]
    assert len(set(ids)) == P and not set(ids) & set(tiny.tokenizer().all_special_ids)


def test_labels_are_the_mean_of_their_words_and_common_words_fill_up():
    drawn, table = start("classes")
    bad, so, good = (tiny.VOCABULARY.index(w) for w in ("bad", "so", "good"))
    torch.testing.assert_close(drawn[0], table[bad])
    torch.testing.assert_close(drawn[1], (table[so] + table[good]) / 2)
    assert all((table == row).all(1).any() for row in drawn[2:])


def test_a_text_over_and_over():
    drawn, table = start("text", text="the film was good")
    torch.testing.assert_close(drawn, table[[tiny.VOCABULARY.index(w) for w in ("the", "film", "was", "good", "the")]])


@pytest.mark.parametrize("method, family, ready, message", [
    (Prompt(init="classes"), "bert", False, "no tokenizer"), (Prompt(init="text", text="good"), "bert", False, "no tokenizer"),
    (Prompt(init="text"), "bert", True, "text is empty"), (Prompt(init="classes"), "bert", True, "labels of BertFor"),
    (Prompt(place="after_cls"), "gpt2", True, "no class token"), (Prompt(place="after_cls"), "t5", True, "no class token"),
    (Prompt(), "vit", True, "embeds no tokens"), (Prompt(length=64), "gpt2", True, "no room"),
])  # fmt: skip
def test_what_cannot_be_is_refused(method, family, ready, message):
    model = work.ready(family) if ready else steps.model(family)
    with pytest.raises(Incompatible, match=message):
        surgery.attach(model, [method])


def test_a_place_that_is_none():
    with pytest.raises(RecipeError, match="did you mean before"):
        Prompt(place="befor")


def test_a_saved_prompt_needs_no_tokenizer(tmp_path):
    model = work.ready("bert")
    surgery.attach(model, [Prompt(length=P, init="text", text="good")])
    model.save_pretrained(tmp_path)
    assert torch.equal(tokens(type(model).from_pretrained(tmp_path)), tokens(model))


# --- what would be silently wrong is said ------------------------------------------------------------------------------------------


def test_length_plus_prompt_over_the_limit():
    model = adapted(family="gpt2", task="causal")
    assert model(torch.ones(1, 64 - P, dtype=torch.long)).logits.shape[1] == 64 - P
    with pytest.raises(Incompatible, match="60 tokens and 5 virtual ones are 65"):
        model(torch.ones(1, 60, dtype=torch.long))


def test_texts_are_cut_to_what_fits_beside_the_prompt():
    model = work.ready("roberta")
    surgery.attach(model, [Prompt(length=P)])
    assert training.max_length(model) == 64 - P
    surgery.switch(model)
    assert training.max_length(model) == 64


def test_a_static_cache_and_a_mask_of_pairs():
    model = adapted(family="llama", task="causal")
    with pytest.raises(Incompatible, match="static cache|mask"):
        model.generate(torch.tensor([ROWS[0]]), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(Incompatible, match="mask of shape"):
        model(torch.tensor([ROWS[0]]), attention_mask=torch.zeros(1, 1, 6, 6))


def test_a_cache_that_was_cut():
    model, ids = adapted(family="gpt2", task="causal"), torch.tensor([ROWS[0]])
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-P)
    with pytest.raises(Incompatible, match="which filled it"):
        model(ids[:, -1:], attention_mask=torch.ones(1, 7, dtype=torch.long), past_key_values=cache)


def test_a_cache_of_an_earlier_conversation():
    model, ids = adapted(family="llama", task="causal"), torch.tensor([ROWS[0]])
    said = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, eos_token_id=None)
    more = torch.cat([said.sequences, torch.tensor([[9, 8, 7, 6, 5, 4, 9, 8]])], 1)
    with pytest.raises(Incompatible, match="which filled it"):
        model.generate(more, past_key_values=said.past_key_values, max_new_tokens=2)


def test_an_assistant_that_drafts_changes_nothing():
    model, ids = adapted(family="llama", task="causal"), torch.tensor([ROWS[0] * 3])
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **how), model.generate(ids, **how))


# --- several at once ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_prompts_of_different_length_in_one_batch(family):
    model, inputs = adapted(family=family), tiny.inputs(family)
    surgery.attach(model, [Prompt(length=2)], name="short", head=False)
    names = ["short", "default", None]
    with torch.no_grad():
        with surgery.rows(model, names):
            together = model(**inputs).logits
        for row, name in enumerate(names):
            surgery.switch(model, *([name] if name else []))
            torch.testing.assert_close(together[row], model(**inputs).logits[row], rtol=1e-5, atol=1e-6)


def test_rows_are_generated_each_with_its_prompt():
    model = adapted(family="gpt2", task="causal")
    surgery.attach(model, [Prompt(length=2)], name="short", head=False)
    how = {"max_new_tokens": 5, "num_beams": 2, "eos_token_id": None}
    for texts in (ROWS, [ROWS[0]] * 3):  # padded or not: transformers drops a mask that hides nothing
        with surgery.rows(model, ["short", None, "default"]):
            together = model.generate(**padded(texts, "left", 6), **how)
        for row, name in enumerate(["short", None, "default"]):
            surgery.switch(model, *([name] if name else []))
            assert torch.equal(model.generate(torch.tensor([texts[row]]), **how)[0, len(texts[row]) :], together[row, 6:])


def test_the_majority_of_prompts_decides():
    model, names = steps.model("bert"), ["a", "b", "c", "d", "e"]
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        surgery.attach(model, [Prompt(length=P)], name=name, head=False)
        with torch.no_grad():
            tokens(model, name).mul_(20)
    inputs, each = tiny.inputs("bert", batch=6), []
    for name in names:
        surgery.switch(model, name)
        each.append(steps.logits(model, "bert", batch=6).argmax(-1))
    ballots = torch.stack(each)
    assert len(ballots.unique()) > 1 and not (ballots == ballots[0]).all()
    wanted = [max(range(3), key=lambda c: (column == c).sum()) for column in ballots.T]  # noqa: B023
    assert pt.vote(model, inputs, names=names).tolist() == wanted


@pytest.mark.parametrize("template", ["{text} {label}", "the film and the book and the story: {text}\n{label}"])  # the longer one's front is read once for all rows
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_prompts_vote_over_the_answers_that_a_language_model_ranks(family, template):
    """In one batch of one frozen model, each prompt scores the answers as it does alone, and the majority's answer is told."""
    model, task, names = work.ready(family, "seq2seq" if family == "t5" else "causal"), work.text_task(), ["a", "b", "c", "d", "e"]
    phases.shrink(model, Choices(words=("so bad", "fine scene", "good film"), template=template), task)
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        surgery.attach(model, [Prompt(length=2 + seed)], name=name, head=False)
        with torch.no_grad():
            tokens(model, name).mul_(20)
    frozen = {n: p.clone() for n, p in model.named_parameters() if "paretune" not in n}
    batch = task.kind.inputs(task.kind.collate(training.encode(task, task.test, model=model), surgery.state(model).processor))
    alone = []
    for name in names:
        surgery.switch(model, name)
        with torch.no_grad():
            alone.append(model(**batch).logits)
    each = torch.stack(alone, 1)  # (B, prompts, answers)
    with surgery.rows(model, names * len(each)), torch.no_grad():
        together = model(**{key: value.repeat_interleave(5, 0) for key, value in batch.items()}).logits
    torch.testing.assert_close(together.view_as(each), each, rtol=1e-4, atol=1e-5)
    ballots = each.argmax(-1).tolist()
    assert any(len(set(votes)) > 1 for votes in ballots)
    assert pt.vote(model, batch, names=names).tolist() == [max(range(3), key=votes.count) for votes in ballots]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_a_published_count():
    with torch.device("meta"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(transformers.T5Config(d_model=768))
        surgery.attach(model, [pt.Prompt(length=100)], head=False)
    assert surgery.count(model) == (76_800, 0)

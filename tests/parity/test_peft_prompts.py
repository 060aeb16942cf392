"""A prompt with the same values in PEFT: the same logits, and the same tokens from a padded batch, greedy and with beams."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from paretune import surgery
from paretune.methods.adapters.prompt import Prompt

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

P = 5
ROWS = {"input_ids": [[9, 8, 7, 6, 5, 4], [1, 1, 1, 11, 12, 13], [1, 20, 21, 22, 23, 24]], "attention_mask": [[1] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]}


def pair(family: str, task: str, kind: str, **knobs: str) -> tuple[nn.Module, nn.Module]:
    """(our model, PEFT's) with one prompt."""
    plain = tiny.model(family, task)
    for parameter in plain.parameters():
        parameter.data.mul_(8 if parameter.ndim > 1 and family != "t5" else 1)  # else every row is continued alike
    model = copy.deepcopy(plain)
    torch.manual_seed(0)
    surgery.attach(model, [Prompt(length=P, place="before", **knobs)], head=False)
    theirs = peft.get_peft_model(plain, peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=P)).eval()
    (tokens,) = (p for n, p in model.named_parameters() if n.endswith("prompt.tokens"))
    theirs.prompt_encoder["default"].embedding.weight.data[:P] = tokens.data * 4
    tokens.data *= 4
    return model.eval(), theirs


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("beams", [1, 4])
def test_a_left_padded_batch_is_continued_as_peft_does(family: str, beams: int, cache: bool) -> None:
    model, theirs = pair(family, "causal", "CAUSAL_LM", positions="all")
    batch = {k: torch.tensor(v) for k, v in ROWS.items()}
    how = {"num_beams": beams, "use_cache": cache, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = model.generate(**batch, **how)
    assert torch.equal(found, theirs.generate(**batch, **how))
    assert len({tuple(row) for row in found[:, 6:].tolist()}) == 3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("beams", [1, 4])
def test_positions_that_count_tokens_alone_continue_each_row_as_peft_does_without_padding(family: str, beams: int) -> None:
    model, theirs = pair(family, "causal", "CAUSAL_LM")
    batch = {k: torch.tensor(v) for k, v in ROWS.items()}
    how = {"num_beams": beams, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = model.generate(**batch, **how)
    for row, ids, mask in zip(found, batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        alone = theirs.generate(input_ids=ids[mask][None], attention_mask=mask[mask][None].long(), **how)
        assert torch.equal(row[6:], alone[0, int(mask.sum()) :])


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_classes(family: str) -> None:
    model, theirs = pair(family, "classification", "SEQ_CLS")
    inputs = tiny.inputs(family)
    if family in ("gpt2", "llama"):  # PEFT reads the last position of all, padding or not
        inputs = {k: v[:1] for k, v in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_tags() -> None:
    model, theirs = pair("bert", "tokens", "TOKEN_CLS")
    inputs = tiny.inputs("bert")
    here = inputs["attention_mask"].bool()
    here[:, 0] = False  # the class token has no tag; ours gives the head PEFT's first position there
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[here], theirs(**inputs).logits[:, P:][here], rtol=1e-5, atol=1e-5)


def test_encoder_decoder() -> None:
    model, theirs = pair("t5", "seq2seq", "SEQ_2_SEQ_LM")
    inputs = tiny.inputs("t5")
    with torch.no_grad():
        found, wanted = (m(**inputs, decoder_input_ids=inputs["input_ids"]).logits for m in (model, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for beams in (1, 4):
        how = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(**inputs, **how), theirs.generate(**inputs, **how))
    assert surgery.count(model) == (P * 16, 0), "PEFT has as many again, which nothing reads"

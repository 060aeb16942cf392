"""Blockwise attention against its definition on all pairs, its limit, and what padding may change."""

from __future__ import annotations

import pytest
import steps
import tiny
import torch
import work
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from paretune import inference, phases, surgery
from paretune.attention import Call
from paretune.errors import Incompatible, RecipeError
from paretune.methods.transforms.blockwise import Blocks, Blockwise


def replaced(method, query, key, value, *, mask=None):
    patch = Blocks(None)
    patch.method = method
    call = Call(torch.nn.Module(), "sdpa", query, query, key, value, mask, {})
    return patch.compute(lambda call: pytest.fail("the model's own way was taken"), call)[0]


@pytest.mark.parametrize("blocks, shifts", [(2, "0,1"), (3, "0,1,2,1"), (4, "3,0")])
def test_each_head_lets_a_block_see_one_block(blocks, shifts):
    torch.manual_seed(0)
    n, heads = 23, 4
    query, key, value = torch.randn(3, 2, heads, n, 5, dtype=torch.double)
    sizes = [n // blocks + (i < n % blocks) for i in range(blocks)]
    block = torch.repeat_interleave(torch.arange(blocks), torch.tensor(sizes))
    given = [int(s) for s in shifts.split(",")]
    per_head = torch.tensor(given).repeat_interleave(heads // len(given))
    seen = (block[None, :, None] + per_head[:, None, None]) % blocks == block  # (H, n, n)
    wanted = ((query @ key.mT * 5**-0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(replaced(Blockwise(blocks=blocks, permutations=shifts), query, key, value), wanted)


def test_shares_of_heads_are_dealt_out():
    assert Blockwise(blocks=3, local=0.5).shifts(8) == [0, 0, 0, 0, 1, 2, 1, 2]
    assert Blockwise(blocks=2, local=10 / 12).shifts(12) == [0] * 10 + [1] * 2  # the paper's 10:2
    assert Blockwise(blocks=1).shifts(4) == [0] * 4
    with pytest.raises(Incompatible, match="equal groups"):
        Blockwise(permutations="0,1,1").shifts(4)
    with pytest.raises(RecipeError, match="whole numbers"):
        Blockwise(permutations="0,-1")


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_one_block_is_the_model_itself(family):
    model = steps.model(family)
    before = steps.logits(model, family)
    Blockwise(blocks=1).apply(model)
    assert torch.equal(steps.logits(model, family), before)


def test_padding_moves_no_block():
    model = steps.model("bert")
    Blockwise(blocks=3, local=0.5).apply(model)
    ids = tiny.inputs("bert", batch=1, length=8)["input_ids"]
    longer = torch.cat([ids, torch.full((1, 5), tiny.PAD)], 1)
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        padded = model(input_ids=longer, attention_mask=(torch.arange(13) < 8).long()[None]).logits
    torch.testing.assert_close(padded, alone)


def test_rows_of_one_length_are_taken_together_and_each_is_as_alone(monkeypatch):
    """With a bias by distance, padding at either end, and a row of padding alone."""
    torch.manual_seed(0)
    n, method = 12, Blockwise(blocks=3, permutations="0,1")
    query, key, value = torch.randn(3, 6, 2, n, 4, dtype=torch.double)
    bias = torch.randn(1, 2, n, n, dtype=torch.double)
    spans = [(0, 7), (5, 12), (0, 10), (3, 10), (2, 12), (0, 0)]
    keep = torch.tensor([[a <= i < b for i in range(n)] for a, b in spans])
    times, blocks = [], Blocks._blocks
    monkeypatch.setattr(Blocks, "_blocks", lambda self, call, shifts: times.append(len(call.query)) or blocks(self, call, shifts))
    patch = Blocks(None)
    patch.method = method
    mask = keep[:, None, None].expand(6, 1, n, n)
    found = patch.compute(lambda call: call, Call(torch.nn.Module(), "sdpa", query, query, key, value, mask, {"position_bias": bias}))[0]
    assert times == [3, 2]  # of seven tokens, and of ten
    for i, (a, b) in enumerate(spans):
        if b > a:
            q, k, v = (t[i : i + 1, :, a:b] for t in (query, key, value))
            alone = patch.compute(lambda call: call, Call(torch.nn.Module(), "sdpa", q, q, k, v, None, {"position_bias": bias[:, :, a:b, a:b]}))[0]
            torch.testing.assert_close(found[i : i + 1, a:b], alone)
        assert (found[i, [j for j in range(n) if not a <= j < b]] == 0).all()


@pytest.mark.parametrize("blocks, n", [(2, 16), (4, 32)])
def test_its_products_are_those_that_the_card_declares(blocks, n):
    query, key, value = torch.randn(3, 2, 4, n, 8)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        replaced(Blockwise(blocks=blocks, permutations="0,1"), query, key, value)
    assert counted.get_total_flops() == 2 * 2 * 4 * 2 * n**2 // blocks * 8  # of scores and of values


def test_a_token_reaches_its_blocks_alone():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 12, 4)
    method = Blockwise(blocks=3, permutations="0,1")
    before = replaced(method, query, key, value)
    value[:, :, 5] += 1
    moved = (replaced(method, query, key, value) - before).abs().amax((0, 3)) > 0  # (n, H)
    assert moved[:, 0].nonzero().flatten().tolist() == [4, 5, 6, 7] and moved[:, 1].nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_decoders_are_refused():
    with pytest.raises(Incompatible, match="early"):
        Blockwise().apply(steps.model("gpt2"))


def test_saved_and_loaded_it_keeps_its_shifts(tmp_path):
    model = work.ready("bert")
    phases.shrink(model, Blockwise(blocks=3, permutations="0,2"))
    phases.save_model(model, tmp_path)
    loaded = inference.open_model(tmp_path, work.task("bert"))
    assert {p.method for _, _, seam in surgery.seams_of(loaded) for _, _, p in seam.patches()} == {Blockwise(blocks=3, permutations="0,2")}
    assert torch.equal(steps.logits(loaded, "bert"), steps.logits(model, "bert"))

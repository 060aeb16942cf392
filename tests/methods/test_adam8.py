"""adam8: AdamW's own steps, with moments that are dynamic floats by block."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import steps
import torch
import work
from torch import nn

from paretune import surgery
from paretune.errors import Incompatible, RecipeError
from paretune.methods.adapters.full import Full
from paretune.methods.modifiers.adam8 import Adam8, AdamW8, is_mapped
from paretune.weights.numerics import dynamic_float

FIT = {"lr": 1e-2, "weight_decay": 0.1}


def descent(make, count=40, shape=(64, 64), **other):
    """A weight after some steps of a noisy least-squares fit, its loss, and the optimizer."""
    torch.manual_seed(0)
    weight, aim = nn.Parameter(torch.zeros(shape)), torch.randn(shape)
    optimizer = make([weight], **FIT, **other)
    for _ in range(count):
        optimizer.zero_grad()
        x = torch.randn(16, shape[0])
        (x @ (weight - aim) if len(shape) > 1 else x * (weight - aim)).square().mean().backward()
        optimizer.step()
    return weight.detach(), float((weight.detach() - aim).square().mean()), optimizer


def adamw8(parameters, block=256, paged=False, **knobs):
    return AdamW8(torch.optim.AdamW(parameters, **knobs), block=block, paged=paged)


def test_a_first_step_is_that_of_adamw():
    """The moments are rounded after they were used."""
    assert torch.allclose(descent(adamw8, count=1)[0], descent(torch.optim.AdamW, count=1)[0], rtol=1e-6, atol=0)


def test_a_vector_goes_the_way_of_adamw():
    assert torch.allclose(descent(adamw8, shape=(64,))[0], descent(torch.optim.AdamW, shape=(64,))[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("block", [256, 2048])
def test_a_matrix_stays_near_the_way_of_adamw(block):
    """A level is off by at most 5 % of a moment above 1 % of its block, so 40 steps of at most lr stay well within a tenth of the way."""
    (mine, loss, _), (plain, aim, _) = descent(adamw8, block=block), descent(torch.optim.AdamW)
    assert float((mine - plain).norm() / plain.norm()) < 0.1
    assert abs(loss - aim) < 0.01 * aim


def test_it_goes_with_bitsandbytes():
    optimizers = pytest.importorskip("bitsandbytes.optim")

    def theirs(parameters, **knobs):
        return optimizers.AdamW8bit(parameters, min_8bit_size=1, **knobs)

    mine, theirs_weight = descent(adamw8)[0], descent(theirs)[0]
    assert float((mine - theirs_weight).norm() / theirs_weight.norm()) < 0.02


def test_levels_without_a_sign_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_float(signed=False), functional.create_dynamic_map(signed=False))


def test_the_states_of_a_matrix_have_the_stated_bytes():
    state = next(iter(descent(adamw8, count=2, shape=(64, 128), block=2048)[2].state.values()))
    assert state["m"].dtype is state["v"].dtype is torch.uint8
    assert sum(t.nbytes for n, t in state.items() if n != "step") == 64 * 128 * (2 + 8 / 2048)


class Killed(Exception):
    """The process ends here."""


@pytest.mark.parametrize("paged", [False, True])
def test_a_killed_training_resumes_bit_for_bit(tmp_path, paged):
    def trained(report=None):
        model = work.ready("bert")
        surgery.attach(model, [Full()])
        return work.fitted(model, work.text_task(), Adam8(paged=paged), folder=tmp_path, report=report), steps.tensors(model)

    def kill(progress):
        if progress["step"] == 9:
            raise Killed

    whole, aim = trained()
    with pytest.raises(Killed):
        trained(kill)
    again, found = trained()
    assert again == whole and steps.same(found, aim)


def test_paged_states_are_the_same_states_in_pages_of_files_without_a_name():
    plain, paged = descent(adamw8, count=3), descent(adamw8, count=3, paged=True)
    assert torch.equal(plain[0], paged[0])
    (mine,), (theirs,) = (list(made[2].state.values()) for made in (plain, paged))
    assert steps.same(mine, theirs) and is_mapped(theirs["m"]) and is_mapped(theirs["v"]) and not is_mapped(mine["m"])
    file = Path(theirs["m"].untyped_storage().filename)
    assert not file.exists()  # nothing is left behind, however the process ends
    maps = Path("/proc/self/maps")
    if maps.is_file():
        (line,) = [line for line in maps.read_text().splitlines() if str(file) in line]
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        assert first <= theirs["m"].data_ptr() < last and line.split()[1][3] == "s"  # shared: what is written goes to the file's pages


def test_states_that_cannot_be_paged_are_refused():
    with pytest.raises(RecipeError, match="not paged"):
        Adam8(bits=32, paged=True)
    on_a_card = types.SimpleNamespace(parameters={"w": torch.empty(1, device="meta")}, accelerator=types.SimpleNamespace(device="cuda"))
    with pytest.raises(Incompatible, match="the processor's memory, and this model is on cuda"):
        Adam8(paged=True).events(on_a_card)

"""What makes a training step cheaper on a CPU: dropout from few random bits, our attention, the residual stream in bf16; each against its equation."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import steps
import tiny
import torch
import work
from torch import nn
from torch.nn import functional as F

from paretune import anatomy
from paretune.meters.system import Fastest
from paretune.methods.adapters.full import Full
from paretune.methods.modifiers.schedule import Schedule
from paretune.methods.transforms.longformer import Longformer
from paretune.step import dropout, probe, short_attention
from paretune.step.probe import Pace

SHAPE = (3, 4, 5, 8)  # B, H, T, D
OURS = anatomy.attention_function(nn.Module, short_attention.NAME)


# --- dropout --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_drops_its_share_and_keeps_the_mean(dtype):
    torch.manual_seed(0)
    n, p = 2**21, 0.1
    y = dropout.dropped(torch.ones(n, dtype=dtype), p)
    k = round(p * 2**16)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(2**16 / (2**16 - k), dtype=dtype).item()}
    share = float((y == 0).double().mean())
    assert abs(share - k / 2**16) < 4 * math.sqrt(p * (1 - p) / n)
    pairs = float(((y[:-1] == 0) & (y[1:] == 0)).double().mean())  # neighbors come from one draw, and are independent
    assert abs(pairs - p**2) < 4 * math.sqrt(p**2 / n)


def test_a_mask_has_each_threshold_that_sixteen_bits_tell_apart():
    for k in (1, 2**15, 2**16 - 1):
        torch.manual_seed(1)
        kept = dropout.mask(torch.Size([2**20]), k)
        assert kept.element_size() == 1 and set(kept.unique().tolist()) <= {0, -1}
        p = k / 2**16
        assert abs(float((kept == 0).double().mean()) - p) <= 4 * math.sqrt(p * (1 - p) / 2**20)


def test_dropout_is_linear_with_the_same_mask_backward_and_twice():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    factors = dropout.dropped(torch.ones(4, 6, dtype=torch.float64), 0.4)

    def under_the_mask(x):
        torch.manual_seed(3)
        return dropout.dropped(x, 0.4)

    assert torch.equal(under_the_mask(x.detach()), x.detach() * factors)
    assert torch.autograd.gradcheck(under_the_mask, (x,)) and torch.autograd.gradgradcheck(under_the_mask, (x,))


def test_no_dropout_and_nothing_but_dropout_are_torchs_own():
    x = torch.randn(5)
    assert torch.equal(dropout.dropped(x, 0.0), x) and torch.equal(dropout.dropped(x, 1.0), torch.zeros(5))


def test_modules_drop_so_inside_the_block_and_have_their_own_forward_back():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.25))
    with dropout.cheap(model):
        torch.manual_seed(0)
        one = model[0](torch.ones(64))
        torch.manual_seed(0)
        assert torch.equal(one, dropout.dropped(torch.ones(64), 0.5))
        model.eval()
        assert torch.equal(model(torch.ones(8)), torch.ones(8))
        copy.deepcopy(model).train()(torch.ones(8))
    assert not any("forward" in m.__dict__ for m in model.modules())


# --- attention ------------------------------------------------------------------------------------------------------------------


def by_hand(query, key, value, bias, scale):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    weights = (query @ key.mT * scale + bias).softmax(-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("groups", [4, 2])
def test_our_attention_is_its_equation_with_gradients_for_bias_and_grouped_heads(groups):
    torch.manual_seed(0)
    query = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(3, groups, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(1, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(3, 1, 5, 6, dtype=torch.float64)
    mask[1, :, :, 4:] = torch.finfo(torch.float32).min
    module = nn.Module().train()
    out, weights = OURS(module, query, key, value, mask, scaling=0.3, dropout=0.0, position_bias=bias)
    told = by_hand(query, key, value, bias + mask, 0.3)
    assert weights is None and torch.allclose(out, told, atol=1e-12)
    given = torch.randn_like(out)
    learning = (query, key, value, bias)
    for mine, theirs in zip(torch.autograd.grad(out, learning, given), torch.autograd.grad(told, learning, given), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-10)


def test_our_attention_drops_weights_forward_and_backward_with_one_mask():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    module = nn.Module().train()

    def run(*inputs):
        torch.manual_seed(5)
        return OURS(module, *inputs, None, dropout=0.25)[0]

    torch.manual_seed(5)
    factors = dropout.dropped(torch.ones(1, 2, 3, 3, dtype=torch.float64), 0.25)
    weights = (query @ key.mT / 2).softmax(-1)
    assert torch.allclose(run(query, key, value), (weights * factors @ value).transpose(1, 2), atol=1e-12)
    assert torch.autograd.gradcheck(run, (query, key, value))
    module.eval()
    assert torch.allclose(run(query, key, value), (weights @ value).transpose(1, 2), atol=1e-12)


@pytest.mark.parametrize("case", ["long", "as long as ours", "dropout", "bf16", "a bias that learns"])
def test_a_long_call_goes_to_sdpa_where_its_kernel_is_ahead_and_is_the_same_equation(case, monkeypatch):
    torch.manual_seed(0)
    keys = short_attention.LONG + (case != "as long as ours")
    query, key, value = (torch.randn(2, heads, n, 4, requires_grad=True) for heads, n in ((4, 5), (2, keys), (2, keys)))
    mask = torch.zeros(2, 1, 5, keys)
    mask[1, :, :, keys // 2 :] = torch.finfo(torch.float32).min
    bias, called, own = torch.randn(1, 4, 5, keys, requires_grad=case == "a bias that learns"), [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **how: called.append(how) or own(*args, **how))
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "bf16"):
        out, _ = OURS(nn.Module().train(), query, key, value, mask, scaling=0.3, dropout=0.5 * (case == "dropout"), position_bias=bias)
    assert bool(called) == (case == "long") and out.is_contiguous()
    if case in ("long", "as long as ours"):
        told, given = by_hand(query, key, value, bias + mask, 0.3), torch.randn_like(out)
        assert torch.allclose(out, told, atol=1e-5)
        for mine, theirs in zip(*(torch.autograd.grad(x, (query, key, value), given) for x in (out, told)), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_a_model_with_our_attention_gives_what_eager_gives(family):
    model = steps.model(family)
    model.set_attn_implementation("eager")
    told, gradients = steps.logits(model, family), _gradients(model, family)
    model.set_attn_implementation(short_attention.NAME)
    assert torch.allclose(steps.logits(model, family), told, atol=1e-5)
    for name, gradient in _gradients(model, family).items():
        assert torch.allclose(gradient, gradients[name], atol=1e-5), name


def _gradients(model, family):
    model.zero_grad()
    steps.loss(model, family).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- the residual stream --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_see_bf16_and_the_rest_fp32_and_afterwards_all_is_as_before(family):
    model, seen = steps.model(family), {}
    told = steps.logits(model, family)
    layers = [ref.path for ref in anatomy.layers(model)]
    with probe.paced(model, Pace("bf16")):
        for path in layers:
            model.get_submodule(path).register_forward_hook(lambda m, a, out, path=path: seen.update({path: out[0] if isinstance(out, tuple) else out}))
        with probe.autocast(Pace("bf16")):
            narrow = steps.logits(model, family)
        last = {ref.stack: ref.path for ref in anatomy.layers(model)}.values()
        assert {path: x.dtype for path, x in seen.items()} == {p: torch.float32 if p in last else torch.bfloat16 for p in layers}
    assert torch.allclose(narrow.float(), told, atol=0.05 * float(told.abs().max()) + 0.02)
    assert torch.equal(steps.logits(model, family), told)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_losses_in_the_narrow_stream_are_those_of_autocast_within_its_own_error(family):
    def trained(*, stream):
        model = steps.model(family)
        with probe.paced(model, Pace("bf16")) if stream else torch.enable_grad():
            return torch.tensor(steps.descend(model, family, steps=12, autocast=True))

    model = steps.model(family)
    exact = torch.tensor(steps.descend(model, family, steps=12))
    plain, narrow = trained(stream=False), trained(stream=True)
    assert exact[-1] < 0.8 * exact[0]
    assert (narrow - exact).abs().max() < 4 * (plain - exact).abs().max() + 0.02


def test_a_paced_step_draws_from_torchs_generator_so_that_a_resumed_one_is_the_same():
    model, pace = steps.model("bert"), Pace("bf16", short_attention.NAME)
    with probe.paced(model, pace):
        model.train()
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            with probe.autocast(pace):
                found.append(F.cross_entropy(model(**tiny.inputs("bert")).logits.float(), torch.tensor([0, 1, 2])).item())
    assert found[0] == found[1] != found[2]


# --- the probe ------------------------------------------------------------------------------------------------------------------


def tried(takes: dict[Pace, float], *, passes: float, kernels=("ours", "sdpa", "eager")):
    """(the pace that is chosen, the paces that were timed in order)."""
    asked = []

    def timed(pace):
        asked.append(pace)
        return takes[pace] * (10 if len(asked) == 1 else 1)  # the first pass is slow whatever its pace

    return probe.fastest(timed, formats=["bf16", "fp32"], kernels=kernels, passes=passes), asked


TAKES = {Pace("bf16", "ours"): 1.0, Pace("bf16", "sdpa"): 0.8, Pace("bf16", "eager"): 1.4, Pace("fp32", "ours"): 2.0, Pace("fp32", "sdpa"): 0.5}


def test_a_short_phase_only_tells_the_formats_apart():
    assert tried(TAKES, passes=0) == (Pace("bf16", "ours"), [Pace("bf16", "ours"), Pace("bf16", "ours"), Pace("fp32", "ours")])
    slow = TAKES | {Pace("bf16", "ours"): 3.0}
    assert tried(slow, passes=0)[0] == Pace("fp32", "ours")


def test_a_longer_phase_tries_the_kernels_of_the_faster_format_and_what_is_near_again():
    found, asked = tried(TAKES, passes=1000)
    assert found == Pace("bf16", "sdpa")
    assert asked[3:] == [Pace("bf16", "sdpa"), Pace("bf16", "eager"), Pace("bf16", "ours"), Pace("bf16", "sdpa")], "fp32 and eager are far behind"


def test_what_is_hardly_faster_does_not_replace_what_is_likeliest():
    """Else the same seed gave other numbers whenever a clock's noise said so."""
    near = TAKES | {Pace("bf16", "sdpa"): 0.95, Pace("bf16", "eager"): 0.92, Pace("fp32", "ours"): 0.95}
    assert tried(near, passes=1000)[0] == Pace("bf16", "ours")


@pytest.mark.parametrize("passes", [1, 59, 300, 1000])
def test_trials_of_kernels_take_at_most_a_twentieth_of_the_phase(passes):
    even, asked = dict.fromkeys((Pace("bf16", kernel) for kernel in ("ours", "sdpa", "eager")), 1.0), []
    found = probe.fastest(lambda pace: asked.append(pace) or even[pace], formats=["bf16"], kernels=["ours", "sdpa", "eager"], passes=passes)
    assert found == Pace("bf16", "ours") and len(asked) <= passes / 20
    assert len(asked) == {1: 0, 59: 0, 300: 7, 1000: 7}[passes], "each once, the slow first pass again, and all three once more"


def test_nothing_is_timed_where_there_is_nothing_to_choose():
    assert probe.fastest(None, formats=["fp32"], kernels=["own"], passes=100) == Pace("fp32", "own")


@pytest.mark.parametrize(("ratio", "formats"), [(1.3, ["bf16"]), (1 / 3, ["fp32"]), (1.1, ["bf16", "fp32"]), (0.6, ["bf16", "fp32"])])
def test_a_product_of_the_commonest_shape_tells_the_formats_apart(monkeypatch, ratio, formats):
    asked = []
    monkeypatch.setattr(probe.system, "fastest_dtype", lambda **how: asked.append(how) or Fastest("", ratio))
    for family in ("bert", "gpt2"):  # whose weights stand the other way round
        assert probe._formats(steps.model(family), torch.ones(2, 7)) == formats
    hidden = steps.model("bert").config.hidden_size
    assert asked[0]["rows"] == 14 and hidden in asked[0]["shapes"][0]


def test_frozen_maps_are_cast_once_however_their_weights_are_stored():
    for family in ("bert", "gpt2"):
        model = steps.model(family).requires_grad_(False)
        weights = [m.weight for m in model.base_model.modules() if anatomy.is_linear(m)]
        before = [w.data for w in weights]
        with probe.paced(model, Pace("bf16")):
            assert {w.dtype for w in weights} == {torch.bfloat16}
        assert all(w.data is b or torch.equal(w.data, b) and w.dtype == torch.float32 for w, b in zip(weights, before, strict=True))


def test_a_machine_with_a_card_computes_in_bf16_on_its_processor(monkeypatch):
    on_processor = torch.autocast
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "autocast", lambda device, dtype: on_processor(device, dtype) if device == "cpu" else contextlib.nullcontext())
    frozen, x = torch.nn.Linear(4, 4).bfloat16(), torch.ones(2, 4)
    with probe.autocast(Pace("bf16")):
        assert frozen(x).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_a_replaced_attention_is_timed_by_itself(monkeypatch):
    """Longformer without global tokens brings no parameter, and what is fastest for all pairs need not be for its windows."""
    asked = []
    monkeypatch.setattr(probe, "_CHOSEN", {})
    monkeypatch.setattr(probe, "fastest", lambda timed, **how: asked.append(how) or Pace("fp32", "eager"))
    for method in (None, Longformer(window=2, global_tokens=0), None):
        model = work.ready("bert")
        if method is not None:
            method.apply(model)
        work.fitted(model, work.text_task(), epochs=1.0, batch=8, dtype="auto")
    assert len(asked) == 2


@pytest.mark.parametrize("tokens, share, kept, ours", [(300, 0.0, True, True), (600, 0.0, True, False), (600, 0.1, True, True), (600, 0.1, False, False)])
def test_our_attention_is_likelier_for_few_tokens_and_where_weights_are_dropped(tokens, share, kept, ours, monkeypatch):
    monkeypatch.setattr(probe, "_CHOSEN", {})
    monkeypatch.setattr(probe, "fastest", lambda timed, *, kernels, **how: Pace("fp32", kernels[0]))
    model = work.ready("bert")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
    batch = {"input_ids": torch.ones(2, tokens, dtype=torch.long)}
    chosen = probe.choose(model, None, batch=batch, schedule=Schedule(dropout=kept), passes=5)
    assert chosen.attention == (short_attention.NAME if ours else "sdpa")


def test_a_choice_is_made_once_until_it_is_forgotten(monkeypatch):
    asked = []
    monkeypatch.setattr(probe, "_CHOSEN", {})
    monkeypatch.setattr(probe, "fastest", lambda timed, **how: asked.append(how) or Pace("fp32", "eager"))
    for forget in (False, False, True):
        if forget:
            probe.forget()
        work.fitted(work.ready("bert"), work.text_task(), epochs=1.0, batch=8, dtype="auto")
    assert len(asked) == 2


def test_a_training_tells_the_probe_how_long_it_is_and_shows_it_few_tokens(monkeypatch):
    asked = []

    def choose(model, kind, *, batch, schedule, passes):
        asked.append((passes, batch["input_ids"].shape[0]))
        return Pace()

    monkeypatch.setattr(probe, "choose", choose)
    work.fitted(work.prepared(Full(), "bert"), work.text_task(), epochs=2.0, batch=8)
    n = len(work.text_task().train)
    assert asked == [(2 * n / 8, 8)]
    monkeypatch.setattr(probe, "TOKENS", 20)
    work.fitted(work.prepared(Full(), "bert"), work.text_task(), epochs=2.0, batch=8)
    (_, rows) = asked[-1]
    assert 1 <= rows < 8

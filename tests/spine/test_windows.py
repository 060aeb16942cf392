"""Windows in chunks against the same band written out on all pairs, forward and backward, in double precision."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional as F

from paretune.attention import windows
from paretune.attention.windows import Band, banded

LENGTHS = (1, 64, 65, 200, 321)
BANDS = (Band(1), Band(64), Band(70), Band(150), Band(300), Band(5, dilation=2), Band(70, dilation=3))


def inputs(n, *, rows=1, heads=2, size=3, seed=0):
    made = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, n, heads, size, dtype=torch.double, generator=made).transpose(1, 2).requires_grad_() for _ in range(3))


def written_out(query, key, value, *, band, mask=None):
    """softmax over all pairs, those outside the band at −∞: by the definition, diagonal by diagonal."""
    n, d = query.shape[2], band.dilation
    seen = torch.zeros(n, n, dtype=torch.bool)
    for step in range(-band.window, band.window + 1):
        if abs(step * d) < n:
            seen.diagonal(step * d).fill_(True)
    seen[:, : band.first] = True
    seen = seen.tril() if band.causal else seen
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def assert_as_written_out(band, n, *, mask=None, rows=1):
    tensors = inputs(n, rows=rows)
    learns = (*tensors, mask) if mask is not None and mask.requires_grad else tensors
    wanted = written_out(*tensors, band=band, mask=mask)
    found = banded(*tensors[:2], value=tensors[2], band=band, mask=mask)
    real = ~wanted.isnan()  # a query that a mask leaves nothing to see
    direction = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator().manual_seed(1)) * real
    assert found.isfinite().all()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-9, atol=1e-9)
    if real.all():
        for mine, theirs in zip(*(torch.autograd.grad((y * direction).sum(), learns) for y in (found, wanted)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_a_band_is_the_softmax_over_its_keys(band, causal):
    for n in LENGTHS:
        assert_as_written_out(Band(band.window, band.dilation, causal), n)


@pytest.mark.parametrize("band", [Band(64, first=1), Band(70, first=3), Band(30, dilation=2, first=5), Band(64, causal=True, first=2), Band(8, first=90)], ids=str)
def test_every_query_sees_the_first_keys_once(band):
    for n in LENGTHS:
        assert_as_written_out(Band(band.window, band.dilation, band.causal, min(band.first, n)), n)


@pytest.mark.parametrize("kind", ["padding", "texts", "added"])
@pytest.mark.parametrize("band", [Band(64), Band(70, causal=True), Band(20, dilation=3), Band(64, first=2)], ids=str)
def test_any_mask_is_kept(band, kind):
    n, made = 400, torch.Generator().manual_seed(2)
    if kind == "padding":  # as transformers gives it: the same for all queries, by a stride of 0
        mask = (torch.arange(n) < torch.tensor([[n], [250]]))[:, None, None, :].expand(2, 1, n, n)
    elif kind == "texts":  # two texts packed into one row
        text = (torch.arange(n) > 170).long()
        mask = (text[:, None] == text)[None, None].expand(2, 1, n, n)
    else:
        mask = torch.randn(1, 2, n, n, dtype=torch.double, generator=made).requires_grad_()
    assert_as_written_out(band, n, mask=mask, rows=2)


def test_what_is_far_changes_nothing():
    query, key, value = inputs(400)
    band = Band(64, causal=True)
    before = banded(query, key, value=value, band=band)
    with torch.no_grad():
        key[:, :, 300] += 5
        value[:, :, 300] += 5
    moved = (banded(query, key, value=value, band=band) - before).abs().amax((0, 2, 3)) > 0
    assert moved.nonzero().flatten().tolist() == list(range(300, 365))


def test_float32_is_as_near_as_fused_attention():
    query, key, value = (t.detach().float() for t in inputs(700, size=32))
    wanted = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    torch.testing.assert_close(banded(query, key, value=value, band=Band(700)), wanted, rtol=1e-4, atol=1e-5)


def test_nothing_is_held_that_grows_with_the_square_of_the_length():
    """The largest tensor that a forward and backward pass makes: twice the length, twice the size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    self.size = max(self.size, t.untyped_storage().nbytes())
            return out

    sizes = []
    for n in (1024, 2048, 4096):
        tensors = tuple(t.detach().float().requires_grad_() for t in inputs(n, size=8))
        with Largest() as largest:
            banded(*tensors[:2], value=tensors[2], band=Band(64)).sum().backward()
        sizes.append(largest.size)
    assert sizes[2] <= 2.1 * sizes[1] and sizes[2] < 4 * 4096 * 4096


def test_the_probe_finds_a_length_within_its_search_and_is_asked_once():
    found = windows.crossover(16)
    assert found in [64 * k for k in (*windows.LENGTHS, 2 * windows.LENGTHS[-1])] and windows.crossover(16) == found


def test_a_random_band_is_right():
    pick = random.Random(3)
    for _ in range(12):
        n = pick.randint(1, 500)
        assert_as_written_out(Band(pick.randint(1, 200), pick.choice((1, 1, 2, 4)), pick.random() < 0.5, min(n, pick.choice((0, 0, 1, 4)))), n)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", [None, "padding", "texts"])
@pytest.mark.parametrize("band", [Band(20), Band(150, causal=True), Band(64, first=2)], ids=str)
def test_what_a_cuda_device_computes_is_the_band(band, kind):
    """FlexAttention, here uncompiled and without gradients, which it has on a card alone."""
    n = 300
    query, key, value = (t.detach() for t in inputs(n, rows=2, size=4))
    mask = None
    if kind == "padding":
        mask = (torch.arange(n) < torch.tensor([[n], [250]]))[:, None, None, :].expand(2, 1, n, n)
    elif kind == "texts":
        text = (torch.arange(n) > 170).long()
        mask = (text[:, None] == text)[None, None].expand(2, 1, n, n)
    wanted = written_out(query, key, value, band=band, mask=mask)
    found = windows.by_flex(query, key, value=value, band=band, mask=mask)
    real = ~wanted.isnan()
    assert found.isfinite().all()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("band, how", [(Band(9, dilation=2), {}), *((Band(9), how) for how in ({"dropout": 0.1}, {"cap": 1.0}, {"mask": torch.zeros(1, 1, 30, 30)}))])
def test_what_flex_cannot_say_is_left_to_chunks(band, how):
    query, plain = torch.randn(1, 2, 30, 16), {"mask": None, "dropout": 0.0, "cap": None}
    assert windows._fits_flex(query, band=Band(9), **plain)
    assert not windows._fits_flex(query, band=band, **{**plain, **how})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has gradients on a CUDA device alone")
def test_on_a_cuda_device_gradients_are_those_of_the_band():
    tensors = tuple(t.detach().float().requires_grad_() for t in inputs(500, size=16))
    query, key, value = (t.cuda() for t in tensors)
    band = Band(64, first=1)
    ways = [banded(query, key, value=value, band=band).cpu(), written_out(*tensors, band=band)]
    for mine, theirs in zip(*(torch.autograd.grad(y.square().sum(), tensors) for y in ways), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)

"""The promises of every transform, over the whole registry and all tiny families."""

from __future__ import annotations

import copy
import json

import pytest
import steps
import tiny
import torch
import work

import paretune  # noqa: F401 - lets transformers open our folders
from paretune import anatomy, inference, phases, processors, registry, store, surgery
from paretune.attention.efficient import AttentionTransform
from paretune.errors import Incompatible
from paretune.roles import Trail, Transform
from paretune.weights.packed import Packed, Packing, unpack

CASES = [(work.biting(name), family) for name in registry.names("transform") for family in tiny.FAMILIES]
LOSSY = 0.25  # the largest share of the logits' norm that a changed number format may cost two layers of width 16


def reason(method: Transform, family: str) -> str:
    """Why the transform refuses this family; docs/matrix.md shows it."""
    try:
        phases.shrink(work.prepared(method, family), method, work.task(family))
    except Incompatible as error:
        return str(error)
    return ""


REFUSED = [(m, f) for m, f in CASES if reason(m, f)]
every_case = pytest.mark.parametrize("method, family", [pytest.param(m, f, id=f"{m}-{f}") for m, f in CASES if (m, f) not in REFUSED])


def changed(method: Transform, family: str, kind: str = "classification"):
    """(the model before, the model after)."""
    model = work.prepared(method, family, kind)
    before = copy.deepcopy(model)
    after = phases.shrink(model, method, work.task(family) if kind == "classification" else work.generation_task())
    assert after is model and type(after) is type(before)
    return before, after


def outputs(model, family):
    """Logits of the task's test rows, read by the model's own processor, as no fixed ids survive a new vocabulary."""
    given = work.task(family)
    batch = given.kind.collate(given.encode(given.test, processors.get(model), config=model.config), processors.get(model))
    batch = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        return model(**batch).logits.float()


@pytest.mark.parametrize("method, family", REFUSED, ids=[f"{m}-{f}" for m, f in REFUSED])
def test_a_refusal_gives_its_reason_and_changes_nothing(method, family):
    model = work.prepared(method, family)
    before = steps.tensors(model)
    with pytest.raises(Incompatible) as error:
        phases.shrink(model, method, work.task(family))
    assert len(str(error.value).split()) > 5
    assert steps.same(before, steps.tensors(model))


@every_case
def test_the_stored_size_is_that_of_its_tensors(method, family, tmp_path):
    _, model = changed(method, family)
    phases.save_model(model, tmp_path)
    file = tmp_path / "model.safetensors"
    with file.open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    own = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in model.state_dict().values()}  # tied tensors are stored once
    assert file.stat().st_size == header + sum(own.values())
    assert store.stored_mb(tmp_path) * 1e6 == pytest.approx(sum(p.stat().st_size for p in tmp_path.iterdir()))


@every_case
def test_saved_and_loaded_it_gives_the_same(method, family, tmp_path):
    _, model = changed(method, family)
    phases.save_model(model, tmp_path)
    loaded = inference.open_model(tmp_path, work.task(family))
    assert torch.equal(outputs(loaded, family), outputs(model, family))
    plain = phases.loads_with(tmp_path) == "transformers"
    assert plain == ("quantization_config" not in json.loads((tmp_path / "config.json").read_text()))


@every_case
def test_a_second_application_changes_nothing_or_is_refused(method, family):
    _, model = changed(method, family)
    before, wanted = steps.tensors(model), outputs(model, family)
    try:
        trail = Trail(attached=tuple(m for ms in surgery.state(model).adapters.values() for m in ms))
        if trail.attached or not _needs_adapter(method):
            method.follow(method.follow(trail))
        phases.shrink(model, method, work.task(family))
    except Incompatible as error:
        assert len(str(error).split()) > 5
    assert steps.same(before, steps.tensors(model)) and torch.equal(outputs(model, family), wanted)


def _needs_adapter(method: Transform) -> bool:
    try:
        method.follow(Trail())
    except Incompatible:
        return True
    return False


@every_case
def test_the_error_is_bounded(method, family):
    before, after = changed(method, family)
    wanted, found = outputs(before, family), outputs(after, family)
    assert found.isfinite().all() and found.shape == wanted.shape
    if isinstance(method, Packing):  # each map as near as its format says, and the model that of the maps' own values
        for path, module in ((p, m) for p, m in after.named_modules() if isinstance(m, Packed)):
            weight = anatomy.weight(before.get_submodule(path))
            assert (module.dequantized() - weight).norm() <= method.error * weight.norm(), path
        plain = copy.deepcopy(after)
        assert unpack(plain)
        wanted = outputs(plain, family)
    if not _needs_adapter(method) and method.follow(Trail()).weights != "float":
        assert (found - wanted).norm() <= LOSSY * wanted.norm()


@pytest.mark.parametrize("family, kind", [("gpt2", "causal"), ("llama", "causal"), ("t5", "seq2seq")])
@pytest.mark.parametrize("name", registry.names("transform"))
def test_it_generates(name, family, kind):
    if reason(work.biting(name), family):
        with pytest.raises(Incompatible):
            changed(work.biting(name), family, kind)
        return
    _, model = changed(work.biting(name), family, kind)
    tokens = processors.get(model)(["the film was", "good"], return_tensors="pt", padding=True)
    ids = model.generate(**tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert ids.shape[0] == 2 and int(ids.max()) < len(processors.get(model))
    with torch.no_grad():  # without the cache of keys and values, the same tokens
        again = model.generate(**tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(ids, again)


@pytest.mark.parametrize("method, family", [(m, f) for m, f in CASES if (m, f) not in REFUSED and isinstance(m, AttentionTransform)], ids=str)
def test_another_attention_is_another_function(method, family):
    """The promises here would be kept by any method that does nothing to a tiny input; weights are large enough for attention to matter."""
    model = work.ready(family)
    steps.disturb(model.requires_grad_(True), std=0.5)
    before = outputs(model, family)
    phases.shrink(model, method, None)
    assert not torch.allclose(outputs(model, family), before, rtol=0.01, atol=0.01)


@every_case
def test_a_deep_copy_is_equal(method, family):
    _, model = changed(method, family)
    assert torch.equal(outputs(copy.deepcopy(model), family), outputs(model, family))

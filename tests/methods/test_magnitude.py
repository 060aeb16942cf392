from __future__ import annotations

import math

import pytest
import steps
import tiny
import torch
import work
from torch import nn

from paretune import anatomy, inference, phases, store, surgery
from paretune.errors import Incompatible, RecipeError
from paretune.methods.adapters.full import Full
from paretune.methods.adapters.lora import LoRA
from paretune.methods.transforms.magnitude import Magnitude
from paretune.recipe import parse
from paretune.weights.sparsity import SparseLinear


def matrices(model):
    """The weight of each place, (O, I), as the model computes with it; a fused map is three."""
    found = {}
    for site in anatomy.resolve(model, "linear", kind="linear"):
        weight = anatomy.weight(model.get_submodule(site.path)).detach()
        found[site] = (weight if site.rows is None else weight[list(site.rows)]).clone()
    return found


def pruned(family, **knobs):
    model = work.ready(family)
    before = matrices(model)
    Magnitude(**knobs).apply(model)
    after = {(s.path, s.place): w for s, w in matrices(model).items()}
    return [(w, after[s.path, s.place]) for s, w in before.items()]


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_exactly_the_smallest_of_each_map_are_zero(family, sparsity):
    for before, after in pruned(family, sparsity=sparsity):
        zeros = math.floor(sparsity * before.numel() + 1e-9)
        assert int((after == 0).sum()) == zeros
        smallest = set(before.abs().flatten().sort().indices[:zeros].tolist())
        assert set((after == 0).flatten().nonzero().flatten().tolist()) == smallest
        assert torch.equal(after[after != 0], before[after != 0])


def test_of_each_row_and_of_all_maps_together():
    for before, after in pruned("bert", scope="row", sparsity=0.3):
        assert ((after == 0).sum(1) == math.floor(0.3 * before.shape[1])).all()
    pairs = pruned("bert", scope="global", sparsity=0.3)
    size = sum(before.numel() for before, _ in pairs)
    assert sum(int((after == 0).sum()) for _, after in pairs) == math.floor(0.3 * size)
    removed = max(float(before[after == 0].abs().max()) for before, after in pairs)
    assert removed <= min(float(after[after != 0].abs().min()) for _, after in pairs)


@pytest.mark.parametrize("pattern, n, m", [("2:4", 2, 4), ("4:8", 4, 8)])
def test_of_each_group_n_of_m_stay_and_are_the_largest(pattern, n, m):
    for before, after in pruned("gpt2", pattern=pattern):
        kept, groups = (after != 0).view(len(after), -1, m), before.abs().view(len(before), -1, m)
        assert (kept.sum(-1) == n).all()
        assert (torch.where(kept, groups, torch.inf).amin(-1) >= torch.where(kept, 0.0, groups).amax(-1)).all()


def test_zeros_stay_zero_and_the_rest_learns_to_the_disk_and_back(tmp_path):
    model, given = work.ready("bert"), work.task("bert")
    phases.shrink(model, Magnitude(sparsity=0.7), given)
    zero = {p: m.weight == 0 for p, m in model.named_modules() if isinstance(m, SparseLinear)}
    before = {p: model.get_submodule(p).weight.detach().clone() for p in zero}
    surgery.attach(model, [Full()])
    learning = sum(p.numel() for n, p in steps.learning(model).items() if not n.startswith(("classifier", "bert.pooler")))
    assert surgery.count(model)[0] == learning - sum(int(mask.sum()) for mask in zero.values())
    work.fitted(model, given, weight_decay=0.1)
    surgery.freeze(model)
    surgery.settle(model)
    for path, mask in zero.items():
        weight = model.get_submodule(path).weight
        assert bool((weight[mask] == 0).all()) and bool((weight[~mask] != before[path][~mask]).float().mean() > 0.9)
    phases.save_model(model, tmp_path)
    loaded = inference.open_model(tmp_path, given)
    assert torch.equal(steps.logits(loaded, "bert"), steps.logits(model, "bert"))
    assert all(torch.equal(loaded.get_submodule(p).weight == 0, mask) for p, mask in zero.items())


def test_the_file_is_a_dense_one_less_its_zeros_plus_a_bit_per_weight(tmp_path):
    dense, sparse = work.ready("bert"), work.ready("bert")
    Magnitude(sparsity=0.9).apply(sparse)
    for name, model in (("dense", dense), ("sparse", sparse)):
        phases.save_model(model, tmp_path / name)
    sizes = [m.numel() for m in matrices(dense).values()]
    saved = sum(4 * math.floor(0.9 * n) - math.ceil(n / 8) for n in sizes)
    files = {name: tmp_path / name / "model.safetensors" for name in ("dense", "sparse")}
    tensors = {name: file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for name, file in files.items()}
    assert tensors["dense"] - tensors["sparse"] == saved
    assert phases.loads_with(tmp_path / "sparse") == "transformers+paretune"
    assert store.stored_mb(tmp_path / "sparse") > 0


def test_a_state_dict_goes_back_into_a_sparse_model():
    model = work.ready("gpt2")
    Magnitude().apply(model)
    state, wanted = steps.tensors(model), steps.logits(model, "gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert not torch.equal(steps.logits(model, "gpt2"), wanted)
    model.load_state_dict(state)
    assert torch.equal(steps.logits(model, "gpt2"), wanted)


def test_more_zeros_later_keep_those_of_before():
    model = work.ready("bert")
    Magnitude(sparsity=0.5).apply(model)
    first = {s.path: w == 0 for s, w in matrices(model).items()}
    for again, zeros in ((0.75, 0.75), (0.6, 0.75)):
        Magnitude(sparsity=again).apply(model)
        for site, weight in matrices(model).items():
            assert bool((weight[first[site.path]] == 0).all()) and int((weight == 0).sum()) == math.floor(zeros * weight.numel())


def test_int8_packs_a_sparse_model_and_keeps_its_zeros(tmp_path):
    model = phases.shrink(work.ready("bert"), Magnitude())
    zero = {s.path: w == 0 for s, w in matrices(model).items()}
    phases.shrink(model, parse("int8").phases[0][0])
    for path, mask in zero.items():
        assert bool((model.get_submodule(path).dequantized()[mask] == 0).all())
    phases.save_model(model, tmp_path)
    assert torch.equal(steps.logits(inference.open_model(tmp_path, work.task("bert")), "bert"), steps.logits(model, "bert"))


def test_no_merge_fills_the_zeros():
    for text in ("magnitude | lora | merge", "lora | magnitude | merge", "magnitude | int8 | lora | merge"):
        with pytest.raises(Incompatible, match="would undo|int8|float"):
            parse(text).check()
    parse("lora | merge | magnitude | full | merge").check()
    model = work.ready("bert")
    Magnitude().apply(model)
    surgery.attach(model, [LoRA()])
    with pytest.raises(Incompatible, match="has fixed the form"):
        surgery.merge(model)


def test_mistakes_are_refused():
    with pytest.raises(RecipeError, match="leaves one half"):
        Magnitude(sparsity=0.7, pattern="2:4")
    with pytest.raises(RecipeError, match="a pattern says itself"):
        Magnitude(scope="row", pattern="2:4")
    odd = tiny.model("bert", config={"hidden_size": 18, "num_attention_heads": 3})
    with pytest.raises(Incompatible, match="18 inputs"):
        Magnitude(pattern="2:4").apply(odd)
    with pytest.raises(Incompatible, match="computes with the weights"):
        parse("dora | magnitude").check()
    tied = tiny.model("bert")
    tied.bert.encoder.layer[1].intermediate.dense.weight = tied.bert.encoder.layer[0].intermediate.dense.weight
    with pytest.raises(Incompatible, match="shared with another module"):
        Magnitude().apply(tied)
    assert not any(isinstance(m, SparseLinear) for m in tied.modules()) and isinstance(tied.classifier, nn.Linear)

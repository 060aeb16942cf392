"""Codes and scales beside those of bitsandbytes and torchao, and bitsandbytes' own files read and written."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from paretune.errors import Incompatible
from paretune.methods.transforms import int8
from paretune.methods.transforms.int8 import Int8
from paretune.methods.transforms.llm_int8 import LLMInt8
from paretune.methods.transforms.nf4 import NF4
from paretune.weights import bitsandbytes_format
from paretune.weights.numerics import absmax, dynamic_float, normal_float, zero_point
from paretune.weights.packed import PackedLinear

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional
_dequantize_4bit_compute = pytest.importorskip("bitsandbytes.backends.default.ops")._dequantize_4bit_compute
pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes warns of kernels that it could download


def weight(rows=96, columns=320):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    w[3] = 0
    w[5, 7] = 1.5
    return w


def packed(method, linear):
    module = method.empty(linear)
    module.pack(linear)
    return module


def test_the_tables_of_levels_are_bitsandbytes():
    assert torch.equal(normal_float(), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_float(), functional.create_dynamic_map())


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("shape", [(96, 320), (7, 33)])
def test_nf4_codes_constants_and_weights_are_bitsandbytes(block, shape):
    w = weight(*shape)
    theirs, state = functional.quantize_4bit(w, blocksize=block, quant_type="nf4")
    method = NF4(block=block, double_quant=False)
    ours = method.encode(w)
    whole = w.numel() // 2  # the last half of a byte may belong to no weight
    assert torch.equal(ours["weight"][:whole].view(torch.uint8), theirs.flatten()[:whole]) and torch.equal(ours["absmax"], state.absmax)
    # The kernel in Python: bitsandbytes 0.50's compiled one is wrong for CPUs where a block lies in two rows.
    wanted = _dequantize_4bit_compute(theirs.flatten(), state.absmax, state.code, block, shape, torch.float32)
    assert torch.equal(method.decode(ours, shape, rows=slice(None)), wanted)
    if shape[1] % block == 0:
        assert torch.equal(wanted, functional.dequantize_4bit(theirs, state))


def test_doubly_quantized_constants_are_bitsandbytes():
    """The compiled kernel looks codes up in a coarse table, and so is up to 3 codes off on some; the one in Python is exact."""
    w = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0)) * 0.02
    theirs, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    ours = NF4().encode(w)
    assert torch.equal(ours["weight"].view(torch.uint8), theirs.flatten())
    torch.testing.assert_close(ours["nested_offset"], state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["nested_absmax"], state.state2.absmax, rtol=1e-5, atol=0)
    apart = (ours["absmax"].int() - state.absmax.int()).abs()
    assert apart.max() <= 3 and (apart > 0).float().mean() <= 0.005


@pytest.mark.parametrize("double", [True, False])
def test_a_checkpoint_of_bitsandbytes_is_read_and_written(double):
    linear = nn.Linear(64, 48)
    theirs = bitsandbytes.nn.Linear4bit(64, 48, quant_type="nf4", compress_statistics=double)
    theirs.load_state_dict(linear.state_dict())
    theirs.to("cpu")
    if theirs.weight.quant_state is None:
        theirs.weight._quantize("cpu")
    saved = {f"0.{n}": t for n, t in theirs.state_dict().items()}
    model = nn.Sequential(nn.Linear(64, 48))
    assert bitsandbytes_format.read(model, saved) == ["0"]
    found = model[0]
    assert isinstance(found, PackedLinear) and found.method == NF4(double_quant=double) and torch.equal(found.bias, theirs.bias)
    wanted = functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    torch.testing.assert_close(found.dequantized(), wanted, rtol=1e-6, atol=1e-8)

    written = bitsandbytes_format.write(model)
    assert written.keys() == saved.keys()
    for name, tensor in saved.items():
        if "quant_state" not in name:
            assert torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype, name
    state = {n.removeprefix("0.weight."): t for n, t in written.items() if n.startswith("0.weight.")}
    back = functional.QuantState.from_dict(state, device="cpu")
    torch.testing.assert_close(functional.dequantize_4bit(written["0.weight"], back), wanted, rtol=0, atol=0)


def test_what_is_no_nf4_checkpoint_is_refused():
    model = tiny.model("bert")
    with pytest.raises(Incompatible, match="nothing in it is NF4"):
        bitsandbytes_format.read(model, model.state_dict())
    linear = packed(NF4(), nn.Linear(64, 48))
    tensors = {f"0.{n}": t for n, t in bitsandbytes_format.write(nn.Sequential(linear)).items() for n in [n.removeprefix("0.")]}
    with pytest.raises(Incompatible, match="the shape"):
        bitsandbytes_format.read(nn.Sequential(nn.Linear(32, 48)), tensors)


def test_llm_int8_multiplies_as_bitsandbytes():
    """bitsandbytes brings inputs to fp16 first, whatever their format; the codes of the weight are the same."""
    linear, x = nn.Linear(320, 96), torch.randn(24, 320)
    x[:, 5] *= 30
    with torch.no_grad():
        linear.weight.copy_(weight())
    ours = packed(LLMInt8(), linear)
    codes, largest, _ = functional.int8_vectorwise_quant(linear.weight.detach())
    assert torch.equal(ours.weight.view(96, 320), codes)
    torch.testing.assert_close(ours.scales * 127, largest)
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB, state.threshold, state.has_fp16_weights = codes, largest, 6.0, False
    theirs = bitsandbytes.matmul(x, codes, bias=linear.bias.detach(), state=state)
    exact = linear(x).detach()
    assert (ours(x) - theirs).norm() <= 0.5 * (theirs - exact).norm() <= 0.01 * exact.norm()


def test_the_affine_mapping_is_torchaos():
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    w = weight()
    w[1] = w[1].abs()
    s, z = primitives.choose_qparams_affine(w, primitives.MappingType.ASYMMETRIC, (1, 320), torch.int8, -128, 127, scale_dtype=torch.float32)
    theirs = primitives.quantize_affine(w, (1, 320), s, z, torch.int8, -128, 127)
    codes, scales, zeros = zero_point(w)
    some = w.any(1)  # torchao gives a row of zeros a scale of its own
    torch.testing.assert_close(scales[some], s.flatten()[some], rtol=1e-6, atol=0)
    assert torch.equal(zeros[some], z.flatten()[some].to(torch.int8))
    apart = (codes[some].int() - theirs[some].int()).abs()  # it multiplies by 1 / s where this divides
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3


def test_the_symmetric_mapping_is_torchaos():
    """Of the codes -127 to 127: torchao's int8 weights take -128 as well, by which their scales are 127 / 127.5 of ours."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    w = weight()
    s, z = primitives.choose_qparams_affine(w, primitives.MappingType.SYMMETRIC, (1, 320), torch.int8, -127, 127, scale_dtype=torch.float32)
    theirs = primitives.quantize_affine(w, (1, 320), s, z, torch.int8, -127, 127)
    codes, scales = absmax(w)
    some = w.any(1)  # torchao gives a row of zeros a scale of its own
    torch.testing.assert_close(scales[some], s.flatten()[some], rtol=1e-6, atol=0)
    apart = (codes[some].int() - theirs[some].int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3


def test_an_int8_map_is_as_near_to_the_float_one_as_torchaos():
    quantization = pytest.importorskip("torchao.quantization")
    linear, x = nn.Linear(320, 96), torch.randn(24, 320, generator=torch.Generator().manual_seed(1))
    exact, ours = linear(x).detach(), packed(Int8(), linear)
    theirs = nn.Sequential(linear)
    quantization.quantize_(theirs, quantization.Int8DynamicActivationInt8WeightConfig())
    own, their = ((found.detach() - exact).norm() / exact.norm() for found in (ours(x), theirs(x)))
    assert 0 < own < 1.2 * their * (2 if int8.levels_here() == 127 else 1) < 0.025  # a processor without VNNI gets inputs of 7 bits


def test_the_symmetric_mapping_is_onnxruntimes():
    utilities = pytest.importorskip("onnxruntime.quantization.quant_utils")
    w = weight()
    codes, scales = absmax(w.flatten())
    found = utilities.quantize_data(w.flatten().numpy(), utilities.QuantType.QInt8.tensor_type, True)
    assert float(found[1]) == pytest.approx(float(scales), rel=1e-6) and torch.equal(torch.tensor(found[-1]).to(torch.int8), codes)

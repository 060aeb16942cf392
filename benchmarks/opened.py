"""A finished run's model as it is used: opened by paretune or transformers, compiled, as a graph, or quantized by another library.

What another library gets is the same fine-tuned weights, saved by paretune as a plain folder, and its own advertised way.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest import mock

from paretune.store import Run

BEFORE = 20  # the opset that torch's exporter takes by itself
FORMS = ("saved", "compiled", "onnx", "onnxruntime int8", "torchao int8", "torchao int8 compiled", "torchao int8 weights")


def prepare(form: str, run: Run, folder: Path) -> Path:
    """The folder that the form opens, made where it needs one of its own."""
    from paretune import exports, onnx_files

    if not form.startswith("onnx"):
        return run.folder
    if form == "onnx":
        exports.write(run, folder, to="onnx")
    else:
        with mock.patch.object(onnx_files, "OPSET", BEFORE):  # as torch's exporter writes it; attention as one operator stops onnxruntime's quantization
            exports.write(run, folder, to="onnx")
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        graph = onnx.load(folder / "model.onnx")
        del graph.graph.value_info[:]  # shapes that torch's exporter wrote, at which onnxruntime's own inference of shapes stops
        quantize_dynamic(graph, folder / "model.onnx", weight_type=QuantType.QInt8, per_channel=True)
    return folder


def model(form: str, place: Path, task: Any) -> Any:
    """The model, ready to answer."""
    from paretune import inference

    made = inference.open_model(place if form.startswith("onnx") else place / "model", task)
    if form.startswith("torchao"):
        _by_torchao(form, made)
    if form.endswith("compiled"):
        import torch
        from torch._inductor import config

        config.freezing = True  # weights become constants in the kernels' own layout; it is faster than without
        made.forward = torch.compile(made.forward, dynamic=True)
    return made


def _by_torchao(form: str, made: Any) -> None:
    from torchao import quantization

    config = quantization.Int8WeightOnlyConfig() if "weights" in form else quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(made, config)


def stored_mb(form: str, place: Path) -> float:
    """The bytes of the files that opening it reads, 10^6; of torchao's tensors, which safetensors does not take, those of a torch file."""
    from paretune import inference, store

    if form.startswith("onnx"):
        return store.stored_mb(place)
    if not form.startswith("torchao"):
        return store.stored_mb(place / "model")
    import torch

    made = inference.open_model(place / "model", inference.task_of(Run.read(place)))
    _by_torchao(form, made)
    file = io.BytesIO()
    with contextlib.closing(file):
        torch.save(made.state_dict(), file)
        others = store.stored_mb(place / "model") - sum(f.stat().st_size for f in (place / "model").glob("*.safetensors")) / 1e6
        return file.tell() / 1e6 + others

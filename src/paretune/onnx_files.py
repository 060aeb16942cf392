"""A run's model as an ONNX graph: float or int8, for any number of rows and tokens, and checked against the model it was made from.

    drift = ‖z_onnx − z‖ / ‖z‖   over the logits z of the run's own test rows

An int8 run keeps its embedding's codes; its linear maps are quantized by onnxruntime from the weights that their codes stand for, so that
the codes stay, while activations get one scale per call, not one per token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import logging
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from paretune import backbones, seams, store, surgery, tasks, training
from paretune.errors import Incompatible, StoreError, one_of
from paretune.tasks import Task
from paretune.weights import packed
from paretune.weights.packed import PackedLinear

GRAPH = "model.onnx"
NEEDED = ("onnx", "onnxscript", "onnxruntime")
DRIFT = {"float": 1e-3, "int8": 0.15}  # the largest drift that an export may have
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch notes the paths of the modules that a node comes from
SCORE = 0.01  # how far its score may be from the model's, as a share of it


@dataclasses.dataclass(frozen=True)
class Parity:
    """What the graph answers, beside what the model answers, on the same rows."""

    form: str  # "float" or "int8"
    rows: int
    drift: float
    score: float
    model_score: float

    def check(self, name: str) -> None:
        """Refuses an export that answers otherwise than its model.

        Raises:
            Incompatible: with the figures and what was tolerated.
        """
        apart = abs(self.score - self.model_score)
        if not self.drift <= DRIFT[self.form] or not apart <= SCORE * max(1.0, abs(self.model_score)):
            raise Incompatible(
                f"{name}: the {self.form} ONNX graph answers otherwise than the model: on {self.rows} test rows its logits are off by {self.drift:.2g} "
                f"(tolerated {DRIFT[self.form]:g}) and it scores {self.score:.4f}, not {self.model_score:.4f} (tolerated {SCORE:g}); "
                "nothing was written, export with --to hf"
            )


def write(model: nn.Module, task: Task, *, folder: Path, name: str) -> Parity:
    """Writes `model.onnx` into a folder and compares it with the model on the task's test rows.

    Args:
        model: opened from its folder, in evaluation mode; afterwards its linear maps are float.
        name: how an error calls it.

    Raises:
        Incompatible: without the extra, for a task or format that has no graph, or where the graph drifts.
        StoreError: for too little disk or memory.
    """
    form = _form(model, task, name=name)
    _require_room(model, folder)
    rows, processor, longest = task.test, surgery.state(model).processor, training.max_length(model)
    if longest and hasattr(processor, "model_max_length"):
        processor.model_max_length = longest  # virtual tokens leave less room, and the graph does not say so
    answers = [training.read(model, task, rows=rows, answers=_logits), training.predict(model, task, rows=rows)]
    maps = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    for path, module in maps.items():
        surgery.replace(model, path, new=module.unpacked())
    graph = folder / ("float.onnx" if form == "int8" else GRAPH)
    _trace(model.float(), task, graph, name=name)
    if form == "int8":
        _quantize(graph, folder / GRAPH, paths=list(maps), large=_large(model))
        for part in folder.glob("float.onnx*"):
            part.unlink()
    runner = Runner(folder, processor, model.config)
    again = [training.read(runner, task, rows=rows, answers=_logits), training.predict(runner, task, rows=rows)]
    parity = Parity(form, len(rows), _drift(answers[0], again[0]), *(tasks.score(task, found[1], rows=rows) for found in (again, answers)))
    parity.check(name)
    return parity


def _form(model: nn.Module, task: Task, *, name: str) -> str:
    readout = seams.readout(model)
    absent = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if absent:
        raise Incompatible(f"export to onnx needs {one_of(absent)}, which is not installed; pip install 'paretune[onnx]'")
    if readout is not None and readout.speaks:
        raise Incompatible(f"{name}: {readout!r} answers by several calls of a language model, and a graph is one; export with --to hf")
    if task.kind.name == "generation":
        raise Incompatible(f"{name}: a graph answers once, and a generated text needs many calls with a cache; export with --to hf")
    if not len(task.test):
        raise Incompatible(f"{name}: an export is compared with its model on test rows, and there are none")
    formats = {m.method.spelling() for m in model.modules() if isinstance(m, packed.Packed)}
    other = sorted(f for f in formats if f != "int8")
    if other:
        raise Incompatible(f"{name}: a graph has float or int8 weights, and {one_of(other)} is neither; end the recipe with int8, or export with --to hf")
    return "int8" if formats else "float"


def _require_room(model: nn.Module, folder: Path) -> None:
    """Disk for the float graph and what is made of it; memory for the weights in torch, twice while tracing, and in onnxruntime."""
    weights = 4e-6 * sum(p.numel() for p in (*model.parameters(), *model.buffers()))  # packed codes are one each
    store.require_space(folder, 2.2 * weights)
    free = psutil.virtual_memory().available / 1e6
    if free < 4 * weights:
        raise StoreError(f"{folder}: about {4 * weights:,.0f} MB of memory are needed to make the graph and {free:,.0f} MB are free; close other programs")


def _logits(batch: Mapping[str, Tensor], outputs: Any) -> list[Tensor]:
    """The logits of each example, where its own tokens are."""
    return [z[: int(n)] if z.dim() > 1 else z for z, n in zip(outputs.logits.float(), _lengths(batch, outputs), strict=True)]


def _lengths(batch: Mapping[str, Tensor], outputs: Any) -> list[int]:
    mask = batch.get("attention_mask")
    return [len(z) for z in outputs.logits] if mask is None or mask.dim() > 2 else mask.sum(1).tolist()


def _drift(model: list[Tensor], graph: list[Tensor]) -> float:
    z, again = (torch.cat([t.flatten() for t in found]) for found in (model, graph))
    return float((again - z).norm() / z.norm())


class _Answers(nn.Module):
    """The model as a function of named tensors that gives its logits alone."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True))).logits


def _trace(model: nn.Module, task: Task, path: Path, *, name: str) -> None:
    encodings = training.encode(task, [*task.test[:2], *task.test[:1]], model=model)  # two or more: torch takes 1 for a constant
    batch = task.kind.inputs(task.kind.collate(encodings, surgery.state(model).processor))
    free = {n: {axis: torch.export.Dim.DYNAMIC for axis in range(t.dim()) if _varies(n, axis)} for n, t in batch.items()}
    shapes = (tuple(free.values()),)  # of *tensors
    try:
        with _hushed(), torch.no_grad():
            made = torch.onnx.export(
                _Answers(model, list(batch)).eval(), tuple(batch.values()), dynamo=True, dynamic_shapes=shapes, input_names=list(batch),
                output_names=["logits"], verbose=False,
            )  # fmt: skip
            made.save(path, external_data=_large(model))
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise Incompatible(f"{name}: torch cannot write this model as a graph ({reason}); put merge behind its adapters, or export with --to hf") from None


def _varies(name: str, axis: int) -> bool:
    return axis == 0 or name.endswith(("ids", "mask"))


def _large(model: nn.Module) -> bool:
    """Is it more than fits into one ONNX file, 2 GB?"""
    return sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers())) > 1.8e9


def _quantize(source: Path, target: Path, *, paths: list[str], large: bool) -> None:
    """The weights of these maps in int8, a scale per output; their inputs in uint8, by the range at each call."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = onnx.load(source)
    made.graph.ClearField("value_info")  # onnx infers the shapes anew, and stops at some that torch wrote
    scopes = {node.name: {p.value for p in node.metadata_props if p.key == SCOPES} for node in made.graph.node if node.op_type == "MatMul"}
    chosen = [name for name, found in scopes.items() if any(f"'model.{path}'" in scope for scope in found for path in paths)]
    assert len(chosen) >= len(paths), "every packed map is a product in the graph"
    with _hushed():
        quantize_dynamic(
            made, target, op_types_to_quantize=["MatMul"], nodes_to_quantize=chosen, per_channel=True, weight_type=QuantType.QInt8,
            use_external_data_format=large,
        )  # fmt: skip


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without the exporter's and the quantizer's remarks on their own insides."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class Runner(nn.Module):
    """A graph in the place of a model: it takes the same named tensors, and answers with `.logits`."""

    def __init__(self, folder: Path, processor: Any, config: Any) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads that wait shall not burn energy
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])
        self.names = [given.name for given in self.session.get_inputs()]
        self.config = config
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # says on which device it runs
        backbones.travel(self, processor)

    def forward(self, **inputs: Tensor) -> types.SimpleNamespace:
        """`.logits`, from tensors named as the tokenizer names them."""
        (logits,) = self.session.run(None, {name: np.ascontiguousarray(inputs[name].cpu().numpy()) for name in self.names})
        return types.SimpleNamespace(logits=torch.from_numpy(logits))


def opened(folder: Path) -> Runner:
    """The graph in a folder with its tokenizer or image processor."""
    from transformers import AutoConfig

    return Runner(folder, backbones.read_processor(str(folder), {}), AutoConfig.from_pretrained(folder))

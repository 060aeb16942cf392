"""A run's model as an ONNX graph: float or int8, for any number of rows and tokens, and checked (`parity`) against the model it was made from.

An int8 run keeps its codes and scales q, s_o, those that `qat` learned included. Inputs of its maps become uint8 codes u:

    dynamic: by the range at each call, of all tokens together    y = Cast(MatMulInteger(u, q)) · s · s_o
    static:  by the range that training examples gave             y = MatMul(Dequantize(u), Dequantize(q)), which runtimes multiply as integers

A run in 16 bits becomes a graph in fp32 with the same weights, and is compared with its model in fp32.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from paretune import backbones, folding, seams, store, surgery, training
from paretune.errors import Incompatible, one_of
from paretune.parity import Answers, Parity, require_rows
from paretune.tasks import Task
from paretune.weights import packed
from paretune.weights.numerics import TINY
from paretune.weights.packed import PackedLinear

if TYPE_CHECKING:
    import onnx_ir as ir

GRAPH = "model.onnx"
NEEDED = ("onnx", "onnxscript", "onnxruntime")
OPSET = 23  # the first with attention as one operator
SLOWER = ["SkipLayerNormFusion"]  # sum and layer norm as one operator take longer than as two
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch notes the paths of the modules that a node comes from


def write(model: nn.Module, task: Task, *, folder: Path, name: str, merge: bool = True) -> Parity:
    """Writes `model.onnx` into a folder and compares it with the model on the task's test rows.

    Args:
        model: opened from its folder, in evaluation mode; afterwards its linear maps are float.
        name: how an error calls it.
        merge: adapters that can be folded become part of the graph's weights.

    Raises:
        Incompatible: without the extra, for a task or format that has no graph, or where the graph drifts.
        StoreError: for too little disk or memory.
    """
    form = _form(model, task, name=name)
    _require_room(model, folder)
    processor, longest = surgery.state(model).processor, training.max_length(model)
    if longest and hasattr(processor, "model_max_length"):
        processor.model_max_length = longest  # virtual tokens leave less room, and the graph does not say so
    maps = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    notes = _notes(model, maps)
    model.float()  # packed codes keep their formats, and answers are fp32
    answers = Answers.of(model, task)
    notes += folding.attempt(model) if merge else ()
    surgery.replace(model, ((path, module.unpacked()) for path, module in maps.items()))
    with _hushed():
        made = _trace(model, task, name=name)
        _quantize(made.model, maps)
        _join_heads(made.model)
        _spread_angles(made.model)
        _save(made, folder / GRAPH, large=_large(model))
    runner = Runner(folder, processor, model.config)
    parity = answers.beside(Answers.of(runner, task), task, form=form, notes=notes)
    parity.check(name)
    return parity


def _notes(model: nn.Module, maps: Mapping[str, PackedLinear]) -> tuple[str, ...]:
    """What is otherwise in a graph than in the run, in sentences."""
    notes = []
    narrow = sorted({str(t.dtype).removeprefix("torch.") for t in model.parameters() if t.dtype in (torch.bfloat16, torch.float16)})
    if narrow:
        notes.append(f"the run computes in {one_of(narrow)}; the graph has the same weights in fp32, and so has the model beside it")
    if any(_span(module) is None for module in maps.values()):
        notes.append("inputs of int8 maps get one range at each call, where the run takes one for each token; after int8(mode='static') both take the same")
    if any(_span(module) is not None for module in maps.values()):
        notes.append("inputs of int8 maps get the run's own ranges, which training examples gave")
    return tuple(notes)


def _span(module: PackedLinear) -> tuple[float, float] | None:
    """The fixed range of a map's inputs; None where each call finds its own."""
    low, high = module.range.tolist() if hasattr(module, "range") else (0.0, 0.0)
    return (low, high) if high > low else None


def _form(model: nn.Module, task: Task, *, name: str) -> str:
    readout = seams.readout(model)
    absent = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if absent:
        raise Incompatible(f"export to onnx needs {one_of(absent)}, which is not installed; pip install 'paretune[onnx]'")
    if readout is not None and readout.speaks:
        raise Incompatible(f"{name}: {readout!r} answers by several calls of a language model, and a graph is one; export with --to hf")
    if task.kind.name == "generation":
        raise Incompatible(f"{name}: a graph answers once, and a generated text needs many calls with a cache; export with --to hf")
    require_rows(task, name=name)
    formats = {m.method.spelling() for m in model.modules() if isinstance(m, packed.Packed)}
    other = sorted(f for f in formats if f != "int8")
    if other:
        raise Incompatible(f"{name}: a graph has float or int8 weights, and {one_of(other)} is neither; end the recipe with int8, or export with --to hf")
    return "int8" if formats else "float"


def _require_room(model: nn.Module, folder: Path) -> None:
    """Disk for the graph, as if it were float; memory for the weights in torch, twice while tracing, and in onnxruntime."""
    weights = 4e-6 * sum(p.numel() for p in (*model.parameters(), *model.buffers()))  # packed codes are one each
    store.require_space(folder, 1.1 * weights)
    store.require_memory(folder, 4 * weights)


class _Answers(nn.Module):
    """The model as a function of named tensors that gives its logits alone."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True))).logits


def _trace(model: nn.Module, task: Task, *, name: str) -> Any:
    """The model as torch's ONNX program."""
    encodings = training.encode(task, [*task.test[:2], *task.test[:1]], model=model)  # two or more: torch takes 1 for a constant
    batch = task.kind.inputs(task.kind.collate(encodings, surgery.state(model).processor))
    free = {n: {axis: torch.export.Dim.DYNAMIC for axis in range(t.dim()) if _varies(n, axis)} for n, t in batch.items()}
    shapes = (tuple(free.values()),)  # of *tensors
    try:
        with torch.no_grad():
            return torch.onnx.export(
                _Answers(model, list(batch)).eval(), tuple(batch.values()), dynamo=True, dynamic_shapes=shapes, input_names=list(batch),
                output_names=["logits"], verbose=False, opset_version=OPSET,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise Incompatible(f"{name}: torch cannot write this model as a graph ({reason}); put merge behind its adapters, or export with --to hf") from None


def _save(made: Any, path: Path, *, large: bool) -> None:
    for node in made.model.graph:
        node.metadata_props.clear()  # where in whose files torch found each operator: half a megabyte, and the paths of this machine
    made.save(path, external_data=large)


def _varies(name: str, axis: int) -> bool:
    return axis == 0 or name.endswith(("ids", "mask"))


def _large(model: nn.Module) -> bool:
    """Is it more than fits into one ONNX file, 2 GB?"""
    return sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers())) > 1.8e9


def _quantize(graph: ir.Model, maps: Mapping[str, PackedLinear]) -> None:
    """Puts the codes and scales of these maps in the place of the float weights that the graph multiplies with."""
    from onnx_ir.convenience import replace_nodes_and_values
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnx_ir.tape import Tape

    found = set()
    for node in list(graph.graph):
        path = next((path for path in maps if f"'model.{path}'" in node.metadata_props.get(SCOPES, "")), None)
        if path is None or node.op_type not in ("MatMul", "Gemm"):
            continue
        found.add(path)
        tape = Tape(graph.graph)
        y = _product(tape, node.inputs[0], maps[path], name=node.name or "")
        if node.op_type == "Gemm":  # a product of matrices, with its bias
            y = tape.op("Add", [y, node.inputs[2]]) if len(node.inputs) > 2 else y
        replace_nodes_and_values(graph.graph, node, [node], tape.nodes, node.outputs, [y])
    assert found == set(maps), "every packed map is a product in the graph"
    RemoveUnusedNodesPass()(graph)


def _product(tape: Any, x: ir.Value, module: PackedLinear, *, name: str) -> ir.Value:
    """x (..., I) times the codes of a map: y (..., O) without the bias, in the operators that onnxruntime fuses into one integer product."""
    import onnx_ir as ir

    def constant(what: str, value: np.ndarray) -> ir.Value:
        return tape.initializer(ir.tensor(value, name=f"{name}.{what}"))

    codes = constant("codes", np.ascontiguousarray(module.weight.view(module.shape).numpy().T))  # (I, O)
    scales, zeros = constant("scales", module.scales.float().numpy()), constant("zeros", np.zeros(module.out_features, np.int8))
    span = _span(module)
    if span is None:
        u, scale, zero = tape.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3)
        sums = tape.op("Cast", [tape.op("MatMulInteger", [u, codes, zero, zeros])], {"to": ir.DataType.FLOAT})
        return tape.op("Mul", [sums, tape.op("Mul", [scale, scales])])
    step = max((span[1] - span[0]) / 255, TINY)
    grid = [constant("step", np.float32(step)), constant("zero", np.uint8(round(-span[0] / step)))]
    floats = tape.op("DequantizeLinear", [tape.op("QuantizeLinear", [x, *grid]), *grid])
    return tape.op("MatMul", [floats, tape.op("DequantizeLinear", [codes, scales, zeros], {"axis": 1})])


def _join_heads(graph: ir.Model) -> None:
    """Gives attention its queries, keys and values with the heads side by side, (B, N, H·D), wherever they were only moved apart for it, and back after it.

    The operator splits them itself, without a copy; the numbers stay the same to the last bit.
    """
    import onnx_ir as ir
    from onnx_ir.convenience import replace_all_uses_with
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in [node for node in graph.graph if node.op_type == "Attention"]:
        apart = [_split(value) for value in node.inputs[:3]]
        joined = _joined(node.outputs[0])
        if joined is None or None in apart:
            continue
        for i, split in enumerate(apart):
            node.replace_input_with(i, split.inputs[0])
        queries, keys = (split.outputs[0].shape[2] for split in apart[:2])
        node.attributes.add(ir.AttrInt64("q_num_heads", queries))
        node.attributes.add(ir.AttrInt64("kv_num_heads", keys))
        node.outputs[0].shape = joined.shape
        replace_all_uses_with(joined, node.outputs[0])
    RemoveUnusedNodesPass()(graph)


def _split(value: ir.Value) -> ir.Node | None:
    """The Reshape (B, N, H·D) to (B, N, H, D), H known, that a value (B, H, N, D) was transposed from."""
    moved = value.producer()
    split = moved.inputs[0].producer() if moved and _swaps(moved) else None
    known = split and split.op_type == "Reshape" and len(split.inputs[0].shape) == 3 and isinstance(split.outputs[0].shape[2], int)
    return split if known else None


def _joined(value: ir.Value) -> ir.Value | None:
    """What becomes of a value (B, H, N, D), and of nothing else made from it: (B, N, H·D)."""
    for step in (_swaps, lambda node: node.op_type == "Reshape"):
        users = list(value.consumers())
        if len(users) != 1 or not step(users[0]):
            return None
        value = users[0].outputs[0]
    return value if len(value.shape) == 3 else None


def _swaps(node: ir.Node) -> bool:
    """Does it exchange the second and the third of four axes?"""
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]


def _spread_angles(graph: ir.Model) -> None:
    """Gives rotary embeddings their cosines and sines (1, N, D/2) for each row of a batch: the operator that the exporter writes does not broadcast them."""
    import onnx_ir as ir
    from onnx_ir.tape import Tape

    for node in [node for node in graph.graph if node.op_type == "RotaryEmbedding" and len(node.inputs) == 3]:
        tape = Tape(graph.graph)
        ones = tape.initializer(ir.tensor(np.ones(2, np.int64), name=f"{node.name}.ones"))
        rows = tape.op("Concat", [tape.op("Shape", [node.inputs[0]], {"start": 0, "end": 1}), ones], {"axis": 0})  # (B, 1, 1)
        for i in (1, 2):
            node.replace_input_with(i, tape.op("Expand", [node.inputs[i], rows]))
        graph.graph.insert_before(node, tape.nodes)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without the exporter's remarks on its own insides."""
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
        options.add_session_config_entry("session.force_spinning_stop", "1")  # threads that wait for the next call shall not burn energy
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOWER)
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

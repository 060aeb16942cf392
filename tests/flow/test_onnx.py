"""ONNX exports: the graph answers as the run does for any rows and lengths, float and int8, or is refused with the figures and leaves nothing."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import types

import numpy
import onnx
import onnxruntime
import pytest
import tiny
import torch

from paretune import exports, flow, inference, onnx_files, options, parity, runs, store, tasks
from paretune.errors import Incompatible, StoreError
from paretune.reports import card
from paretune.weights import kernels

ONCE = options.Options(training=options.Training(epochs=1, batch=8))
NEW = ["the good film", "a bad and very very long story about a plot with an actor", "!"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tiny backbones and texts."""
    folder = tmp_path_factory.mktemp("place")
    for name, family, kind in (("bert", "bert", "base"), ("t5", "t5", "seq2seq")):
        tiny.model(family, kind).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    (folder / "bert" / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nA tiny one.\n")
    with (folder / "films.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["text", "label"])
        rows.writerows([f"the {noun} was {word} {'very ' * n} {n}", label] for n, noun in enumerate(["film", "book", "plot"] * 4)
                       for word, label in (("good", "up"), ("bad", "down")))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def finished(place):
    """A run that trained, by its recipe; it measured nothing."""
    made = {}

    def run(recipe, *, backbone="bert", kind=None):
        if (recipe, backbone, kind) not in made:
            task = tasks.task(str(place / "films.csv"), text="text", label="label", kind=kind)
            made[recipe, backbone, kind] = runs.make(flow._plan(flow.as_recipe(recipe), task, str(place / backbone), place / "out", 0, ONCE), recipe)
        return made[recipe, backbone, kind]

    return run


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """The folder to which a run was exported, by its recipe."""
    made = {}

    def export(recipe):
        if recipe not in made:
            made[recipe] = flow.export(finished(recipe), tmp_path_factory.mktemp("to") / "export", to="onnx")
        return made[recipe]

    return export


FLOAT, INT8, QAT, STATIC = "lora(r=2)", "full | int8", "full + qat | int8", 'full | int8(mode="static")'


@pytest.mark.parametrize("recipe, tolerance", [(FLOAT, 1e-5), (INT8, 0.05), (STATIC, 0.05)])
def test_the_graph_answers_as_the_run_does(recipe, tolerance, finished, exported):
    folder = exported(recipe)
    assert {"model.onnx", "config.json", "run.json", "README.md", "tokenizer.json", "sample.json"} <= {p.name for p in folder.iterdir()}
    run, again = finished(recipe), store.Run.read(folder)
    for rows in (NEW, NEW[:1]):
        for mine, its in zip(run.predict(rows), again.predict(rows), strict=True):
            assert abs(mine["p_up"] - its["p_up"]) < tolerance


def test_a_graph_says_nothing_of_the_machine_that_wrote_it(exported):
    assert re.findall(rb"\.py|site-packages|stack_trace", (exported(FLOAT) / "model.onnx").read_bytes()) == []


def test_onnxruntime_alone_gives_the_logits_of_transformers(finished, exported):
    run = finished(FLOAT)
    model = inference.open_model(run.model, inference.task_of(run))
    session = onnxruntime.InferenceSession(exported(FLOAT) / "model.onnx", providers=["CPUExecutionProvider"])
    for how in ({"batch": 1, "length": 2}, {"batch": 5, "length": 40}):
        batch = tiny.inputs("bert", **how)
        names = {given.name for given in session.get_inputs()}
        batch |= {"token_type_ids": torch.zeros_like(batch["input_ids"])} if "token_type_ids" in names else {}
        (logits,) = session.run(["logits"], {n: batch[n].numpy() for n in names})
        with torch.no_grad():
            assert numpy.allclose(logits, model(**batch).logits.numpy(), atol=1e-5)


def initializers(folder):
    """The graph's nodes, and its stored tensors by name."""
    graph = onnx.load(folder / "model.onnx").graph
    return graph.node, {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}


def test_heads_are_not_moved_apart_for_attention_and_no_number_changes_by_it(finished, exported, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(onnx_files, "_join_heads", lambda graph: None)
        apart = flow.export(finished(INT8), tmp_path / "apart", to="onnx")
    moved = {folder: sum(n.op_type == "Transpose" for n in initializers(folder)[0]) for folder in (exported(INT8), apart)}
    assert moved == {exported(INT8): 0, apart: 4 * 2}, "queries, keys, values and what comes out, of two layers"
    assert store.Run.read(exported(INT8)).predict(NEW) == store.Run.read(apart).predict(NEW)


def test_a_graph_has_adapters_merged_unless_they_are_kept(finished, exported, tmp_path):
    kept = flow.export(finished(FLOAT), tmp_path / "kept", to="onnx", keep_adapters=True)
    products = {folder: sum(n.op_type in ("MatMul", "Gemm") for n in initializers(folder)[0]) for folder in (exported(FLOAT), kept)}
    assert products[kept] == products[exported(FLOAT)] + 2 * 12, "A and B of twelve maps"
    assert "merged into the weights" in (exported(FLOAT) / "README.md").read_text() and "merged into" not in (kept / "README.md").read_text()


def packed_maps(run):
    model = inference.open_model(run.model, inference.task_of(run))
    return {path: m for path, m in model.named_modules() if isinstance(m, onnx_files.PackedLinear)}, model


@pytest.mark.parametrize("recipe", [INT8, QAT, STATIC, "full | cast | int8"])
def test_int8_runs_export_their_own_codes(recipe, finished, exported):
    maps, model = packed_maps(finished(recipe))
    nodes, stored = initializers(exported(recipe))
    products = [n for n in nodes if n.op_type == ("MatMul" if recipe == STATIC else "MatMulInteger") and n.name not in stored]
    assert len([n for n in nodes if n.op_type == "MatMulInteger"]) == (0 if recipe == STATIC else len(maps)) and len(products) >= len(maps)
    for module in maps.values():
        codes, scales = module.weight.view(module.shape).numpy().T, module.scales.numpy()
        name = next(n for n, t in stored.items() if t.dtype == numpy.int8 and t.shape == codes.shape and (t == codes).all())
        assert numpy.array_equal(stored[name.replace(".codes", ".scales")], scales)
    (table,) = [m for m in model.modules() if isinstance(m, onnx_files.packed.PackedEmbedding)]
    assert any(t.shape == table.shape and (t == table.weight.view(table.shape).numpy()).all() for t in stored.values())
    floats = sum(t.size for t in stored.values() if t.dtype == numpy.float32)
    assert floats < sum(m.weight.numel() for m in maps.values()), "no float weight of a map is left"


def test_qat_leaves_rows_below_the_largest_code(finished):
    """Else the test above would pass with ranges found anew."""
    assert any(int(m.weight.view(m.shape).abs().amax(1).min()) < 127 for m in packed_maps(finished(QAT))[0].values())


def test_static_ranges_are_the_runs_own(finished, exported):
    maps, _ = packed_maps(finished(STATIC))
    nodes, stored = initializers(exported(STATIC))
    assert not any(n.op_type == "DynamicQuantizeLinear" for n in nodes)
    steps = sorted(float(stored[n.input[1]]) for n in nodes if n.op_type == "QuantizeLinear")
    assert steps == pytest.approx(sorted(float(m.range[1] - m.range[0]) / 255 for m in maps.values()))
    assert "own ranges" in (exported(STATIC) / "README.md").read_text()
    assert "one range at each call" in (exported(INT8) / "README.md").read_text()


@pytest.mark.parametrize("recipe", ["full | cast", 'full | cast(dtype="fp16")', "nf4 | lora(r=2) | merge"])
def test_runs_in_16_bits_are_compared_in_fp32(recipe, finished, exported):
    about = json.loads((exported(recipe) / "run.json").read_text())["export"]
    assert about["form"] == "float" and about["drift"] < 1e-5
    assert "float16" in about["notes"][0] and "in fp32" in (exported(recipe) / "README.md").read_text()


def test_the_folder_says_what_it_is(finished, exported):
    run, folder = finished(FLOAT), exported(FLOAT)
    record, text = json.loads((folder / "run.json").read_text()), (folder / "README.md").read_text()
    assert record["loads_with"] == "onnx" and record["recipe"] == run.recipe and record["score"] == run.score
    assert record["export"]["form"] == "float" and record["export"]["drift"] < 1e-5 and record["export"]["score"] == record["export"]["model_score"]
    opened = ("model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json")
    assert record["cost"]["stored_mb"] == pytest.approx(sum((folder / name).stat().st_size for name in opened if (folder / name).is_file()) / 1e6)
    assert record["cost"]["train_s"] == run.cost.train_s and record["cost"]["latency_p50_ms"] is None
    assert "license: \"apache-2.0\"" in text and "A float ONNX graph" in text and FLOAT in text and record["task_fingerprint"] in text


def test_the_folder_is_measured_like_a_run(exported):
    run = store.Run.read(exported(FLOAT))
    task = inference.tested(run)
    bench = inference.Bench(inference.open_model(run.model, task), task)
    bench.one()
    bench.many(8)()
    assert bench.flops().value is None and "graph" in bench.flops().reason
    assert inference.answers(run, task.test)


def test_a_graph_that_answers_otherwise_is_refused_and_leaves_nothing(finished, exported, tmp_path, monkeypatch):
    other = exported(FLOAT) / "model.onnx"
    monkeypatch.setattr(onnx_files, "_save", lambda made, path, *, large: path.write_bytes(other.read_bytes()))
    with pytest.raises(Incompatible, match=r"answers otherwise.*test rows it scores [\d.]+, not .*its logits are off by [\d.e+-]+ \(tolerated 0.001\)"):
        flow.export(finished("lora(r=2) + schedule(lr=0.1)"), tmp_path / "export", to="onnx")
    assert not any(tmp_path.iterdir())


def test_an_export_is_compared_on_rows_from_all_over_the_split_while_the_source_is_there(finished, monkeypatch):
    run = finished(FLOAT)
    kept, whole = inference.tested(run).test, inference.compared(run).test
    assert whole == kept and len(whole) > 3
    monkeypatch.setattr(inference, "COMPARED", 3)
    step = -(-len(whole) // 3)
    assert inference.compared(run).test == whole[::step] and 1 < len(whole[::step]) <= 3


def test_an_export_is_compared_on_the_rows_the_run_keeps_where_its_source_changed(finished, place):
    run, file = finished(FLOAT), place / "films.csv"
    kept, text = inference.tested(run).test, file.read_text()
    try:
        file.write_text(text.replace("film", "movie"))
        assert inference.compared(run).test == kept
        file.unlink()
        assert inference.compared(run).test == kept
    finally:
        file.write_text(text)


@pytest.mark.parametrize("found", [
    parity.Parity("float", 9, 2e-3, 0.9, 0.9), parity.Parity("int8", 9, 0.2, 0.9, 0.9), parity.Parity("int8", 9, 0.01, 0.88, 0.9),
    parity.Parity("float", 9, float("nan"), 0.9, 0.9), parity.Parity("float", 9, 0.0, 15.0, 14.0), parity.Parity("int8", 200, 0.01, 0.91, 0.895),
])  # fmt: skip
def test_drift_of_outputs_or_score_is_refused(found):
    with pytest.raises(Incompatible, match=f"the run.*{found.model_score:.4f}.*nothing was written"):
        found.check("the run")


@pytest.mark.parametrize("recipe", [INT8, STATIC])
def test_no_clock_decides_what_a_graph_is_compared_with(recipe, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "SMALLEST", 0)
    monkeypatch.setattr(kernels, "choices", lambda *_: pytest.fail("kernels were timed"))
    with pytest.raises(pytest.fail.Exception):
        finished(recipe).predict(NEW)
    flow.export(finished(recipe), tmp_path / "export", to="onnx")


def test_a_refusal_says_what_is_otherwise_in_the_graph():
    with pytest.raises(Incompatible, match="ranges are otherwise; nothing was written"):
        parity.Parity("int8", 9, 0.2, 0.9, 0.9, notes=("ranges are otherwise",)).check("the run")


def test_a_refusal_and_a_card_say_of_which_rows_the_logits_are():
    with pytest.raises(Incompatible, match=r"on 1000 test rows .* its logits \(of the first 200\) are off"):
        parity.Parity("int8", 1000, 0.2, 0.9, 0.9, held=200).check("the run")
    (said,) = card._export(dataclasses.asdict(parity.Parity("int8", 1000, 0.1, 0.9, 0.9, held=200)))
    assert "On 1000 test rows" in said and "its logits (of the first 200) are off" in said


def test_what_is_tolerated_passes():
    parity.Parity("float", 9, 9e-4, 0.9, 0.9).check("the run")
    parity.Parity("int8", 9, 0.14, 0.895, 0.9).check("the run")
    parity.Parity("int8", 200, 0.01, 0.905, 0.895).check("the run")  # a hundredth, though 0.905 - 0.895 > 0.01


def test_what_no_graph_holds_is_refused(finished, tmp_path):
    for run, word in ((finished("full | nf4"), "nf4 is neither"), (finished("full", backbone="t5", kind="generation"), "generated text needs many calls")):
        with pytest.raises(Incompatible, match=f"{word}.*--to hf"):
            flow.export(run, tmp_path / "export", to="onnx")
    assert not any(tmp_path.iterdir())


def test_room_and_packages_are_asked_for_first(finished, tmp_path, monkeypatch):
    run = finished(FLOAT)
    with monkeypatch.context() as patch:
        patch.setattr(store.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1e3))
        with pytest.raises(StoreError, match="MB of memory are needed"):
            exports.write(run, tmp_path / "export", to="onnx")
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1e3))
        with pytest.raises(StoreError, match="MB are needed and 0 MB are free"):
            exports.write(run, tmp_path / "export", to="onnx")
    monkeypatch.setattr(onnx_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Incompatible, match=r"needs onnx, onnxscript or onnxruntime.*paretune\[onnx\]"):
        exports.write(run, tmp_path / "export", to="onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.all
@pytest.mark.parametrize("recipe", [None, "int8"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_has_a_graph(family, recipe, tmp_path):
    drift, products, maps = graph(family, recipe, tmp_path)
    assert drift < (0.05 if recipe else 1e-5) and products == maps


def test_rotary_embeddings_have_a_graph_for_any_number_of_rows(tmp_path):
    drift, products, maps = graph("llama", "int8", tmp_path)
    assert drift < 0.05 and products == maps > 0


def graph(family, recipe, folder):
    """How far the answers of a family's graph drift, its integer products, and the model's packed maps."""
    import work

    model = work.ready(family).eval()
    if recipe:
        flow.shrink(model, recipe)
    maps = sum(isinstance(m, onnx_files.PackedLinear) for m in model.modules())
    drift = onnx_files.write(model, work.task(family), folder=folder, name=family).drift
    return drift, sum(node.op_type == "MatMulInteger" for node in initializers(folder)[0]), maps

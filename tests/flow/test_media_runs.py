"""A run on images: its test examples are files, which a measurement reads again from where they lie."""

from __future__ import annotations

import dataclasses
import shutil
import traceback
from pathlib import Path

import numpy as np
import pytest
import tiny
import work
from PIL import Image

import paretune as pt
from paretune import inference, store
from paretune.errors import DataError
from paretune.meters import memory, protocol


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """40 pictures in two folders, dark and bright."""
    for i in range(40):
        folder = tmp_path / "pictures" / ("dark", "bright")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 100, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise + np.uint8(100 * (i % 2))).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def test_peak_memory_of_an_image_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(protocol.QUICK, window_s=0.05, window_n=5, windows=1, idle_s=0.02, warm_s=0.1, search_s=0.0)
    monkeypatch.setitem(protocol.PROTOCOLS, "quick", short)
    tiny.model("vit", "base").save_pretrained(tmp_path / "vit")
    work.processor("vit").save_pretrained(tmp_path / "vit")
    made = pt.run("head + schedule(epochs=1)", pt.task(images), backbone=str(tmp_path / "vit"), out=tmp_path / "out")
    assert store.read_json(made.folder / "sample.json") == []
    assert 0 < made.cost.peak_memory_mb < 500 and "peak_memory_mb" not in made.cost.reasons

    monkeypatch.setattr(memory, "child_peaks", lambda target, jobs, timeout_s: [fails(*job) for job in jobs])
    sourceless = shutil.copytree(made.folder, tmp_path / "sourceless")
    store.write_json(sourceless / "run.json", {**made.record, "task_definition": work.image_task().define()})
    next(images.rglob("*.png")).unlink()
    reasons = [peak.reason for peak in inference.peak_memory([made.folder, sourceless])]
    assert [reason.split(":")[0] for reason in reasons] == ["the test examples cannot be read again"] * 2
    assert "is not the data that run" in reasons[0] and "'brightness' was not read from files" in reasons[1]


def fails(folder: str) -> memory.ChildPeak:
    """What a child tells of a pass that fails, without starting one."""
    with pytest.raises(DataError) as wrong:
        inference._one_pass(folder)
    return memory._child_peak("pass", {"error": traceback.format_exception_only(wrong.value)[-1].strip()})

"""Images and sound, from folders and from columns."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from scipy.io import wavfile

import paretune as pt
from paretune import tasks
from paretune.errors import DataError

SIZE = {"height": 16, "width": 16}


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for i in range(40):
        (tmp_path / "pets" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(tmp_path / "pets" / "ab"[i % 2] / f"{i}.png")
    return tmp_path / "pets"


def test_an_image_folder(image_folder: Path) -> None:
    task = pt.task(image_folder)
    assert (task.kind.name, task.labels, task.metric) == ("image", ("a", "b"), "accuracy")
    processor = transformers.ViTImageProcessor(size=SIZE)
    encodings = task.encode(task.test, processor)
    batch = task.kind.collate(encodings, processor)
    numbers = [int(Path(row["image"]["path"]).stem) for row in task.test]
    expected = torch.tensor(np.stack([picture(i) for i in numbers])).permute(0, 3, 1, 2) / 127.5 - 1  # the processor's mean and deviation, 0.5
    torch.testing.assert_close(batch["pixel_values"], expected, atol=1e-5, rtol=0)
    assert batch["labels"].tolist() == [i % 2 for i in numbers]

    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
                                    **task.kind.config(task))  # fmt: skip
    model = getattr(transformers, task.kind.auto_class_for(config)).from_config(config).eval()
    with torch.no_grad():
        outputs = model(**task.kind.inputs(batch))
        total, count = task.kind.loss(outputs, batch)
        own = model(**batch).loss
    assert float(total) / count == pytest.approx(float(own), rel=1e-5)
    predictions = task.kind.predict(model, batch, outputs=outputs)
    assert tasks.per_example(task, predictions, rows=task.test) == [float(int(p[1] > p[0]) == i % 2) for p, i in zip(predictions, numbers, strict=True)]


def test_the_same_image_twice_never_crosses(image_folder: Path) -> None:
    for path in sorted(image_folder.rglob("*.png")):
        path.with_name("copy " + path.name).write_bytes(path.read_bytes())
    task = pt.task(image_folder)
    where = [{Path(row["image"]["path"]).stem.split()[-1] for row in task.rows(split)} for split in ("train", "validation", "test")]
    assert sum(map(len, where)) == 40 == len(set.union(*where))


def test_an_array_column_is_the_same_image(image_folder: Path, tmp_path: Path) -> None:
    rows = [{"pixels": picture(i).tolist(), "label": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "arrays.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = pt.task(tmp_path / "arrays.jsonl", text="pixels", label="label")
    assert task.kind.name == "image"
    processor = transformers.ViTImageProcessor(size=SIZE)
    got = task.kind.collate(task.encode(task.test, processor), processor)["pixel_values"]
    expected = torch.tensor([row["pixels"] for row in task.test]).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_paths_in_a_table(image_folder: Path) -> None:
    lines = "".join(f"{'ab'[i % 2]}/{i}.png,{'ab'[i % 2]}\n" for i in range(40))
    (image_folder / "list.csv").write_text("file,label\n" + lines)
    assert pt.task(image_folder / "list.csv", text="file", label="label", kind="image").labels == ("a", "b")
    (image_folder / "list.csv").write_text("file,label\n" + lines + "lost.png,a\n")
    with pytest.raises(DataError, match="row 42, column 'file', value 'lost.png': there is no such file"):
        pt.task(image_folder / "list.csv", text="file", label="label", kind="image")


def test_a_broken_image_is_named(image_folder: Path) -> None:
    for path in image_folder.rglob("*.png"):
        path.write_bytes(b"no image " + path.name.encode())
    task = pt.task(image_folder)
    processor = transformers.ViTImageProcessor(size=SIZE)
    with pytest.raises(DataError, match=r"\d+\.png cannot be opened"):
        task.kind.collate(task.encode(task.test, processor), processor)


def test_sound_from_files_is_mono_scaled_and_resampled(tmp_path: Path) -> None:
    rate, time = 8000, np.arange(8000) / 8000
    for i in range(40):
        (tmp_path / "s" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        wave = np.sin(2 * np.pi * (200 + 10 * i) * time)
        stereo = np.stack([wave, wave], 1) if i % 3 else wave
        wavfile.write(tmp_path / "s" / "ab"[i % 2] / f"{i}.wav", rate, (stereo * 16384).astype(np.int16))
    task = pt.task(tmp_path / "s")
    assert (task.kind.name, task.labels) == ("audio", ("a", "b"))
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000, do_normalize=False)
    batch = task.kind.collate(task.encode(task.test, extractor), extractor)
    numbers = torch.tensor([int(Path(row["audio"]["path"]).stem) for row in task.test])[:, None]
    expected = 0.5 * torch.sin(2 * torch.pi * (200 + 10 * numbers) * torch.arange(16000) / 16000)
    assert batch["input_values"].shape == expected.shape
    torch.testing.assert_close(batch["input_values"][:, 200:-200].double(), expected[:, 200:-200].double(), atol=5e-3, rtol=0)


def test_sound_from_a_column(tmp_path: Path) -> None:
    rows = [{"wave": [float(j % (i + 2)) / 50 for j in range(100 + i)], "sampling_rate": 16000, "label": i % 2} for i in range(40)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = pt.task(tmp_path / "s.jsonl", text="wave", label="label")
    assert task.kind.name == "audio"
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000, do_normalize=False)
    batch = task.kind.collate(task.encode(task.test, extractor), extractor)
    for values, row in zip(batch["input_values"], task.test, strict=True):
        wave = row["wave"]["array"]
        assert values[: len(wave)].tolist() == pytest.approx(wave) and not values[len(wave) :].any()


def test_real_images_and_sounds(shared_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(shared_data / "cifar10_subset" / "test.zip") as archive:
        archive.extractall(tmp_path / "cifar")
    (folder,) = {path.parent.parent for path in (tmp_path / "cifar").rglob("*.jpg")}
    task = pt.task(folder)
    assert len(task.labels) == 10 and sum(len(task.rows(s)) for s in ("train", "validation", "test")) == 1200
    with zipfile.ZipFile(shared_data / "spoken_digits" / "test.zip") as archive:
        for name in archive.namelist():
            if name.endswith(".wav"):
                target = tmp_path / "digits" / Path(name).name[0] / Path(name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
    spoken = pt.task(tmp_path / "digits")
    assert spoken.labels == tuple("0123456789")
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000)
    assert spoken.kind.collate(spoken.encode(spoken.test[:4], extractor), extractor)["input_values"].shape[0] == 4

"""Run folders: written whole or not at all, found again, and never written by two processes at once.

out/runs/<id>/     run.json, per_example.json, log.jsonl, README.md, model/ (Hugging Face format)
out/phases/<id>/   phase.json, model/: the model after the first k phases of a recipe, shared by recipes
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open

from paretune.errors import StoreError, did_you_mean
from paretune.meters.cost import Cost

FORMAT = 1  # of run.json; part of every id


def identity(facts: dict[str, Any]) -> str:
    """A name of 16 hexadecimal digits for facts, whatever their order."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def written(target: Path) -> Iterator[Path]:
    """A folder to fill, which appears as `target` when the block ends without an error, and not at all otherwise.

    What killed processes left of the same target is removed first.

    Raises:
        StoreError: for a full disk or a folder that may not be written.
    """
    with _apart(target) as beside:
        beside.mkdir(parents=True)
        yield beside
        for file in (p for p in beside.rglob("*") if p.is_file()):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if target.exists():
            shutil.rmtree(target)
        os.replace(beside, target)


@contextlib.contextmanager
def written_file(target: Path) -> Iterator[Path]:
    """A path to write a file to, which appears as `target` when the block ends without an error, and not at all otherwise.

    Raises:
        StoreError: for a full disk or a folder that may not be written.
    """
    with _apart(target) as beside:
        yield beside
        os.replace(beside, target)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Says in one sentence what kept the block from writing a file or folder.

    Raises:
        StoreError: for a full disk or a folder that may not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _unwritable(target, error) from error


@contextlib.contextmanager
def _apart(target: Path) -> Iterator[Path]:
    """Where this process fills what is to become `target`; what is there when the block ends is removed."""
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    with writing(target):
        _clear(target)
        try:
            yield beside
        finally:
            _remove(beside)


def _clear(target: Path) -> None:
    """Removes what this process, or one that runs no more, left of a target half-written; not every writer holds the target's lock."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        writer = left.name.removeprefix(f".{target.name}.").removesuffix(".part")
        if writer.isdecimal() and (int(writer) == os.getpid() or not psutil.pid_exists(int(writer))):
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _unwritable(target: Path, error: Exception) -> StoreError:
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return StoreError(f"{target}: the disk is full; nothing was kept of it; free some space and run again, a run or frontier with --resume")
    return StoreError(f"{target}: cannot be written ({getattr(error, 'strerror', None) or error}); free some space or choose another --out")


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Waits until no other process writes `target`, and keeps others waiting; a killed process frees its lock."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        stream = (target.parent / f".{target.name}.lock").open("w")
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def write_json(path: Path, data: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, whole."""
    with written_file(path) as part:
        part.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        StoreError: for a file that is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(f"{path} is not there") from None
    except (OSError, json.JSONDecodeError) as error:
        raise StoreError(f"{path} is damaged ({error}); delete its folder and run again with --resume") from None


def _neighbors(folder: Path) -> list[str]:
    return [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []


def require_space(folder: Path, megabytes: float) -> None:
    """Refuses work whose result would not fit.

    Raises:
        StoreError: with what is needed and what is free.
    """
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free / 1e6
    if free < megabytes:
        raise StoreError(f"{folder}: {megabytes:,.0f} MB are needed and {free:,.0f} MB are free; free some space or choose another --out")


def require_memory(folder: Path, megabytes: float) -> None:
    """Refuses work that memory would not hold.

    Raises:
        StoreError: with what is needed and what is free.
    """
    free = psutil.virtual_memory().available / 1e6
    if free < megabytes:
        raise StoreError(f"{folder}: about {megabytes:,.0f} MB of memory are needed to make it and {free:,.0f} MB are free; close other programs")


def stored_mb(folder: Path) -> float:
    """Megabytes (10^6 bytes) of all files that a process opens to use the model in a folder."""
    opened = [p for p in folder.iterdir() if p.is_file() and p.name != "README.md"]
    return sum(p.stat().st_size for p in opened) / 1e6


def structure(folder: Path) -> str:
    """A name of 16 hexadecimal digits for what a saved model is made of (names, shapes and numeric formats of its tensors, and its other files), whatever
    its weights say. Two models of one structure do the same work for an example."""
    parts = {}
    for file in sorted(p for p in folder.iterdir() if p.is_file() and p.name != "README.md"):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="np") as tensors:
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
                parts[file.name] = [tensors.metadata(), {name: [part.get_dtype(), part.get_shape()] for name, part in slices.items()}]
        else:
            parts[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return identity(parts)


def share(source: Path, target: Path) -> None:
    """The files of a folder in another, without using their space twice where the file system can."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copy2(file, target / file.name)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its folder and what run.json says."""

    folder: Path
    record: dict[str, Any] = dataclasses.field(repr=False)

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """The run in a folder.

        Raises:
            StoreError: where there is none, or a damaged one.
        """
        folder = Path(folder)
        if not (folder / "run.json").is_file():
            near = did_you_mean(folder.name, _neighbors(folder))
            raise StoreError(f"{folder} is not the folder of a finished run{near}; give one that `paretune run` or `frontier` wrote, as out/runs/<id>")
        return cls(folder, read_json(folder / "run.json"))

    @property
    def id(self) -> str:
        return self.record["id"]

    @property
    def recipe(self) -> str:
        return self.record["recipe"]

    @property
    def score(self) -> float:
        return self.record["score"]

    @property
    def model(self) -> Path:
        """Where its model lies: in `model`, or in the folder itself after an export."""
        inside = self.folder / "model"
        return inside if inside.is_dir() else self.folder

    @functools.cached_property
    def cost(self) -> Cost:
        return Cost.from_json(self.record["cost"])

    def per_example(self) -> list[float] | None:
        """What each test example scores, 1.0 or 0.0 for a right or wrong answer, where the metric is a mean over examples."""
        name = self.record.get("per_example")
        return read_json(self.folder / name) if name else None

    def predict(self, rows: Any) -> list[dict[str, Any]]:
        """Answers for texts (or rows as dicts): labels and probabilities.

        Args:
            rows: a list of texts, of pairs of texts, or of rows with the task's columns.
        """
        from paretune import inference

        return inference.answers(self, rows)


def finished(out: Path) -> list[Run]:
    """The finished runs of a results folder, oldest first."""
    found = [Run.read(p.parent) for p in sorted((out / "runs").glob("*/run.json")) if not p.parent.name.startswith(".")]
    return sorted(found, key=lambda run: (run.record["date"], run.id))

"""Sources that are more than one file: folders of images or sound, folders saved by `datasets`, data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paretune.errors import DataError, all_of, one_of
from paretune.tasks import reading
from paretune.tasks.reading import Table

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
               "test": "test"}  # fmt: skip


def open_source(source: str) -> dict[str, Table]:
    """The tables of a source by split; one without splits is "train".

    Raises:
        DataError: for a source that is not there or cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        return _saved(path) if saved else _media(path)
    if path.exists() or path.suffix.lower() in (*reading.SUFFIXES, ".gz") or path.is_absolute() or source.count("/") > 1:
        return {"train": reading.read(path)}
    return _hub(source)


# --- folders of files -----------------------------------------------------------------------------------------------------------


def _media(folder: Path) -> dict[str, Table]:
    """`[split/]class/file`: the class is the name of the sub-folder."""
    splits = {SPLIT_NAMES[sub.name.lower()]: sub for sub in sorted(folder.iterdir()) if sub.is_dir() and sub.name.lower() in SPLIT_NAMES}
    return {name: _classes(sub) for name, sub in (splits or {"train": folder}).items()}


def media_files(folder: Path) -> Iterator[dict[str, Any]]:
    """All images and sounds below a folder, without labels, in the order of their paths."""
    for file in sorted(folder.rglob("*")):
        role = "image" if file.suffix.lower() in IMAGES else "audio" if file.suffix.lower() in SOUNDS else None
        if role:
            yield {role: {"path": str(file), "bytes": None}}


def _classes(folder: Path) -> Table:
    files = [f for sub in sorted(folder.iterdir()) if sub.is_dir() for f in sorted(sub.iterdir()) if f.suffix.lower() in IMAGES + SOUNDS]
    if not files:
        kinds = f"images ({one_of(IMAGES)}) or sound ({one_of(SOUNDS)})"
        raise DataError(f"{folder.name} holds nothing saved by `datasets` and no sub-folders, one per class, with {kinds}")
    role = "audio" if files[0].suffix.lower() in SOUNDS else "image"
    rows: list[dict[str, Any]] = [{role: {"path": str(f), "bytes": None}, "label": f.parent.name} for f in files]
    return Table([role, "label"], rows, range(1, len(rows) + 1), folder.name, folder)


# --- datasets -------------------------------------------------------------------------------------------------------------------


def _saved(folder: Path) -> dict[str, Table]:
    import datasets

    try:
        return _tables(datasets.load_from_disk(str(folder)), folder.name)
    except (FileNotFoundError, ValueError, OSError) as error:
        raise DataError(f"{folder.name} is not a whole folder of `datasets`: {error}") from None


def _hub(source: str) -> dict[str, Table]:
    """A data set of the hub, or of its cache when HF_HUB_OFFLINE is set. Code from the hub is never run: `datasets` 4 has no way to."""
    import datasets

    name, _, config = source.partition(":")
    try:
        return _tables(datasets.load_dataset(name, config or None), source)
    except (FileNotFoundError, ConnectionError, ValueError, OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{source!r} is no file or folder here, and the hub gives no data set of that name ({reason})") from None


def _tables(data: Any, name: str) -> dict[str, Table]:
    """The splits under our names. A test split without answers (-1 everywhere, as in GLUE) gives way to validation."""
    if not hasattr(data, "keys"):
        data = {"train": data}
    tables = {SPLIT_NAMES[split.lower()]: _table(part, name) for split, part in data.items() if split.lower() in SPLIT_NAMES}
    if not tables:
        raise DataError(f"{name} has the splits {all_of(data)}, none of them train, validation or test")
    test = tables.get("test")
    if test and "label" in test.columns and all(row["label"] in (-1, None) for row in test.rows):
        del tables["test"]
        if "validation" in tables:
            tables["test"] = tables.pop("validation")
    return tables


def _table(data: Any, name: str) -> Table:
    import datasets

    classes = {}
    for column, feature in data.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            data = data.cast_column(column, type(feature)(decode=False))
        elif isinstance(getattr(feature, "feature", feature), datasets.ClassLabel):
            classes[column] = getattr(feature, "feature", feature).names
    rows = data.to_list()
    for row in rows:
        for column, names in classes.items():
            row[column] = _named(row[column], names)
    return Table(list(data.features), rows, range(1, len(rows) + 1), name)


def _named(value: Any, names: list[str]) -> Any:
    """A class number, or a list of them, as names; -1 and None stay."""
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if value is not None and value >= 0 else value

"""One class for an image."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from paretune.errors import DataError
from paretune.tasks.kinds.base import Bad, Batch, Encoding, cell
from paretune.tasks.kinds.classification import Classification

if TYPE_CHECKING:
    from paretune.tasks.definition import Row, Task


def read_file(column: str, raw: Mapping[str, Any]) -> dict[str, Any] | list[Any]:
    """A cell that is a file (a path, relative to the table's folder, or bytes) or an array (nested lists of numbers)."""
    value = cell(column, raw)
    if isinstance(value, list | np.ndarray):
        return value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, dict):
        raise Bad(column, value, "a file's path, its bytes or an array was expected")
    if value.get("bytes") or "array" in value:
        return value
    path = Path(raw.get("", ""), str(value.get("path")))
    if not path.is_file():
        raise Bad(column, str(value.get("path")), "there is no such file")
    return {"path": str(path.absolute())}


def content(value: Any) -> bytes:
    """The bytes of a file or array, for hashing and decoding."""
    if isinstance(value, dict) and "array" not in value:
        return value.get("bytes") or Path(value["path"]).read_bytes()
    return repr(value).encode()


@dataclasses.dataclass(frozen=True)
class Image(Classification):
    """A softmax over the classes. Files are opened batch by batch, when they are needed."""

    name: ClassVar[str] = "image"
    noun: ClassVar[str] = "images"
    role: ClassVar[str] = "image"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    pairs: ClassVar[bool] = False

    def read_input(self, columns: Mapping[str, str], raw: Mapping[str, Any]) -> Row:
        return {columns[self.role]: read_file(columns[self.role], raw)}

    def texts(self, columns: Mapping[str, str], row: Row) -> list[str]:
        return []

    def key(self, columns: Mapping[str, str], row: Row) -> str:
        return hashlib.sha256(content(row[columns[self.role]])).hexdigest()

    def encode(self, task: Task, rows: Sequence[Row], *, processor: Any, max_length: int | None = None, config: Any = None) -> list[Encoding]:
        """The files themselves; `collate` opens them. `max_length` has no meaning here."""
        return self.add_labels(task, rows, encodings=[{"file": row[task.columns[self.role]]} for row in rows])

    def collate(self, encodings: Sequence[Encoding], processor: Any, *, width: int = 0) -> Batch:
        """pixel_values (B, channels, height, width), made by the image processor."""
        return dict(processor(images=[_picture(e["file"]) for e in encodings], return_tensors="pt")) | self.label_tensor(encodings)

    def length(self, encoding: Encoding) -> int:
        return 1


def _picture(value: Any) -> Any:
    """An RGB picture from a file's bytes, or from an array (H, W), (H, W, 3) or (3, H, W) of 0..255 or 0..1."""
    try:
        from PIL import Image as pillow
    except ImportError:
        raise DataError("images need pillow: pip install 'paretune[image]'") from None
    if isinstance(value, dict):
        try:
            return pillow.open(io.BytesIO(content(value))).convert("RGB")
        except OSError as error:
            raise DataError(f"{value.get('path') or 'an image'} cannot be opened: {error}") from None
    array = np.asarray(value)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.dtype.kind == "f" and array.max() <= 1:
        array = array * 255
    return pillow.fromarray(array.round().astype(np.uint8).squeeze()).convert("RGB")

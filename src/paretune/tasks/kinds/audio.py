"""One class for a sound."""

from __future__ import annotations

import dataclasses
import inspect
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from paretune.errors import DataError
from paretune.tasks.kinds.base import Batch, Encoding, cell
from paretune.tasks.kinds.image import Image, content, read_file

if TYPE_CHECKING:
    from paretune.tasks.definition import Row


@dataclasses.dataclass(frozen=True)
class Audio(Image):
    """A softmax over the classes. Sounds become mono and are brought to the feature extractor's sampling rate."""

    name: ClassVar[str] = "audio"
    noun: ClassVar[str] = "sounds"
    role: ClassVar[str] = "audio"
    auto_class: ClassVar[str] = "AutoModelForAudioClassification"

    def read_input(self, columns: Mapping[str, str], raw: Mapping[str, Any]) -> Row:
        value = read_file(columns["audio"], raw)
        if isinstance(value, list) and "rate" in columns:
            value = {"array": value, "sampling_rate": int(cell(columns["rate"], raw))}
        return {columns["audio"]: value}

    def collate(self, encodings: Sequence[Encoding], processor: Any, *, width: int = 0) -> Batch:
        """What the feature extractor makes: input_values (B, ...), and a mask where it makes one."""
        sounds = [_sound(e["file"], processor.sampling_rate) for e in encodings]
        padding = inspect.signature(processor.__call__).parameters.get("padding")
        wanted = {"padding": True} if padding is not None and not padding.default else {}
        return dict(processor(sounds, sampling_rate=processor.sampling_rate, return_tensors="pt", **wanted)) | self.label_tensor(encodings)

    def length(self, encoding: Encoding) -> int:
        """Samples of an array, bytes of a file."""
        value = encoding["file"]
        if isinstance(value, dict) and "array" not in value:
            return len(value["bytes"]) if value.get("bytes") else Path(value["path"]).stat().st_size
        return len(value["array"] if isinstance(value, dict) else value)


def _sound(value: Any, rate: int) -> np.ndarray:
    """Mono fp32 samples in [-1, 1] at `rate` per second."""
    if isinstance(value, dict):
        array, own = (np.asarray(value["array"]), value["sampling_rate"]) if "array" in value else _decoded(value)
    else:
        array, own = np.asarray(value), rate  # a bare array says nothing: taken as the model expects it
    array = array.astype(np.float32)
    if array.ndim == 2:
        array = array.mean(axis=int(np.argmin(array.shape)))
    if own != rate:
        from scipy.signal import resample_poly

        common = math.gcd(own, rate)
        array = resample_poly(array, rate // common, own // common).astype(np.float32)
    return array


def _decoded(value: Mapping[str, Any]) -> tuple[np.ndarray, int]:
    """(samples, rate) of a wav file; other formats through soundfile."""
    data = content(value)
    if data[:4] == b"RIFF":
        from scipy.io import wavfile

        try:
            rate, samples = wavfile.read(io.BytesIO(data))
        except ValueError as error:
            raise DataError(f"{value.get('path') or 'a sound'} cannot be read: {error}") from None
        if samples.dtype == np.uint8:
            return (samples.astype(np.float32) - 128) / 128, rate
        return samples / (1.0 if samples.dtype.kind == "f" else -float(np.iinfo(samples.dtype).min)), rate
    try:
        import soundfile
    except ImportError:
        raise DataError(f"{value.get('path') or 'a sound'} is no wav file; other formats need soundfile: pip install 'paretune[audio]'") from None
    return soundfile.read(io.BytesIO(data), dtype="float32")

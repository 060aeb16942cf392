"""Peak memory: of this process in a window, and of a job in a process of its own. MB is 10^6 bytes."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from paretune.errors import MeterError
from paretune.meters.reading import Reading, missing

UNFINISHED = "the saved model does not work in a fresh process"  # how the reason of a failed peak-memory pass begins
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt: how much may lie free at the heap's end; from how many bytes on a block has pages of its own
AT_ONCE_B, KEPT_B, NEVER_B = 128 * 1024, 32 * 1024 * 1024, 2**31 - 1
_AT_ONCE = threading.Event()  # is memory given back at once?
_LOCK = threading.Lock()
_KEEPING: list[None] = []  # one for each `kept_between_calls` that is not over
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """The highest resident memory of this process while the block runs: `with Peak() as peak: ...`, then `peak.reading`.

    Linux keeps the exact peak, and lets it be reset; elsewhere a thread looks every 10 ms and may miss a shorter peak. What earlier work freed, and glibc
    kept for later, is given back first: it would count as resident.
    On `cuda` it is torch's peak of allocated memory on the card.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.before_mb = 0.0
        self.reading: Reading | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Peak:
        self._done, self._highest = threading.Event(), 0
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            self.before_mb = torch.cuda.memory_allocated(self.device) / 1e6
            return self
        give_back()
        self.before_mb = _resident() / 1e6
        if not _reset():
            self._thread = threading.Thread(target=self._sample, daemon=True, name="peak memory")
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread:
            self._done.set()
            self._thread.join()
        self.reading = self.so_far()

    def so_far(self) -> Reading:
        """The peak until now, while the block runs."""
        if self.device.startswith("cuda"):
            import torch

            peak, source = torch.cuda.max_memory_allocated(self.device), "torch's peak of allocated card memory"
        elif self._thread:
            peak, source = max(self._highest, _resident()), "resident memory of this process, sampled every 10 ms"
        else:
            peak, source = _high_water(), "peak resident memory of this process (VmHWM)"
        return Reading(peak / 1e6, "MB", source=source)

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self._highest = max(self._highest, _resident())


@dataclasses.dataclass(frozen=True)
class ChildPeak:
    """Memory of a job in a fresh process: `before_mb` with its libraries loaded and no model, `peak_mb` at the highest, `over_mb` the difference."""

    before_mb: Reading
    peak_mb: Reading
    over_mb: Reading


def child_peak(target: str, arguments: list[object], *, timeout_s: float = 300.0) -> ChildPeak:
    """Runs a job in a process of its own and reads its peak memory.

    Args:
        target: `package.module:function`; importing the module should load the libraries, calling the function the model, which it runs.
            Where the function gives a function back, only that one is measured.
        arguments: the function's positional arguments, plain JSON values.
        timeout_s: after so many seconds the job is stopped.

    Raises:
        MeterError: when the job fails or takes too long, with the last line it wrote.
    """
    (found,) = child_peaks(target, [arguments], timeout_s=timeout_s)
    if found.peak_mb.value is None:
        raise MeterError(found.peak_mb.reason)
    return found


def child_peaks(target: str, jobs: list[list[object]], *, timeout_s: float = 300.0) -> list[ChildPeak]:
    """The same for several jobs, each in a process of its own that starts with the libraries already there.

    Returns:
        One per job, in order; of a job that failed every reading is missing, with the reason.

    Raises:
        MeterError: when the jobs take longer than `timeout_s` together, or none can be started.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "paretune.meters.child", target, json.dumps(jobs), str(answer)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise MeterError(f"{target} took longer than {timeout_s:g} s in its own process; give it more time or less work") from error
        if done.returncode or not answer.is_file():
            last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise MeterError(f"{target} failed in its own process: {last}")
        return [_child_peak(target, found) for found in json.loads(answer.read_text())]


def _child_peak(target: str, found: dict[str, Any]) -> ChildPeak:
    if "error" in found:
        silent = missing("MB", f"{target} failed in its own process: {found['error']}")
        return ChildPeak(silent, silent, silent)
    source = found["source"].replace("this process", "a process of its own")
    peak, before = found["peak_mb"], found["before_mb"]
    return ChildPeak(*(Reading(value, "MB", source=source) for value in (before, peak, peak - before)))


def _resident() -> int:
    return psutil.Process().memory_info().rss


def give_back() -> None:
    """Returns freed memory to the system, where the C library knows how; after fifty trainings in one process it had kept 3 GB."""
    _glibc("malloc_trim", 0)


@contextlib.contextmanager
def given_back_at_once() -> Iterator[None]:
    """Tensors let go inside the block go back to the system, where the C library knows how; else it keeps them, in pieces, as much again as is held.

    It costs time: pages are made anew (MiniLM, 456 tokens at once, fp32: 100 MB added by a step in place of 200, for a quarter more CPU time).
    """
    give_back()
    _glibc("mallopt", _MMAP_THRESHOLD, AT_ONCE_B)
    _AT_ONCE.set()
    try:
        yield
    finally:
        _AT_ONCE.clear()
        _as_ever()


@contextlib.contextmanager
def kept_between_calls() -> Iterator[None]:
    """Memory that a step, or an answer, lets go stays for the next, which asks for as much; what is free goes back where the outermost such block ends.

    Else glibc gives the heap's end back after each call, and the kernel makes its pages anew. Inside `given_back_at_once` nothing is kept.
    """
    if _AT_ONCE.is_set():
        yield
        return
    with _LOCK:
        _KEEPING.append(None)
        _glibc("mallopt", _TRIM_THRESHOLD, NEVER_B)
        _glibc("mallopt", _MMAP_THRESHOLD, KEPT_B)
    try:
        yield
    finally:
        with _LOCK:
            _KEEPING.pop()
            if not _KEEPING:
                _as_ever()
                give_back()


def _as_ever() -> None:
    """glibc's thresholds where its own rule, which can't be had back, moves them as large blocks are let go."""
    _glibc("mallopt", _TRIM_THRESHOLD, 2 * KEPT_B)
    _glibc("mallopt", _MMAP_THRESHOLD, KEPT_B)


def _glibc(name: str, *values: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function:
        function(*values)


def _reset() -> bool:
    """Sets the kernel's high-water mark back to now, where that is allowed."""
    try:
        CLEAR.write_text("5")
        return _high_water() > 0
    except OSError:
        return False


def _high_water() -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0

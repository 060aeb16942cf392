"""Weights that are a mapped file: their pages go back to the system while copies stand in for them, and are read again when somebody asks.

Safetensors maps a file into memory without writing to it. Pages of such a private mapping that nobody has changed are the file's own bytes:
the system may drop them whenever it likes, and here is asked to. What was written to is no longer the file's, and is left alone.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import re
from pathlib import Path

from torch import Tensor

SMAPS = Path("/proc/self/smaps")  # Linux's
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)")
_CHANGED = ("Anonymous:", "Swap:")  # a page that is written to becomes the process's own


class Mapped:
    """The stretches of this process's memory that are, as it is made, unchanged files."""

    def __init__(self) -> None:
        self._starts: list[int] = []  # in order
        self._ends: list[int] = []
        try:
            lines = SMAPS.read_text(errors="replace").splitlines()
        except OSError:  # nothing is known to be a file
            return
        for line in lines:
            head = _HEAD.match(line)
            if head and (unchanged := int(head[3]) != 0):  # the number of a file
                self._starts.append(int(head[1], 16))
                self._ends.append(int(head[2], 16))
            elif not head and unchanged and line.startswith(_CHANGED) and int(line.split()[1]):
                self._starts.pop(), self._ends.pop()
                unchanged = False

    def let_go(self, tensor: Tensor) -> int:
        """Gives the whole pages of a tensor back, if they are an unchanged file's; returns how many bytes.

        The tensor's values stay what they are: reading it reads the file again, which must not change meanwhile, as of any mapped file.
        """
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return 0
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        at = bisect.bisect_right(self._starts, start) - 1
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if at < 0 or end > self._ends[at] or last <= first:
            return 0
        refused = ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
        return 0 if refused else last - first

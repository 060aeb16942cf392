"""While a model computes, memory that it frees stays with the process, for the next batch.

glibc gives large blocks back to the system as soon as they are free and asks for them again at the next batch; every page
is then zeroed and mapped anew. On two cores that costs time in every step; how much, `python -m benchmarks.step` measures.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from collections.abc import Iterator
from typing import Any

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
KEPT = (2**31 - 1, 2**30)  # bytes: (free at the heap's end before it shrinks, a block's before it is mapped by itself)
USUAL = (2**26, 2**25)  # the largest that glibc's own adaptation comes to, on 64 bits
_depth = 0


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Freed memory stays with this process inside the block, and is given back after the outermost one; only glibc is asked."""
    global _depth
    libc = _glibc()
    _depth += 1
    if libc and _depth == 1:
        _set(libc, KEPT)
    try:
        yield
    finally:
        _depth -= 1
        if libc and not _depth:
            _set(libc, USUAL)
            libc.malloc_trim(0)


def _set(libc: Any, limits: tuple[int, int]) -> None:
    trim, mmap = limits
    libc.mallopt(TRIM, trim)
    if not libc.mallopt(MMAP, mmap):  # before glibc 2.35 no more than this is taken
        libc.mallopt(MMAP, USUAL[1])


@functools.cache
def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None

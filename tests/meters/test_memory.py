"""Memory that a process holds."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")
TRIED = """
import psutil, torch
from paretune.meters import memory

with memory.given_back_at_once():
    kept = [torch.ones(64, 1024) for _ in range(400)]  # 256 KiB each
    before = psutil.Process().memory_info().rss
    del kept[::2]
    print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(not GLIBC, reason="mallopt is glibc's")
def test_tensors_let_go_are_given_back_at_once():
    """In a fresh process, in which nothing lies free that the tensors could have come from."""
    freed = int(subprocess.run([sys.executable, "-c", TRIED], capture_output=True, text=True, check=True).stdout)
    assert freed > 0.9 * 200 * 64 * 1024 * 4, "with the others between them still there"

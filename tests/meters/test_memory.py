"""Memory that a process holds."""

from __future__ import annotations

import ctypes
import sys

import psutil
import pytest
import torch

from paretune.meters import memory

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.skipif(not GLIBC, reason="mallopt is glibc's")
def test_tensors_let_go_are_given_back_at_once():
    with memory.given_back_at_once():
        kept = [torch.ones(64, 1024) for _ in range(400)]  # 256 KiB each
        before = psutil.Process().memory_info().rss
        del kept[::2]
        assert before - psutil.Process().memory_info().rss > 0.9 * 200 * 64 * 1024 * 4, "with the others between them still there"

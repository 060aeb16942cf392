"""Memory that a process holds."""

from __future__ import annotations

import ctypes
import os
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


STEPS = """
import contextlib, resource, psutil, torch
from paretune.meters import memory

def step():
    tensors = [torch.ones(256, 1024) for _ in range(200)]  # 1 MiB each

def faults(n=5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

step()  # torch's own first use
with {outer}:
    with memory.kept_between_calls():
        with memory.kept_between_calls():
            step()
        inside, held = faults(), psutil.Process().memory_info().rss
after = psutil.Process().memory_info().rss
print(inside, held - after, faults())
"""


def faults(outer):
    done = subprocess.run([sys.executable, "-c", STEPS.format(outer=outer)], capture_output=True, text=True, check=True)
    return [int(n) for n in done.stdout.split()]


@pytest.mark.skipif(not GLIBC, reason="mallopt is glibc's")
def test_what_a_step_lets_go_is_there_for_the_next_and_goes_back_afterwards():
    """By the kernel's count of pages made, 4 KiB each, in a fresh process."""
    pages = 200 * 2**20 // 4096  # of a step
    inside, given_back, after = faults("contextlib.nullcontext()")
    assert inside < 0.05 * 5 * pages and given_back > 0.9 * pages * 4096
    assert after > 0.9 * pages, "what went back is made anew"


@pytest.mark.skipif(not GLIBC, reason="mallopt is glibc's")
def test_within_a_limit_nothing_is_kept():
    inside, given_back, _ = faults("memory.given_back_at_once()")
    assert inside > 0.5 * 5 * 200 * 2**20 // 4096 and given_back < 10 * 2**20


MEASURED = """
import psutil, torch
from paretune.meters import protocol

before = []

def answer():
    before.append(psutil.Process().memory_info().rss)
    tensors = [torch.ones(256, 1024) for _ in range(200)]  # 1 MiB each

answer(), {call}
print(before[-1] - before[0])
"""


@pytest.mark.skipif(not GLIBC, reason="mallopt is glibc's")
def test_an_answer_is_timed_with_the_memory_of_the_one_before():
    timed = 'protocol.measure({"model": answer}, protocol=protocol.Protocol("brief", 0.2, 50, 2, 0.1, 0.1, 0.0, False, False))'
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": f"{2**16}"}  # without it glibc learns what to keep, or not, from what was there before
    held, plain = (
        int(subprocess.run([sys.executable, "-c", MEASURED.replace("{call}", call)], env=given_back, capture_output=True, text=True, check=True).stdout)
        for call in (timed, "[answer() for _ in range(20)]")
    )
    assert held > 0.9 * 200 * 2**20 > 0.5 * 200 * 2**20 > plain

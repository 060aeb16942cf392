"""Pages of a mapped file against the kernel's own count: given back, read again, and left alone where anything was written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paretune.step.mapped import Mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says which pages are a file's")
N = 4 * 2**20


@pytest.fixture
def weights(tmp_path):
    save_file({"a": torch.randn(N), "b": torch.randn(N)}, tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    for tensor in found.values():
        tensor.sum()  # read once, so that it is resident
    return found


def resident_mb() -> float:
    """Of files."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")) * 1024 / 1e6


def test_pages_of_a_file_are_given_back_and_read_again(weights):
    kept, before = weights["a"].clone(), resident_mb()
    assert 4 * N - 2 * 4096 <= Mapped().let_go(weights["a"]) <= 4 * N
    assert before - resident_mb() > 0.9 * 4 * N / 1e6
    assert torch.equal(weights["a"], kept)


def test_what_was_written_to_is_left_alone(weights):
    weights["a"][7] = 5.0
    kept = weights["a"].clone()
    assert Mapped().let_go(weights["a"]) == 0 and torch.equal(weights["a"], kept)


def test_what_is_no_file_is_left_alone(weights):
    own, part = torch.randn(N), weights["b"].view(2, -1).T
    kept = own.clone()
    assert Mapped().let_go(own) == 0 and torch.equal(own, kept)
    assert Mapped().let_go(part) == 0, "not contiguous"


def test_elsewhere_than_on_linux_nothing_is_done(weights, monkeypatch, tmp_path):
    monkeypatch.setattr("paretune.step.mapped.SMAPS", tmp_path / "none")
    assert Mapped().let_go(weights["a"]) == 0

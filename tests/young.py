"""Python in a young process: a fork of one that has imported torch and transformers, and nothing of ours."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.modeling_utils", "transformers.pipelines"])
    return context


def run(code: str, folder: Path, *, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """What `python -c code` in a folder exits with and prints, without the seconds that importing transformers takes."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place) / "out", Path(place) / "err"
        child = _server().Process(target=_child, args=(code, str(folder), str(out), str(err)))
        child.start()
        child.join(timeout_s)
        if child.exitcode is None:
            child.kill()
            raise subprocess.TimeoutExpired(code, timeout_s, output=out.read_text(), stderr=err.read_text())
        return subprocess.CompletedProcess(code, child.exitcode, out.read_text(), err.read_text())


def _child(code: str, folder: str, *streams: str) -> None:
    assert "paretune" not in sys.modules
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})

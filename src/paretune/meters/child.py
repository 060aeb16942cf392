"""The process that `memory.child_peaks` starts: imports the job's module once, then forks for each job and notes the memory it took."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paretune.meters.memory import Peak


def main(target: str, arguments: str, *, answer: str) -> None:
    """Runs `target` (`module:function`) on each JSON list in the list `arguments`; writes what memory each took to the file `answer`."""
    module, _, function = target.partition(":")
    job = getattr(importlib.import_module(module), function)
    Path(answer).write_text(json.dumps([_forked(job, each) for each in json.loads(arguments)]))


def _forked(job: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    """The job in a copy of this process, which holds the libraries and no model; a dict with "error" where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "note.json"
        child = os.fork()
        if not child:
            _work(job, arguments, note)
        os.waitpid(child, 0)
        return json.loads(note.read_text()) if note.is_file() else {"error": "it was ended by a signal"}


def _work(job: Callable[..., Any], arguments: list[Any], note: Path) -> None:
    """This copy of the process ends here, whatever happens; what it found, or what went wrong, goes to the parent in a file."""
    try:
        with Peak() as peak:
            rest = job(*arguments)
        if callable(rest):  # the job has prepared what does not count, as reading examples
            with Peak() as peak:
                rest()
        reading = peak.reading
        note.write_text(json.dumps({"before_mb": peak.before_mb, "peak_mb": reading.value, "source": reading.source}))
    finally:
        wrong = sys.exception()
        if wrong is not None:
            note.write_text(json.dumps({"error": "".join(traceback.format_exception_only(wrong)).strip().splitlines()[-1]}))
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], answer=sys.argv[3])

"""Answers from a finished run: for a list of texts, and for a file too large for memory.

    python examples/predict.py [DATA BACKBONE OUT]
"""

from __future__ import annotations

import sys
from pathlib import Path

import paretune as pt
from paretune import inference, tasks
from paretune.options import Options, Training

data, backbone, out = sys.argv[1:] or ["stdlib-topics", "minilm", "out/predict"]

options = Options(training=Training(epochs=1, max_train=500))
run = pt.run("head", pt.task(data), backbone=backbone, out=out, resume=True, options=options)

for answer in run.predict(["Open a file and read it line by line.", "Return the mean of the numbers."]):
    label = answer["label"]
    print(f"{label}  probability {answer[f'p_{label}']:.3f}")

# Any later process: the folder is all that is needed. Rows are read, answered and forgotten a few hundred at a time.
run = pt.read_run(run.folder)
lines = Path(out) / "new.jsonl"
lines.write_text('{"text": "Parse the arguments of a command."}\n' * 1000)
answers = inference.stream(run, tasks.inputs(inference.task_of(run), lines))
print(next(answers)["label"], "and", sum(1 for _ in answers), "more")

"""One recipe from data to a measured, deployable model: LoRA, folded into the weights, then int8.

    python examples/run.py [DATA BACKBONE OUT]
"""

from __future__ import annotations

import sys

import paretune as pt
from paretune.options import Metering, Options, Training

data, backbone, out = sys.argv[1:] or ["stdlib-topics", "minilm", "out/one-run"]

options = Options(
    training=Training(epochs=2, max_train=500),
    metering=Metering(power="idle=6W,busy=28W"),  # for an estimate where no meter is at hand: a guess for a laptop
)
run = pt.run("lora(r=8) | merge | int8", pt.task(data), backbone=backbone, out=out, resume=True, options=options)

record, cost = run.record, run.cost
print(f"{record['metric']} on test {run.score:.3f}, 95 % interval {record['score_low']:.3f} to {record['score_high']:.3f}")
print(f"latency {cost.latency_p50_ms:.2f} ms, stored {cost.stored_mb:.1f} MB, trained {cost.trainable_parameters:,} parameters in {cost.train_s:.0f} s")
print(f"energy per inference {cost.energy_per_inference_j} J ({'estimated' if cost.meter['estimate'] else 'measured'}: {cost.meter['source']})")
print(f"opens with {record['loads_with']}: {run.folder}")

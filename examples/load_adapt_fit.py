"""By hand: load a backbone, put LoRA on it, train, switch it off and on, save, and open it again.

    python examples/load_adapt_fit.py [DATA BACKBONE OUT]
"""

from __future__ import annotations

import sys

import torch

import paretune as pt

data, backbone, out = sys.argv[1:] or ["stdlib-topics", "minilm", "out/by-hand"]

task = pt.task(data).subset(500)  # at most so many training rows
print(task.describe())

model = pt.load(backbone, task)  # a plain transformers model with the task's head
pt.adapt(model, pt.LoRA(r=8))  # the same object; only LoRA and the head learn from here on
print("trainable parameters, without the head and of the head:", *pt.count(model))

fitted = pt.fit(model, task, pt.Schedule(epochs=2))
print("validation by epoch:", [round(epoch["validation_score"], 3) for epoch in fitted.epochs], f"in {fitted.dtype}")

model.eval()  # without dropout
batch = pt.processor(model)(task.texts("test")[:4], return_tensors="pt", padding=True, truncation=True)
with torch.inference_mode():
    adapted = model(**batch).logits
    pt.switch(model)  # the backbone, bit for bit
    assert not torch.equal(model(**batch).logits, adapted)
    pt.switch(model, "default")
    assert torch.equal(model(**batch).logits, adapted)

model.save_pretrained(out)
pt.processor(model).save_pretrained(out)
again = pt.load(out, task)
with torch.inference_mode():
    print("saved and opened again, the logits differ by at most", float((again(**batch).logits - adapted).abs().max()))

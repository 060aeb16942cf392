"""The ledger: what a whole search really cost, E, D, H and E D H (Schwartz et al. 2019, "Green AI", arXiv:1907.10597).

    E = total training FLOPs / examples seen           mean FLOPs per example seen
    D = examples seen / H                              examples x epochs of a mean training
    H = number of trainings                            phases that saw examples, every seed its own
    E D H = total training FLOPs                       exactly, by these definitions

A phase that several runs share is counted once; `unshared` is the sum had each run worked alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from paretune.pareto.records import Record, reason

SUMS = ("train_flops", "train_s", "train_cpu_s", "train_energy_j")


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The sums over a search: FLOPs, seconds and joules of training, None with a reason where any phase lacks them."""

    e_flops: float | None
    d_examples: float
    h_trainings: int
    phases: int
    runs: int
    spent: dict[str, float | None]
    unshared: dict[str, float | None]
    reasons: dict[str, str]

    @property
    def edh_flops(self) -> float | None:
        """E times D times H, in FLOPs."""
        return None if self.e_flops is None else self.e_flops * self.d_examples * self.h_trainings

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the product."""
        return {**dataclasses.asdict(self), "edh_flops": self.edh_flops}


def of(runs: Sequence[Record]) -> Ledger:
    """The ledger of these runs; it knows of no work that has no record."""
    every = [phase for run in runs for phase in run.get("phases", [])]
    once = list({phase["id"]: phase for phase in every}.values())
    spent = {name: _sum(phase.get(name) for phase in once) for name in SUMS}
    seen = sum(phase["examples"] or 0 for phase in once)
    trainings = sum(bool(phase["examples"]) for phase in once)
    total = spent["train_flops"]
    return Ledger(
        e_flops=total / seen if total is not None and seen else None,
        d_examples=seen / trainings if trainings else 0.0,
        h_trainings=trainings,
        phases=len(once),
        runs=len(runs),
        spent=spent,
        unshared={name: _sum(phase.get(name) for phase in every) for name in SUMS},
        reasons={name: _why(runs, name) for name, value in spent.items() if value is None},
    )


def _sum(values: Iterable[float | None]) -> float | None:
    values = list(values)
    return None if None in values else sum(values)


def _why(runs: Sequence[Record], name: str) -> str:
    return next(filter(None, (reason(run, name) for run in runs if name != "train_flops")), "a phase did not count its FLOPs")

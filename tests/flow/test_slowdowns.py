"""What a format's card says of its time is what was measured, word for word."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from paretune import registry
from paretune.weights import kernels

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import slowdowns  # noqa: E402


def test_a_sentence_holds_the_medians(monkeypatch):
    factors = iter([1.0, 9.0, 1.1])

    def found(method, *, shape):
        factor = next(factors)
        return [kernels.Slowdown(tokens, 2 * factor, "codes", 3.26 * tokens / 8 * factor, "dequantized") for tokens in (1, 8, 128)]

    monkeypatch.setattr(slowdowns, "FORMATS", ("nf4",))
    monkeypatch.setattr(kernels, "slowdowns", found)
    measured = json.loads(json.dumps(slowdowns.measured(3)))
    measured["environment"] = {"cpu": "a processor", "cpu_flags": ["avx2", "amx_int8"]}
    assert slowdowns.sentence(measured, "nf4") == (
        "Measured on one thread of a processor (avx2, amx_int8), eagerly, by CPU time, a map from 768 to 3072: for 1, 8 and 128 tokens it takes 2.2, 2.2 "
        "and 2.2 times as long as in fp32, and with inputs in bf16 0.45, 3.6 and 57 times as long as a bf16 map."
    )


@pytest.mark.parametrize("name", slowdowns.FORMATS)
def test_the_card_says_what_was_measured(name):
    if not slowdowns.TIMING.file.is_file():
        pytest.skip(f"{slowdowns.TIMING.file.name} is not measured yet: python -m benchmarks.slowdowns, on a quiet machine")
    wanted = slowdowns.sentence(json.loads(slowdowns.TIMING.file.read_text()), name)
    note = registry.get(name).card.note
    assert wanted in note, f"the card of {name} has to say: {wanted}"
    assert note.count("easured on") == 1, f"the card of {name} has an older measurement, too"

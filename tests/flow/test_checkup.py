"""What `paretune doctor` says of the extras is what pyproject.toml has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from paretune.cli import checkup
from paretune.weights import kernels
from paretune.weights.packed import Packing

EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_every_extra_is_known_with_what_it_brings() -> None:
    declared = {extra: sorted(re.split(r"[><=~!;\[ ]", given)[0] for given in listed) for extra, listed in EXTRAS.items()}
    assert {extra: sorted(brings) for extra, brings in checkup.EXTRAS.items()} == declared


def test_doctor_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "_version", lambda name: "" if name in ("onnx", "sacrebleu", "rouge-score") else "9.8.7")
    monkeypatch.setattr(checkup, "_packed", lambda: {"int8 beside fp32": "1: 0.5 codes"})  # timed in test_cli
    said = CliRunner().invoke(checkup.doctor, catch_exceptions=False).output
    assert "int8 beside fp32  1: 0.5 codes" in said
    lines = dict(line.split(maxsplit=1) for line in said.partition("extras\n")[2].strip().splitlines())
    assert lines.keys() == EXTRAS.keys()
    assert lines["audio"] == "soundfile 9.8.7"
    assert lines["onnx"] == "onnx is missing: pip install 'paretune[onnx]'"
    assert lines["text"] == "sacrebleu and rouge-score are missing: pip install 'paretune[text]'"


def test_doctor_times_every_packed_format(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowdowns(method: Packing, *, shape: tuple[int, int]) -> list[kernels.Slowdown]:
        return [kernels.Slowdown(1, 0.5, "codes", 2.0, "dequantized"), kernels.Slowdown(8, 12.0, "dequantized", 3.0, method.spelling())]

    monkeypatch.setattr(kernels, "slowdowns", slowdowns)
    found = checkup._packed()
    assert found["nf4 beside fp32"] == "1: 0.5 codes, 8: 12 dequantized" and found["int4 beside bf16"] == "1: 2 dequantized, 8: 3 int4"
    assert {line.split()[0] for line in found} >= {"int8", "int8_weights", "int4", "nf4", "fp8", "llm_int8"}

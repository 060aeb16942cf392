"""What `paretune doctor` says of the extras is what pyproject.toml has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from paretune.cli import checkup

EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_every_extra_is_known_with_what_it_brings() -> None:
    declared = {extra: sorted(re.split(r"[><=~!;\[ ]", given)[0] for given in listed) for extra, listed in EXTRAS.items()}
    assert {extra: sorted(brings) for extra, brings in checkup.EXTRAS.items()} == declared


def test_doctor_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "_version", lambda name: "" if name in ("onnx", "sacrebleu", "rouge-score") else "9.8.7")
    said = CliRunner().invoke(checkup.doctor, catch_exceptions=False).output
    lines = dict(line.split(maxsplit=1) for line in said.partition("extras\n")[2].strip().splitlines())
    assert lines.keys() == EXTRAS.keys()
    assert lines["audio"] == "soundfile 9.8.7"
    assert lines["onnx"] == "onnx is missing: pip install 'paretune[onnx]'"
    assert lines["text"] == "sacrebleu and rouge-score are missing: pip install 'paretune[text]'"

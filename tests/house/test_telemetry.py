"""No download tells of the machine, from Python as from the command line, whoever imports what first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from paretune import telemetry

LIBRARIES = "import datasets, huggingface_hub"
READ = """
from huggingface_hub.utils import build_hf_headers
from transformers.utils.hub import http_user_agent
print(huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS)
print(http_user_agent())
print(build_hf_headers(token=False)["user-agent"])
"""


@pytest.mark.parametrize("first", [f"import paretune; {LIBRARIES}", f"{LIBRARIES}; import paretune", LIBRARIES], ids=["before", "after", "without"])
def test_no_flag_is_left_on(first: str) -> None:
    known = {"DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE", *(name for name, _ in telemetry.SWITCHES.values())}
    environment = {name: value for name, value in os.environ.items() if name not in known} | {"HF_HUB_DISABLE_TELEMETRY": "0"}
    child = subprocess.run([sys.executable, "-c", f"{first}\n{READ}"], capture_output=True, text=True, check=True, env=environment)
    flags, agent, hub_agent = child.stdout.splitlines()
    silent = "paretune" in first  # without it both tell: the test can fail
    assert flags == ("True False" if silent else "False True")
    assert agent.endswith("telemetry/off") == silent and ("torch/" not in hub_agent) == silent

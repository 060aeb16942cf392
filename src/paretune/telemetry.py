"""No telemetry: what Hugging Face's libraries tell of a machine beside what they download is switched off, wherever a download begins."""

from __future__ import annotations

import os
import sys

# the module that reads the variable, when it is first imported -> the variable, and what it shall be
SWITCHES = {"huggingface_hub.constants": ("HF_HUB_DISABLE_TELEMETRY", True), "datasets.config": ("HF_UPDATE_DOWNLOAD_COUNTS", False)}


def off() -> None:
    """Switches it off in this process and those that it starts, whether the libraries are imported already or not."""
    for module, (name, value) in SWITCHES.items():
        os.environ[name] = str(int(value))
        if module in sys.modules:
            setattr(sys.modules[module], name, value)

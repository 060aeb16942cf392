"""What all tests share: no network, one thread, and the path to the real data where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it does


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: $PARETUNE_DATA, or `../shared/data` beside the repository."""
    path = Path(os.environ.get("PARETUNE_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not path.is_dir():
        pytest.skip("the real data sets are not here; PARETUNE_DATA names their folder")
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the long tests: every pair on every family, several processes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --all the tests marked `all` are deselected; pytest's summary counts them."""
    if config.getoption("--all") or any(item.nodeid in config.args for item in items):
        return
    long = [item for item in items if item.get_closest_marker("all")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("all")]

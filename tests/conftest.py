"""Put the chapters on the import path; register the slow marker for the README's commands."""
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", "readme: runs the README's commands (minutes; only with `pytest -m readme`)")


def pytest_collection_modifyitems(config, items):
    if "readme" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("readme"):
                item.add_marker(pytest.mark.skip(reason="minutes long: run `pytest -m readme`"))

"""The slow tier: tests marked `slow` run with --all only."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        slow = pytest.mark.skip(reason="slow: runs with --all")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)

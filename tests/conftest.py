"""Shared by all tests: sample shards, and real ranks in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "shards" / "sample"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        slow = pytest.mark.skip(reason="slow: runs with --all")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)


def run_ranks(
    script: Path, *arguments: object, ranks: int = 2, timeout: float = 600
) -> subprocess.CompletedProcess:
    """Runs a script on real ranks under torchrun; the output is shown when it fails."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        str(script),
        *map(str, arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, f"{script.name} failed\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


@pytest.fixture(scope="session")
def sample() -> Path:
    return SAMPLE

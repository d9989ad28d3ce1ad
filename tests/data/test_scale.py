"""100 million samples: memory holds counts, and any step is planned at once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("scale.py")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("scale")
    subprocess.run([sys.executable, SCRIPT, folder, folder / "report.json"], check=True, timeout=300)
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_100_million_samples_take_less_than_500_mb(report: dict[str, Any]) -> None:
    """Sounds by length, a mix of them, and blocks of their texts, all at once; without torch's own 300 MB."""
    assert report["samples"] > 98_000_000 and report["blocks"] > 190_000_000
    assert not report["torch"] and report["peak"] < 200


@pytest.mark.slow
def test_any_step_is_planned_in_less_than_50_ms(report: dict[str, Any]) -> None:
    """Six streams, two of them in windows, at the start and a million million steps on; by the time of the CPU."""
    assert report["milliseconds"][-1] < 50


@pytest.mark.slow
def test_1_to_4096_ranks_share_out_the_same_micro_batches(report: dict[str, Any]) -> None:
    """Each once, and all ranks run the modalities in one order."""
    assert len(report["worlds"]) == 13 and all(report["worlds"].values())

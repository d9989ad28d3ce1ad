"""What a rank holds is what the formula says, and falls with the number of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = ("master", "moments", "teacher", "average")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_at_zero3_everything_is_divided_among_the_ranks(tmp_path: Path) -> None:
    """Masters, moments, teacher and average in bf16; the student's small tensors stay whole."""
    options = ["--recipe", "image_tiny", "--stages", "3", "--ranks", "1", "2", "--precisions", "bf16"]
    command = [sys.executable, str(ROOT / "scripts" / "bench_memory.py"), *options, "--out", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone, two = json.loads((tmp_path / "memory.json").read_text())["rows"]
    for row in (alone, two):
        for part in PARTS:
            assert row["held"][part] == pytest.approx(row["formula"][part], rel=0.01), part
    for part in PARTS:
        assert two["held"][part] == pytest.approx(alone["held"][part] / 2, rel=0.01), part
    assert two["peak"] < alone["peak"]

"""The measuring script runs, on tiny shapes; what it says about speed only a GPU can tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "bench_kernels.py"), *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_check_writes_every_row_of_the_aims(tmp_path: Path):
    """Four shapes of targets whole and masked, two sizes of the average with and without a copy, attention, loss."""
    done = bench("--check", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    kernels = ["targets", "targets, masked"] * 4 + ["ema"] * 4 + ["attention"] * 2 + ["regression"] * 2
    assert [row["kernel"] for row in rows] == kernels
    assert all(row["error"] < 3e-2 and row["ms"] > 0 and row["baselines"]["eager"]["ms"] > 0 for row in rows)
    assert (tmp_path / "kernels.md").read_text().count("\n| ") == len(rows) + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path):
    done = bench("--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr.strip().startswith("bench_kernels needs a CUDA GPU")
    assert not (tmp_path / "out").exists()

"""Real ranks in processes of their own, and where things lie."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "shards" / "sample"


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

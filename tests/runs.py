"""Runs that several test files look at, and how they are started: real processes, tiny settings."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ranks import ROOT, SAMPLE

from d2v_ds.engine.ds_config import PRESETS
from d2v_ds.engine.launch import free_port

MODALITIES = ("audio", "image", "text")
STEPS, HALF = 6, 3
TINY = [
    f"data={SAMPLE}",
    f"train.steps={STEPS}",
    f"train.save_every={HALF}",
    "train.log_every=1",
    "train.workers=0",
    "precision=fp32",
    "optim.lr=2e-3",
    "optim.warmup_steps=20",
    "optim.clip=4.0",
    "body.dim=48",
    "body.depth=2",
    "modalities.audio.alibi.learned=false",
    "modalities.text.alibi.learned=true",
    *[
        f"modalities.{name}.{key}=2"
        for name in MODALITIES
        for key in ("data.batch", "data.micro_batches", "target.top_k", "clones")
    ],
]
"""multimodal_tiny with what a test of the machinery needs (a step takes 0.2 s) or counts on."""
TIMINGS = (
    "samples_per_second", "data_wait_share", "save_pause_seconds", "slowest_rank", "slowest_rank_seconds",
    "median_rank_seconds",
)  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """One thread a rank; the CPU also where there is a GPU, since two ranks cannot share one."""
    return (
        os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        | more
    )


def deepspeed(*arguments: object) -> list[str]:
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
        "train.py",
        *map(str, arguments),
    ]


def torchrun(*arguments: object, ranks: int = 2) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        *map(str, arguments),
    ]


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def start(command: list[str], code: int = 0, **env: str) -> subprocess.CompletedProcess:
    """Runs it to its end in the repository; its output is shown when it ends with another exit code."""
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(**env), cwd=ROOT, timeout=400
    )
    assert done.returncode == code, (
        f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    )
    return done


@dataclass
class Command:
    """One command line of train.py on the tiny settings, for `start_all`."""

    out: Path
    settings: list[object]
    after: Path | None = None
    """A finished run: `out` becomes a copy of it, interrupted."""
    env: dict[str, str] = field(default_factory=dict)


def start_all(folder: Path, commands: dict[str, Command], ranks: int = 1) -> dict[str, dict[str, Any]]:
    """One after another in one process (or so many ranks); {name: {code, out, err}}."""
    listed = [
        {
            "name": name,
            "argv": [*TINY, f"out={command.out}", *map(str, command.settings)],
            "after": str(command.after or ""),
            "out": str(command.out),
            "env": command.env,
        }
        for name, command in commands.items()
    ]
    (folder / "commands.json").write_text(json.dumps(listed), encoding="utf-8")
    script = [ROOT / "tests" / "training" / "commands.py", folder / "commands.json", folder / "results.json"]
    start(python(*script) if ranks == 1 else torchrun(*script, ranks=ranks))
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def zero3_config(folder: Path) -> Path:
    """The preset, but with parameters on both sides of the persistence threshold."""
    config = json.loads((PRESETS / "zero3.json").read_text(encoding="utf-8"))
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 2_000
    path = folder / "zero3_low.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def two_rank_run(factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks at ZeRO-3, under the `deepspeed` launcher: one for all processes of the tests, only
    read."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two_ranks"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            shutil.rmtree(folder / "run", ignore_errors=True)
            start(deepspeed("--deepspeed", zero3_config(folder), f"out={folder / 'run'}", *TINY))
            (folder / "done").touch()
    return folder / "run"


def interrupted(run: Path, out: Path) -> Path:
    """What a crash while saving the last step leaves: the checkpoint before, and later rows, wrong ones."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns(f"step_{STEPS:08d}", "losses.png"))
    newest = max(out.glob("step_*")).name  # that of HALF, or a later one that is kept for its score
    (out / "latest").write_text(newest, encoding="utf-8")
    (out / f".tmp-step_{STEPS:08d}").mkdir()
    (out / f".tmp-step_{STEPS:08d}" / "rank_00000.safetensors").write_bytes(b"half a file")
    for name in ("metrics.jsonl", "health.jsonl"):
        kept = [
            row if row["step"] <= int(newest[5:]) else dict.fromkeys(row, -1.0) | {"step": row["step"]}
            for row in read_rows(run, name)
        ]
        lines = [json.dumps(row) for row in kept]
        (out / name).write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20], encoding="utf-8")
    return out


def read_rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


def without_timings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]

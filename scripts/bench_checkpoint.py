"""What a checkpoint costs: how long training stands still, bytes, and the time to resume. On a CPU, on an idle machine.

    python scripts/bench_checkpoint.py            # writes docs/benchmarks/checkpoint.md and .json, in some minutes

Tiny (multimodal_tiny) and base (image_base), 1, 2 and 4 ranks at ZeRO-3 in fp32, saved while the training waits (sync)
and beside it (async), by the project's own engine and saver, with moments. Beside a save, ranks multiply matrices as a
training would; `slowed` is how much longer that takes than without one. Resuming is: verify all hashes, then read
weights, moments and average into the engine. Medians, and the range, of --repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from d2v_ds.engine.build import build_engine, build_optimizer
from d2v_ds.engine.checkpoint import Checkpoint, load, newest
from d2v_ds.engine.ds_config import find_config, read_config, resolve_config
from d2v_ds.engine.ema import TeacherEMA
from d2v_ds.engine.launch import prepare_environment, start_distributed
from d2v_ds.engine.partition import base_optimizer, fragments
from d2v_ds.engine.saver import Saver
from d2v_ds.modalities.build import build_model
from d2v_ds.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"tiny": "multimodal_tiny", "base": "image_base"}
RANKS = (1, 2, 4)
COLUMNS = ("pause", "whole", "slowed")


def build(name: str) -> tuple[Any, TeacherEMA]:
    """Engine and average of a recipe, with moments as after a step."""
    recipe = load_recipe(name)
    optim = recipe.optim
    numbers = {
        "lr": optim.lr,
        "betas": optim.betas,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    config = resolve_config(
        read_config(find_config("zero3")),
        clip=optim.clip,
        precision="fp32",
        dim=recipe.body.dim,
        **numbers,
    )
    torch.manual_seed(1)
    model = build_model(recipe.body, recipe.modalities)
    engine = build_engine(model, build_optimizer(model, decay=optim.decay, **numbers), config)
    optimizer = base_optimizer(engine)
    for flat in {id(f.flat): f.flat for f in fragments(engine)}.values():
        moments = {"exp_avg": torch.randn_like(flat), "exp_avg_sq": torch.rand_like(flat)}
        optimizer.state[flat] = {"step": torch.tensor(1.0), **moments}
    return engine, TeacherEMA(engine)


def work(matrix: torch.Tensor) -> float:
    """Seconds of some products, as a step has them."""
    began = time.perf_counter()
    for _ in range(4):
        matrix @ matrix
    return time.perf_counter() - began


def measure(name: str, mode: str, run: Path, repeats: int) -> dict[str, list[float]]:
    engine, ema = build(name)
    saver = Saver(engine, ema, run, mode=mode, keep=1)
    matrix = torch.randn(768, 768)
    usual = statistics.median(work(matrix) for _ in range(20))
    rows: dict[str, list[float]] = {column: [] for column in (*COLUMNS, "resume")}
    for step in range(repeats + 1):
        dist.barrier()
        saver.take_pause()
        began, slowed = time.perf_counter(), 0.0
        saver.begin(step, {})
        while saver.pending is not None:
            slowed += work(matrix) - usual
            saver.advance()
        row = {"pause": saver.take_pause(), "whole": time.perf_counter() - began, "slowed": max(slowed, 0.0)}
        if step:  # the first one allocates
            for column, value in row.items():
                rows[column].append(value)
    for _ in range(max(2, repeats // 2)):
        dist.barrier()
        began = time.perf_counter()
        if dist.get_rank() == 0:
            assert newest(run)[0] is not None
        dist.barrier()
        load(engine, ema, Checkpoint(run / f"step_{repeats:08d}"), 1)
        dist.barrier()
        rows["resume"].append(time.perf_counter() - began)
    rows["megabytes"] = [sum(p.stat().st_size for p in (run / f"step_{repeats:08d}").iterdir()) / 1e6]
    return rows


def be_a_rank(name: str, mode: str, run: Path, repeats: int) -> None:
    _, world = prepare_environment()
    start_distributed(world)
    rows = measure(name, mode, run, repeats)
    if dist.get_rank() == 0:
        (run / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()


def start_ranks(size: str, ranks: int, mode: str, folder: Path, repeats: int) -> dict[str, Any]:
    run = folder / f"{size}_{ranks}_{mode}"
    run.mkdir(parents=True)
    threads = max(1, (os.cpu_count() or 1) // ranks)
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads),
    }
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
    ]
    rank = [__file__, "--rank", SIZES[size], mode, str(run), "--repeats", str(repeats)]
    done = subprocess.run([*torchrun, *rank], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{size}, {ranks} ranks, {mode}:\n{done.stderr[-3000:]}")
    rows = json.loads((run / "rows.json").read_text(encoding="utf-8"))
    shutil.rmtree(run)
    return {"size": size, "ranks": ranks, "mode": mode, **rows}


def format_table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| size | ranks | how | pause, s | whole save, s | slowed by, s | MB | resume, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        numbers = [spread(row[column]) for column in COLUMNS]
        lines.append(
            f"| {row['size']} | {row['ranks']} | {row['mode']} | {' | '.join(numbers)} | {row['megabytes'][0]:.1f} | "
            f"{spread(row['resume'])} |"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def describe_machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: both")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="default: 1 2 4")
    parser.add_argument(
        "--repeats", type=int, default=5, help="saves that are measured, besides a first one (default: 5)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "checkpoint.md")
    parser.add_argument("--rank", nargs=3, metavar=("RECIPE", "MODE", "RUN"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        name, mode, run = arguments.rank
        be_a_rank(name, mode, Path(run), arguments.repeats)
        return 0
    results = []
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_") as folder:
        for size in arguments.sizes:
            for ranks in arguments.ranks:
                for mode in ("sync", "async"):
                    results.append(start_ranks(size, ranks, mode, Path(folder), arguments.repeats))
                    print(format_table(results[-1:]).splitlines()[-1], flush=True)
    text = (
        "# What a checkpoint costs\n\n`python scripts/bench_checkpoint.py` on "
        f"{describe_machine()}: ZeRO-3, fp32, a local disk; median (range) of {arguments.repeats} saves.\n\n"
        f"{format_table(results)}\n\n"
        "`pause`: seconds that rank 0's training stands still. `slowed`: how much longer products of matrices take "
        "while a save is written beside them, on the same cores. `resume`: all hashes verified, then weights, moments "
        "and average read.\n"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What does a rank hold, and what is the most it needs in a step? Measured beside the formula, on CPU ranks.

    python scripts/bench_memory.py                # ZeRO 0-3 on 1, 2 and 4 ranks, fp32 and bf16, in some minutes

Each row is a real DeepSpeed run of the project's own engine, step and EMA: one small batch, a few steps. State is
what the tensors between two steps occupy (weights, fp32 masters, Adam's moments, teacher, average), counted once each;
the formula is the bytes that the stage must hold on a rank. Gradients are what backward leaves before the reduction,
whole on every rank since a step reduces once. Peak is the most that tensors occupy at any moment of a step: gathered
layers, activations and the buffers of communication and of Adam come on top of state and gradients. Writes
docs/benchmarks/memory.md and .json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_ds.data import Draw
from d2v_ds.engine.build import build_engine, build_optimizer
from d2v_ds.engine.ds_config import find_config, read_config, resolve_config
from d2v_ds.engine.ema import TeacherEMA
from d2v_ds.engine.launch import end_process, prepare_environment, start_distributed
from d2v_ds.engine.partition import base_optimizer, fragments
from d2v_ds.engine.step import apply_step, one_reduction
from d2v_ds.modalities.build import build_model
from d2v_ds.modalities.source import draw_views
from d2v_ds.model.batch import Batch
from d2v_ds.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
STAGES, RANKS, PRECISIONS = (0, 1, 2, 3), (1, 2, 4), ("fp32", "bf16")
PARTS = ("student", "master", "moments", "teacher", "average")


def formula(stage: int, ranks: int, precision: str, trained: int, followed: int) -> dict[str, float]:
    """Bytes a rank must hold of `trained` parameters, of which the teacher follows `followed`.

    Weights are divided at stage 3, what the optimizer steps from stage 1 on. A teacher in fp32 is its own average.
    """
    width = 4 if precision == "fp32" else 2
    weights, stepped = (ranks if stage == 3 else 1), (ranks if stage else 1)
    return {
        "student": width * trained / weights,
        "master": 0 if stage == 0 and width == 4 else 4 * trained / stepped,
        "moments": 8 * trained / stepped,
        "teacher": width * followed / weights,
        "average": 0 if width == 4 else 4 * followed / stepped,
    }


def build(recipe: Recipe, stage: int) -> tuple[Any, TeacherEMA]:
    optim = recipe.optim
    numbers = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    path = find_config(f"zero{stage}")
    config = resolve_config(
        read_config(path),
        clip=optim.clip,
        precision=recipe.precision,
        dim=recipe.body.dim,
        path=str(path),
        **numbers,
    )
    torch.manual_seed(0)
    model = build_model(recipe.body, recipe.modalities)
    engine = build_engine(model, build_optimizer(model, decay=optim.decay, **numbers), config)
    engine.train()
    return engine, TeacherEMA(engine)


def make_batch(recipe: Recipe) -> Batch:
    ((name, config),) = recipe.modalities.items()
    tokens = (config.size // config.patch) ** 2
    source = torch.randn(1, 3, config.size, config.size)
    return Batch(name, source, **draw_views([Draw(0, 0, 0)], [tokens], config))


def size_of(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of their storages that were not counted yet."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def held(engine: Any, ema: TeacherEMA) -> dict[str, int]:
    """Bytes of each part on this rank."""
    seen: set[int] = set()
    module = engine.module
    teachers = {id(t) for _, _, t in module.followed()}
    shards = [(id(p), weights_of(p)) for p in module.parameters()]
    parts = {
        "student": [t for key, tensors in shards if key not in teachers for t in tensors],
        "teacher": [t for key, tensors in shards if key in teachers for t in tensors],
        "average": [shadow.average for shadow in ema.shadows],
        "master": [f.flat for f in fragments(engine)],
        "moments": [
            t for s in base_optimizer(engine).state.values() for t in s.values() if torch.is_tensor(t)
        ],
    }
    return {part: size_of(tensors, seen) for part, tensors in parts.items()}


def weights_of(parameter: Tensor) -> list[Tensor]:
    """What holds a parameter here: its shard at stage 3, and a gathered copy if there is one."""
    shard = getattr(parameter, "ds_tensor", None)
    return [parameter.data] if shard is None else [shard.data, parameter.data]


def tensors_alive() -> Iterator[Tensor]:
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            yield thing
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad


def highest(step: torch.profiler.profile) -> int:
    """Most bytes of tensors allocated and not freed since the profile began."""
    most = now = 0
    for event in step.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measure(arguments: argparse.Namespace) -> None:
    """One rank of one row."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    recipe = load_recipe(arguments.recipe, [f"precision={arguments.precision}", "modalities.image.clones=1"])
    rank, world = prepare_environment()
    device = start_distributed(world)
    engine, ema = build(recipe, arguments.stage)
    batch = make_batch(recipe).to(device, next(engine.module.parameters()).dtype)

    def step() -> int:
        """Bytes of tensors when all gradients are there."""
        with one_reduction(engine):
            out = engine(batch)
            engine.backward(out.loss / out.sample_size)
            del out
            alive = size_of(tensors_alive(), set())
        apply_step(engine)
        ema.update(0.999)
        return alive

    step()
    step()
    gc.collect()
    rest = size_of(tensors_alive(), set())
    gradients = step() - rest
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    peak = rest + highest(profile)
    trained = sum(
        p.ds_numel if hasattr(p, "ds_numel") else p.numel()
        for p in engine.module.parameters()
        if p.requires_grad
    )
    followed = sum(
        t.ds_numel if hasattr(t, "ds_numel") else t.numel()
        for _, s, t in engine.module.followed()
        if s.requires_grad
    )
    row = {
        "stage": arguments.stage,
        "ranks": world,
        "precision": arguments.precision,
        "trained": trained,
        "followed": followed,
        "formula": formula(arguments.stage, world, arguments.precision, trained, followed),
        "held": held(engine, ema),
        "gradients": gradients,
        "peak": peak,
    }
    every: list[Any] = [None] * world
    torch.distributed.all_gather_object(every, row)
    if rank == 0:
        worst = max(every, key=lambda r: r["peak"])
        arguments.row.write_text(json.dumps(worst))


def start(stage: int, ranks: int, precision: str, recipe: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        row = Path(folder) / "row.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [
            __file__,
            "--row",
            str(row),
            "--stage",
            str(stage),
            "--precision",
            precision,
            "--recipe",
            recipe,
        ]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"stage {stage} on {ranks} ranks failed:\n{done.stderr[-4000:]}")
        return json.loads(row.read_text())


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| precision | ZeRO | ranks | " + " | ".join(PARTS) + " | state | formula | gradients | peak |",
        "|---|---|---|" + "---|" * (len(PARTS) + 4),
    ]
    for row in rows:
        mb = [row["held"][part] for part in PARTS]
        mb += [sum(row["held"].values()), sum(row["formula"].values()), row["gradients"], row["peak"]]
        cells = " | ".join(f"{value / 1e6:.1f}" for value in mb)
        lines.append(f"| {row['precision']} | {row['stage']} | {row['ranks']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="image_small", help="an image recipe")
    parser.add_argument("--stages", type=int, nargs="+", default=STAGES)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder for memory.md and .json"
    )
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        measure(arguments)
        end_process(0)
    rows = []
    for precision in arguments.precisions:
        for stage in arguments.stages:
            for ranks in arguments.ranks:
                rows.append(start(stage, ranks, precision, arguments.recipe))
                print(table(rows).splitlines()[-1], flush=True)
    model = f"{arguments.recipe}: {rows[0]['trained']:,} trained parameters, {rows[0]['followed']:,} followed"
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "recipe": arguments.recipe,
        "machine": platform.platform(),
        "torch": torch.__version__,
        "rows": rows,
    }
    (arguments.out / "memory.json").write_text(json.dumps(facts, indent=1) + "\n")
    about = __doc__.split("\n\n")[2].partition(" Writes\n")[0]
    head = (
        f"# Memory of a rank, in MB\n\n`python scripts/bench_memory.py`, CPU ranks. {model}.\n\n{about}\n\n"
    )
    (arguments.out / "memory.md").write_text(head + table(rows) + "\n")


if __name__ == "__main__":
    main()

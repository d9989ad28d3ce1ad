"""What looking at a model's health costs, beside the step that is logged: prints the median of both.

    python scripts/bench_health.py --recipe image_tiny --data DIR [key=value ...]

One process, real batches; a step is forward and backward of all micro-batches and an AdamW step. Run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.distributed as dist

from d2v_ds.data import Plan, StepLoader
from d2v_ds.data.memory import keep_memory
from d2v_ds.modalities.build import build_model
from d2v_ds.modalities.source import open_source
from d2v_ds.recipe import load_recipe
from d2v_ds.training.health import Health


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="audio_tiny")
    parser.add_argument("--data", default="shards/sample")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments, overrides = parser.parse_known_args()
    recipe = load_recipe(arguments.recipe, [f"data={arguments.data}", *overrides])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device(arguments.device)
    if device.type == "cpu":
        keep_memory()  # as a run does
    model = build_model(recipe.body, recipe.modalities).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    sources = [open_source(name, config, recipe.data) for name, config in recipe.modalities.items()]
    plan = Plan(recipe.seed, [s.stream for s in sources])
    seconds: dict[bool, list[float]] = {False: [], True: []}
    looks: list[float] = []
    for step, micros in enumerate(StepLoader(sources, plan, 0, 1, 0, 2 * arguments.steps + 4)):
        is_observed, health = step % 2 == 1, Health()
        look, began = 0.0, now(device)
        for micro in micros:
            batch = micro.batch.to(device, torch.float32)
            output = model(batch, is_observed=is_observed)
            output.loss.backward()
            if is_observed:
                look -= now(device)
                health.observe(batch, output)
                look += now(device)
        optimizer.step()
        optimizer.zero_grad()
        if is_observed:
            look -= now(device)
            health.values()
            look += now(device)
        if step >= 4:
            seconds[is_observed].append(now(device) - began)
            looks += [look] if is_observed else []
    plain, looked = (1e3 * statistics.median(seconds[key]) for key in (False, True))
    spent = 1e3 * statistics.median(looks)
    print(
        f"{recipe.name} on {device.type}, n = {arguments.steps}: a step {plain:.2f} ms, with a look {looked:.2f} ms; "
        f"the look itself {spent:.3f} ms = {spent / plain:.2%} of a step, "
        f"{spent / plain / recipe.train.log_every:.3%} of a run that logs every {recipe.train.log_every} steps"
    )


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()

"""Two real ranks at every stage and precision meet numbers that are not finite, and write down what they did.

    torchrun --nproc_per_node 2 skip_ranks.py OUT CASE ...

Step 1: a picture of rank 1 holds NaN, so a loss does. Step 2: the loss is finite, the gradient of rank 1 is not.
Step 3: the loss of rank 1 is infinite, though its gradient would be finite.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from d2v_ds.engine.launch import prepare_environment, start_distributed
from d2v_ds.engine.partition import fragments
from d2v_ds.training.init import Start
from d2v_ds.training.loop import Report, train_step
from d2v_ds.training.run import build_run, open_sources
from d2v_ds.training.skips import Skips

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
from equality_cases import Case, case_recipe  # noqa: E402

from d2v_ds.engine.ds_config import find_config, read_config, resolve_config  # noqa: E402

STEPS = 5


class Infinite(torch.autograd.Function):
    """A value that overflowed, with a gradient that did not."""

    @staticmethod
    def forward(ctx, x):
        return x * torch.inf

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def weights(run) -> list[torch.Tensor]:
    """All that a step may change on this rank."""
    masters = [f.of(f.flat).clone() for f in fragments(run.engine)]
    return masters + [value.clone() for _, value in run.ema.values()]


def run_case(name: str, out: Path, device: torch.device) -> dict[str, object]:
    preset, _, precision = name.partition(" ")
    recipe = case_recipe(Case(preset, precision))
    recipe.out, recipe.train.steps = str(out / name.replace(" ", "_")), STEPS
    optim = recipe.optim
    config = resolve_config(
        read_config(find_config(preset)), clip=optim.clip, lr=optim.lr, betas=optim.betas, eps=optim.eps,
        weight_decay=optim.weight_decay, precision=precision, dim=recipe.body.dim,
    )  # fmt: skip
    if precision == "fp16":
        config["fp16"] |= {"initial_scale_power": 4, "hysteresis": 1}  # no overflow but ours
    rank, world = dist.get_rank(), dist.get_world_size()
    sources = open_sources(recipe, rank)
    run = build_run(recipe, config, sources, None, Start(), device, rank, world)
    run.engine.train()
    skips, did = Skips(run), []
    for step, micro_batches in enumerate(run.loader):
        image = recipe.modalities["image"].loss
        image.weight = float("inf") if step == 2 and rank == 1 else 1.0
        if step == 1 and rank == 1:
            next(m for m in micro_batches if m.modality == "image").batch.source[0, 0, 0, 0] = torch.nan
        handle = run.engine.module.register_forward_hook(overflow) if step == 3 and rank == 1 else None
        before, report = weights(run), Report(False)
        is_applied = train_step(run, micro_batches, report)
        skips.observe(is_applied, micro_batches, report.each)
        if handle:
            handle.remove()
        changed = [not torch.equal(a, b) for a, b in zip(before, weights(run), strict=True)]
        finite = all(w.isfinite().all() for w in weights(run))
        did.append([is_applied, any(changed), bool(finite), run.applied, skips.in_a_row])
    everyone = [None] * world
    dist.all_gather_object(everyone, did)
    return {"ranks": everyone, "dtype": str(next(run.engine.module.parameters()).dtype)}


def overflow(module, args, output):
    return output._replace(loss=Infinite.apply(output.loss))


def main() -> None:
    prepare_environment()
    # NOTE: DeepSpeed refuses fp16 on CPUs without instructions for it; torch computes it on any
    get_accelerator().is_fp16_supported = lambda: True
    device = start_distributed(2)
    results = {name: run_case(name, Path(sys.argv[1]), device) for name in sys.argv[2:]}
    if dist.get_rank() == 0:
        (Path(sys.argv[1]) / "results.json").write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()


if __name__ == "__main__":
    main()

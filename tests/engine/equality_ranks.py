"""Two real ranks train 5 steps under every engine configuration and write down what they have at the end.

    torchrun --nproc_per_node 2 equality_ranks.py OUT CASE ...

Modalities appear and disappear between the steps and layer drop is on, so stale gradients would show.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from equality_cases import CASES, STEPS, case_recipe, schedule
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_ds.engine.ds_config import find_config, read_config, resolve_config
from d2v_ds.engine.launch import prepare_environment, start_distributed
from d2v_ds.engine.partition import fragments, full_shape
from d2v_ds.training.init import Start
from d2v_ds.training.loop import Report, train_step
from d2v_ds.training.run import build_run, open_sources


class CountCollectives(TorchDispatchMode):
    """Names of the collectives issued inside the block, by whoever: each is an operator of c10d."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls.append(func.name())
        return func(*args, **(kwargs or {}))


def full_values(run) -> dict[str, torch.Tensor]:
    """fp32 student masters and teacher averages, whole, put together from the ranks' stretches."""
    shapes = {name: full_shape(p) for name, p in run.engine.module.named_parameters()}
    mine = [("student." + f.name, f.start, f.of(f.flat).clone()) for f in fragments(run.engine)]
    mine += [("teacher." + f.name, f.start, value.clone()) for f, value in run.ema.values()]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, torch.Tensor] = {}
    for rank in everyone:
        for key, start, value in rank:
            name = key.split(".", 1)[1]
            flat = whole.setdefault(key, torch.full((shapes[name].numel(),), float("nan")))
            flat[start : start + value.numel()] = value
    return {key: value.view(shapes[key.split(".", 1)[1]]) for key, value in whole.items()}


def forward_teacher(run) -> dict[str, torch.Tensor]:
    """The teacher as the next forward pass sees it: gathered where it is partitioned."""
    import deepspeed

    teachers = list(run.ema.teachers.items())
    with deepspeed.zero.GatheredParameters([t for _, t in teachers], enabled=run.ema.stage == 3):
        return {"used." + name: t.detach().float().clone() for name, t in teachers}


def moved_share(run) -> float:
    """Share of the averages that one more step at tau = 0.9999 changes; hardly any would in bf16."""
    before = [value.clone() for _, value in run.ema.values()]
    run.ema.update(0.9999)
    moved = sum((old != new).sum().item() for old, (_, new) in zip(before, run.ema.values(), strict=True))
    return moved / sum(old.numel() for old in before)


def run_case(name: str, out: Path, device: torch.device) -> None:
    case = CASES[name]
    recipe = case_recipe(case)
    config = read_config(find_config(case.preset))
    config["zero_optimization"].update(case.zero)
    ds_config = resolve_config(
        config,
        clip=recipe.optim.clip,
        lr=recipe.optim.lr,
        betas=recipe.optim.betas,
        eps=recipe.optim.eps,
        weight_decay=recipe.optim.weight_decay,
        precision=recipe.precision,
        dim=recipe.body.dim,
    )
    recipe.out = str(out / f"run-{name}")
    rank, world = dist.get_rank(), dist.get_world_size()
    run = build_run(recipe, ds_config, open_sources(recipe, rank), None, Start(), device, rank, world)
    run.engine.train()
    losses, collectives, formula_errors = [], [], []
    update = run.ema.update

    def counted_update(tau: float) -> None:
        before = [(f.of(f.flat).double(), value.double().clone(), value) for f, value in run.ema.values()]
        with CountCollectives() as count:
            update(tau)
        collectives.extend(count.calls)
        formula_errors.append(
            max((tau * old + (1 - tau) * master - new).abs().max().item() for master, old, new in before)
        )

    run.ema.update = counted_update
    for step, micro_batches in enumerate(run.loader):
        report = Report(True)
        assert train_step(run, [m for m in micro_batches if m.modality in schedule(step)], report)
        values = report.losses()
        losses.append([values.get(f"{m}/loss", 0.0) for m in sorted(recipe.modalities)])
    values = full_values(run) | forward_teacher(run)
    values["losses"] = torch.tensor(losses, dtype=torch.float64)
    values["num_collectives"] = torch.tensor(len(collectives))
    values["formula_error"] = torch.tensor(max(formula_errors))
    values["moved_share"] = torch.tensor(moved_share(run))
    persistent = [p.ds_persist for p in run.ema.teachers.values()] if run.ema.stage == 3 else []
    values["num_persistent"] = torch.tensor([sum(persistent), len(persistent)])
    if rank == 0:
        save_file({k: v.contiguous() for k, v in values.items()}, out / f"{name}.safetensors")


def main() -> None:
    prepare_environment()
    device = start_distributed(int(dist.get_world_size()) if dist.is_initialized() else 2)
    for name in sys.argv[2:]:
        run_case(name, Path(sys.argv[1]), device)
    assert STEPS
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

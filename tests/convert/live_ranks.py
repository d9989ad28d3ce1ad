"""Two real ranks train three steps at a stage and precision, save, and write down what lives in the engine.

torchrun --nproc_per_node 2 live_ranks.py OUT CASE ...
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch.distributed as dist
from safetensors.torch import save_file

from d2v_ds.engine.ds_config import find_config, read_config, resolve_config
from d2v_ds.engine.launch import prepare_environment, start_distributed
from d2v_ds.training.init import Start
from d2v_ds.training.loop import run_steps
from d2v_ds.training.run import build_run, open_sources

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
from equality_cases import Case, case_recipe  # noqa: E402
from equality_ranks import full_values  # noqa: E402


def run_case(name: str, out: Path, device) -> None:
    preset, _, precision = name.partition("_")
    recipe = case_recipe(Case(preset, precision))
    recipe.out, recipe.train.steps = str(out / name), 3
    optim = recipe.optim
    config = resolve_config(
        read_config(find_config(preset)), clip=optim.clip, lr=optim.lr, betas=optim.betas, eps=optim.eps,
        weight_decay=optim.weight_decay, precision=precision, dim=recipe.body.dim,
    )  # fmt: skip
    rank, world = dist.get_rank(), dist.get_world_size()
    run = build_run(recipe, config, open_sources(recipe, rank), None, Start(), device, rank, world)
    run_steps(run)
    masters = full_values(run)
    parameters = dict(run.engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=run.ema.stage == 3):
        used = {"used." + name: p.detach().clone().contiguous() for name, p in parameters.items()}
    if rank == 0:
        save_file({k: v.contiguous() for k, v in (masters | used).items()}, out / f"{name}.safetensors")


def main() -> None:
    prepare_environment()
    device = start_distributed(2)
    for name in sys.argv[2:]:
        run_case(name, Path(sys.argv[1]), device)
    dist.barrier()


if __name__ == "__main__":
    main()

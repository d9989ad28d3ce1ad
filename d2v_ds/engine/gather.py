"""Whole weights of a running engine, at any ZeRO stage, without touching what the next step works with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds.engine.partition import fragments, full_shape


@torch.no_grad()
def whole_weights(engine: Any, is_wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The parameters whose name `is_wanted`, as the forward pass uses them, on the engine's device; all ranks call it.

    ZeRO-3: gathered from the ranks' shards into tensors of their own, so no parameter changes its state. Other stages:
    the parameters themselves, to be read only.
    """
    is_partitioned = engine.zero_optimization_stage() == 3
    weights = {}
    for name, parameter in engine.module.named_parameters():
        if not is_wanted(name):
            continue
        if not is_partitioned:
            weights[name] = parameter.data
            continue
        shard = parameter.ds_tensor.data.view(-1).to(engine.device)
        whole = shard.new_empty(shard.numel() * dist.get_world_size())
        dist.all_gather_into_tensor(whole, shard)
        weights[name] = whole[: parameter.ds_numel].view(full_shape(parameter))
    return weights


@torch.no_grad()
def whole_masters(engine: Any) -> dict[str, Tensor]:
    """The fp32 weights that a checkpoint would hold, whole, on the engine's device; all ranks call it."""
    whole = {
        name: torch.zeros(full_shape(p).numel(), device=engine.device)
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }
    for f in fragments(engine):
        whole[f.name][f.start : f.start + f.numel] = f.of(f.flat).to(engine.device, torch.float32)
    shapes = {name: full_shape(p) for name, p in engine.module.named_parameters()}
    for values in whole.values():
        if engine.zero_optimization_stage():  # each stretch lies on one rank
            dist.all_reduce(values)
    frozen = whole_weights(engine, lambda name: name not in whole)
    return {n: t.view(shapes[n]) for n, t in whole.items()} | {n: t.float() for n, t in frozen.items()}

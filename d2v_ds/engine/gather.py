"""Whole weights of a running engine, at any ZeRO stage, without touching what the next step works with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds.engine.partition import full_shape


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

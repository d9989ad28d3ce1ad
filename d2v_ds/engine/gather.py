"""Whole weights of a running engine, at any ZeRO stage, without touching what the next step works with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2v_ds.engine.ema import TeacherEMA
from d2v_ds.engine.partition import Fragment, fragments, full_shape


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


def whole_masters(engine: Any, is_wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The fp32 weights that a checkpoint would hold, whole, on the engine's device; all ranks call it."""
    wanted = {name: p for name, p in engine.module.named_parameters() if is_wanted(name)}
    trained = {name: p for name, p in wanted.items() if p.requires_grad}
    masters = join(engine, ((f, f.of(f.flat)) for f in fragments(engine) if f.name in trained), trained)
    frozen = whole_weights(engine, lambda name: name in wanted and name not in trained)
    return masters | {name: t.float() for name, t in frozen.items()}


def whole_averages(engine: Any, ema: TeacherEMA) -> dict[str, Tensor]:
    """The teacher's fp32 averages, by the names of the weights that they follow, as `whole_masters`."""
    return join(engine, ema.values(), {name: ema.teachers[name] for name in ema.trained})


@torch.no_grad()
def join(
    engine: Any, stretches: Iterable[tuple[Fragment, Tensor]], parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The ranks' stretches of these parameters, whole."""
    whole = {name: torch.zeros(full_shape(p).numel(), device=engine.device) for name, p in parameters.items()}
    for f, values in stretches:
        whole[f.name][f.start : f.start + f.numel] = values.to(engine.device, torch.float32)
    for values in whole.values():
        if engine.zero_optimization_stage():  # each stretch lies on one rank
            dist.all_reduce(values)
    return {name: values.view(full_shape(parameters[name])) for name, values in whole.items()}

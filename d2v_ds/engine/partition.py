"""Where on this rank the fp32 values of a parameter live, whatever DeepSpeed's stage and precision.

Everything that must touch them (EMA, checkpoints) works on these stretches, so it is written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """A stretch of one flattened parameter inside one of this rank's fp32 tensors."""

    name: str
    parameter: nn.Parameter
    start: int
    """In the flattened parameter."""
    numel: int
    flat: Tensor
    """The fp32 tensor the optimizer steps; its optimizer state has the same layout."""
    offset: int
    """In `flat`."""

    def of(self, flat: Tensor) -> Tensor:
        """This stretch of a tensor laid out like `flat`."""
        return flat.detach().view(-1).narrow(0, self.offset, self.numel)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def shard_range(parameter: nn.Parameter, rank: int) -> tuple[int, int]:
    """(start, numel) of what a rank holds of a ZeRO-3 parameter; the rest of its shard is padding, never read."""
    size = parameter.partition_numel()
    start = rank * size
    return start, max(0, min(size, parameter.ds_numel - start))


def fragments(engine: Any) -> list[Fragment]:
    """All stretches of trainable parameters on this rank, in the optimizer's order."""
    return [f for f in find_fragments(engine) if f.numel > 0]


def find_fragments(engine: Any) -> Iterator[Fragment]:
    optimizer, names = engine.optimizer, engine.parameter_names
    kind = type(optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            offset = 0
            for p in group:
                start, numel = shard_range(p, torch.distributed.get_rank())
                yield Fragment(names[id(p)], p, start, numel, flat, offset)
                offset += p.partition_numel()
    elif kind == "DeepSpeedZeroOptimizer":
        for flat, group in zip(
            optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True
        ):
            for p in group:
                if p._hp_mapping is not None:
                    low, high = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                    yield Fragment(names[id(p)], p, low.start, high.numel, flat, high.start)
    elif kind == "FP16_UnfusedOptimizer":
        for masters, group in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, p in zip(masters, group, strict=True):
                yield Fragment(names[id(p)], p, 0, p.numel(), master, 0)
    elif isinstance(optimizer, torch.optim.Optimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                yield Fragment(names[id(p)], p, 0, p.numel(), p, 0)
    else:
        raise ValueError(
            f"DeepSpeed chose {kind}, which this project has no EMA for; "
            "use a preset of ds_configs/, or drop data_types.grad_accum_dtype at stage 1"
        )


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def is_replicated(engine: Any) -> bool:
    """Every rank holds everything (stage 0), so one of them is enough for a checkpoint."""
    return engine.zero_optimization_stage() == 0


@torch.no_grad()
def publish_weights(engine: Any) -> None:
    """Brings the weights that the forward pass uses up to date with the fp32 values."""
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        for i in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        drop_gathered(p for group in optimizer.fp16_groups for p in group)
    elif kind == "DeepSpeedZeroOptimizer":
        optimizer.update_lp_params()
    elif kind == "FP16_UnfusedOptimizer":
        for masters, group in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            torch._foreach_copy_([p.data for p in group], [m.data for m in masters])


def drop_gathered(parameters: Iterator[nn.Parameter]) -> None:
    """Forgets gathered copies of ZeRO-3 parameters, small persistent ones too, so the next forward gathers anew.

    No collective: `partition` only frees when the parameter was not written to.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    gathered = []
    for p in parameters:
        p.ds_secondary_tensor = None  # a copy inside the node (hpZ) would stay as it was
        if p.ds_status == ZeroParamStatus.AVAILABLE:
            gathered.append(p)
    if gathered:
        gathered[0].partition(gathered)

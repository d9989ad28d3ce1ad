"""One optimizer step over micro-batches of several modalities: one reduction, absent gradients count as zero.

NOTE: left alone, ZeRO-3, and any stage with CPU offload, applies the *previous* gradient again to a parameter
that got none in this step. Here nothing is left of it when the step's one reduction runs; tests compare each
stage with plain AdamW.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def one_reduction(engine: Any) -> Iterator[None]:
    """Backward passes inside leave their gradients on this rank; they are reduced together at the end."""
    if engine.zero_optimization_stage() == 0:
        with engine.no_sync():
            yield
        fill_absent(engine)
        if (
            dist.get_world_size() > 1
        ):  # alone there is nothing to add, and each gradient would be copied twice
            engine.allreduce_gradients()
    else:
        with engine.coalesce_grad_reduction():
            yield
            fill_absent(engine)


def fill_absent(engine: Any) -> None:
    """Parameters without a gradient, of an absent modality or a dropped layer, get zeros instead of what is left."""
    if engine.zero_optimization_stage() == 3:  # the reduction writes over these where there is a gradient
        engine.optimizer.grad_partitions_flat_buffer.zero_()
        for flat in engine.optimizer.fp32_partitioned_groups_flat:
            if flat.grad is not None:  # CPU offload keeps it between steps
                flat.grad.zero_()
        return
    for parameter in engine.module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def apply_step(engine: Any) -> bool:
    """Clips and updates; False if the gradients were not finite and the step was skipped, on all ranks alike."""
    if is_plain(engine) and not finite_gradients(engine):
        engine.zero_grad()
        engine.global_steps += 1
        engine.skipped_steps += 1
        return False
    engine.step()
    return engine.was_step_applied()


def is_plain(engine: Any) -> bool:
    """Stage 0 in fp32, where DeepSpeed itself would apply gradients that are not finite."""
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def finite_gradients(engine: Any) -> bool:
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine._global_grad_norm = norm  # what get_global_grad_norm() gives; DeepSpeed leaves it empty here
    return bool(torch.isfinite(norm))


def clip_gradients(engine: Any) -> None:
    """By the norm of `finite_gradients`, which DeepSpeed would compute again; a smaller one moves nothing."""
    clip = engine.gradient_clipping()
    if engine._global_grad_norm > clip:
        torch.nn.utils.clip_grads_with_norm_(engine.module.parameters(), clip, engine._global_grad_norm)


def loss_scaler(engine: Any) -> Any:
    """What holds fp16's loss scale, wherever the stage keeps it; None in fp32."""
    found = (getattr(engine.optimizer, name, None) for name in ("loss_scaler", "loss_scale_config"))
    return next((scaler for scaler in found if scaler is not None), None)


def loss_scale(engine: Any) -> tuple[float | None, float]:
    """fp16's loss scale, None if it does not move, and the lowest that it may become."""
    scaler = loss_scaler(engine)
    if not getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False)):
        return None, 0.0
    lowest = getattr(scaler, "min_scale", None) or getattr(scaler, "min_loss_scale", None) or 0.0
    return float(scaler.cur_scale), float(lowest)

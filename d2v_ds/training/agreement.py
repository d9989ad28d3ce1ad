"""What all ranks agree on: an error of one reaches all, and a difference between them is an error, not a hang."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds.config import dotted_keys
from d2v_ds.data import MicroBatch
from d2v_ds.data.remote import Remote
from d2v_ds.engine.launch import control_group
from d2v_ds.model.batch import Batch
from d2v_ds.recipe import Recipe

if TYPE_CHECKING:
    from d2v_ds.training.run import Run

Result = TypeVar("Result")
LOCAL = {"data", "init", "train.workers", *(f"remote.{key}" for key in Remote.model_fields)}
"""Keys that may differ between machines."""


def together(work: Callable[[], Result]) -> Result:
    """What `work` gives on this rank. All ranks call it; a ValueError or OSError of one is a ValueError on all."""
    result, problem = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for text in problems:
        if text:
            raise ValueError(text)
    return result


def agree(facts: dict[str, Any]) -> None:
    """Raises ValueError on all ranks, with both values, if they are not about to do the same."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    for rank, other in enumerate(everyone):
        for key in facts.keys() | other.keys():
            ours, theirs = facts.get(key), other.get(key)
            if theirs != ours:
                raise ValueError(
                    f"rank {rank} has {key} {theirs}, rank {dist.get_rank()} has {ours}; "
                    "all ranks must see the same command, files and checkpoints"
                )


def settings(recipe: Recipe) -> dict[str, Any]:
    """What must be equal on all ranks."""
    return {
        key: value
        for key, value in dotted_keys(recipe).items()
        if key not in LOCAL and not key.endswith((".data.shards", ".data.corpora", ".data.tokenizer"))
    }


def meet(run: Run, micro_batches: list[MicroBatch]) -> dict[str, Tensor] | None:
    """Masked tokens (in fine-tuning: samples) of each modality in this step, over all ranks and micro-batches.

    None on all ranks if one was asked to stop, and so comes with no micro-batches. ValueError on all if they are
    not at the same step, recipe, data and order of modalities: with marks m of 16 bits that are equal on all W
    ranks, and with no others, W sum m^2 = (sum m)^2 (Cauchy-Schwarz).
    """
    names = sorted(run.recipe.modalities)
    counts = dict.fromkeys(names, 0.0)
    for micro in micro_batches:
        counts[micro.modality] += num_targets(micro.batch, run.recipe.fairseq_compat)
    facts = {"step": run.step, "modalities": [micro.modality for micro in micro_batches], **run.identity}
    mark = int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:2], "big")
    row = [*(counts[name] for name in names), float(not micro_batches), mark, mark**2]
    total = torch.tensor(row, dtype=torch.float64)
    run.clock.arrived()
    dist.all_reduce(total, group=control_group())
    run.clock.met()
    asked, marks, squares = (int(value) for value in total[-3:].tolist())
    if asked:
        return None
    if run.world * squares != marks**2:
        agree(facts)
    return dict(zip(names, total.to(run.device), strict=False))


def num_targets(batch: Batch, fairseq_compat: bool) -> int:
    if batch.labels is not None:
        return len(batch.labels)
    if batch.padding_BT is None or fairseq_compat:
        return batch.masked_NJ.numel() if batch.counted_NJ is None else int(batch.counted_NJ.sum())
    return int((batch.mask_NT & ~batch.padding_BT.repeat_interleave(batch.clones, dim=0)).sum())

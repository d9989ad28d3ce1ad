"""Steps that were skipped because a loss or a gradient was not finite: counted, written down, and not too many.

The engine decides by the norm of all gradients, so on all ranks alike. A loss that is not finite does not make its
gradients so by itself (an overflow in the forward pass can leave them finite, and wrong): `taint` sees to that, on the
device, without waiting for it.
"""

from __future__ import annotations

import contextlib
import math
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds.data import MicroBatch
from d2v_ds.engine.step import loss_scale
from d2v_ds.training.guard import roll_back
from d2v_ds.training.log import append, warn

if TYPE_CHECKING:
    from d2v_ds.training.run import Run

FILE = "skipped_steps.jsonl"


class Diverged(RuntimeError):
    """Training cannot go on: its losses or gradients are not finite, step after step."""


def taint(loss: Tensor) -> Tensor:
    """A factor for the loss: 1, or NaN if it is not finite, so that its gradients are not."""
    return torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class Skips:
    """What to do about each step, skipped or not. All ranks call it."""

    def __init__(self, run: Run):
        self.run = run
        self.in_a_row = 0
        """Skipped steps, but those that only look for the loss scale of fp16."""

    def observe(self, is_applied: bool, micro_batches: list[MicroBatch], losses: list[Tensor]) -> None:
        """After a step with these micro-batches of this rank.

        After `train.skip_limit` in a row it raises Diverged, or goes back if `health.on_collapse` says so.
        """
        if is_applied:
            self.in_a_row = 0
            return
        run, step = self.run, micro_batches[0].step + 1
        mine = [describe(run, micro, loss) for micro, loss in zip(micro_batches, losses, strict=True)]
        everyone: list[Any] = [None] * run.world
        dist.all_gather_object(everyone, mine)
        rows = sorted((row for rank in everyone for row in rank), key=lambda r: (r["modality"], r["index"]))
        bad = sorted({row["modality"] for row in rows if not row["is_finite"]})
        scale, lowest = loss_scale(run.engine)
        is_search = not bad and scale is not None and scale > lowest
        self.in_a_row += not is_search
        what = f"a loss of {', '.join(bad)} was" if bad else "its losses are finite, but its gradients were"
        if run.rank == 0:
            write_down(run, {"step": step, "loss_scale": scale, "micro_batches": rows})
            count = f"the loss scale of fp16 is {scale:g} now" if is_search else f"{self.in_a_row} in a row"
            text = (
                f"step {step} was skipped, {what} not finite ({count}); {run.folder / FILE} names its samples"
            )
            with contextlib.suppress(BrokenPipeError):  # a launcher that is gone does not read
                print(f"warning: {text}", file=sys.stderr, flush=True)
        limit = run.recipe.train.skip_limit
        if self.in_a_row < limit:
            return
        reason = (
            f"{limit} steps in a row had losses or gradients that are not finite (train.skip_limit={limit}); "
            f"{run.folder / FILE} names their samples"
        )
        if run.recipe.health.on_collapse == "rollback":
            roll_back(run, reason)
            return
        run.saver.finish()
        last = run.saver.last_good
        raise Diverged(
            f"{reason}; "
            + (f"the last good checkpoint is {last}, and the same command goes on from it; " if last else "")
            + "lower optim.lr or set precision=fp32"
            + ("" if last else ", and start again: there is no checkpoint yet")
        )


def describe(run: Run, micro: MicroBatch, loss: Tensor) -> dict[str, Any]:
    """One micro-batch: its summed loss, and the keys of its samples, of replacements where some could not be read."""
    source = next(s for s in run.sources if s.name == micro.modality)
    value = float(loss)
    return {
        "modality": micro.modality,
        "index": micro.index,
        "loss": value if math.isfinite(value) else str(value),  # JSON has no NaN
        "is_finite": math.isfinite(value),
        "samples": source.keys(run.plan, micro),
    }


def write_down(run: Run, row: dict[str, Any]) -> None:
    try:
        append(run.folder / FILE, row)
    except OSError as error:
        warn(f"the samples of step {row['step']}", error)

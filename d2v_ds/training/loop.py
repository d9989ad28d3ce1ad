"""The training step, on one screen: student, teacher, loss, step, EMA.

The student looks at the masked views, the teacher at the whole sample; the loss compares them at the masked
positions (all in the model's forward pass); the engine steps; the teacher follows.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds.data import DataError, MicroBatch, seed_of
from d2v_ds.engine.ema import anneal
from d2v_ds.engine.step import apply_step, one_reduction
from d2v_ds.model.batch import Batch
from d2v_ds.model.data2vec import Output
from d2v_ds.training.agreement import meet
from d2v_ds.training.clock import Clock
from d2v_ds.training.codes import Stopped
from d2v_ds.training.guard import respond, steps_of
from d2v_ds.training.health import Health
from d2v_ds.training.schedule import learning_rate, scaled
from d2v_ds.training.skips import Skips, taint

if TYPE_CHECKING:
    from d2v_ds.training.run import Run


def train_step(run: Run, micro_batches: list[MicroBatch], report: Report) -> bool | None:
    """One optimizer step; False if its gradients were not finite and it was skipped, None if a rank was asked to stop
    before it; on all ranks alike."""
    recipe, engine = run.recipe, run.engine
    set_learning_rate(run)
    report.sizes = meet(run, micro_batches)
    if report.sizes is None:
        return None

    with one_reduction(engine):
        for micro in micro_batches:
            batch = prepare(run, micro)
            output = engine(batch, is_observed=report.is_wanted)  # student, teacher, loss
            engine.backward(output.loss * (scale(run, micro.modality, report.sizes) * taint(output.loss)))
            report.observe(batch, output)
        run.clock.computed()

    run.step += 1
    is_applied = apply_step(engine)
    if is_applied:
        run.applied += 1
        run.ema.update(anneal(recipe.ema.start, recipe.ema.end, recipe.ema.anneal_steps, run.updates))
    return is_applied


def run_steps(run: Run) -> None:
    """From the run's step to the last one, with log and checkpoints on the way."""
    train = run.recipe.train
    run.engine.train()
    skips, clock = Skips(run), run.clock
    clock.start(run.step)
    for micro_batches in run.signals.until_asked(steps_of(run)):
        loader = run.loader
        clock.got_data()
        report = Report(run.step == run.first_step or is_due(run.step + 1, train.log_every, train.steps))
        is_applied = train_step(run, micro_batches, report)
        if is_applied is None:
            stop(run)
        clock.did_step()
        run.saver.advance()
        record_faults(run, micro_batches)
        if report.is_wanted:
            write_log(run, report, clock, is_applied)
        if run.loader is loader:
            skips.observe(is_applied, micro_batches, report.each)
        if run.loader is not loader:  # it went back: what is due at that step was done then
            skips = Skips(run)
            clock.start(run.step)
            continue
        if run.probes.is_due(run.step):
            run.probes.measure(run)
        if run.examiner.is_due(run.step):
            run.examiner.score(run)
        if is_due(run.step, train.save_every, train.steps):
            run.save()
        clock.start(run.step)
    run.finish_saving()
    if run.log:
        run.say(f"finished {run.step} steps\n{run.log.close()}")


def prepare(run: Run, micro: MicroBatch) -> Batch:
    """The batch on its device, and the random state of its forward pass.

    Dropout and decoder noise are functions of (seed, step, modality, micro-batch), layer drop of the first
    three, so nothing random is stored and a step is the same at any number of ranks.
    """
    seed = run.recipe.seed
    torch.manual_seed(seed_of(seed, "forward", run.step, micro.modality, micro.index))
    batch = micro.batch.to(run.device, next(run.engine.module.parameters()).dtype)
    layerdrop_seed = seed_of(seed, "layerdrop", run.step, micro.modality)
    return dataclasses.replace(batch, layerdrop_seed=layerdrop_seed, is_frozen=is_frozen(run))


def stop(run: Run) -> None:
    """Between two steps, on all ranks, because one was asked to."""
    if run.step > run.saved:
        run.save()
    run.finish_saving()
    run.signals.phase = "leaving"
    raise Stopped(
        f"stopped after step {run.step} of {run.recipe.train.steps}; the same command goes on from there"
    )


def scale(run: Run, modality: str, sizes: dict[str, Tensor]) -> Tensor:
    """Makes a micro-batch's summed loss its share of the mean over the step; the engine averages over ranks."""
    return (run.recipe.modalities[modality].loss.weight * run.world / sizes[modality]).float()


def set_learning_rate(run: Run) -> None:
    optim, steps = run.recipe.optim, run.recipe.train.steps
    for group in run.engine.optimizer.param_groups:
        learns = group["is_head"] or not is_frozen(run)
        group["lr"] = learns * run.lr_scale * learning_rate(scaled(optim, group["lr_scale"]), run.step, steps)


def is_frozen(run: Run) -> bool:
    """Whether the head alone learns in this step."""
    return run.recipe.task is not None and run.step < run.recipe.task.freeze_steps


def is_due(step: int, every: int, last: int) -> bool:
    """Step numbers from 1: every n-th, and the last."""
    return step == last or step % every == 0


class Report:
    """Losses of a step's micro-batches, and sums over them in a step that will be logged."""

    def __init__(self, is_wanted: bool):
        self.is_wanted = is_wanted
        self.sizes: dict[str, Tensor] | None = None
        """Masked tokens of each modality, over all ranks."""
        self.each: list[Tensor] = []
        self.health = Health()
        self.sums: dict[str, Tensor] = {}

    def observe(self, batch: Batch, output: Output) -> None:
        self.each.append(output.loss.detach())
        if not self.is_wanted:
            return
        if batch.labels is None:
            self.health.observe(batch, output)
        for part, value in {"loss": output.loss.detach(), **output.losses}.items():
            key = f"{batch.modality}/{part}"
            self.sums[key] = self.sums.get(key, 0) + value.double()

    def losses(self) -> dict[str, float]:
        """Mean a masked token, over all ranks."""
        keys = sorted(self.sums)
        total = torch.stack([self.sums[key] for key in keys])
        dist.all_reduce(total)
        return {
            key: (value / self.sizes[key.split("/")[0]]).item()
            for key, value in zip(keys, total, strict=True)
        }


def record_faults(run: Run, micro_batches: list[MicroBatch]) -> None:
    faults = [fault for micro in micro_batches for fault in micro.faults]
    if faults or run.faults.counts:
        seen = int(run.step * run.plan.samples_a_step() / run.world)
        try:
            run.faults.add(faults, seen)
        except DataError as error:
            raise DataError(
                f"{error} (train.max_bad_share={run.recipe.train.max_bad_share} says how many)"
            ) from error


def write_log(run: Run, report: Report, clock: Clock, is_applied: bool) -> None:
    losses, health = report.losses(), report.health.values()
    tau = anneal(run.recipe.ema.start, run.recipe.ema.end, run.recipe.ema.anneal_steps, run.updates)
    changed = run.watch.look(health, run.step)
    run.watch.is_firm &= is_applied  # fine-tuning has no other sign
    if run.rollbacks and run.watch.is_firm:
        run.rollbacks[-1]["held"] = True
    recipe, engine = run.recipe, run.engine
    rate = run.plan.samples_a_step() * clock.steps / clock.total
    norm = engine.get_global_grad_norm()
    metrics = losses | {
        "lr": engine.optimizer.param_groups[0]["lr"],
        **({"tau": tau} if run.ema.teachers else {}),
        "grad_norm": float(norm) if norm is not None else float("nan"),
        "applied_steps": run.applied,
        "skipped_steps": run.step - run.first_step - run.applied,
        "failed_saves": run.saver.failures,
        "save_pause_seconds": run.saver.take_pause(),
        "samples_per_second": rate,
        "data_wait_share": clock.waited / clock.total,
        **clock.ranks(),
    }
    if run.log:
        run.log.step(run.step, metrics, health, run.watch.verdicts(), rate, recipe.train.straggler_factor)
    respond(run, changed, health)
    clock.reset()

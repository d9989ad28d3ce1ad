"""What a run does about its health: say it, stop, or go back to where it was healthy and go on more slowly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from d2v_ds.data import MicroBatch, StepLoader
from d2v_ds.engine import checkpoint as checkpoints
from d2v_ds.engine.upload import uploaded
from d2v_ds.recipe import Health
from d2v_ds.training.log import Log, append, warn
from d2v_ds.training.verdict import Finding, Verdict, Watch

if TYPE_CHECKING:
    from d2v_ds.training.run import Run

GUARDED_UPDATES = 5_000
"""The original's variance thresholds act after so many."""
MEANS: dict[Verdict, str] = {
    "healthy": "targets and features carry what they should",
    "position-only": "the output is a function of position alone, so nothing about a sample is learned, however well "
    "the loss falls. Lower optim.lr, slow the teacher down (ema.start nearer to 1), let it own its encoder "
    "(modalities.NAME.teacher=full)",
    "constant": "all tokens of all samples are alike. Lower optim.lr, warm up longer (optim.warmup_steps), clip "
    "(optim.clip)",
    "low-rank": "tokens differ in a few directions only. Lower optim.lr, or slow the teacher down (ema.start nearer to "
    "1)",
    "diverging": "numbers explode. Lower optim.lr, warm up longer (optim.warmup_steps), clip (optim.clip), or set "
    "precision=fp32",
}


class Collapsed(RuntimeError):
    """The run was ended, since it learns nothing; no crash, and no reason to start it again as it is."""


def describe(name: str, finding: Finding) -> str:
    because = f" ({finding.because})" if finding.because else ""
    return f"{name} is {finding.verdict}{because}: {MEANS[finding.verdict].replace('NAME', name)}"


def respond(run: Run, changed: Mapping[str, Finding], health: Mapping[str, float]) -> None:
    """Says what has changed, and does what the recipe wants done; all ranks call it with equal numbers.

    Raises Collapsed where that is to stop, or below the original's variance thresholds.
    """
    for name, finding in changed.items():
        run.say(f"health at step {run.step}: {describe(name, finding)}")
        note(run, modality=name, verdict=finding.verdict, because=finding.because)
    check_variances(health, run.recipe.health, run.updates)
    sick, policy = run.watch.sick(), run.recipe.health.on_collapse
    if not sick or policy == "warn":
        return
    reason = "; ".join(describe(name, finding) for name, finding in sick.items())
    if policy == "rollback":
        roll_back(run, reason)
        return
    raise Collapsed(
        f"{reason}. The run ends at step {run.step}, since health.on_collapse=stop; its checkpoints are kept. Change "
        "what is said above in a new out=, go back with health.on_collapse=rollback, or go on with "
        "health.on_collapse=warn (docs/health.md)"
    )


def check_variances(health: Mapping[str, float], settings: Health, updates: int) -> None:
    """Ends the run as the original does: after 5,000 updates, at any policy."""
    if updates <= GUARDED_UPDATES:
        return
    for key, value in health.items():
        name, _, number = key.partition("/")
        least = {"target_var": settings.min_target_var, "pred_var": settings.min_pred_var}.get(number, 0.0)
        if value < least:
            raise Collapsed(
                f"{number} of {name} is {value:.4f} after {updates:,} updates, must be at least "
                f"health.min_{number}={least:g} after {GUARDED_UPDATES:,}: "
                f"{'targets' if number == 'target_var' else 'predictions'} have collapsed, and the run ends. Lower "
                "optim.lr or slow the teacher down (ema.start nearer to 1) in a new out=, or set "
                f"health.min_{number}=0 to go on without this limit (docs/health.md)"
            )


def roll_back(run: Run, reason: str) -> None:
    """Goes on from the newest checkpoint that was healthy, at a lower learning rate; all ranks call it.

    A checkpoint is called healthy by a look at the weights before its own last steps, so it may hold an update that
    exploded: where no look since the last rollback was healthy, the run goes further back. Later checkpoints are
    removed, since a run that is started again takes the newest. Raises Collapsed if there is no such checkpoint, or
    after `max_rollbacks`.
    """
    settings = run.recipe.health
    run.watchdog.wait_patiently("going back")
    if len(run.rollbacks) >= settings.max_rollbacks:
        raise Collapsed(
            f"{reason}. It went back {len(run.rollbacks)} times (health.max_rollbacks={settings.max_rollbacks}) and "
            f"came to the same, at last with {run.lr_scale:g} of the learning rate: the run ends at step {run.step}"
        )
    run.saver.finish()
    last = run.rollbacks[-1] if run.rollbacks else None
    is_further = last is not None and not last.get("held", True)  # absent in older checkpoints
    before = min(run.step, last["looked"]) if is_further else run.step
    found: list[Path | None] = [newest_healthy(run.folder, before) if run.rank == 0 else None]
    dist.broadcast_object_list(found)
    if found[0] is None and is_further:
        raise Collapsed(
            f"{reason}. It went back to step {last['to']} and was not healthy from there on, and no checkpoint of "
            f"before step {before} is healthy: the run ends at step {run.step}; lower optim.lr in a new out="
        )
    if found[0] is None:
        raise Collapsed(
            f"{reason}. No checkpoint was saved while the run was healthy, so it cannot go back, and ends at step "
            f"{run.step}; lower optim.lr in a new out=, or save more often than train.save_every="
            f"{run.recipe.train.save_every}"
        )
    saved = checkpoints.Checkpoint(found[0])
    lr_scale = run.lr_scale * settings.rollback_lr
    text = f"going back from step {run.step} to {saved.loop['step']}, with {lr_scale:g} of the recipe's learning rate"
    run.say(text)
    note(run, rollback=text, because=reason)
    run.rollbacks.append(
        {
            "from": run.step,
            "to": saved.loop["step"],
            "lr_scale": lr_scale,
            "looked": looked(found[0]),
            "held": False,
        }
    )
    run.lr_scale = lr_scale
    run.step, run.applied = saved.loop["step"], saved.loop["applied_steps"]
    checkpoints.load(run.engine, run.ema, saved, run.applied)
    run.engine.zero_grad()
    run.examiner.go_on(run, saved.loop)
    run.faults.counts.clear()  # those of steps that are done again count once, as after a new start
    run.watch = Watch(settings.patience)
    run.watch.is_firm, run.watch.step = True, looked(found[0])
    if run.log:
        for path in checkpoints.checkpoints(run.folder):
            if path.name > found[0].name:
                checkpoints.delete(path)
        run.log.close_writer()
        run.log = Log(run.folder, run.step, run.recipe.train.steps)
    run.saved, run.saver.last_good = -1, found[0]
    run.save()  # from here on a new start knows of it too
    run.loader = StepLoader(
        run.sources, run.plan, run.rank, run.world, run.step, run.recipe.train.steps, run.recipe.train.workers
    )


def newest_healthy(folder: Path, before: int) -> Path | None:
    """The newest whole checkpoint, of a step before this one, that was saved when every modality was healthy."""
    for path in checkpoints.checkpoints(folder):
        if checkpoints.damage(path) is None:
            loop = json.loads((path / "loop.json").read_text(encoding="utf-8"))
            if loop["step"] < before and loop.get("is_healthy") and loop["applied_steps"]:
                return path
    return None


def places_to_go_back_to(folder: Path, before: int) -> list[Path]:
    """The newest healthy checkpoint, and the one to go back to if that was not healthy after all."""
    first = newest_healthy(folder, before)
    second = newest_healthy(folder, looked(first)) if first else None
    return [path for path in (first, second) if path]


def looked(checkpoint: Path) -> int:
    """The step whose look called it healthy. That saw no later weights than those of the step before."""
    loop = json.loads((checkpoint / "loop.json").read_text(encoding="utf-8"))
    return loop.get("looked", loop["step"])  # absent in older checkpoints


def steps_of(run: Run) -> Iterator[list[MicroBatch]]:
    """The micro-batches of every step up to the last, from wherever the run went back to."""
    loader = None
    while loader is not run.loader:
        loader = run.loader
        for micro_batches in uploaded(loader, run.device, next(run.engine.module.parameters()).dtype):
            yield micro_batches
            if loader is not run.loader:
                break


def note(run: Run, **row: object) -> None:
    """A line of verdicts.jsonl, which, unlike other files, keeps what a rollback takes back."""
    if run.rank == 0:
        try:
            append(run.folder / "verdicts.jsonl", {"step": run.step, **row})
        except OSError as error:  # a full disk
            warn("verdicts.jsonl", error)

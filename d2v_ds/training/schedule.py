"""The learning rate as a function of the steps done."""

from __future__ import annotations

import math

from d2v_ds.recipe import Optim


def learning_rate(optim: Optim, done: int, total: int) -> float:
    """Rate of the step that follows `done` of `total` steps; as in the original, the first step has the warm-up's
    lowest (of cosine and linear 0 by default)."""
    return {"cosine": cosine, "tri_stage": tri_stage, "linear": linear}[optim.schedule](optim, done, total)


def scaled(optim: Optim, scale: float) -> Optim:
    """The same schedule for a group that learns with a share of the rate; `min_lr` stays, unless above its highest."""
    if scale == 1:
        return optim
    highest = optim.lr * scale
    return optim.model_copy(update={"lr": highest, "min_lr": min(optim.min_lr, highest)})


def cosine(optim: Optim, done: int, total: int) -> float:
    """Linear from `min_lr` to `lr`, then half a cosine to `min_lr` at `total`."""
    if done < optim.warmup_steps:
        return warm_up(optim, done)
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (
        1 + math.cos(math.pi * decayed(optim, done, total))
    )


def linear(optim: Optim, done: int, total: int) -> float:
    """Linear from `min_lr` to `lr`, then linear to `min_lr` at `total`."""
    if done < optim.warmup_steps:
        return warm_up(optim, done)
    return optim.min_lr + (optim.lr - optim.min_lr) * (1 - decayed(optim, done, total))


def warm_up(optim: Optim, done: int) -> float:
    return optim.min_lr + done * (optim.lr - optim.min_lr) / optim.warmup_steps


def decayed(optim: Optim, done: int, total: int) -> float:
    """Share of the decay that is done."""
    return min(1.0, (done - optim.warmup_steps) / max(1, total - optim.warmup_steps))


def tri_stage(optim: Optim, done: int, total: int) -> float:
    """Linear to `lr`, hold, exponential decay, by the shares of `phases` (arXiv:1904.08779)."""
    first, last = optim.phase_scales
    warmup, hold, decay = (round(share * total) for share in optim.phases)
    if done < warmup:
        return optim.lr * (first + (1 - first) * done / warmup)
    progress = (done - warmup - hold) / max(1, decay)
    return optim.lr * last ** min(1.0, max(0.0, progress))

"""The learning rate as a function of the steps done."""

from __future__ import annotations

import math

from d2v_ds.recipe import Optim


def learning_rate(optim: Optim, done: int, total: int) -> float:
    """Rate of the step that follows `done` steps: linear from `min_lr`, then half a cosine to `min_lr` at `total`.

    As in the original, the very first step has the lowest rate (0 by default).
    """
    if done < optim.warmup_steps:
        return optim.min_lr + done * (optim.lr - optim.min_lr) / optim.warmup_steps
    progress = min(1.0, (done - optim.warmup_steps) / max(1, total - optim.warmup_steps))
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * progress))

"""How long and how fast a model was trained, from fairseq's configuration to ours and back."""

from __future__ import annotations

import re
from typing import Any

from d2v_ds.recipe import EMA, Optim, Recipe, Train


def our_training(root: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """`ema`, `optim` and `train` of a recipe; what the file does not say keeps our defaults."""
    optimization = root.get("optimization") or {}
    steps = first(model.get("max_update"), optimization.get("max_update"), Train().steps)
    anneal = first(model.get("ema_anneal_end_step"), optimization.get("max_update"), EMA().anneal_steps)
    ema = EMA(start=model["ema_decay"], end=model["ema_end_decay"], anneal_steps=anneal)
    return {"ema": ema, "optim": our_optim(root, optimization), "train": Train(steps=max(1, steps))}


def our_optim(root: dict[str, Any], optimization: dict[str, Any]) -> Optim:
    group = root
    if (root.get("optimizer") or {}).get("_name") == "composite":
        group = ((root["optimizer"].get("groups") or {}).get("default")) or {}
    adam, schedule = group.get("optimizer") or {}, group.get("lr_scheduler") or {}
    settings = {
        "lr": number(group.get("lr_float"), group.get("lr"), optimization.get("lr")),
        "betas": pair(adam.get("adam_betas")),
        "eps": number(adam.get("adam_eps")),
        "weight_decay": number(adam.get("weight_decay")),
        "clip": number(optimization.get("clip_norm")),
    }
    if schedule.get("_name") == "tri_stage":
        phases = schedule.get("phase_ratio")
        numbers = re.findall(r"[\d.]+(?:e-?\d+)?", phases) if isinstance(phases, str) else phases
        if numbers and len(numbers) == 3:
            settings["phases"] = tuple(float(n) for n in numbers)
        scales = schedule.get("init_lr_scale", 0.01), schedule.get("final_lr_scale", 0.01)
        settings |= {"schedule": "tri_stage", "phase_scales": scales}
    elif schedule.get("_name") == "cosine":
        settings |= {
            "warmup_steps": number(schedule.get("warmup_updates")),
            "min_lr": number(schedule.get("min_lr")),
        }
    return Optim(**{key: value for key, value in settings.items() if value is not None})


def first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def number(*values: Any) -> Any:
    """The first that is a number, or the first of a list of them."""
    for value in values:
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
    return None


def pair(value: Any) -> tuple[float, float] | None:
    """(0.9, 0.98) of a pair or of its text."""
    numbers = re.findall(r"[\d.]+", value) if isinstance(value, str) else value or ()
    return (float(numbers[0]), float(numbers[1])) if len(numbers) == 2 else None


def their_training(recipe: Recipe) -> dict[str, Any]:
    """`optimization`, `optimizer` and `lr_scheduler` of fairseq's configuration."""
    optim = recipe.optim
    schedule = {
        "_name": "cosine",
        "warmup_updates": optim.warmup_steps,
        "min_lr": optim.min_lr,
        "max_update": recipe.train.steps,
    }
    if optim.schedule == "tri_stage":
        start, end = optim.phase_scales
        schedule = {
            "_name": "tri_stage",
            "phase_ratio": list(optim.phases),
            "init_lr_scale": start,
            "final_lr_scale": end,
        }
    return {
        "optimization": {"max_update": recipe.train.steps, "lr": [optim.lr], "clip_norm": optim.clip},
        "optimizer": {
            "_name": "adam",
            "adam_betas": f"({optim.betas[0]},{optim.betas[1]})",
            "adam_eps": optim.eps,
            "weight_decay": optim.weight_decay,
        },
        "lr_scheduler": schedule,
    }

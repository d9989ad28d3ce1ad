"""How long and how fast a model was trained, from fairseq's configuration to ours and back."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from d2v_ds.recipe import EMA, Optim, Recipe, Train

MAX_TEXT = 200


def our_training(root: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """`ema`, `optim` and `train` of a recipe; what the file does not say keeps our defaults."""
    optimization = part(root, "optimization")
    steps = number(model.get("max_update"), optimization.get("max_update"), Train().steps)
    anneal = number(model.get("ema_anneal_end_step"), optimization.get("max_update"), EMA().anneal_steps)
    ema = EMA(start=model["ema_decay"], end=model["ema_end_decay"], anneal_steps=max(0, int(anneal)))
    return {"ema": ema, "optim": our_optim(root, optimization), "train": Train(steps=max(1, int(steps)))}


def our_optim(root: dict[str, Any], optimization: dict[str, Any]) -> Optim:
    group = root
    if part(root, "optimizer").get("_name") == "composite":
        group = part(part(root["optimizer"], "groups"), "default")
    adam, schedule = part(group, "optimizer"), part(group, "lr_scheduler")
    settings = {
        "lr": number(group.get("lr_float"), group.get("lr"), optimization.get("lr")),
        "betas": pair(adam.get("adam_betas")),
        "eps": number(adam.get("adam_eps")),
        "weight_decay": number(adam.get("weight_decay")),
        "clip": number(optimization.get("clip_norm")),
    }
    if schedule.get("_name") == "tri_stage":
        scales = tuple(number(schedule.get(f"{end}_lr_scale")) or 0.01 for end in ("init", "final"))
        settings |= {"schedule": "tri_stage", "warmup_steps": 0, "min_lr": 0.0, "phase_scales": scales}
        settings["phases"] = phases(schedule)
    elif schedule.get("_name") == "cosine":
        settings |= {
            "warmup_steps": number(schedule.get("warmup_updates")),
            "min_lr": number(schedule.get("min_lr")),
        }
    elif schedule.get("_name") == "polynomial_decay" and number(schedule.get("power")) in (None, 1):
        settings |= {
            "schedule": "linear",
            "warmup_steps": number(schedule.get("warmup_updates")),
            "min_lr": number(schedule.get("end_learning_rate")),
        }
    try:
        return Optim(**{key: value for key, value in settings.items() if value is not None})
    except ValidationError:  # how a model was trained is no part of it
        return Optim()


def phases(schedule: dict[str, Any]) -> tuple[float, ...] | None:
    """Shares of the steps, which the original takes as shares or as steps."""
    steps = tuple(number(schedule.get(f"{phase}_steps")) or 0 for phase in ("warmup", "hold", "decay"))
    for found in (numbers(schedule.get("phase_ratio")), steps):
        if len(found) == 3 and sum(found) > 0:
            return tuple(part / sum(found) if abs(sum(found) - 1) > 1e-6 else part for part in found)
    return None


def part(settings: dict[str, Any], key: str) -> dict[str, Any]:
    """A group of settings; an odd one counts as absent, since how a model was trained is no part of it."""
    value = settings.get(key)
    return value if isinstance(value, dict) else {}


def number(*values: Any) -> Any:
    """The first that is a number of at least 0, or the first of a list of them; None if none is."""
    for value in values:
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf"):
            return value
    return None


def numbers(value: Any) -> tuple[float, ...]:
    """Those of a list, or of its text such as "(0.9, 0.98)"."""
    if isinstance(value, str) and len(value) <= MAX_TEXT:
        return tuple(float(n) for n in re.findall(r"\d+\.?\d*(?:e-?\d+)?", value))
    values = value if isinstance(value, (list, tuple)) else ()
    return tuple(float(n) for n in values if number(n) is not None)


def pair(value: Any) -> tuple[float, ...] | None:
    found = numbers(value)
    return found if len(found) == 2 else None


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
    elif optim.schedule == "linear":
        schedule = {
            "_name": "polynomial_decay",
            "warmup_updates": optim.warmup_steps,
            "end_learning_rate": optim.min_lr,
            "power": 1.0,
            "total_num_update": recipe.train.steps,
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

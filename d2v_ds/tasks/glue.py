"""GLUE's eight tasks: their metrics (arXiv:1804.07461), and how good a fine-tuned model is at one of them.

A task's score is the mean of its metrics; of MNLI that of both development sets. Other labelled texts are measured
alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from d2v_ds.convert.features import Encoder
from d2v_ds.convert.load import load
from d2v_ds.modalities.source import shard_pattern
from d2v_ds.tasks.embed import best_device
from d2v_ds.tasks.evaluate import answers, check_head, own_label, read_truths
from d2v_ds.tasks.items import open_items, paired
from d2v_ds.tasks.metrics import OF_NUMBERS, check_metrics, measure
from d2v_ds.tasks.table import Bad, check_place, write_whole

GLUE: dict[str, tuple[str, ...]] = {
    "cola": ("matthews",),
    "mnli": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qnli": ("accuracy",),
    "qqp": ("accuracy", "f1"),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "stsb": ("pearson", "spearman"),
}
"""WNLI, the ninth, is left out, as in every published average."""
LABEL = "cls;json.label"


def evaluate_glue(
    model: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    task: str | None = None,
    metrics: list[str] | None = None,
    label: str | None = None,
    batch: int = 32,
    device: str | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Metrics of a model with a sentence head on labelled texts, and their mean `score`; in `out` as JSON, if named.

    `data`: a folder that `d2v prepare glue` made, whose development sets are taken and which says its task; or any
    labelled shards. Metrics unsaid: the task's; without a task those that a run was scored by, else accuracy and
    macro_f1, of a head with one output pearson and spearman. A run of ours reads pairs if it learned on them, other
    models where there are some.

    Raises ValueError, before the model runs, for a model without such a head, for labels that are missing or that the
    head does not have, and for metrics that do not go with it.
    """
    if batch < 1:
        raise ValueError(f"--batch {batch} must be 1 or more")
    splits, made_for = find_splits(str(data))
    task = task or made_for
    if task is not None and task not in GLUE:
        raise ValueError(f"--task {task} is none of {', '.join(GLUE)}")
    encoder = load(model, "text", device=device or best_device())
    check_head(encoder, "glue")
    names = choose_metrics(encoder, task, metrics)
    label = label or own_label(encoder, LABEL)
    opened = []
    for split, shards in splits.items():
        if encoder.recipe.task is None:
            encoder.samples = paired(encoder.samples, shards)
        items = open_items(shards, "text", encoder.samples, label)
        opened.append((split, items, encoder.samples, read_truths(items, encoder, label, data)))
    check_place(out)
    found: dict[str, dict[str, float]] = {}
    unreadable: list[Bad] = []
    count = 0
    for split, items, encoder.samples, truths in opened:
        logits, places = answers(encoder, items, batch, workers, unreadable)
        if not places:
            raise ValueError(f"none of {items.words} can be read; the first: {unreadable[0].reason}")
        found[split] = measure(names, torch.stack(logits), torch.tensor([truths[i] for i in places]))
        count += len(places)
    result = {
        "task": task or "text",
        "model": str(model),
        "data": str(data),
        "samples": count,
        **flatten(found),
        "score": sum(each["score"] for each in found.values()) / len(found),
        "unreadable": [bad._asdict() for bad in unreadable],
    }
    if out is not None:
        write_whole(Path(out), json.dumps(result, indent=1).encode())
    return result


def find_splits(data: str) -> tuple[dict[str, str], str | None]:
    """Name and shards of each part to measure, and the task they were made for."""
    try:
        made = json.loads((Path(data) / "manifest.json").read_bytes())
        settings, all_splits = made["settings"], list(made["splits"])
        name, task = settings["name"], settings.get("task")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent, or another tool's
        return {"": data}, None
    splits = sorted(split for split in all_splits if split.startswith("val"))
    if not splits:
        raise ValueError(
            f"{data} has the splits {', '.join(all_splits)}, no val; name the shards to measure on"
        )
    patterns = {split: shard_pattern(data, f"{name}-{split}-[0-9]*.tar") for split in splits}
    return {split.removeprefix("val").strip("-"): "::".join(found) for split, found in patterns.items()}, task


def choose_metrics(encoder: Encoder, task: str | None, metrics: list[str] | None) -> tuple[str, ...]:
    is_number, own = encoder.head_config.outputs == 1, encoder.recipe.task
    unsaid = (
        own.metrics if own and own.test is not None else None
    )  # else nobody checked that they go with the head
    unsaid = unsaid or (OF_NUMBERS if is_number else ("accuracy", "macro_f1"))
    names = tuple(metrics or GLUE.get(task, unsaid))
    check_metrics(names, encoder.head_config.outputs, encoder.origin)
    return names


def flatten(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """`accuracy`, or of several parts `accuracy_matched`, ...; without each part's score."""
    return {
        f"{name}_{part}" if part else name: value
        for part, values in found.items()
        for name, value in values.items()
        if name != "score"
    }

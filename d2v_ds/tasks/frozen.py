"""How good frozen features are on labelled shards: nearest neighbours, ridge, trained linear and attentive readouts.

The first two give the numbers that probes give during training (`probe.every`): the same features, subset and methods.
N samples, L layers, D dim.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from d2v_ds.convert.features import Hidden
from d2v_ds.convert.load import Encoder, load
from d2v_ds.data import Corpus, expand_shards
from d2v_ds.modalities.source import shard_pattern
from d2v_ds.tasks.embed import best_device
from d2v_ds.tasks.items import paired
from d2v_ds.tasks.knn import knn
from d2v_ds.tasks.probe import (
    choose,
    layer_means,
    random_twin,
    read_labels,
    refusal,
    refuse_classes,
    refuse_overlap,
    ridge,
)
from d2v_ds.tasks.readout import Tokens, Training, Vectors, readout
from d2v_ds.tasks.table import Bad, check_place, write_whole

KINDS = ("knn", "ridge", "linear", "attentive")
TRAIN = ("*-train-[0-9]*.tar", "*train*.tar")
TEST = ("*-val-*.tar", "*val*.tar", "*dev*.tar", "*test*.tar")
"""Which shards of a folder are fitted and tested on where nothing is said: the first of each that are there."""
LABEL = "cls;json.label"

Say = Callable[[str], Any]
Row = dict[str, Any]
Found = TypeVar("Found")


@dataclass
class Part:
    """Labelled samples; those that turn out unreadable are taken out."""

    corpus: Corpus
    indices: list[int]
    labels: Tensor
    shards: str


def evaluate_frozen(
    kind: str,
    model: str | Path,
    data: str | Path,
    train: str | None = None,
    test: str | None = None,
    out: str | Path | None = None,
    modality: str | None = None,
    label: str | None = None,
    weights: str | None = None,
    samples: int | None = None,
    baselines: bool = False,
    epochs: int | None = None,
    seed: int = 0,
    batch: int = 32,
    device: str | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Accuracies of what can be read from the features of a model, written to `out` as JSON too, if it is named.

    `data`: a folder of shards, in which `train` and `test` are patterns, or a pattern of those to fit on beside a
    `test` of its own. `knn`, `ridge`: every layer, mean-pooled, and all together; `linear`: the last and all;
    `attentive`: the last layer's tokens. `samples`: at most so many of each part, always the same, as
    `probe.samples`. `epochs`: of a trained readout, unsaid 50, and 300 steps or more. `baselines`: the same of the
    network's random initialisation, and of the raw input where it has one length.

    Raises ValueError, before the model runs, for shards or labels that are not there, that are no classes, or classes
    in the test part alone.
    """
    if kind not in KINDS:
        raise ValueError(f"kind '{kind}' is not known; it must be one of {', '.join(KINDS)}")
    for name, value in (("batch", batch), ("epochs", epochs), ("samples", samples)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be 1 or more")
    encoder = load(model, modality, weights, device=device or best_device())
    parts = open_parts(encoder, data, train, test, label or LABEL, samples)
    check_place(out)
    training = Training(epochs=epochs, seed=seed)
    unreadable: list[Bad] = []
    rows = measure(kind, "model", encoder, parts, training, batch, unreadable, say)
    if baselines:
        twin = random_twin(encoder).to(next(encoder.model.parameters()).device)
        rows += measure(kind, "random init", twin, parts, training, batch, [], say)
        if kind != "attentive" and hasattr(encoder.samples, "raw"):
            raw = [
                encoder.samples.raw([encoder.samples.decode(p.corpus, i) for i in p.indices]) for p in parts
            ]
            rows.append({"weights": "raw input", **judge(kind, "raw", raw, parts, training, encoder, say)})
    result = {
        "task": kind,
        "model": str(model),
        "data": str(data),
        "modality": encoder.modality,
        "train": {"shards": parts[0].shards, "samples": len(parts[0].indices)},
        "test": {"shards": parts[1].shards, "samples": len(parts[1].indices)},
        "rows": rows,
        "unreadable": [bad._asdict() for bad in unreadable],
    }
    if out is not None:
        write_whole(Path(out), json.dumps(result, indent=1).encode())
    return result


# ---- what is measured on ---------------------------------------------------------------------------------------


def open_parts(
    encoder: Encoder, data: str | Path, train: str | None, test: str | None, label: str, samples: int | None
) -> list[Part]:
    """The part to fit on and the one to test on."""
    names = find_shards(str(data), train, test)
    refuse_overlap(names)
    encoder.samples = paired(encoder.samples, names[0])
    fields = {**encoder.samples.fields, "label": label}
    parts = []
    for shards in names:
        corpus = Corpus.open(expand_shards(shards), fields, progress=None)
        indices = choose(len(corpus), samples or len(corpus))
        parts.append(Part(corpus, indices, read_labels(corpus, indices, label), str(shards)))
    refuse_classes(names, parts[0].labels, parts[1].labels, samples is None)
    return parts


def find_shards(data: str, train: str | None, test: str | None) -> tuple[str, str]:
    """Patterns of the shards to fit on and to test on."""
    if shard_pattern(data, "") == data:  # a pattern itself
        if test is None:
            raise ValueError(
                f"{data} is what is fitted on; name labelled shards to test on with --test, or give a folder with both"
            )
        return train or data, test
    return first_there(data, train, TRAIN, "fit"), first_there(data, test, TEST, "test")


def first_there(data: str, given: str | None, patterns: tuple[str, ...], verb: str) -> str:
    """The pattern that was given, else the first of `patterns` that names shards."""
    for pattern in (given,) if given else patterns:
        try:
            expand_shards(os.path.join(data, pattern))
        except ValueError:
            if given:
                raise
            continue
        return os.path.join(data, pattern)
    option = "--train" if verb == "fit" else "--test"
    raise ValueError(
        f"{data} holds none of {', '.join(patterns)}; name the shards to {verb} on with {option}"
    )


# ---- measuring -------------------------------------------------------------------------------------------------


def measure(
    kind: str,
    weights: str,
    encoder: Encoder,
    parts: list[Part],
    training: Training,
    batch: int,
    unreadable: list[Bad],
    say: Say,
) -> list[Row]:
    """Rows of one network."""
    with said_once(logging.getLogger("d2v_ds.convert.features")):
        return measure_features(kind, weights, encoder, parts, training, batch, unreadable, say)


@contextmanager
def said_once(log: logging.Logger) -> Iterator[None]:
    """The first warning alone: each batch has one about texts that are cut."""
    seen: list[logging.LogRecord] = []

    def first(record: logging.LogRecord) -> bool:
        seen.append(record)
        return len(seen) == 1

    log.addFilter(first)
    try:
        yield
    finally:
        log.removeFilter(first)


def measure_features(
    kind: str,
    weights: str,
    encoder: Encoder,
    parts: list[Part],
    training: Training,
    batch: int,
    unreadable: list[Bad],
    say: Say,
) -> list[Row]:
    if kind == "attentive":
        tokens = [tokens_of(encoder, part, batch, unreadable) for part in parts]
        return [{"weights": weights, **judge(kind, "last", tokens, parts, training, encoder, say)}]
    means = []
    for part in parts:
        work = functools.partial(layer_means, encoder, batch=batch)
        means.append(torch.cat(list(over_batches(encoder, part, batch, unreadable, work))))  # (N, L, D)
    if not all(x.isfinite().all() for x in means):
        raise ValueError(f"{weights}: features are not finite; take weights of an earlier step")
    depth = means[0].shape[1]
    chosen = {f"layer {i + 1}": [x[:, i] for x in means] for i in range(depth)}
    chosen["all"] = [x.flatten(1) for x in means]
    if kind == "linear":
        chosen = {"last": [x[:, -1] for x in means], "all": chosen["all"]}
    return [
        {"weights": weights, **judge(kind, name, x, parts, training, encoder, say)}
        for name, x in chosen.items()
    ]


def over_batches(
    encoder: Encoder, part: Part, batch: int, unreadable: list[Bad], work: Callable[[list[Any]], Found]
) -> Iterator[Found]:
    """What `work` gives for so many decoded samples at a time; afterwards the part holds those that could be read."""
    kept: list[int] = []
    for first in range(0, len(part.indices), batch):
        items = {}
        for place in range(first, min(first + batch, len(part.indices))):
            try:
                items[place] = encoder.samples.decode(part.corpus, part.indices[place])
            except ValueError as error:
                unreadable.append(Bad(part.corpus.key(part.indices[place]), str(error)))
        try:
            found = work(list(items.values())) if items else None
        except ValueError:
            refused = {place: refusal(encoder, item) for place, item in items.items()}
            bad = {place: reason for place, reason in refused.items() if reason}
            if not bad:
                raise
            unreadable += [Bad(part.corpus.key(part.indices[place]), bad[place]) for place in bad]
            items = {place: item for place, item in items.items() if place not in bad}
            found = work(list(items.values())) if items else None
        if found is not None:
            kept += items
            yield found
    if not kept:
        raise ValueError(
            f"none of {len(part.indices)} samples of {part.shards} can be read: {unreadable[-1].reason}"
        )
    part.indices, part.labels = [part.indices[place] for place in kept], part.labels[kept]


def tokens_of(encoder: Encoder, part: Part, batch: int, unreadable: list[Bad]) -> Tokens:
    tokens = Tokens(encoder.recipe.body.dim)

    def work(items: list[Any]) -> Hidden:
        return encoder.run(encoder.prepare(items))

    for hidden in over_batches(encoder, part, batch, unreadable, work):
        for x, mask in zip(hidden.x, hidden.mask, strict=True):
            tokens.add(x[~mask])
    tokens.close()
    return tokens


def judge(
    kind: str, name: str, x: list[Any], parts: list[Part], training: Training, encoder: Encoder, say: Say
) -> Row:
    """What the method makes of these features, of both parts."""
    train, test = parts[0].labels, parts[1].labels
    if kind == "knn":
        found = knn(x[0], train, x[1], test)
        if not found:
            raise ValueError(
                f"{len(train)} samples to fit on are fewer than the 10 neighbours that knn needs; give more, or use "
                "`d2v eval ridge`"
            )
        return {"features": name, "dim": x[0].shape[1], "knn": {str(k): value for k, value in found.items()}}
    if kind == "ridge":
        accuracy, penalty = ridge(x[0], train, x[1], test)
        return {"features": name, "dim": x[0].shape[1], "accuracy": accuracy, "penalty": penalty}
    device = next(encoder.model.parameters()).device
    features = x if kind == "attentive" else [Vectors(each) for each in x]
    dim = x[0].dim if kind == "attentive" else x[0].shape[1]
    return {"features": name, "dim": dim} | readout(
        features[0], train, features[1], test, training, device, say
    )


def format_frozen(result: dict[str, Any]) -> str:
    """A table with a line for every kind of feature."""
    rows = [
        {key: value for key, value in row.items() if key != "knn"}
        | {f"k={k}": value for k, value in row.get("knn", {}).items()}
        for row in result["rows"]
    ]
    keys = list(rows[0])
    lines = [[key.replace("_", " ") for key in keys]]
    lines += [[shown(key, row[key]) if key in row else "" for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(
            f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    counts = f"fitted on {result['train']['samples']}, tested on {result['test']['samples']} samples"
    bad = f", {len(result['unreadable'])} more could not be read" if result["unreadable"] else ""
    return "\n".join([*(line.rstrip() for line in table), counts + bad])


def shown(key: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0e}" if key in ("penalty", "lr", "weight_decay") else f"{value:.4f}"

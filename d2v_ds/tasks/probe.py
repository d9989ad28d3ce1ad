"""Closed-form ridge probes on frozen features: one feature definition for train and test, baselines beside it.

N samples, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v_ds.convert.load import Encoder, load, mean_pool
from d2v_ds.data import Corpus, expand_shards, permute, seed_of
from d2v_ds.modalities.build import build_model
from d2v_ds.tasks.knn import count_classes

PENALTIES = tuple(10.0**p for p in range(-8, 7))
LOWEST_PENALTY = 0.1
"""Below it a readout lives on directions that hold less than 1e-4 of a feature's spread (at some thousand samples),
which are lost when features are stored in 16 bits. docs/experiments.md has the numbers without this limit."""


@dataclass(frozen=True)
class Row:
    """Accuracy of one kind of feature."""

    features: str
    accuracy: float
    dim: int
    penalty: float


def ridge(
    train_ND: Tensor,
    labels_N: Tensor,
    test_ND: Tensor,
    test_labels_N: Tensor,
    lowest_penalty: float = LOWEST_PENALTY,
) -> tuple[float, float]:
    """(test accuracy, penalty) of ridge regression on one-hot labels; the penalty, a power of ten, is chosen by exact
    leave-one-out on the training part, features are standardised by it."""
    labels_N, test_labels_N = count_classes(labels_N, test_labels_N)
    mean, std = train_ND.mean(0), train_ND.std(0).clamp(min=1e-6)
    x, z = ((train_ND - mean) / std).double(), ((test_ND - mean) / std).double()
    onehot = torch.nn.functional.one_hot(labels_N).double()
    centre = onehot.mean(0)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    projected = u.T @ (onehot - centre)
    best = (-1.0, 0.0)
    for penalty in (p for p in PENALTIES if p >= lowest_penalty):
        shrink = s.square() / (s.square() + penalty)
        fitted = u @ (shrink[:, None] * projected)
        leverage = (u.square() * shrink).sum(1, keepdim=True) + 1 / len(x)
        held_out = centre + (fitted - (onehot - centre) * leverage) / (1 - leverage).clamp(min=1e-9)
        best = max(best, ((held_out.argmax(1) == labels_N).double().mean().item(), penalty))
    weights = vt.T @ ((s / (s.square() + best[1]))[:, None] * projected)
    accuracy = ((z @ weights + centre).argmax(1) == test_labels_N).double().mean().item()
    return accuracy, best[1]


def labelled(encoder: Encoder, shards: str, label: str) -> tuple[list[Any], Tensor]:
    """Decoded items and integer labels of all samples of some shards; ValueError names one that cannot be used."""
    samples = encoder.samples
    corpus = Corpus.open(expand_shards(shards), {**samples.fields, "label": label}, progress=None)
    labels = read_labels(corpus, range(len(corpus)), label)
    items = []
    for i in range(len(corpus)):
        try:
            items.append(samples.decode(corpus, i))
        except ValueError as error:
            raise ValueError(f"{corpus.key(i)} cannot be used: {error}; name shards without it") from error
    return items, labels


def overlap(train: list[Any], test: list[Any]) -> list[str]:
    """Shards that both name, by whatever path or link."""
    named = ({str(s.resolve() if isinstance(s, Path) else s) for s in shards} for shards in (train, test))
    return sorted(set.intersection(*named))


def refuse_overlap(names: tuple[str, str]) -> None:
    if both := overlap(*map(expand_shards, names)):
        raise ValueError(
            f"{names[0]} and {names[1]} both name {both[0]}; what is fitted on says nothing when it is tested on: "
            "name other shards with --train and --test"
        )


def refuse_classes(
    names: tuple[str, str], labels_N: Tensor, test_labels_N: Tensor, is_whole: bool = True
) -> None:
    """Raises ValueError for a part to fit on of one class, and for classes that the other has alone, unless they may be
    among the samples that are not looked at."""
    known, asked = set(labels_N.tolist()), set(test_labels_N.tolist())
    if len(known) < 2:
        more = "" if is_whole else ", or raise --samples"
        raise ValueError(
            f"{names[0]} holds one class alone ({known.pop()}); give shards of two or more{more}"
        )
    unknown = sorted(asked - known)
    if unknown and is_whole:
        raise ValueError(
            f"classes {unknown[:8]} of {names[1]} are not in {names[0]}; give shards of the same classes"
        )


def choose(size: int, most: int) -> list[int]:
    """At most so many of 0 ... size - 1, always the same. At random: samples at even distances may be of one class."""
    return sorted(permute(np.arange(min(size, most)), size, seed_of(0, "probe")).tolist())


def read_labels(corpus: Corpus, indices: Iterable[int], label: str) -> Tensor:
    """Raises ValueError for a label that is no integer of 0 ... 2^63 - 1."""
    labels = []
    for i in indices:
        value = corpus.read(i)["label"]
        try:
            if b"_" in value:  # Python takes 1_0 for 10
                raise ValueError(value)
            labels.append(int(value))
        except ValueError as error:
            raise ValueError(
                f"label {value!r} of {corpus.key(i)} is no integer; "
                f"name another member or key than '{label}' with --label or probe.label"
            ) from error
        if not 0 <= labels[-1] < 2**63:
            raise ValueError(
                f"label {labels[-1]} of {corpus.key(i)} must be 0 or more, and below 2^63: classes count from 0"
            )
    return torch.tensor(labels)


@torch.no_grad()
def layer_means(encoder: Encoder, items: list[Any], batch: int = 64) -> Tensor:
    """Every block's output, mean-pooled over real tokens; (N, depth, D) fp32 on the CPU."""
    order = sorted(range(len(items)), key=lambda i: length(items[i]))  # alike lengths: little padding
    pooled: list[Any] = [None] * len(items)
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        f = encoder.extract([items[i] for i in chosen], all=True)
        means = torch.stack([mean_pool(layer, f.mask) for layer in f.layers], dim=1).float()  # (B, depth, D)
        for i, row in zip(chosen, means.cpu(), strict=True):
            pooled[i] = row
    return torch.stack(pooled)


def refusal(encoder: Encoder, item: Any) -> str | None:
    """Why the encoder does not take a decoded sample, as one that is too short; None if it does."""
    try:
        encoder.prepare([item])
    except ValueError as error:
        return str(error)
    return None


def features(encoder: Encoder, items: list[Any], batch: int = 64) -> dict[str, Tensor]:
    """`mean`: the last block, mean-pooled, (N, D). `all`: every block's mean, concatenated, (N, D * depth)."""
    means = layer_means(encoder, items, batch)
    return {"mean": means[:, -1], "all": means.flatten(1)}


def length(item: Any) -> int:
    return len(item) if isinstance(item, (Tensor, str)) else 0


def random_twin(encoder: Encoder) -> Encoder:
    """The same network as it was before training."""
    recipe = encoder.recipe
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.body, recipe.modalities, recipe.fairseq_compat, has_teacher=False)
    return Encoder(model.eval(), encoder.modality, encoder.samples, recipe)


def raw_features(encoder: Encoder, items: list[Any]) -> Tensor | None:
    """The input itself, where it has one length: normalised pixels, or token counts of a text."""
    return encoder.samples.raw(items) if hasattr(encoder.samples, "raw") else None


def probe(
    model: str | Path,
    train: str,
    test: str,
    modality: str | None = None,
    label: str = "cls;json.label",
    weights: str = "student",
    lowest_penalty: float = LOWEST_PENALTY,
) -> list[Row]:
    """Rows for raw input, the run's own random initialisation and the trained weights, `mean` and `all` features.

    Raises ValueError if `lowest_penalty` leaves none of 1e-8 ... 1e6, for shards that are fitted and tested on, classes
    in the test part alone, a sample that cannot be read, and features that are not finite.
    """
    if not lowest_penalty <= PENALTIES[-1]:
        raise ValueError(f"lowest_penalty={lowest_penalty:g} is above {PENALTIES[-1]:g}, the largest penalty")
    refuse_overlap((train, test))
    encoder = load(model, modality, weights)
    train_items, train_labels = labelled(encoder, train, label)
    test_items, test_labels = labelled(encoder, test, label)
    refuse_classes((train, test), train_labels, test_labels)
    rows = []
    raw = raw_features(encoder, train_items), raw_features(encoder, test_items)
    if raw[0] is not None:
        accuracy, penalty = ridge(raw[0], train_labels, raw[1], test_labels, lowest_penalty)
        rows.append(Row("raw input", accuracy, raw[0].shape[1], penalty))
    for name, network in (("random init", random_twin(encoder)), (weights, encoder)):
        fit, held_out = features(network, train_items), features(network, test_items)
        if not all(x.isfinite().all() for x in (*fit.values(), *held_out.values())):
            raise ValueError(f"{name}: features are not finite; take weights of an earlier step")
        for kind in fit:
            accuracy, penalty = ridge(fit[kind], train_labels, held_out[kind], test_labels, lowest_penalty)
            rows.append(Row(f"{name}, {kind}", accuracy, fit[kind].shape[1], penalty))
    return rows


def format_rows(rows: list[Row]) -> str:
    lines = [f"{'features':24} {'accuracy':>8} {'dim':>6} {'penalty':>8}"]
    return "\n".join(lines + [f"{r.features:24} {r.accuracy:8.3f} {r.dim:6d} {r.penalty:8.0e}" for r in rows])

"""Probes of a run on its way: what can be read from student and teacher at this step, by methods without a setting.

On a fixed labelled subset, of every layer and of all together: closed-form ridge and nearest neighbours, fitted on one
part and tested on the other with one definition of features; RankMe and alpha-ReQ of the test part; LiDAR of masked
views of training data. Beside them random initialisation and the raw input, once.

Nothing of the run is touched: the fp32 weights that a checkpoint would hold are copied from the ranks into a network of
its own, and random states are put back. Ranks share the batches, and rank 0 fits.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2v_ds.convert.features import Encoder, mean_pool
from d2v_ds.convert.load import assign
from d2v_ds.data import Corpus, Draw, Source, expand_shards, seed_of
from d2v_ds.engine.gather import whole_averages, whole_masters, whole_weights
from d2v_ds.modalities.build import build_model
from d2v_ds.modalities.source import shard_pattern
from d2v_ds.model.data2vec import TEACHER
from d2v_ds.recipe import Recipe
from d2v_ds.tasks.knn import knn
from d2v_ds.tasks.probe import choose, layer_means, overlap, random_twin, read_labels, refusal, ridge
from d2v_ds.tasks.spectrum import alpha_req, lidar, rankme
from d2v_ds.training.agreement import together
from d2v_ds.training.log import keep_rows, read_rows, warn

if TYPE_CHECKING:
    from d2v_ds.training.run import Run

FILE = "probes.jsonl"
LIDAR_SAMPLES, LIDAR_VIEWS = 500, 8
Row = dict[str, Any]


@dataclass
class Part:
    """Labelled samples of one modality."""

    corpus: Corpus
    indices: list[int]
    labels: Tensor
    name: str
    """probe.train=... or probe.test=..."""


@dataclass
class Subset:
    """What one modality is probed on."""

    source: Source
    train: Part
    test: Part

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of samples and labels: numbers of two subsets do not compare."""
        text = json.dumps([(p.corpus.fingerprint, p.indices, p.labels.tolist()) for _, p in parts(self)])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Probes:
    """`measure(run)` when it is due; an empty one never is."""

    def __init__(self, recipe: Recipe, subsets: dict[str, Subset], problems: Sequence[str] = ()):
        """`problems`: of modalities that the labelled shards do not hold."""
        self.recipe, self.subsets, self.problems = recipe, subsets, problems

    def is_due(self, step: int) -> bool:
        every = self.recipe.probe.every
        return bool(self.subsets) and (step % every == 0 or step == self.recipe.train.steps)

    def begin(self, run: Run) -> None:
        """Random initialisation and raw input: measured before the first step, so that what cannot be read is known
        before any work is lost; a run that goes on finds them in its file. All ranks call it."""
        for problem in self.problems:
            run.say(f"  {problem}")
        if self.subsets:
            run.watchdog.wait_patiently("probing")
            with undisturbed():
                self.add_baselines(run)

    def measure(self, run: Run) -> None:
        """Writes probes.jsonl, probes.png and TensorBoard; all ranks call it."""
        run.watchdog.wait_patiently("probing")
        with undisturbed():
            student = whole_masters(run.engine, lambda name: not name.startswith((TEACHER, "decoders.")))
            self.measure_weights(run, "student", student)
            followed = {TEACHER + name for name in run.ema.trained}
            fixed = whole_weights(run.engine, lambda name: name.startswith(TEACHER) and name not in followed)
            teacher = student | {name.removeprefix(TEACHER): t.float() for name, t in fixed.items()}
            self.measure_weights(run, "teacher", teacher | whole_averages(run.engine, run.ema))
        if run.log:
            try:
                plot(run.folder)
            except OSError as error:  # a full disk
                warn("probes.png", error)

    def add_baselines(self, run: Run) -> None:
        missing = [self.without_baselines(run) if run.rank == 0 else []]
        dist.broadcast_object_list(missing)
        for name in missing[0]:
            subset = self.subsets[name]
            encoder = build_encoder(run, subset.source, None)
            self.measure_encoder(run, name, "random init", encoder, step=0)
            samples = subset.source.samples
            if run.rank == 0 and hasattr(samples, "raw"):
                raw = {kind: samples.raw(decode(samples, part)) for kind, part in parts(subset)}
                self.write(
                    run, judge_features("raw input", "raw", raw, subset) | {"step": 0, "modality": name}
                )

    def without_baselines(self, run: Run) -> list[str]:
        """The modalities to be measured: all of a run that begins, whatever another left in its folder; of one that
        goes on those of another subset, or half measured. What is there of their baselines is removed."""
        path, missing = run.folder / FILE, []
        rows = read_rows(path) if run.saver.last_good else []
        for name, subset in self.subsets.items():
            last = "raw input" if hasattr(subset.source.samples, "raw") else "random init"
            done = {
                r["weights"] for r in rows
                if (r["step"], r["modality"], r.get("subset", subset.fingerprint)) == (0, name, subset.fingerprint)
                and r["features"] in ("all", "raw")
            }  # fmt: skip
            if last not in done:
                missing.append(name)
        keep_rows(path, lambda row: row["step"] > 0 or row["modality"] not in missing)
        return missing

    def measure_weights(self, run: Run, weights: str, tensors: dict[str, Tensor]) -> None:
        for name, subset in self.subsets.items():
            self.measure_encoder(run, name, weights, build_encoder(run, subset.source, tensors), run.step)

    def measure_encoder(self, run: Run, name: str, weights: str, encoder: Encoder, step: int) -> None:
        subset, batch = self.subsets[name], self.recipe.probe.batch
        means = {
            kind: shared(
                run,
                [part.indices[i : i + batch] for i in range(0, len(part.indices), batch)],
                lambda chosen, part=part: means_of(encoder, part, chosen, batch),
            )
            for kind, part in parts(subset)
        }
        units = choose(subset.source.stream.size, min(LIDAR_SAMPLES, self.recipe.probe.samples))
        views = shared(
            run,
            [units[i : i + batch] for i in range(0, len(units), batch)],
            lambda chosen: view_means(encoder, subset.source, chosen, run.device),
        )
        if run.rank:
            return
        if not all(x.isfinite().all() for x in (*means.values(), views)):
            run.say(
                f"probe at step {step}: {name}, {weights}: features are not finite, so nothing is measured"
            )
            return
        where = {"step": step, "modality": name}
        depth = means["test"].shape[1]
        for i in range(depth):
            layer = {kind: x[:, i] for kind, x in means.items()}
            row = judge_features(weights, f"layer {i + 1}", layer, subset)
            self.write(run, where | row | spectrum(layer["test"], views if i == depth - 1 else None))
        every = {kind: x.flatten(1) for kind, x in means.items()}
        row = where | judge_features(weights, "all", every, subset)
        self.write(run, row)
        accuracies = [f"ridge {row['ridge']:.3f} (all layers)"]
        accuracies += [f"{k}-NN {v:.3f}" for k, v in row["knn"].items()]
        run.say(f"probe at step {step}: {name}, {weights}: {', '.join(accuracies)}")

    def write(self, run: Run, row: Row) -> None:
        row = row | {"subset": self.subsets[row["modality"]].fingerprint}
        numbers = {k: v for k, v in row.items() if k in ("ridge", "rankme", "alpha_req", "lidar")}
        numbers |= {f"knn_{k}": v for k, v in row["knn"].items()}
        curve = f"probe/{row['modality']}/{row['weights']}/{row['features']}".replace(" ", "_")
        run.log.probe(FILE, row, {f"{curve}/{key}": value for key, value in numbers.items()})


# ---- what is probed ------------------------------------------------------------------------------------------


def open_probes(recipe: Recipe, sources: list[Source]) -> Probes:
    """The labelled samples of every modality of the run that the shards hold; none if `probe.every` is 0.

    Raises ValueError, before training, for shards that are not there, that hold no modality of the run, or whose labels
    are no classes.
    """
    settings = recipe.probe
    if not settings.every:
        return Probes(recipe, {})
    paths = {key: labelled_shards(recipe, key) for key in ("train", "test")}
    if both := overlap(paths["train"], paths["test"]):
        raise ValueError(
            f"probe.train={settings.train} and probe.test={settings.test} both name {both[0]}; what is fitted on says "
            "nothing when it is tested on: give other shards"
        )
    subsets, problems = {}, []
    for source in sources:
        fields = {**source.samples.fields, "label": settings.label}
        try:
            corpora = {key: Corpus.open(found, fields, progress=None) for key, found in paths.items()}
        except ValueError as error:  # this modality is not in these shards
            problems.append(f"{source.name} is not probed: {error}")
            continue
        train, test = (open_part(corpora[key], recipe, f"probe.{key}") for key in ("train", "test"))
        unknown = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
        if unknown and len(train.indices) == len(corpora["train"]):
            raise ValueError(
                f"classes {unknown[:8]} of probe.test={settings.test} are not in probe.train={settings.train}; "
                "give shards of the same classes"
            )
        subsets[source.name] = Subset(source, train, test)
    if not subsets:
        raise ValueError(
            f"probe.train and probe.test hold no labelled sample of this run: {'; '.join(problems)}"
        )
    return Probes(recipe, subsets, problems)


def labelled_shards(recipe: Recipe, key: str) -> list[Path]:
    pattern = getattr(recipe.probe, key)
    try:
        is_own = recipe.data == shard_pattern(recipe.data, pattern)  # data= is itself a pattern
        return expand_shards(pattern if is_own else shard_pattern(recipe.data, pattern))
    except ValueError as error:
        raise ValueError(f"probe.{key}={pattern}: {error}") from error


def open_part(corpus: Corpus, recipe: Recipe, key: str) -> Part:
    indices = choose(len(corpus), recipe.probe.samples)
    try:
        labels = read_labels(corpus, indices, recipe.probe.label)
    except ValueError as error:
        raise ValueError(f"{key}={getattr(recipe.probe, key[6:])}: {error}") from error
    if key == "probe.train" and len(labels.unique()) < 2:
        raise ValueError(
            f"{key}={recipe.probe.train} holds one class alone ({labels[0]}) in the {len(labels)} samples that are "
            "looked at; a probe needs two or more: name shards of several classes, or another probe.label, or raise "
            f"probe.samples={recipe.probe.samples}"
        )
    return Part(corpus, indices, labels, f"{key}={getattr(recipe.probe, key[6:])}")


def parts(subset: Subset) -> list[tuple[str, Part]]:
    return [("train", subset.train), ("test", subset.test)]


def decode(samples: Any, part: Part) -> list[Any]:
    return [samples.decode(part.corpus, i) for i in part.indices]


# ---- features ------------------------------------------------------------------------------------------------


def build_encoder(run: Run, source: Source, tensors: dict[str, Tensor] | None) -> Encoder:
    """A network of its own, on the run's device, with these weights or those of the recipe's seed; no decoder."""
    recipe = run.recipe
    config = recipe.modalities[source.name]
    with torch.device("meta"):
        model = build_model(recipe.body, {source.name: config}, recipe.fairseq_compat, has_teacher=False)
    model.decoders = nn.ModuleDict()
    encoder = Encoder(model, source.name, source.samples, recipe)
    if tensors is None:
        tensors = dict(random_twin(encoder).model.named_parameters())
    assign(model, tensors, run.folder)
    model.requires_grad_(False).eval().to(run.device)
    return encoder


def shared(run: Run, batches: list[list[int]], work: Callable[[list[int]], Tensor]) -> Tensor:
    """What `work` gives for every batch, one after another; ranks take turns, so it is the same at any number."""
    mine = together(lambda: {i: work(batches[i]).cpu() for i in range(run.rank, len(batches), run.world)})
    everyone: list[Any] = [mine] if run.world == 1 else [None] * run.world
    if run.world > 1:
        dist.all_gather_object(everyone, mine)
    done = {i: x for each in everyone for i, x in each.items()}
    return torch.cat([done[i] for i in range(len(batches))])


def means_of(encoder: Encoder, part: Part, chosen: list[int], batch: int) -> Tensor:
    """`layer_means` of some samples; ValueError with the name of one that cannot be used."""
    items: list[Any] = []
    for i in chosen:
        try:
            items.append(encoder.samples.decode(part.corpus, i))
        except ValueError as error:
            raise unusable(part, i, str(error)) from error
    try:
        return layer_means(encoder, items, batch)
    except ValueError:
        for i, item in zip(chosen, items, strict=True):
            if reason := refusal(encoder, item):
                raise unusable(part, i, reason) from None
        raise


def unusable(part: Part, i: int, reason: str) -> ValueError:
    return ValueError(
        f"{part.name}: {part.corpus.key(i)} cannot be used: {reason}; name shards without it, or take it out"
    )


@torch.no_grad()
def view_means(encoder: Encoder, source: Source, units: list[int], device: torch.device) -> Tensor:
    """The student's mean output for LIDAR_VIEWS masked views of training samples; (B, Q, D). One that cannot be read,
    or of which a view shows padding alone, is left out."""
    model, samples, rows, kept = encoder.model, source.samples, [], []
    for unit in units:
        try:
            rows.append(samples.read(source.corpus, unit))
            kept.append(unit)
        except ValueError:
            continue
    config, views, is_seen = model.configs[source.name], [], []
    if not kept:
        return torch.zeros(0, LIDAR_VIEWS, encoder.recipe.body.dim)
    for again in range(-(-LIDAR_VIEWS // config.clones)):
        draws = [Draw(unit, 0, seed_of(0, "lidar", again, unit)) for unit in kept]
        batch = samples.collate(rows, draws).to(device, next(model.parameters()).dtype)
        own = model.encoders[source.name]
        hidden_NKD = model.see_views(batch, own.local(batch.source) if own.mask_id is None else None)
        hidden_NKD = hidden_NKD[:, config.extra_tokens :]
        mask_NK = torch.zeros(hidden_NKD.shape[:2], dtype=torch.bool, device=device)
        if batch.padding_BT is not None:
            mask_NK = batch.padding_BT.repeat_interleave(batch.clones, dim=0)
            mask_NK = mask_NK if batch.keep_NK is None else mask_NK.gather(1, batch.keep_NK)
        views.append(mean_pool(hidden_NKD.float(), mask_NK).unflatten(0, (-1, batch.clones)))
        is_seen.append((~mask_NK).any(1).unflatten(0, (-1, batch.clones)))
    is_seen_B = torch.cat(is_seen, dim=1)[:, :LIDAR_VIEWS].all(1)
    return torch.cat(views, dim=1)[is_seen_B, :LIDAR_VIEWS]


def judge_features(weights: str, kind: str, x: dict[str, Tensor], subset: Subset) -> Row:
    train, test = subset.train.labels, subset.test.labels
    accuracy, penalty = ridge(x["train"], train, x["test"], test)
    neighbours = knn(x["train"], train, x["test"], test)
    return {
        "weights": weights, "features": kind, "dim": x["train"].shape[1], "ridge": accuracy, "penalty": penalty,
        "knn": {str(k): v for k, v in neighbours.items()},
    }  # fmt: skip


def spectrum(x_ND: Tensor, views_NQD: Tensor | None) -> Row:
    row = {"rankme": rankme(x_ND), "alpha_req": alpha_req(x_ND)}
    return row if views_NQD is None else row | {"lidar": lidar(views_NQD)}


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves every random state as it was."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield
    random.setstate(before[0])
    np.random.set_state(before[1])


# ---- the plot ------------------------------------------------------------------------------------------------

STYLES = {"student": "C0", "teacher": "C1", "random init": "C2", "raw input": "C3"}


def plot(folder: Path) -> Path:
    """probes.png: accuracies of each modality over steps with both baselines, and ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, path = read_rows(folder / FILE), folder / "probes.png"
    names = sorted({row["modality"] for row in rows})
    if not names:
        return path
    figure, axes = plt.subplots(len(names), 3, figsize=(14, 3.6 * len(names)), squeeze=False)
    for line, name in zip(axes, names, strict=True):
        own = [row for row in rows if row["modality"] == name]
        own = [row for row in own if row.get("subset") in (None, own[-1].get("subset"))]
        layers = (r["features"] for r in own if r["features"].startswith("layer"))
        last = max(layers, key=lambda t: int(t[6:]), default="all")
        for axis, title in zip(line, ("ridge", "nearest neighbours", "RankMe and LiDAR"), strict=True):
            axis.set(title=f"{name}: {title}", xlabel="step")
            axis.grid(alpha=0.3)
        for weights, colour in STYLES.items():
            for features, style in (("all", "-"), (last, "--"), ("raw", ":")):
                of = [r for r in own if r["weights"] == weights and r["features"] == features]
                if not of:
                    continue
                k = "20" if "20" in of[0]["knn"] else next(iter(of[0]["knn"]), None)
                draw(line[0], of, [r["ridge"] for r in of], f"{weights}, {features}", colour, style)
                if k:
                    draw(
                        line[1], of, [r["knn"][k] for r in of], f"{weights}, {features}, k={k}", colour, style
                    )
                for key, mark in (("rankme", "--"), ("lidar", "-.")):
                    if key in of[0]:
                        draw(line[2], of, [r[key] for r in of], f"{weights}, {key}", colour, mark)
        for axis in line:
            if axis.has_data():  # no neighbours of fewer than 10 samples
                axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw(axis: Any, rows: list[Row], values: list[float], label: str, colour: str, style: str) -> None:
    """A curve, or a level line for what is measured once."""
    if rows[0]["step"]:
        axis.plot([r["step"] for r in rows], values, label=label, color=colour, linestyle=style, marker=".")
    elif values[0] is not None:  # LiDAR of one sample
        axis.axhline(values[0], label=label, color=colour, linestyle=style)

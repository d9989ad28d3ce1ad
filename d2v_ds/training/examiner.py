"""How good is a fine-tuned model on its way? Scored on labelled shards, as `d2v eval` does; the best checkpoint stays.

Nothing of the run is touched: weights are copied (from the ranks' shards at ZeRO-3) into a network of its own. Ranks
share the samples, and see the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from d2v_ds.convert.features import Encoder
from d2v_ds.convert.load import assign
from d2v_ds.data import Source
from d2v_ds.engine.gather import whole_masters
from d2v_ds.engine.saver import folder_name
from d2v_ds.modalities.build import build_model
from d2v_ds.modalities.source import shard_pattern
from d2v_ds.model.heads import HEAD, build_head
from d2v_ds.recipe import Recipe
from d2v_ds.tasks.evaluate import answers, best_path, import_jiwer, renumber, score_transcripts
from d2v_ds.tasks.items import Items, Name, ShardItems, open_items
from d2v_ds.tasks.metrics import check_metrics, measure
from d2v_ds.tasks.probe import overlap
from d2v_ds.tasks.table import Bad, write_whole
from d2v_ds.training.agreement import together
from d2v_ds.training.log import warn
from d2v_ds.training.probing import undisturbed

if TYPE_CHECKING:
    from d2v_ds.training.run import Run

FILE = "scores.jsonl"
BATCH = 32


class Examiner:
    """`score(run)` when it is due; one of a recipe without a test never is."""

    best: dict[str, Any] | None = None
    """Step, score and metrics of the best checkpoint."""
    before: dict[str, Any] | None = None
    """Of the best one before it, for the case that it cannot be saved."""

    def __init__(
        self, recipe: Recipe, parts: dict[str, tuple[Items, list[float]]] | None, samples: Any = None
    ):
        """`parts`: of each test its items and what is true of them."""
        self.recipe, self.parts, self.samples = recipe, parts or {}, samples

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of what is scored."""
        return {name: items.fingerprint for name, (items, _) in self.parts.items()}

    def go_on(self, run: Run, loop: dict[str, Any]) -> None:
        """Takes the best checkpoint from the one that the run goes on from or back to, if it is still there and was
        scored on the same shards; all ranks call it."""
        before = loop.get("test", self.fingerprints)  # absent in older checkpoints
        self.best = self.before = None
        if self.parts and before != self.fingerprints:
            run.say("task.test is of other shards than before: the best checkpoint is chosen anew")
            return
        best = loop.get("best")
        found = [best if best and (run.folder / folder_name(best["step"])).is_dir() else None]
        if dist.is_initialized():  # a shared disk may show it to some ranks alone, and all must save together
            dist.broadcast_object_list(found)
        self.best = found[0]
        if best and self.best is None and self.parts:
            run.say(
                f"{folder_name(best['step'])}, the best checkpoint, is not there any more: the best is chosen anew"
            )
        if run.rank == 0:
            write_best(run.folder, self.best)  # a kill may have left that of a checkpoint that was not saved

    def is_due(self, step: int) -> bool:
        every = self.recipe.task.test_every if self.parts else 0
        return bool(self.parts) and (step == self.recipe.train.steps or bool(every and step % every == 0))

    def score(self, run: Run) -> None:
        """Writes scores.jsonl and TensorBoard, and saves a checkpoint if none was as good; all ranks call it."""
        run.watchdog.wait_patiently("scoring")
        with undisturbed():
            encoder = build_encoder(run, self.samples)
            found = {name: self.score_part(run, encoder, *part) for name, part in self.parts.items()}
        row = flatten(found) | {"unreadable": sum(values["unreadable"] for values in found.values())}
        row["score"] = sum(values["score"] for values in found.values()) / len(found)
        if run.log:
            run.log.probe(
                FILE, {"step": run.step, **row}, {f"test/{key}": value for key, value in row.items()}
            )
        numbers = "  ".join(
            f"{key} {value:.4f}" for key, value in row.items() if key not in ("score", "unreadable")
        )
        if self.best and self.best["step"] in run.saver.lost:
            self.best = self.before
        is_best = self.best is None or row["score"] > self.best["score"]
        numbers += f"  unreadable {row['unreadable']}" if row["unreadable"] else ""
        run.say(f"test at step {run.step}: {numbers}{' (best)' * is_best}")
        if is_best:
            self.before, self.best = self.best, {"step": run.step, **row}
            run.save()
        if run.rank == 0:
            write_best(run.folder, self.best)

    def score_part(self, run: Run, encoder: Encoder, items: Items, truths: list[float]) -> dict[str, float]:
        mine = Share(items, run.rank, run.world)
        bad: list[Bad] = []
        workers = run.recipe.train.workers or 1
        decode = best_path(encoder) if self.recipe.task.head == "ctc" else None
        said, places = together(lambda: answers(encoder, mine, BATCH, workers, bad, decode))
        everyone: list[Any] = [None] * run.world
        dist.all_gather_object(everyone, (said, [mine.place(i) for i in places], len(bad)))
        rows = [(i, row) for said, found, _ in everyone for i, row in zip(found, said, strict=True)]
        if not rows:
            first = f"; the first: {bad[0].key}: {bad[0].reason}" if bad else ""
            raise ValueError(f"task.test: none of {items.words} can be read{first}")
        rows.sort(key=lambda row: row[0])
        bad_count = sum(count for _, _, count in everyone)
        if decode:
            found = score_transcripts([(text, truths[i]) for i, text in rows])
            return found | {"score": -found["wer"], "unreadable": bad_count}
        logits_NC = torch.stack([row for _, row in rows])
        truth_N = torch.tensor([truths[i] for i, _ in rows])
        found = measure(self.recipe.task.metrics, logits_NC, truth_N)
        return found | {"unreadable": bad_count}

    def spared(self, run: Path) -> Callable[[], Path | None]:
        """The checkpoint that is kept besides the last ones: the best, or the one before it if it was not saved."""
        rows = [row for row in (self.best, self.before) if row]
        folders = [run / folder_name(row["step"]) for row in rows]
        return lambda: next((folder for folder in folders if folder.is_dir()), None)


class Share:
    """Every n-th of some items, for one of n ranks."""

    def __init__(self, items: Items, rank: int, world: int):
        self.items, self.rank, self.world = items, rank, world
        self.fingerprint, self.words, self.has_labels = items.fingerprint, items.words, items.has_labels

    def __len__(self) -> int:
        return len(range(self.rank, len(self.items), self.world))

    def place(self, i: int) -> int:
        return self.rank + i * self.world

    def name(self, i: int) -> Name:
        return self.items.name(self.place(i))

    def read(self, i: int) -> Any:
        return self.items.read(self.place(i))


def open_examiner(recipe: Recipe, sources: list[Source]) -> Examiner:
    """Reads all labels of the test; ValueError names the first that is missing or cannot be said."""
    task = recipe.task
    if task is None or task.test is None:
        return Examiner(recipe, None)
    if task.head == "ctc":
        import_jiwer()
    else:
        check_metrics(task.metrics, task.outputs, f"task.metrics={','.join(task.metrics)}")
    (source,) = sources
    patterns = task.test if isinstance(task.test, dict) else {"": task.test}
    samples, parts = source.samples.samples, {}
    for name, pattern in patterns.items():
        data = where(recipe, pattern)
        items = open_items(data, source.name, samples, task.label)
        refuse_trained(pattern, source, items)
        others = {} if task.head == "ctc" else renumber(data, task.labels or (), task.label)
        parts[name] = items, [read_truth(items, i, source.samples.parse, others) for i in range(len(items))]
    return Examiner(recipe, parts, samples)


def refuse_trained(pattern: str, source: Source, items: Items) -> None:
    """Raises ValueError for a test that holds shards of the training."""
    if not isinstance(items, ShardItems):
        return
    shards = ([index.remote or index.path for index in each.corpus.indexes] for each in (source, items))
    if both := overlap(*shards):
        raise ValueError(
            f"task.test={pattern} names {both[0]}, which the run learns from, so its best checkpoint would be the one "
            f"that knows it by heart; give other shards, or keep it from the training: "
            f"modalities.{source.name}.data.shards= (`d2v eval` measures on any)"
        )


def where(recipe: Recipe, pattern: str) -> str:
    """A pattern inside the data folder, or a path of its own."""
    if Path(pattern).exists() or "/" in pattern:
        return pattern
    inside = shard_pattern(recipe.data, pattern)
    if inside == recipe.data:  # a pattern itself, so there is no folder
        raise ValueError(
            f"task.test={pattern} is a pattern inside the data folder, but data={recipe.data} is no folder; give the "
            "test its whole path, or none (task.test=null task.test_every=0)"
        )
    return inside if isinstance(inside, str) else "::".join(inside)


def read_truth(items: Items, i: int, parse: Callable[[str], Any], others: dict[str, str]) -> Any:
    """A number; of CTC the text that its symbols write. `others`: what the test's own numbers are here."""
    try:
        text = items.read(i)[1] if items.has_labels else ""
        truth = parse(others.get(text, text))
        return parse.vocabulary.decode(truth) if hasattr(parse, "vocabulary") else truth
    except ValueError as error:
        raise ValueError(f"task.test: {items.name(i).full}: {error}") from error


def build_encoder(run: Run, samples: Any) -> Encoder:
    """A network of its own with the run's weights, and its head."""
    recipe, (name,) = run.recipe, run.recipe.modalities
    tensors = whole_masters(run.engine)
    with torch.device("meta"):
        model = build_model(recipe.body, recipe.modalities, recipe.fairseq_compat, has_teacher=False)
        head = build_head(recipe.task.head_config, recipe.body.dim)
    model.decoders = nn.ModuleDict()
    if recipe.task.mask is None:
        model.encoders[name].context.mask_token = None
    assign(model, tensors, run.folder)
    assign(
        head, {key.removeprefix(HEAD): t for key, t in tensors.items() if key.startswith(HEAD)}, run.folder
    )
    encoder = Encoder(model, name, samples, recipe, head=head, head_config=recipe.task.head_config)
    return encoder.requires_grad_(False).eval().to(run.device)


def flatten(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """`accuracy`, or of several parts `accuracy_matched`, ..."""
    return {
        f"{key}_{name}" if name else key: value
        for name, values in found.items()
        for key, value in values.items()
        if key not in ("score", "unreadable")
    }


def write_best(folder: Path, best: dict[str, Any] | None) -> None:
    """best.json: the step, and its numbers, whole or as it was; none where nothing is best."""
    path = folder / "best.json"
    try:
        if best is None:
            path.unlink(missing_ok=True)
        else:
            write_whole(path, json.dumps(best, indent=1).encode())
    except OSError as error:  # a full disk: the next score tries again
        warn("best.json", error)

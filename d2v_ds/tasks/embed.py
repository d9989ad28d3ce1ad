"""Embeddings of everything in some shards or a folder, in one file: streamed, batched by length, resumable.

What is done is a function of the data, the model and the settings alone, so a run that was killed at any moment and
started again writes the very file that an uninterrupted one writes: items go in stored order through groups, which are
sorted by length and cut into batches; whole groups are written as parts (d2v_ds.tasks.table).
B items of a batch, T tokens, L layers, D dim.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from d2v_ds.convert.features import Encoder
from d2v_ds.convert.load import load
from d2v_ds.data.progress import ProgressLine, duration
from d2v_ds.tasks import final
from d2v_ds.tasks.groups import Group, Ready, ahead, cut_batches, make_groups, prepare
from d2v_ds.tasks.items import Items, open_items
from d2v_ds.tasks.pooling import What
from d2v_ds.tasks.table import Bad, Parts, Row, parts_folder, refuse_other, write_whole

PART_SECONDS, PART_BYTES = 20.0, 64 << 20
"""A part is written when one of these is reached; where parts are cut does not change the result."""


class Summary(NamedTuple):
    """What was done, for people."""

    out: Path
    modality: str
    rows: int
    bad: int = 0
    notices: int = 0
    """Items longer than the model takes at once."""
    seconds: float = 0.0
    was_there: bool = False

    def __str__(self) -> str:
        if self.was_there:
            return f"{self.out} is there already, complete and with these settings"
        lines = [f"wrote {self.out}: {self.rows} embeddings in {duration(self.seconds)}"]
        if self.bad:
            lines.append(f"{self.bad} could not be embedded: {bad_file(self.out)} lists each with the reason")
        if self.notices:
            done = "encoded in windows" if self.modality == "audio" else "cut"
            lines.append(f"{self.notices} were {done}: they are longer than the model takes at once")
        return "\n".join(lines)


def embed(
    model: str | Path | Encoder,
    data: str | Path,
    out: str | Path,
    modality: str | None = None,
    layer: str | int = "last",
    pool: str = "mean",
    batch: int = 32,
    device: str | None = None,
    weights: str | None = None,
    label: str = "cls;json.label",
    workers: int | None = None,
    say: Callable[[str], Any] | None = None,
) -> Summary:
    """Writes the embedding of every item of `data` to `out`, a .parquet or .npy file.

    `data`: shards (folder, pattern) or a folder of files. Items that cannot be read or used are listed in
    `<out>.bad.jsonl`. Called again after it was stopped, it goes on. `say`: takes lines for people.

    Raises ValueError for settings that do not fit the model, for `out` of other settings, and if all items are bad.
    """
    began, out, say = time.monotonic(), Path(out), say or (lambda line: None)
    final.check_out(out)
    if batch < 1:
        raise ValueError(f"batch {batch} must be at least 1")
    encoder = (
        model
        if isinstance(model, Encoder)
        else load(model, modality, weights, device=device or best_device())
    )
    what = What(str(layer), pool)
    what.check(encoder)
    say(repr(encoder))
    items = open_items(data, encoder.modality, encoder.samples, label)
    say(items.words)
    settings = describe(encoder, items, what, batch, label)
    if out.exists() and not parts_folder(out).is_dir():
        refuse_other(final.settings_of(out), settings, f"{out} is there")
        return Summary(out, encoder.modality, len(items), was_there=True)
    parts = Parts(out, settings)
    start = parts.next_item()
    if start:
        say(f"going on at {start} of {len(items)}")
    line = ProgressLine(len(items), start)
    try:
        fill(parts, encoder, items, what, batch, workers, line)
    finally:
        line.close()
    return finish(parts, out, settings, began)


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe(encoder: Encoder, items: Items, what: What, batch: int, label: str) -> dict[str, Any]:
    """All that the result depends on."""
    parameter = next(encoder.model.parameters())
    return {
        "version": 1,
        "model": fingerprint(encoder),
        "data": items.fingerprint,
        "modality": encoder.modality,
        "layer": what.layer,
        "pool": what.pool,
        "batch": batch,
        "label": label if items.has_labels else None,
        "device": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }


def fingerprint(encoder: Encoder) -> str:
    """sha256 of the weights and of how input is prepared."""
    config = encoder.samples.config.model_dump_json(
        exclude={"data": {"shards", "tokenizer"}}
    )  # where they lie
    digest = hashlib.sha256(config.encode())
    for file in getattr(encoder.samples, "files", ()):
        digest.update(file.read_bytes())
    for name, parameter in encoder.model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fill(
    parts: Parts,
    encoder: Encoder,
    items: Items,
    what: What,
    batch: int,
    workers: int | None,
    line: ProgressLine,
) -> None:
    """Embeds what the parts do not have yet."""
    rows: list[Row] = []
    bad: list[Bad] = []
    notices, held, num_bad, written = 0, 0, len(parts.bad()), time.monotonic()
    ready = prepare(encoder, items, parts.next_item(), workers)
    bytes_per_token = 4 * encoder.recipe.body.dim if what.pool == "none" else 0
    for group in ahead(make_groups(ready, encoder, batch, bytes_per_token)):
        bad += group.bad
        num_bad += len(group.bad)
        for result in embed_group(group, encoder, what, batch, line, num_bad):
            (bad if isinstance(result, Bad) else rows).append(result)
            held += 0 if isinstance(result, Bad) else result.embedding.nbytes
        notices += sum(item.notice is not None for item in group.ready)
        is_last = group.next_item == len(items)
        if is_last or held >= PART_BYTES or time.monotonic() - written >= PART_SECONDS:
            parts.add(rows, bad, group.next_item, notices)
            rows, bad, notices, held, written = [], [], 0, 0, time.monotonic()


def embed_group(
    group: Group, encoder: Encoder, what: What, batch: int, line: ProgressLine, num_bad: int
) -> list[Row | Bad]:
    """One for each item, in the order of the items."""
    results: dict[int, Row | Bad] = {}
    for chosen in cut_batches(group, encoder, batch):
        hidden = encoder.run([item.row for item in chosen], what.blocks(encoder))
        for item, embedding in zip(chosen, what.take(hidden, encoder), strict=True):
            tokens = encoder.inputs.num_tokens(encoder.samples, item.row)
            results[item.number] = to_row(item, tokens, embedding)
        line.show(group.next_item - len(group.ready) + len(results), num_bad)
    return [results[item.number] for item in group.ready]


def to_row(ready: Ready, tokens: int, embedding: np.ndarray) -> Row | Bad:
    if not np.isfinite(embedding).all():
        return Bad(ready.name.full, "its features are not finite")
    return Row(ready.name.key, ready.name.shard, ready.label or None, tokens, embedding)


def finish(parts: Parts, out: Path, settings: dict[str, Any], began: float) -> Summary:
    """The parts as one file, with the list of what is bad beside it."""
    bad, notices = parts.bad(), parts.notices()
    rows = sum(len(table) for table in parts.tables(["key"]))
    if not rows:
        parts.remove()
        shown = "; ".join(f"{b.key}: {b.reason}" for b in bad[:3])
        raise ValueError(f"none of the {len(bad)} items can be embedded: {shown}")
    if bad:
        lines = [json.dumps({"key": b.key, "reason": b.reason}) + "\n" for b in bad]
        write_whole(bad_file(out), "".join(lines).encode())
    else:
        bad_file(out).unlink(missing_ok=True)
    final.write(parts, out, settings)
    parts.remove()
    return Summary(out, settings["modality"], rows, len(bad), notices, time.monotonic() - began)


def bad_file(out: Path) -> Path:
    return out.with_suffix(".bad.jsonl")

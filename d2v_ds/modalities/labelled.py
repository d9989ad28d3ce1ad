"""Samples with what a head should say of them: the class or number that a member or json key holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from d2v_ds.data import Corpus, Draw, Share, Volume
from d2v_ds.model.batch import Batch
from d2v_ds.model.tuned import Task

CHECKED = 20_000
"""Labels that are read before a run starts, evenly spaced; others are read with their samples."""
FIELD = "label"


class Fields:
    """One sample that was read already, in the place of the corpus that it comes from."""

    def __init__(self, fields: dict[str, bytes]):
        self.fields = fields

    def read(self, unit: int) -> dict[str, bytes]:
        return self.fields


class Labelled:
    """The samples of a modality, each with its label; in all else they are what they were."""

    def __init__(self, samples: Any, task: Task):
        if not hasattr(samples, "collate_whole"):
            raise ValueError(f"{type(samples).__name__} cannot be fine-tuned")
        if hasattr(samples, "check_tools"):
            samples.check_tools()
        self.samples, self.task = samples, task
        self.parse = samples.parser(task) if task.head == "ctc" else task.parse
        if task.head == "ctc" and task.vocabulary:
            self.files = (Path(task.vocabulary).expanduser(),)  # what the run needs to go on
        self.fields = {**samples.fields, FIELD: f"{task.label};"}

    def __getattr__(self, name: str) -> Any:
        if name == "samples":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.samples, name)

    def volume(self, corpus: Corpus, share: Share, batch: int) -> Volume:
        """Whole samples are padded where those of pre-training are cropped."""
        own = getattr(self.samples, "whole_volume", self.samples.volume)
        return own(corpus, share, batch)

    def read(self, corpus: Corpus, unit: int) -> tuple[Any, float | int]:
        fields = corpus.read(unit)
        label = self.parse(text_of(fields[FIELD]))
        decoded = self.samples.read(Fields(fields), unit)
        if hasattr(self.samples, "check_pair"):
            self.samples.check_pair(decoded, label, self.task)
        return decoded, label

    def collate(self, pairs: list[tuple[Any, float | int]], draws: list[Draw]) -> Batch:
        decoded, labels = zip(*pairs, strict=True)
        return self.samples.collate_whole(list(decoded), draws, list(labels), self.task)


def text_of(label: bytes) -> str:
    """ValueError if it is no UTF-8: a model would learn to write the sign that stands for what cannot be read."""
    try:
        return label.decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the label {label[:40]!r} is no UTF-8 ({error.reason}); store it as UTF-8"
        ) from error


def check_labels(name: str, corpus: Corpus, parse: Callable[[str], Any]) -> None:
    """Raises ValueError for the first sample whose label is missing or cannot be said, by its name."""
    labels = Corpus(corpus.indexes, corpus.fields)  # the same samples
    labels.fields = {FIELD: corpus.fields[FIELD]}  # of which nothing else is read
    for i in np.unique(np.linspace(0, len(labels) - 1, CHECKED, dtype=int)):
        try:
            parse(text_of(labels.read(int(i))[FIELD]))
        except ValueError as error:
            raise ValueError(f"{name}: {labels.key(int(i))}: {error}") from error

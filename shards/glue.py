"""GLUE's eight tasks, from the original TSV files or Hugging Face's parquet files, a folder of shards for each.

    d2v prepare glue glue_data --task cola --out shards/glue/cola          glue_data/CoLA/train.tsv, dev.tsv
    d2v prepare glue glue --task mnli --out shards/glue/mnli               glue/mnli/train-00000-of-00001.parquet, ...

SOURCE is the folder of all tasks, or the task's own. Splits are train and val (of MNLI val-matched and val-mismatched);
test files have no labels and are left out. Columns are found by their names in the header, whatever their order. Rows
that do not have the header's number of fields (QQP has some) are listed in `skipped.jsonl`.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shards.listing import Found, Part, Skipped, stamp_file
from shards.prepare import Job, Source
from shards.rows import NoLabel, as_number, column_names, read_rows, refuse_missing, samples_of


class Task(NamedTuple):
    """Where the texts and the label of a task stand."""

    folder: str
    """In the original's archive; Hugging Face's has it in small letters, without a dash."""
    tsv: tuple[str, ...]
    """Columns of text in the original, best names first."""
    parquet: tuple[str, ...]
    label: str
    classes: tuple[str, ...] | None
    """None: a number from 0 to 5."""


ENTAILED = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")
ASKED = ("question1", "question2")
STRINGS = ("#1 String", "#2 String")
TASKS = {
    "cola": Task("CoLA", ("sentence",), ("sentence",), "label", ("unacceptable", "acceptable")),
    "mnli": Task(
        "MNLI", PAIR, ("premise", "hypothesis"), "gold_label", ("entailment", "neutral", "contradiction")
    ),
    "mrpc": Task("MRPC", STRINGS, PAIR, "Quality", ("not_equivalent", "equivalent")),
    "qnli": Task("QNLI", ("question", "sentence"), ("question", "sentence"), "label", ENTAILED),
    "qqp": Task("QQP", ASKED, ASKED, "is_duplicate", ("not_duplicate", "duplicate")),
    "rte": Task("RTE", PAIR, PAIR, "label", ENTAILED),
    "sst2": Task("SST-2", ("sentence",), ("sentence",), "label", ("negative", "positive")),
    "stsb": Task("STS-B", PAIR, PAIR, "score", None),
}

COLA = ["source", "label", "mark", "sentence"]
"""Columns of CoLA's files, which have no header; the mark is the original author's star."""
FILES = {
    "train": ("train.tsv", "train-*.parquet"),
    "val": ("dev.tsv", "validation-*.parquet"),
    "val-matched": ("dev_matched.tsv", "validation_matched-*.parquet"),
    "val-mismatched": ("dev_mismatched.tsv", "validation_mismatched-*.parquet"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of GLUE, or of the task")
    parser.add_argument("--task", required=True, choices=tuple(TASKS), help="which of the eight")


def make_job(arguments: argparse.Namespace) -> Job:
    source = Path(os.path.abspath(arguments.source.expanduser()))
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; give that of GLUE's files, or of the task's")
    files = find_files(source, arguments.task)
    return Job(
        name=arguments.task,
        out=arguments.out.expanduser(),
        settings={"made by": "d2v prepare glue", "source": str(source), "task": arguments.task},
        find=functools.partial(find_parts, name=arguments.task, files=files),
    )


def find_files(source: Path, name: str) -> dict[str, list[Path]]:
    """The files of each split; ValueError if one has none."""
    task = TASKS[name]
    places = [source / task.folder, source / name, source / task.folder.lower(), source]
    wanted = ["train", "val-matched", "val-mismatched"] if name == "mnli" else ["train", "val"]
    for place in places:
        for kind in (0, 1):
            found = {split: sorted(place.glob(FILES[split][kind])) for split in wanted}
            if all(found.values()):
                return found
            if any(found.values()):
                missing = [FILES[split][kind] for split in wanted if not found[split]]
                raise ValueError(f"{place} lacks {', '.join(missing)} of {task.folder}")
    tsv, parquet = (", ".join(FILES[split][kind] for split in wanted) for kind in (0, 1))
    raise ValueError(
        f"{source} holds neither {task.folder}/ nor {name}/ with {tsv}, or with {parquet}; give the folder of the "
        "original TSV files or of Hugging Face's parquet files"
    )


def find_parts(job: Job, name: str, files: dict[str, list[Path]]) -> Source:
    """A part for each file; what its header lacks is known before anything is read."""
    parts, origin = [], []
    for split, paths in files.items():
        for path in paths:
            columns, names = find_columns(path, name)
            listed = functools.partial(
                list_file, name=name, path=path, split=split, columns=columns, names=names
            )
            parts.append(Part(f"{split} {path.name}", listed, f"{path} {stamp_file(path)} {columns} {names}"))
            origin.append({"file": path.name, "size": path.stat().st_size, "checksum": None})
    classes = TASKS[name].classes
    return Source(parts=parts, origin=origin, classes=list(classes) if classes else None)


def find_columns(path: Path, name: str) -> tuple[dict[str, str], list[str] | None]:
    """Text, text_b and label -> the file's columns; and the columns' names of a file without a header.

    Raises ValueError, with the columns that there are, if one is missing.
    """
    task, is_tsv = TASKS[name], path.suffix == ".tsv"
    texts, label = (task.tsv, task.label) if is_tsv else (task.parquet, "label")
    columns = dict(zip(("text", "text_b"), texts, strict=False)) | {"label": label}
    listed = column_names(path)
    if name == "cola" and is_tsv and not {"sentence", "label"} <= set(listed):
        check_cola(path)
        return columns, COLA
    refuse_missing(path, columns.values(), listed)
    return columns, None


def check_cola(path: Path) -> None:
    """ValueError unless every row looks like CoLA's: it has no header that would say which column is which."""
    for number, values in read_rows(path, [], [f"{i + 1}" for i in range(len(column_names(path)))]):
        fields = list(values.values()) if isinstance(values, dict) else []
        is_row = len(fields) == len(COLA) and fields[1] in ("0", "1") and fields[2] in ("", "*")
        if not is_row or len(fields[0].split()) != 1:
            shown = " | ".join(fields)[:100] if fields else str(values)
            raise ValueError(
                f"{path}, row {number} is not as CoLA's, whose columns without a header are: source (one word), label "
                f"(0 or 1), mark (* or nothing), sentence; it says: {shown}. Put them in this order, or add a header "
                "with `sentence` and `label`"
            )


def list_file(
    scratch: Path, name: str, path: Path, split: str, columns: dict[str, str], names: list[str] | None
) -> Iterator[Found | Skipped]:
    task = TASKS[name]
    label = functools.partial(read_class, classes=task.classes) if task.classes else read_score
    prefix = make_prefix(path)
    for found in samples_of(path, split, columns, label, names):
        yield found._replace(key=f"{prefix}{found.key}") if isinstance(found, Found) else found


def make_prefix(path: Path) -> str:
    """Of keys, where a split has several files."""
    return f"{path.name.split('-')[1]}/" if path.suffix == ".parquet" else ""


def read_class(value: Any, where: str, classes: tuple[str, ...]) -> int:
    """The number of a class, from it or from its name."""
    if value in classes:
        return classes.index(value)
    text = str(value)
    if text == "-":  # of MNLI's annotators no majority
        raise NoLabel("has no gold label")
    if not text.isascii() or not text.isdigit() or int(text) >= len(classes):
        raise ValueError(
            f"{where}: label {value!r} must be one of {', '.join(classes)}, or their numbers 0 to {len(classes) - 1}; "
            "are the columns those that the header names?"
        )
    return int(text)


def read_score(value: Any, where: str) -> float:
    """A similarity of STS-B."""
    score = as_number(value, where)
    if not 0 <= score <= 5:
        raise ValueError(
            f"{where}: score {value!r} must lie in 0 to 5; are the columns those that the header names?"
        )
    return score

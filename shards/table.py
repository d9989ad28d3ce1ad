"""Your own labelled texts: a TSV, CSV, JSONL or parquet file with text, perhaps a second text, and a class or a number.

    d2v prepare table train.tsv --val-file dev.tsv --out shards/mine            columns text, label (and text_b)
    d2v prepare table reviews.jsonl --text-column review --label-column stars --regression --val 0.1 --out shards/stars
    d2v prepare table pairs.tsv --columns label text text_b --val 0.1 --out shards/pairs         a file without a header

Classes are whole numbers from 0, or names, numbered in sorted order (`classes.json`); --classes names them in an order
of yours. A row without a label is an error, rows without text are listed in `skipped.jsonl`.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.listing import Found, Part, Skipped, draw_split, stamp_file
from shards.prepare import Job, Source
from shards.rows import COLUMNS, as_number, column_names, is_missing, read_rows, refuse_missing, samples_of

MOST_CLASSES = 10_000
NAME = "texts"
"""Not that of TABLE: of a train.tsv the split val would be in train-val-*.tar, which `*train*.tar` names too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="TABLE", help="a .tsv, .csv, .jsonl or .parquet file")
    parser.add_argument("--val-file", type=Path, default=None, help="another one for the split `val`")
    parser.add_argument("--test-file", type=Path, default=None, help="another one for the split `test`")
    parser.add_argument("--val", type=float, default=0.0, help="share of TABLE's rows for `val` (default: 0)")
    for column in COLUMNS:
        needed = " (default: if it is there)" if column == "text_b" else ""
        parser.add_argument(
            f"--{column.replace('_', '-')}-column",
            default=None,
            help=f"name of the column with {column}{needed}",
        )
    parser.add_argument(
        "--columns", nargs="+", action="extend", help="names of all columns of files without a header"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--classes", nargs="+", action="extend", help="names of the classes, in the order of their numbers"
    )
    kind.add_argument("--regression", action="store_true", help="labels are numbers, not classes")


def make_job(arguments: argparse.Namespace) -> Job:
    files = {}
    for split, path in (
        ("train", arguments.source),
        ("val", arguments.val_file),
        ("test", arguments.test_file),
    ):
        if path is not None:
            files[split] = Path(os.path.abspath(path.expanduser()))
            if not files[split].is_file():
                raise ValueError(f"{files[split]} is not there, or no file; give a table")
    if twice := [name for name, count in Counter(arguments.classes).items() if count > 1]:
        raise ValueError(f"--classes names {', '.join(twice)} twice; name each class once")
    if not 0 <= arguments.val < 1:
        raise ValueError(f"--val {arguments.val} must be a share from 0 to below 1")
    if arguments.val and "val" in files:
        raise ValueError(
            f"--val {arguments.val} and --val-file {arguments.val_file} contradict each other; give one"
        )
    columns = {split: find_columns(path, arguments) for split, path in files.items()}
    keys = ("val", "columns", "classes", "regression", "text_column", "text_b_column", "label_column")
    settings = {
        "made by": "d2v prepare table",
        "files": {split: str(path) for split, path in files.items()},
        **{key: getattr(arguments, key) for key in keys},
    }
    find = functools.partial(find_parts, files=files, columns=columns, arguments=arguments)
    return Job(name=NAME, out=arguments.out.expanduser(), settings=settings, find=find)


def find_columns(path: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """text, label and, if it is named or there, text_b -> the file's columns."""
    listed = column_names(path, arguments.columns)
    chosen = {key: getattr(arguments, f"{key}_column") or key for key in COLUMNS}
    if arguments.text_b_column is None and "text_b" not in listed:
        del chosen["text_b"]
    refuse_missing(path, chosen.values(), listed)
    return chosen


def find_parts(
    job: Job, files: dict[str, Path], columns: dict[str, dict[str, str]], arguments: argparse.Namespace
) -> Source:
    classes = arguments.classes
    if not arguments.regression and classes is None:
        classes = find_classes(files["train"], columns["train"]["label"], arguments.columns)
    parts = []
    for split, path in files.items():
        listed = functools.partial(
            list_file,
            path=path,
            split=split,
            columns=columns[split],
            names=arguments.columns,
            classes=classes,
            is_regression=arguments.regression,
            val=arguments.val if split == "train" else 0.0,
            seed=job.seed,
        )
        parts.append(Part(split, listed, f"{path} {stamp_file(path)} {job.settings} {job.seed} {classes}"))
    origin = [{"file": path.name, "size": path.stat().st_size, "checksum": None} for path in files.values()]
    named = classes if classes != [str(i) for i in range(len(classes or ()))] else None
    return Source(parts=parts, origin=origin, classes=named)


def find_classes(path: Path, column: str, names: list[str] | None) -> list[str]:
    """The classes of the train part: 0 ... n - 1 if all are whole numbers, else their names, sorted."""
    seen: Counter[str] = Counter()
    for number, values in read_rows(path, [column], names):
        if not isinstance(values, dict) or is_missing(values.get(column)):
            continue  # said where the row is read
        value = values[column]
        if isinstance(value, float) and not (math.isfinite(value) and value.is_integer()):
            raise ValueError(f"{path}, row {number}: label {value!r} is no class; --regression takes numbers")
        if isinstance(value, (list, dict, bytes)):
            raise ValueError(f"{path}, row {number}: label {value!r} is no class: give each row one")
        seen[name_of(value)] += 1
        if len(seen) > MOST_CLASSES:
            raise ValueError(
                f"{path} has more than {MOST_CLASSES} classes in {column!r}; is it the label's column?"
            )
    if not seen:
        raise ValueError(f"{path} has no row with a label in {column!r}; label them, or name another column")
    if len(seen) < 2:
        raise ValueError(
            f"{path} has one class alone in {column!r} ({', '.join(seen)}); two or more are needed"
        )
    if all(is_whole(name) for name in seen):
        largest = max((name.lstrip("0") for name in seen), key=lambda digits: (len(digits), digits))
        if len(largest) > len(str(MOST_CLASSES)) or int(largest) >= MOST_CLASSES:
            raise ValueError(
                f"{path} has the class {largest[:40]} in {column!r}, and classes count from 0 to at most "
                f"{MOST_CLASSES - 1}; name those that there are: --classes"
            )
        return [str(i) for i in range(max(map(int, seen)) + 1)]
    return sorted(seen)


def name_of(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit()


def list_file(
    scratch: Path,
    path: Path,
    split: str,
    columns: dict[str, str],
    names: list[str] | None,
    classes: list[str] | None,
    is_regression: bool,
    val: float,
    seed: int,
) -> Iterator[Found | Skipped]:
    label = as_number if is_regression else functools.partial(read_class, classes=classes)
    for found in samples_of(path, split, columns, label, names):
        drawn = isinstance(found, Found) and val and draw_split(found.key, seed, val)
        yield found._replace(split=drawn) if drawn else found


def read_class(value: Any, where: str, classes: list[str]) -> int:
    name = name_of(value)
    if name not in classes and is_whole(name):
        name = str(int(name))  # of 007
    if name not in classes:
        shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise ValueError(
            f"{where}: label {name!r} is none of the {len(classes)} classes of the train part: {shown}"
        )
    return classes.index(name)

"""Rows of labelled texts in TSV, CSV, JSONL or parquet, columns by name, each as one JSON member of a sample.

A line ends in a line feed alone: other characters that some tools take for its end (U+0085, U+2028) stand inside
texts of GLUE. In TSV quotes mean nothing. A sample is {"text": ..., "text_b": ..., "label": ...}.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shards.listing import Found, Skipped

KINDS = (".tsv", ".csv", ".jsonl", ".parquet")
LONGEST_FIELD = 1 << 30
"""Characters of a text in a table; csv's own limit is 131,072."""
MAX_BAD = 0.01
"""Share of rows that may be unusable."""
COLUMNS = ("text", "text_b", "label")

Values = dict[str, Any]
Label = Callable[[Any, str], int | float]
"""(value, where it stands) -> class or number; ValueError if it is none."""


class Numbered(NamedTuple):
    """A row, from 1 without the header, or the reason why it is none."""

    number: int
    values: Values | str


class NoLabel(ValueError):
    """A row whose label says that it has none."""


def column_names(path: Path, names: list[str] | None = None) -> list[str]:
    """Of a file, or `names` of one without a header, which must be as many as it has columns.

    Raises ValueError for a file of another kind, an empty one, and names that come twice.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"{path} is no table; a table ends in {', '.join(KINDS)}")
    if kind in (".jsonl", ".parquet") and names is not None:
        raise ValueError(f"{path} names its columns itself; leave --columns out")
    if kind == ".parquet":
        from shards.parquet import read_schema

        return list(read_schema(path).names)
    first = next(iter(_read_json(path) if kind == ".jsonl" else _read_fields(path)), None)
    if first is None:
        raise ValueError(f"{path} is empty")
    found = list(first.values) if kind == ".jsonl" and isinstance(first.values, dict) else first.values
    if not isinstance(found, list):
        raise ValueError(f"{path}, line 1: {found}")
    if names is not None and len(names) != len(found):
        raise ValueError(f"{path} has {len(found)} columns, but {len(names)} names: {', '.join(names)}")
    listed = names or [str(name).strip() for name in found]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has the column {', '.join(twice)} twice; it must be clear which is meant")
    return listed


def read_rows(path: Path, columns: list[str], names: list[str] | None = None) -> Iterator[Numbered]:
    """All rows in order, of each the `columns`; `names` of a file without a header."""
    kind = path.suffix.lower()
    listed = column_names(path, names)
    if kind != ".jsonl":
        refuse_missing(path, columns, listed)
    if kind == ".parquet":
        from shards.parquet import iterate

        for number, row in enumerate(iterate(path, columns), 1):
            yield Numbered(number, row)
        return
    if kind == ".jsonl":
        yield from _read_json(path)
        return
    for number, fields in _read_fields(path):
        number -= names is None
        if not number:
            continue
        if isinstance(fields, str) or len(fields) != len(listed):
            reason = fields if isinstance(fields, str) else f"has {len(fields)} fields, not {len(listed)}"
            yield Numbered(number, reason)
        else:
            yield Numbered(number, dict(zip(listed, fields, strict=True)))


def refuse_missing(path: Path, columns: Iterable[str], listed: list[str]) -> None:
    missing = [name for name in columns if name not in listed]
    if missing:
        shown = ", ".join(repr(name[:40]) for name in listed[:20])
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))}; its first line says {shown}. Name the columns that "
            "hold them, or give the file its header"
        )


def samples_of(
    path: Path,
    split: str,
    columns: dict[str, str],
    label: Label,
    names: list[str] | None = None,
) -> Iterator[Found | Skipped]:
    """A sample for each row. `columns`: text, label and perhaps text_b -> the file's own names of them.

    Raises ValueError, with the row, for a label that is missing or none, and if more than one row in a hundred cannot
    be used.
    """
    bad, rows, last = 0, 0, ""
    for number, values in read_rows(path, list(columns.values()), names):
        rows, where = number, f"{path}, row {number}"
        try:
            yield Found(f"{number:07d}", split, {"json": make_json(values, columns, label, where)})
        except Unusable as error:
            bad, last = bad + 1, f"row {number} {error}"
            yield Skipped(where, str(error))
    if not rows:
        raise ValueError(f"{path} holds no row, its header alone; give the whole file")
    if bad > MAX_BAD * rows:
        raise ValueError(
            f"{path}: {bad} of {rows} rows cannot be used; the last: {last}. Correct them, or name other columns"
        )


class Unusable(ValueError):
    """A row without text, or with too many fields."""


def make_json(values: Values | str, columns: dict[str, str], label: Label, where: str) -> str:
    if isinstance(values, str):
        raise Unusable(values)
    if "text_b" not in columns and not is_missing(values.get("text_b")):
        raise ValueError(
            f"{where} has a 'text_b', which the first row has not; give it to all rows or to none"
        )
    sample: Values = {}
    for key in ("text", "text_b"):
        if key not in columns:
            continue
        text = values.get(columns[key])
        if not isinstance(text, str) or not text.strip():
            raise Unusable(f"has no text in {columns[key]!r}")
        sample[key] = text.strip()
    value = values.get(columns["label"])
    if is_missing(value):
        raise ValueError(f"{where} has no label in {columns['label']!r}; label it or remove it")
    try:
        sample["label"] = label(value, where)
    except NoLabel as error:
        raise Unusable(str(error)) from error
    return json.dumps(sample)


def is_missing(value: Any) -> bool:
    """Of a label: none, or nothing but space."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def as_number(value: Any, where: str) -> float:
    """A label of regression."""
    try:
        number = math.nan if "_" in str(value) else float(value)  # Python takes 1_0 for 10
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{where}: label {value!r} is no number, which regression needs")
    return number


def _read_fields(path: Path) -> Iterator[Numbered]:
    """Fields of each line of TSV or record of CSV, numbered from 1."""
    csv.field_size_limit(LONGEST_FIELD)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        if delimiter == ",":
            lines: Iterable[list[str]] = csv.reader(file, strict=True)
        else:
            lines = (line.rstrip("\n").removesuffix("\r").split("\t") for line in _lines(file))
        try:
            number = 0
            for fields in lines:
                if fields and fields != [""]:
                    number += 1
                    yield Numbered(number, fields)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"{path} after row {number}: {error}; save it as UTF-8, with quotes closed"
            ) from error


def _lines(file: Any) -> Iterator[str]:
    r"""Up to each \n; universal newlines are off, but a lone \r would end a line for Python, too."""
    rest = ""
    for line in file:
        rest += line
        if line.endswith("\n"):
            yield rest
            rest = ""
    if rest:
        yield rest


def _read_json(path: Path) -> Iterator[Numbered]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            for number, line in enumerate(_lines(file), 1):
                if not line.strip():
                    continue
                yield Numbered(number, read_line(path, number, line))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error


def read_line(path: Path, number: int, line: str) -> Values:
    """A line of JSONL; ValueError if it is no object, or holds what is no text."""
    try:
        row = json.loads(line)
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path}: line {number} has half of a pair of surrogates ({error}), which no text can hold; correct it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: line {number} is no JSON ({error}); a line holds one object") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}: line {number} is no JSON object {{...}}, but {type(row).__name__}")
    return row

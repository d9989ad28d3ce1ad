"""Rows of parquet files: the bytes of each go to a plain file once, where they can be read in any order.

A parquet file is read in runs of rows, whole columns of them; a shuffled shard would read each run for one row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shards.listing import Stored, stamp_file
from shards.writer import write_bytes

ROWS = 64
"""Read at a time."""


class Row(NamedTuple):
    number: int
    where: Stored
    """Its bytes."""
    values: dict[str, Any]
    """The other columns."""


def read_rows(
    path: Path,
    scratch: Path,
    columns: list[str],
    split_row: Callable[[dict[str, Any]], tuple[bytes, dict[str, Any]]],
) -> Iterator[Row]:
    """Every row of a file in stored order. `split_row`: a row -> its bytes, and what else of it is to be kept."""
    plain = (
        scratch / f"{path.stem}-{hashlib.sha256(f'{path} {stamp_file(path)}'.encode()).hexdigest()[:8]}.rows"
    )
    kept: list[tuple[int, int, dict[str, Any]]] = []

    def write(file: Any) -> None:
        offset = 0
        for row in iterate(path, columns):
            content, values = split_row(row)
            file.write(content)
            kept.append((offset, len(content), values))
            offset += len(content)

    write_bytes(plain, write)
    for number, (offset, size, values) in enumerate(kept):
        yield Row(number, Stored(str(plain), offset, size), values)


def iterate(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows; of `columns` those that the file has."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(
                    f"{path} has the columns {', '.join(file.schema_arrow.names)}, but not {', '.join(missing)}"
                )
            for batch in file.iter_batches(ROWS, columns=columns, use_threads=False):
                yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} holds a text that is not UTF-8 ({error}); correct it, or get it again"
        ) from error
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's
            raise
        raise ValueError(f"{path} is damaged or no parquet file: {error}; get it again") from error


def read_schema(path: Path) -> Any:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_schema(path)
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path} is damaged or no parquet file: {error}; get it again") from error


def class_names(path: Path, column: str) -> list[str] | None:
    """Those that Hugging Face's `datasets` wrote into a file's schema."""
    metadata = read_schema(path).metadata or {}
    try:
        return list(json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"])
    except (ValueError, LookupError, TypeError):  # none, or of another form
        return None


def split_of(path: Path) -> str:
    """`train` of train-00000-of-00294.parquet, `val` of validation-..."""
    name = path.name.split("-")[0].split(".")[0]
    return {"validation": "val", "valid": "val"}.get(name, name)

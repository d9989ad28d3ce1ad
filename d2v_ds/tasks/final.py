"""The one file that is made of all parts: parquet, or npy with the items' names beside it.

Its bytes do not depend on where the parts were cut. N items, T tokens, L layers, D dim.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2v_ds.tasks.table import META, Parts, from_lists, replace, write_whole

GROUP_BYTES = 64 << 20
"""About so much is in one row group of a parquet file."""
RAGGED_ROWS = 64
"""In a row group where every row has its own length."""


def check_out(out: Path) -> None:
    if out.suffix not in (".parquet", ".npy"):
        raise ValueError(f"--out {out} must end in .parquet or .npy")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it")


def write(parts: Parts, out: Path, settings: dict[str, Any]) -> None:
    (write_parquet if out.suffix == ".parquet" else write_npy)(parts, out, settings)


def write_parquet(parts: Parts, out: Path, settings: dict[str, Any]) -> None:
    """Columns key, shard and label where there are any, tokens, embedding; the settings in the schema."""
    names, has_numbers = known_names(parts), labels_are_numbers(parts)
    first = next(parts.tables())
    is_ragged = settings["pool"] == "none"
    rows = RAGGED_ROWS if is_ragged else max(1, GROUP_BYTES // from_lists(first)[0].nbytes)
    kept = [*names, "tokens", "embedding"]
    types = {name: first.schema.field(name).type for name in kept}
    if has_numbers:
        types["label"] = pa.int64()
    schema = pa.schema(types.items(), {META: json.dumps(settings)})
    temporary = out.with_name(f".{out.name}.tmp")
    with pq.ParquetWriter(temporary, schema, use_dictionary=False) as writer:
        for table in in_groups(parts.tables(kept), rows):
            writer.write_table(table.cast(schema).combine_chunks(), row_group_size=rows)
    replace(temporary, out)


def write_npy(parts: Parts, out: Path, settings: dict[str, Any]) -> None:
    """(N, D), (N, L, D) or, with pool=none, all tokens of all items (sum of T, D).

    Who they are stands in `<out>.jsonl`, a line for each item, the settings in `<out>.json`.
    """
    names, has_numbers = known_names(parts), labels_are_numbers(parts)
    is_ragged = settings["pool"] == "none"
    shape = from_lists(next(parts.tables()))[0].shape
    counts = [sum(t["tokens"].to_pylist()) if is_ragged else len(t) for t in parts.tables(["tokens"])]
    temporary, sidecar = out.with_name(f".{out.name}.tmp"), out.with_suffix(".jsonl")
    lines_file = sidecar.with_name(f".{sidecar.name}.tmp")
    array = np.lib.format.open_memmap(
        temporary, mode="w+", dtype=np.float32, shape=(sum(counts), *shape[is_ragged:])
    )
    begin = 0
    with lines_file.open("w", encoding="utf-8") as lines:
        for table in parts.tables():
            values = (np.concatenate if is_ragged else np.stack)(from_lists(table))
            array[begin : begin + len(values)] = values
            first = begin
            for row in table.select([*names, "tokens"]).to_pylist():
                if has_numbers and row["label"] is not None:
                    row["label"] = int(row["label"])
                if is_ragged:
                    row["first"] = first
                    first += row["tokens"]
                lines.write(json.dumps(row) + "\n")
            begin += len(values)
    array.flush()
    del array
    replace(lines_file, sidecar)
    write_whole(out.with_suffix(".json"), json.dumps(settings, indent=1).encode())
    replace(temporary, out)


def in_groups(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` rows, the last one shorter."""
    held: pa.Table | None = None
    for table in tables:
        held = table if held is None else pa.concat_tables([held, table])
        while len(held) >= rows:
            yield held.slice(0, rows)
            held = held.slice(rows)
    if held is not None and len(held):
        yield held


def known_names(parts: Parts) -> list[str]:
    """key, and shard and label if any item has one."""
    said = {"key"}
    for table in parts.tables(["shard", "label"]):
        said |= {name for name in table.column_names if table[name].null_count < len(table)}
    return [name for name in ("key", "shard", "label") if name in said]


def labels_are_numbers(parts: Parts) -> bool:
    """There are labels, and all are whole numbers as one writes them."""
    labels = [label for table in parts.tables(["label"]) for label in table["label"].to_pylist()]
    labels = [label for label in labels if label is not None]
    return bool(labels) and all(is_number(label) for label in labels)


def is_number(label: str) -> bool:
    digits = label.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 19 and str(int(label)) == label


def settings_of(out: Path) -> dict[str, Any] | None:
    """What a finished file was made with; None if it is not ours."""
    try:
        if out.suffix == ".parquet":
            return json.loads((pq.read_schema(out).metadata or {})[META])
        return json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    except (KeyError, ValueError, OSError):  # pyarrow's own errors are among them
        return None

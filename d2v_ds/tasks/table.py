"""Embeddings as tables: the parts of an unfinished run, each written whole or not at all.

`<out>.parts/` holds what was done; the next run with the same settings goes on there.
N items, T tokens, L layers, D dim.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

META = b"d2v_ds"


class Row(NamedTuple):
    """One item's embedding."""

    key: str
    shard: str | None
    label: str | None
    tokens: int
    embedding: np.ndarray
    """(D,), (L, D) or (T, D), fp32."""


class Bad(NamedTuple):
    """One item that has none."""

    key: str
    reason: str


class Parts:
    """The folder of an unfinished run, held by one process at a time."""

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.folder = parts_folder(out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another process is writing {out}; wait for it, or name another --out"
            ) from error
        path = self.folder / "settings.json"
        if path.is_file():
            held = json.loads(path.read_text(encoding="utf-8"))
            refuse_other(held, settings, f"{self.folder} holds an unfinished run")
        else:
            write_whole(path, json.dumps(settings).encode())
        self.files = self.whole_parts()

    def whole_parts(self) -> list[Path]:
        """Those that can be read, up to the first that cannot; what comes after it is done again."""
        paths = sorted(self.folder.glob("part_*.parquet"))
        for i, path in enumerate(paths):
            try:
                pq.read_metadata(path)
            except (pa.ArrowInvalid, OSError):
                for later in paths[i:]:
                    later.unlink()
                return paths[:i]
        return paths

    def next_item(self) -> int:
        """The first item that no part has."""
        return told(self.files[-1])["next"] if self.files else 0

    def add(self, rows: list[Row], bad: list[Bad], next_item: int, notices: int) -> None:
        meta = {META: json.dumps({"next": next_item, "bad": bad, "notices": notices})}
        path = self.folder / f"part_{len(self.files):06d}.parquet"
        temporary = path.with_suffix(".tmp")
        pq.write_table(to_table(rows).replace_schema_metadata(meta), temporary, use_dictionary=False)
        replace(temporary, path)
        self.files.append(path)

    def bad(self) -> list[Bad]:
        return [Bad(*bad) for path in self.files for bad in told(path)["bad"]]

    def notices(self) -> int:
        return sum(told(path)["notices"] for path in self.files)

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Those with rows; embeddings are only read where they are among the columns."""
        for path in self.files:
            if pq.read_metadata(path).num_rows:
                yield pq.read_table(path, columns=columns).replace_schema_metadata(None)

    def remove(self) -> None:
        self.lock.close()
        shutil.rmtree(self.folder)


def parts_folder(out: Path) -> Path:
    return out.with_name(out.name + ".parts")


def told(path: Path) -> dict[str, Any]:
    """What a part says besides its rows."""
    return json.loads(pq.read_metadata(path).metadata[META])


def to_table(rows: list[Row]) -> pa.Table:
    """Columns key, shard, label, tokens, embedding."""
    texts = {name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in Row._fields[:3]}
    tokens = pa.array([row.tokens for row in rows], pa.int32())
    return pa.table({**texts, "tokens": tokens, "embedding": to_lists([row.embedding for row in rows])})


def to_lists(arrays: list[np.ndarray]) -> pa.Array:
    """Vectors (D,) as lists of fixed size; (L, D) and (T, D) as lists of such."""
    if not arrays:
        return pa.nulls(0)
    flat = pa.array(np.concatenate([array.ravel() for array in arrays]))
    vectors = pa.FixedSizeListArray.from_arrays(flat, arrays[0].shape[-1])
    if arrays[0].ndim == 1:
        return vectors
    offsets = np.cumsum([0, *(len(array) for array in arrays)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), vectors)


def from_lists(table: pa.Table) -> list[np.ndarray]:
    """The arrays that `to_lists` was given; of a table that was read whole."""
    column = pa.concat_arrays(table["embedding"].chunks)
    is_vector = pa.types.is_fixed_size_list(column.type)
    vectors = column if is_vector else column.flatten()
    flat = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), vectors.type.list_size)
    return list(flat) if is_vector else np.split(flat, column.offsets.to_numpy()[1:-1])


def refuse_other(held: dict[str, Any] | None, wanted: dict[str, Any], where: str) -> None:
    """ValueError unless both are the same."""
    if held == wanted:
        return
    if held is None:
        raise ValueError(f"{where}, which d2v embed did not write; name another --out or delete it")
    differing = [key for key in wanted if held.get(key) != wanted[key]]
    said = ", ".join(f"{key} {short(held.get(key))} instead of {short(wanted[key])}" for key in differing)
    raise ValueError(f"{where} with other settings ({said}); name another --out or delete it")


def short(value: Any) -> str:
    return f"{value[:8]}.." if isinstance(value, str) and len(value) == 64 else repr(value)


def write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    replace(temporary, path)


def check_place(out: str | Path | None) -> None:
    """Makes the folder of a file that is written when all work is done; ValueError if it cannot be written there."""
    if out is None:
        return
    path = Path(out)
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder; name a file in it")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(b"")
        temporary.unlink()
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written ({error.strerror}); name another place") from error


def replace(temporary: Path, path: Path) -> None:
    """What was written is on the disk before it has its name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)

"""Which stored samples must not be used? Those that `.nv-meta/split.yaml` of a Megatron-Energon folder excludes.

Keys stand in the headers of the tars alone, so the crc32 of each is stored beside the shard, once, and what has the
right one is looked at.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Set
from pathlib import Path

import numpy as np

from d2v_ds.data.parallel import map_shards
from d2v_ds.data.published import ENERGON_SPLIT, energon_exclude, energon_roots
from d2v_ds.data.reader import ShardReader
from d2v_ds.data.shard import ShardIndex, load_column, write_column

COLUMN = "key-crc32"


def excluded_rows(indexes: list[ShardIndex], workers: int | None = None) -> list[np.ndarray | None]:
    """The excluded rows of each shard, ascending; None where there are none, and for remote shards.

    ValueError for a list that is not understood, or that names a sample that its shard does not have.
    """
    roots_of, exclude_of = functools.cache(energon_roots), functools.cache(energon_exclude)
    found: list[list[tuple[Path, Set[str] | None]]] = []
    for index in indexes:
        path = index.path.absolute()
        roots = () if index.remote else roots_of(path.parent)
        names = [(root, path.relative_to(root).as_posix()) for root in roots]
        found.append([(root, exclude_of(root)[name]) for root, name in names if name in exclude_of(root)])
    unread = [
        index
        for index, lists in zip(indexes, found, strict=True)
        if any(keys is not None for _, keys in lists) and load_column(index, COLUMN) is None
    ]
    map_shards(_write_keys, unread, workers, None, "read the keys of")
    return [_rows(index, lists) for index, lists in zip(indexes, found, strict=True)]


def _rows(index: ShardIndex, lists: list[tuple[Path, Set[str] | None]]) -> np.ndarray | None:
    if not lists:
        return None
    if any(keys is None for _, keys in lists):
        return np.arange(index.num_samples, dtype=np.uint32)
    rows = [row for root, keys in lists for row in _find_keys(index, root, keys)]
    return np.unique(np.array(rows, dtype=np.uint32))


def _find_keys(index: ShardIndex, root: Path, keys: Set[str]) -> list[int]:
    column = load_column(index, COLUMN)
    assert column is not None, f"the keys of {index} were read"
    likely = np.flatnonzero(np.isin(column, np.array([_crc32(key) for key in keys], dtype=np.uint32)))
    reader = ShardReader(index, {})
    rows = {key: row for row in likely.tolist() if (key := reader.key(row)) in keys}
    example = reader.key(0)
    reader.close()
    if missing := sorted(keys - rows.keys()):
        raise ValueError(
            f"{root / ENERGON_SPLIT} excludes {len(missing)} samples that {index} does not have, {missing[0]!r} for "
            f"one; its first is {example!r}. A sample's key is the name of its files up to the first dot; correct "
            "the list, or take out what is gone"
        )
    return list(rows.values())


def _write_keys(index: ShardIndex) -> None:
    reader = ShardReader(index, {})
    keys = [_crc32(reader.key(row)) for row in range(index.num_samples)]
    reader.close()
    write_column(index, COLUMN, np.array(keys, dtype=np.uint32))


def _crc32(key: str) -> int:
    return zlib.crc32(key.encode(errors="surrogateescape"))

"""Which shards and samples of a Megatron-Energon folder are to be trained on? What `.nv-meta/split.yaml` says.

It names parts, and what is excluded; it lies in the folder of the shards or up to three above, here or at a URL. Who
cannot read what it excludes must not train on it. Keys stand in the headers of the tars alone, so which rows a list
excludes is stored beside the shard, once for each list.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import re
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
import yaml

from d2v_ds.data.folders import Folder, LocalFolder, as_folder, folder_of, is_pattern
from d2v_ds.data.parallel import map_shards
from d2v_ds.data.reader import ShardReader
from d2v_ds.data.shard import ShardIndex, load_column, write_column

SPLIT = ".nv-meta/split.yaml"
LEVELS = 4
"""Folders looked at: a shard's own, and those above it."""
ASKED_AT_ONCE = 8
"""Remote folders."""

Lists = list[tuple[Folder, Set[str] | None]]
"""What folders exclude of a shard: keys of samples; None = all of it."""


def roots(folder: Folder) -> tuple[Folder, ...]:
    """A folder and those up to three above it, as far as they have a `.nv-meta`: at a URL, its `split.yaml`."""
    return tuple(root for root in islice(folder.with_parents(), LEVELS) if _is_root(root))


def train_shards(folder: Folder) -> list[str] | None:
    """The shards of the part `train` of an Energon folder, without those excluded; None if it names none.

    ValueError if `split.yaml` cannot be understood, or excludes all of them.
    """
    train = _parts(folder).get("train")
    if not train:
        return None
    excluded = exclude_list(folder)
    names = [name for name in train if excluded.get(name, ()) is not None]
    if not names:
        raise ValueError(
            f"{folder}/{SPLIT} excludes all {len(train)} shards of its part `train`; name other shards"
        )
    return names


def all_patterns(data: str) -> list[str]:
    """Each part of a list as it is; of an Energon folder whose shards all lie below it, those of its parts, without
    those excluded."""
    patterns = []
    for part in filter(None, data.split("::")):
        name, place = (
            (part, None) if is_pattern(part) or glob.glob(f"{glob.escape(part)}/*.tar") else as_folder(part)
        )
        below = _shards_below(place) if place else []
        patterns += [os.path.join(name, shard) for shard in below] or [part]
    return patterns


def exclude_list(folder: Folder) -> dict[str, set[str] | None]:
    """What an Energon folder excludes: name of a shard, from the folder on -> keys of samples; None: all of it.

    Entries are `<shard>` or `<shard>/<key>` with braces expanded, as Energon's `WebdatasetMeta` reads them. ValueError
    for what is neither, or of no shard of the folder: what is excluded must not be trained on by mistake.
    """
    file = f"{folder}/{SPLIT}"
    excluded: dict[str, set[str] | None] = {}
    for entry in _names(_split(folder).get("exclude"), f"{file}: exclude"):
        match = re.fullmatch(r"(.+?\.tar)(?:/(.+))?", entry)
        if match is None:
            raise ValueError(
                f"{file} excludes {entry!r}, which is neither a shard, shards/a.tar, nor a sample, "
                "shards/a.tar/KEY, named from the folder that holds .nv-meta; correct it, or take it out"
            )
        shard, key = match.groups()
        if key is None or excluded.get(shard, ()) is None:
            excluded[shard] = None
        else:
            excluded.setdefault(shard, set()).add(key)
    listed = {name for names in _parts(folder).values() for name in names} if excluded else set()
    for shard in excluded.keys() - listed:
        if not folder.has(shard):
            raise ValueError(
                f"{file} excludes {shard!r}, or samples of it, but no part names it and it is not in {folder}; "
                f"shards are named from there{f', as {min(listed)!r}' if listed else ''}: correct it, or take it out"
            )
    return excluded


def excluded_rows(indexes: list[ShardIndex], workers: int | None = None) -> list[np.ndarray | None]:
    """The excluded rows of each shard, ascending; None where there are none.

    ValueError for a list that is not understood, or that names a sample that its shard does not have. RemoteError if a
    server that was never asked for `split.yaml` gives no answer.
    """
    shards = [index.remote or index.path for index in indexes]
    folders = [folder_of(shard) for shard in shards]
    known = list(dict.fromkeys(folder for folder in folders if folder is not None))
    ask = functools.cache(lambda folder: [(root, exclude_list(root)) for root in roots(folder)])
    if any(not isinstance(folder, LocalFolder) for folder in known):
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            list(pool.map(ask, known))
    found: list[Lists] = []
    for shard, folder in zip(shards, folders, strict=True):
        named = [(root, root.name_of(shard), lists) for root, lists in ask(folder)] if folder else []
        found.append([(root, lists[name]) for root, name, lists in named if name in lists])
    unread = [
        (index, lists)
        for index, lists in zip(indexes, found, strict=True)
        if _keys(lists) and load_column(index, _column(lists)) is None
    ]
    map_shards(_write_column, unread, workers, None, "read the keys of")
    return [_rows(index, lists) for index, lists in zip(indexes, found, strict=True)]


def _rows(index: ShardIndex, lists: Lists) -> np.ndarray | None:
    if not lists:
        return None
    if any(keys is None for _, keys in lists):
        return np.arange(index.num_samples, dtype=np.uint32)
    column = load_column(index, _column(lists))
    assert column is not None, f"the keys of {index} were read"
    return np.flatnonzero(column).astype(np.uint32)


def _keys(lists: Lists) -> set[str]:
    """All keys that are excluded of a shard; none if it is excluded as a whole, or not at all."""
    if any(keys is None for _, keys in lists):
        return set()
    return {key for _, keys in lists for key in keys or ()}


def _column(lists: Lists) -> str:
    """Under which it is stored which rows these are."""
    return f"excluded-{hashlib.sha256(json.dumps(sorted(_keys(lists))).encode()).hexdigest()[:12]}"


def _write_column(job: tuple[ShardIndex, Lists]) -> None:
    index, lists = job
    excluded, found = _keys(lists), set()
    flags = np.zeros(index.num_samples, dtype=np.uint32)
    reader = ShardReader(index, {})
    for row in range(index.num_samples):
        if (key := reader.key(row)) in excluded:
            flags[row] = 1
            found.add(key)
    example = reader.key(0)
    reader.close()
    for root, keys in lists:
        if missing := sorted((keys or set()) - found):
            raise ValueError(
                f"{root}/{SPLIT} excludes {len(missing)} samples that {index} does not have, {missing[0]!r} for "
                f"one; its first is {example!r}. A sample's key is the name of its files up to the first dot; correct "
                "the list, or take out what is gone"
            )
    write_column(index, _column(lists), flags)


def _is_root(folder: Folder) -> bool:
    if isinstance(folder, LocalFolder):
        return (folder.path / Path(SPLIT).parent).is_dir()
    return folder.read_lately(SPLIT) is not None


def _shards_below(folder: Folder) -> list[str]:
    """The shards of all parts of an Energon folder but those excluded, if some lie in folders below it; else none."""
    names = list(dict.fromkeys(name for part in _parts(folder).values() for name in part))
    if not any("/" in name for name in names):
        return []
    excluded = exclude_list(folder)
    return [name for name in names if excluded.get(name, ()) is not None]


def _parts(folder: Folder) -> dict[str, list[str]]:
    """Shards by part, braces expanded."""
    parts = _split(folder).get("split_parts") or {}
    if not isinstance(parts, dict):
        raise ValueError(f"{folder}/{SPLIT}: split_parts is {parts!r}, no mapping of parts to shards")
    where = f"{folder}/{SPLIT}: split_parts"
    return {str(part): _names(names, f"{where}: {part}") for part, names in parts.items()}


def _split(folder: Folder) -> dict[str, Any]:
    """`split.yaml`; empty if there is none."""
    file, content = f"{folder}/{SPLIT}", folder.read_lately(SPLIT)
    if content is None:
        return {}
    try:
        value = yaml.load(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} cannot be read, so what it excludes is not known: {' '.join(str(error).split())}; mend it"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no mapping, so what it excludes is not known; mend it")
    return value


def _names(value: Any, where: str) -> list[str]:
    """A list of names, or one, with braces expanded."""
    names = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where} is {str(value)[:200]}, no list of names; put each name in quotes")
    try:
        return [expanded for name in names for expanded in braceexpand.braceexpand(name)]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error

"""What do other tools say about the shards of a folder: how many samples each holds, and which are to train on?

timm's `_info.json`, our own `manifest.json`, img2dataset's `<shard>_stats.json` and `<shard>.parquet`, and
Megatron-Energon's `.nv-meta` (`.info.json` or `.info.yaml`: counts; `split.yaml`: parts, and what is excluded). What is
there is compared with what is found; what is not understood is another tool's, and left alone, but for `split.yaml`:
who cannot read what it excludes must not train on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import braceexpand
import yaml

Published = dict[str, list[dict[str, Any]]]
"""name of a shard -> what was published of it: `source`, and some of `samples`, `size`, `sha256`"""
Read = Callable[[str], bytes | None]
"""The content of a file by its path inside the folder; None if there is none."""

ENERGON_INFO = (".nv-meta/.info.json", ".nv-meta/.info.yaml")
ENERGON_SPLIT = ".nv-meta/split.yaml"


def read_local(folder: Path) -> Read:
    def read(name: str) -> bytes | None:
        file = folder / name
        return file.read_bytes() if file.is_file() else None

    return read


def published_rows(read: Read) -> Published:
    """What files that describe a whole folder say of each shard in it."""
    rows: Published = {}
    for split in _splits(read, "manifest.json"):
        for row in split.get("shards") or ():
            rows.setdefault(row.get("file"), []).append({**row, "source": "manifest.json"})
    for split in _splits(read, "_info.json"):
        for name, samples in zip(
            split.get("filenames") or (), split.get("shard_lengths") or (), strict=False
        ):
            rows.setdefault(str(name), []).append({"samples": samples, "source": "_info.json"})
    for name in ENERGON_INFO:
        counts = _mapping(read(name)).get("shard_counts")
        for shard, samples in (counts if isinstance(counts, dict) else {}).items():
            rows.setdefault(str(shard), []).append({"samples": samples, "source": name})
    return rows


def rows_of(path: Path) -> list[dict[str, Any]]:
    """All that is published of one local shard, in its folder or, by Energon, in one above it."""
    rows = list(published_rows(read_local(path.parent)).get(path.name, ()))
    for root in energon_roots(path.absolute().parent):
        if root != path.absolute().parent:
            name = path.absolute().relative_to(root).as_posix()
            rows += published_rows(read_local(root)).get(name, ())
    return rows + _img2dataset_rows(path)


def differences(rows: Iterable[dict[str, Any]], samples: int) -> list[str]:
    """How what is published differs from the number of samples that was found."""
    return [
        f"it has {samples} samples, {row['source']} says {row['samples']}"
        for row in rows
        if isinstance(row.get("samples"), int) and row["samples"] != samples
    ]


def missing_shards(paths: list[Path]) -> list[Path]:
    """Tars that `_info.json` lists in a split of which some are among `paths`, but that are not there."""
    missing = []
    for folder in dict.fromkeys(path.parent for path in paths):
        used = {path.name for path in paths if path.parent == folder}
        read = read_local(folder)
        names = [list(map(str, split.get("filenames") or ())) for split in _splits(read, "_info.json")]
        missing += [
            folder / name
            for listed in names
            if used & set(listed)
            for name in listed
            if not (folder / name).exists()
        ]
    return missing


def energon_roots(folder: Path) -> tuple[Path, ...]:
    """An absolute folder and those up to three above it, as far as they are Energon's."""
    return tuple(root for root in (folder, *folder.parents)[:4] if (root / ".nv-meta").is_dir())


def energon_train(folder: Path) -> list[str] | None:
    """The shards of the part `train` of an Energon folder, without those excluded; None if it names none.

    ValueError if `split.yaml` cannot be understood, or excludes all of them.
    """
    train = _energon_parts(folder).get("train")
    if not train:
        return None
    excluded = energon_exclude(folder)
    names = [name for name in train if excluded.get(name, ()) is not None]
    if not names:
        raise ValueError(
            f"{folder / ENERGON_SPLIT} excludes all {len(train)} shards of its part `train`; name other shards"
        )
    return names


def energon_exclude(folder: Path) -> dict[str, set[str] | None]:
    """What an Energon folder excludes: name of a shard, from the folder on -> keys of samples; None: all of it.

    Entries are `<shard>` or `<shard>/<key>` with braces expanded, as Energon's `WebdatasetMeta` reads them. ValueError
    for what is neither, or of no shard of the folder: what is excluded must not be trained on by mistake.
    """
    file = folder / ENERGON_SPLIT
    excluded: dict[str, set[str] | None] = {}
    for entry in _names(_energon_split(folder).get("exclude"), f"{file}: exclude"):
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
    listed = {name for names in _energon_parts(folder).values() for name in names} if excluded else set()
    for shard in excluded.keys() - listed:
        if not (folder / shard).is_file():
            raise ValueError(
                f"{file} excludes {shard!r}, or samples of it, but no part names it and it is not in {folder}; "
                f"shards are named from there{f', as {min(listed)!r}' if listed else ''}: correct it, or take it out"
            )
    return excluded


def _energon_parts(folder: Path) -> dict[str, list[str]]:
    """Shards by part, braces expanded."""
    parts = _energon_split(folder).get("split_parts") or {}
    if not isinstance(parts, dict):
        raise ValueError(f"{folder / ENERGON_SPLIT}: split_parts is {parts!r}, no mapping of parts to shards")
    where = f"{folder / ENERGON_SPLIT}: split_parts"
    return {str(part): _names(names, f"{where}: {part}") for part, names in parts.items()}


def _energon_split(folder: Path) -> dict[str, Any]:
    """`split.yaml`; empty if there is none."""
    file = folder / ENERGON_SPLIT
    if not file.is_file():
        return {}
    try:
        value = yaml.load(file.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
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


def _img2dataset_rows(path: Path) -> list[dict[str, Any]]:
    """Samples whose download succeeded: the others are in the tables, but have no member in the tar."""
    stats = path.with_name(f"{path.stem}_stats.json")
    successes = _mapping(stats.read_bytes() if stats.is_file() else None).get("successes")
    rows = [{"samples": successes, "source": stats.name}] if isinstance(successes, int) else []
    table = path.with_suffix(".parquet")
    if table.is_file() and (count := _count_successes(table)) is not None:
        rows.append({"samples": count, "source": table.name})
    return rows


def _count_successes(table: Path) -> int | None:
    """Rows with status `success`; None if it has no such column, or cannot be read."""
    import pyarrow
    from pyarrow import compute, parquet

    try:
        with parquet.ParquetFile(table) as file:
            if "status" not in file.schema_arrow.names:
                return None
            status = file.read(columns=["status"])["status"]
            return int(compute.sum(compute.equal(status, "success")).as_py() or 0)
    except (pyarrow.ArrowException, OSError):
        return None


def _splits(read: Read, name: str) -> list[dict[str, Any]]:
    splits = _mapping(read(name)).get("splits")
    return [split for split in splits.values() if isinstance(split, dict)] if isinstance(splits, dict) else []


def _mapping(content: bytes | None) -> dict[str, Any]:
    """A JSON or YAML object; empty for anything else."""
    try:
        value = json.loads(content or b"{}")
    except ValueError:
        try:
            value = yaml.safe_load(content or b"")
        except (yaml.YAMLError, UnicodeDecodeError):
            return {}
    return value if isinstance(value, dict) else {}

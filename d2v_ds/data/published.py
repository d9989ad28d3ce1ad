"""What do other tools say about the shards of a folder: how many samples does each hold?

timm's `_info.json`, our own `manifest.json`, img2dataset's `<shard>_stats.json` and `<shard>.parquet`, and
Megatron-Energon's `.nv-meta/.info.json` or `.info.yaml`. What is there is compared with what is found; what is not
understood is another tool's, and left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from d2v_ds.data.cache import RemoteShard
from d2v_ds.data.energon import roots
from d2v_ds.data.folders import Folder, LocalFolder, folder_of

Published = dict[str, list[dict[str, Any]]]
"""name of a shard -> what was published of it: `source`, and some of `samples`, `size`, `sha256`"""
Said = list[tuple[Folder, Published]]
"""What each of some folders says of the shards in and below it"""
Read = Callable[[str], bytes | None]

_KINDS = {"samples": int, "size": int, "sha256": str}
ENERGON_INFO = (".nv-meta/.info.json", ".nv-meta/.info.yaml")


def published_rows(read: Read) -> Published:
    """What files that describe a whole folder say of each shard in it."""
    rows: Published = {}
    for split in _splits(read, "manifest.json"):
        for row in _list(split, "shards"):
            if isinstance(row, dict):
                said = {key: row[key] for key, kind in _KINDS.items() if isinstance(row.get(key), kind)}
                rows.setdefault(str(row.get("file")), []).append({**said, "source": "manifest.json"})
    for split in _splits(read, "_info.json"):
        for name, samples in zip(_list(split, "filenames"), _list(split, "shard_lengths"), strict=False):
            rows.setdefault(str(name), []).append({"samples": samples, "source": "_info.json"})
    for name in ENERGON_INFO:
        counts = _mapping(read(name)).get("shard_counts")
        for shard, samples in (counts if isinstance(counts, dict) else {}).items():
            rows.setdefault(str(shard), []).append({"samples": samples, "source": name})
    return rows


def published_in(folder: Folder) -> Said:
    """What a folder says and, by Energon, those above it."""
    return [(root, published_rows(root.read)) for root in dict.fromkeys((folder, *roots(folder)))]


def rows_of(shard: Path | RemoteShard, said: Said) -> list[dict[str, Any]]:
    """All that is published of one shard."""
    rows = [row for folder, published in said for row in published.get(folder.name_of(shard), ())]
    folder = folder_of(shard)
    return rows + (_img2dataset_rows(folder, folder.name_of(shard)) if folder else [])


def say_none(rows: list[dict[str, Any]]) -> bool:
    """Whether all that is published of a shard says that it has no sample, as where all downloads failed."""
    return bool(rows) and all(row.get("samples") == 0 for row in rows)


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
        read = LocalFolder(folder).read
        names = [list(map(str, _list(split, "filenames"))) for split in _splits(read, "_info.json")]
        missing += [
            folder / name
            for listed in names
            if used & set(listed)
            for name in listed
            if not (folder / name).exists()
        ]
    return missing


def lost_shards(folder: Folder, used: set[str], is_all: bool = False) -> dict[str, str]:
    """Name -> who lists it, of shards that are not there, of splits whose others are all among `used`.

    `is_all`: `used` are all tars of the folder, so splits of our manifest of which none is there are lost, too.
    """
    lost: dict[str, str] = {}
    for source in ("manifest.json", "_info.json"):
        for split in _splits(folder.read, source):
            rows = (row.get("file") for row in _list(split, "shards") if isinstance(row, dict))
            names = {name for name in (*rows, *_list(split, "filenames")) if isinstance(name, str)}
            others = sorted(names - used)
            is_asked_for = names & used or is_all and source == "manifest.json"
            if is_asked_for and not any(map(folder.has, others)):
                lost |= {name: source for name in others if name not in lost}
    return lost


def broken_files(folder: Folder) -> dict[str, str]:
    """Name -> why, of files that tell of a whole folder but are neither JSON nor lines of it, whoever wrote them."""
    return {
        name: why
        for name in ("manifest.json", "_info.json")
        if (content := folder.read(name)) is not None and (why := _why_broken(content))
    }


def _why_broken(content: bytes) -> str | None:
    if not content.strip(b"\0"):
        return f"it holds {len(content)} bytes, all zero" if content else "it is empty"
    try:
        json.loads(content)
    except RecursionError:
        return None
    except ValueError as error:
        return None if _is_lines(content) else f"it is cut or damaged ({error})"
    return None


def _is_lines(content: bytes) -> bool:
    """A list of sounds of that name, as NeMo writes it."""
    try:
        return all(isinstance(json.loads(line), dict) for line in content.splitlines() if line.strip())
    except (ValueError, RecursionError):
        return False


def _img2dataset_rows(folder: Folder, name: str) -> list[dict[str, Any]]:
    """Samples whose download succeeded: the others are in the tables, but have no member in the tar. Remote tables are
    not fetched."""
    stem = name.removesuffix(".tar")
    successes = _mapping(folder.read(f"{stem}_stats.json")).get("successes")
    rows = [{"samples": successes, "source": f"{stem}_stats.json"}] if isinstance(successes, int) else []
    if not isinstance(folder, LocalFolder):
        return rows
    table = folder.path / f"{stem}.parquet"
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


def _list(split: dict[str, Any], name: str) -> list[Any]:
    value = split.get(name)
    return value if isinstance(value, list) else []


def _mapping(content: bytes | None) -> dict[str, Any]:
    """A JSON or YAML object; empty for anything else."""
    try:
        value = json.loads(content or b"{}")
    except RecursionError:
        return {}
    except ValueError:
        try:
            value = yaml.safe_load(content or b"")
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: no UTF-8, or a day 2024-13-45
            return {}
    return value if isinstance(value, dict) else {}

"""What do other tools say about the shards of a folder: how many samples each holds, and which are to train on?

timm's `_info.json`, our own `manifest.json`, img2dataset's `<shard>_stats.json` and `<shard>.parquet`, and
Megatron-Energon's `.nv-meta` (`.info.json` or `.info.yaml`: counts; `split.yaml`: parts). What is there is compared
with what is found; what is not understood is another tool's, and left alone.
"""

from __future__ import annotations

import json
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
    for root in list(path.absolute().parents)[1:4]:
        if (root / ".nv-meta").is_dir():
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


def energon_train(folder: Path) -> list[str] | None:
    """The shards of the part `train` of an Energon folder, without those excluded; None if it names none."""
    split = _mapping(read_local(folder)(".nv-meta/split.yaml"))
    parts, excluded = split.get("split_parts"), split.get("exclude") or ()
    train = parts.get("train") if isinstance(parts, dict) else None
    patterns = [train] if isinstance(train, str) else train if isinstance(train, list) else []
    names = [name for pattern in patterns for name in braceexpand.braceexpand(str(pattern))]
    return [name for name in names if name not in excluded] or None


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

"""Is each shard what its index, and what was published of it, say? Every byte is read; nothing is changed.

A shard without an index is checked alone: that it is a whole tar, with unique keys and an end of archive. A remote one
is fetched anew, whatever the cache holds.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d2v_ds.data.cache import RemoteShard, acquire, drop
from d2v_ds.data.folders import Folder, folder_of
from d2v_ds.data.index import Shard
from d2v_ds.data.parallel import Progress, map_shards
from d2v_ds.data.published import Said, broken_files, lost_shards, published_in, rows_of, say_none
from d2v_ds.data.reader import CorruptSample, ShardReader
from d2v_ds.data.scan import MEMBER, NoSamples, Scan, scan_tar
from d2v_ds.data.shard import ShardIndex, find_remote_index, read_record, stored_index

SHOWN = 20
"""Samples of a shard that are named."""


@dataclass
class Report:
    """What was found in one shard."""

    shard: str
    size: int = 0
    samples: int = 0
    extensions: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What is wrong; empty = nothing"""
    notes: list[str] = field(default_factory=list)
    """What one may want to know, but is not wrong"""
    is_missing: bool = False
    """It is listed, but not there"""
    is_shard: bool = True
    """False: a file that says what shards hold"""


def verify_shards(
    paths: list[Shard],
    workers: int | None = None,
    progress: Progress | None = print,
    is_whole: bool = True,
    folders: Collection[str] = (),
) -> list[Report]:
    """One report for each shard, in their order, then one for each that is missing, unless some were named alone, and
    one for each broken file that says what they hold. Of `folders` all shards are among `paths`."""
    used: dict[Folder, set[str]] = {}
    for shard in paths:
        if folder := folder_of(shard):
            used.setdefault(folder, set()).add(folder.name_of(shard))
    said = {folder: published_in(folder) for folder in used}
    lost = [
        Report(f"{folder}/{name}", problems=[f"it is not there, but {source} lists it"], is_missing=True)
        for folder, names in used.items()
        for name, source in (lost_shards(folder, names, str(folder) in folders).items() if is_whole else ())
    ]
    broken = [
        Report(f"{folder}/{name}", problems=[f"{why}, so shards are not compared with it"], is_shard=False)
        for folder in used
        for name, why in broken_files(folder).items()
    ]
    job = functools.partial(verify_shard, said=said)
    return map_shards(job, paths, workers, progress, "verified") + lost + broken


def verify_shard(shard: Shard, said: dict[Folder | None, Said]) -> Report:
    """Reads all of a shard; nothing that is wrong with it is raised."""
    report = Report(str(shard))
    rows = rows_of(shard, said.get(folder_of(shard), []))
    if not isinstance(shard, RemoteShard):
        _verify_file(shard, rows, report)
        return report
    try:
        find_remote_index(shard)
        if not drop(shard):
            report.notes.append("it is being read by another process: what the cache has of it was checked")
        with acquire(shard):  # stays while it is read
            _verify_file(shard.path, rows, report)
    except OSError as error:
        report.problems.append(str(error))
    return report


def _verify_file(path: Path, rows: list[dict[str, Any]], report: Report) -> None:
    index = None
    try:
        report.size = path.stat().st_size
        index = _index(path, report)
        scan = scan_tar(path, report.shard)
    except (ValueError, OSError) as error:
        if isinstance(error, NoSamples) and say_none(rows):
            report.notes.append(f"it holds no sample, as {rows[0]['source']} says")
        else:
            report.problems.append(str(error))
        if index is not None:
            _count_lost(index, report)
    else:
        report.samples = len(scan.offsets) - 1
        report.extensions = {extension: count for extension, (_, count) in scan.extensions.items()}
        _note_dots(report)
        if index is not None:
            _compare(index, scan, report)
    for row in rows:
        _compare_published(path, row, report)


def summary(reports: list[Report]) -> dict[str, Any]:
    """All reports and their sums, for JSON."""
    there = [report for report in reports if report.is_shard and not report.is_missing]
    return {
        "shards": len(there),
        "bad_shards": sum(bool(report.problems) for report in there),
        "missing_shards": sum(report.is_missing for report in reports),
        "broken_files": sum(not report.is_shard for report in reports),
        "samples": sum(report.samples for report in reports),
        "bytes": sum(report.size for report in reports),
        "reports": [asdict(report) for report in reports],
    }


def _index(path: Path, report: Report) -> ShardIndex | None:
    record = read_record(path)
    if record is None:
        report.notes.append("it has no index to compare with; `d2v index` builds one")
        return None
    index = stored_index(path)
    if index is None:
        report.problems.append(
            "its index is incomplete, damaged or of another version; delete its .tar.json, and it is built anew"
        )
        return None
    if report.size != index.size:
        report.problems.append(f"it has {report.size} bytes, when it was indexed {index.size}")
    members = index.members_file().read_bytes()
    if hashlib.sha256(members).hexdigest() != index.members_sha256:
        report.problems.append(
            "its .tar.members.npy is damaged (sha256); delete its .tar.json, and it is built anew"
        )
        return None
    return index


def _compare(index: ShardIndex, scan: Scan, report: Report) -> None:
    """Rows of what is stored against rows of what was indexed."""
    if report.samples != index.num_samples:
        report.problems.append(f"it has {report.samples} samples, when it was indexed {index.num_samples}")
    if len(index.offsets()) != index.num_samples + 1 or list(index.offsets()) != scan.offsets:
        report.problems.append("its .tar.idx names other offsets than the tar has")
    found, indexed = np.array(scan.members, dtype=MEMBER), index.members()
    if len(found) != len(indexed):
        report.problems.append(f"it has {len(found)} members, when it was indexed {len(indexed)}")
        return
    differ = sorted({int(row["sample"]) for row in indexed[found != indexed]})
    if differ:
        report.problems.append(_named(index, differ, "differ from the index (crc32, size or place)"))


def _count_lost(index: ShardIndex, report: Report) -> None:
    """Of a shard that is no whole tar any more: which samples can still be read as they were indexed."""
    report.extensions = dict(index.extension_counts)
    reader, lost = ShardReader(index, {}), []
    for sample in range(index.num_samples):
        try:
            reader.members(sample)
        except CorruptSample:
            lost.append(sample)
    report.samples = index.num_samples - len(lost)
    if lost:
        report.problems.append(_named(index, lost, "cannot be read as they were indexed"))
    reader.close()


def _named(index: ShardIndex, samples: list[int], what: str) -> str:
    reader = ShardReader(index, {})
    keys = ", ".join(reader.key(sample) for sample in samples[:SHOWN])
    reader.close()
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    return f"{len(samples)} of {index.num_samples} samples {what}: {keys}{more}"


def _note_dots(report: Report) -> None:
    """Keys with a dot: `a.1.jpg` is the sample `a` with a member `1.jpg`, which nobody asks for."""
    dotted = Counter(name.rpartition(".")[2] for name in report.extensions if "." in name)
    for last, count in dotted.items():
        if count > 1 or last in report.extensions:
            names = [name for name in report.extensions if name.endswith(f".{last}")]
            members = sum(report.extensions[name] for name in names)
            report.notes.append(
                f"{members} members have a dot before .{last} (.{names[0]}): an extension begins at the first dot "
                "of a file's name. If those are keys with dots, pack the shard again without them"
            )


def _compare_published(path: Path, row: dict[str, Any], report: Report) -> None:
    for key, found in (("size", report.size), ("samples", report.samples)):
        if isinstance(row.get(key), int) and row[key] != found:
            what = "bytes" if key == "size" else "samples"
            report.problems.append(f"it has {found} {what}, {row['source']} says {row[key]}")
    if "sha256" in row and path.is_file():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != row["sha256"]:
            report.problems.append(
                f"its sha256 is {digest[:12]}..., {row['source']} says {row['sha256'][:12]}..."
            )

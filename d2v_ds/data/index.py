"""Which samples are there? Shard patterns -> an index beside each tar -> the corpus of one modality.

A sample is read by its number, as the bytes that were indexed or not at all (CorruptSample). Columns stay on
disk, and a process holds at most 64 shards of a corpus open; of a shard that is wholly used it holds counts, of
others the list of what is left out.
"""

import bisect
import errno
import functools
import glob
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from d2v_ds.data import energon
from d2v_ds.data.cache import RemoteShard
from d2v_ds.data.folders import LocalFolder, folder_of
from d2v_ds.data.lengths import Lengths, stored_row
from d2v_ds.data.parallel import Progress, map_shards
from d2v_ds.data.published import differences, missing_shards, published_in, rows_of, say_none
from d2v_ds.data.reader import CorruptSample, Fields, ShardReader, parse_fields, samples_with
from d2v_ds.data.remote import Missing, expand_url, is_url, settings
from d2v_ds.data.scan import NoSamples
from d2v_ds.data.shard import (
    ShardIndex,
    build_index,
    fetch_column,
    index_remote,
    load_column,
    load_index,
    load_remote_index,
    sidecar,
    write_atomically,
    write_column,
)

__all__ = ["Corpus", "CorruptSample", "ShardIndex", "build_index", "ensure_index", "expand_shards"]

Measure = Callable[[dict[str, bytes]], int]
Shard = Path | RemoteShard

MAX_OPEN_SHARDS = 64
MAX_TOLD = 20
"""Broken shards that a message names."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

log = logging.getLogger(__name__)


def expand_shards(patterns: str | list[str]) -> list[Shard]:
    """The tars that braces {000..003}, globs, folders and ::-joined lists of them name, in that order.

    They may be URLs too; `remote.reading` says how those are read.
    """
    listed = [patterns] if isinstance(patterns, str | Path) else patterns
    parts = [part for pattern in listed for part in str(pattern).split("::") if part]
    paths = [path for part in parts for path in _expand(part)]
    if not paths:
        raise ValueError(f"shard pattern {patterns!r} is empty; name a tar, a folder of tars or a pattern")
    for path, count in Counter(p.absolute() if isinstance(p, Path) else p for p in paths).items():
        if count > 1:
            raise ValueError(f"{patterns!r} names the shard {path} {count} times; name each shard once")
    return paths


def ensure_index(
    paths: list[Shard],
    workers: int | None = None,
    progress: Progress | None = print,
    then: Callable[[ShardIndex], None] | None = None,
) -> list[ShardIndex]:
    """The index of each tar; those absent, or of a tar of another size, are built in parallel. Without those that hold
    no sample, as is published of them.

    `then` is called with each remote index that was missing, while its tar is cached. BrokenShards, when all others are
    indexed, for those that cannot be.
    """
    indexes = [_or_broken(_load_index, path) for path in paths]
    missing = [path for path, index in zip(paths, indexes, strict=True) if index is None]
    if workers is None and any(isinstance(path, RemoteShard) for path in missing):
        workers = max(settings().connections, len(os.sched_getaffinity(0)))
    job = functools.partial(_or_broken, functools.partial(_index_shard, then=then))
    built = iter(map_shards(job, missing, workers, progress, "indexed"))
    if lost := missing_shards([path for path in paths if isinstance(path, Path)]):
        log.warning(
            "%s: _info.json lists %d shards that are not there, %s for one",
            lost[0].parent,
            len(lost),
            lost[0].name,
        )
    found = [next(built) if index is None else index for index in indexes]
    empty = [i for i, index in enumerate(found) if isinstance(index, NoSamples) and _is_said_empty(paths[i])]
    if empty and len(empty) < len(paths):
        what = "%d of %d shards are left out: they hold no sample, as is published of them, %s for one"
        log.warning(what, len(empty), len(paths), paths[empty[0]])
        found = [found[i] for i in sorted({*range(len(paths))} - {*empty})]
    broken = [index for index in found if isinstance(index, Exception)]
    if broken and len(paths) == 1:
        raise broken[0]
    if broken:
        raise BrokenShards(list(map(str, broken)), [i for i in found if not isinstance(i, Exception)])
    return found


def _is_said_empty(shard: Shard) -> bool:
    folder = folder_of(shard)
    return folder is not None and say_none(rows_of(shard, published_in(folder)))


class BrokenShards(ValueError):
    """Shards that cannot be indexed, with the indexes of all others."""

    def __init__(self, reasons: list[str], indexes: list[ShardIndex]) -> None:
        self.indexes = indexes
        more = [f"and {len(reasons) - MAX_TOLD} more"] if len(reasons) > MAX_TOLD else []
        head = f"{len(reasons)} of {len(reasons) + len(indexes)} shards cannot be indexed:"
        super().__init__("\n".join([head, *reasons[:MAX_TOLD], *more]))


def _or_broken(job: Callable[[Shard], Any], shard: Shard) -> Any:
    """What the job gives, or why this shard cannot be had; what would keep others from it is raised: a full disk, a
    server that gives nothing."""
    try:
        return job(shard)
    except (ValueError, Missing) as error:
        return error
    except OSError as error:
        if isinstance(shard, RemoteShard) or error.errno in FULL:
            raise
        return type(error)(f"{shard}: {error.strerror or error}")


def _load_index(shard: Shard) -> ShardIndex | None:
    return load_remote_index(shard) if isinstance(shard, RemoteShard) else load_index(shard)


def _index_shard(shard: Shard, then: Callable[[ShardIndex], None] | None) -> ShardIndex:
    if not isinstance(shard, RemoteShard):
        index = build_index(shard)
        said = published_in(LocalFolder(shard.absolute().parent))
        for difference in differences(rows_of(shard, said), index.num_samples):
            log.warning("%s: %s; `d2v verify` reads every byte of it", shard, difference)
        return index
    index = index_remote(shard)
    if then:
        then(index)
    return index


class Corpus:
    """All usable samples of a list of shards for one modality, numbered from 0 in the order of the shards."""

    def __init__(self, indexes: list[ShardIndex], fields: Fields, workers: int | None = None) -> None:
        self.indexes = indexes
        self.fields = fields
        self.skipped = 0
        self._excluded = energon.excluded_rows(indexes, workers)
        self._left_out = [
            _join(_without(index, fields), rows) for index, rows in zip(indexes, self._excluded, strict=True)
        ]
        self._lengths: Lengths | None = None
        self._readers: dict[int, ShardReader] = {}  # the one opened first comes first
        self._count()

    @classmethod
    def open(
        cls,
        paths: list[Shard],
        fields: dict[str, str],
        measure: Measure | None = None,
        measure_name: str = "",
        min_length: int = 0,
        workers: int | None = None,
        progress: Progress | None = print,
    ) -> "Corpus":
        """Index what is not indexed; leave out samples that lack a field, are empty or below `min_length`, and what
        the `split.yaml` of an Energon folder excludes.

        `fields` maps a name to alternatives in order of preference: "flac;wav", "txt;json.text" (the key
        `text` of the member `json`). `measure` gives a sample's length, its ValueError means 0; the lengths
        are stored beside each shard under `measure_name`, which must name all that they depend on.
        """
        then = None
        if measure is not None:  # of a remote shard at once: later it may not be cached any more
            then = functools.partial(
                _measure_shard, fields=parse_fields(fields), measure=measure, name=measure_name
            )
        corpus = cls(ensure_index(paths, workers, progress, then), parse_fields(fields), workers)
        total = sum(index.num_samples for index in corpus.indexes)
        excluded = sum(len(rows) for rows in corpus._excluded if rows is not None)
        reasons = {
            f"excluded by {energon.SPLIT}": excluded,
            f"without {' or '.join(map(repr, fields.values()))}": total - len(corpus) - excluded,
        }
        if not len(corpus):
            if excluded:
                corpus._report(paths, reasons, total)
            raise ValueError(corpus._no_field_message(paths, fields))
        if measure is not None:
            assert measure_name, "a measure needs a name to be stored under"
            corpus._measure(measure, measure_name, workers, progress)
            reasons |= corpus._leave_out_short(measure_name, min_length)
        corpus._report(paths, reasons, total)
        return corpus

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def lengths(self) -> Lengths:
        """What `measure` gave for each sample."""
        assert self._lengths is not None, "the corpus was opened without a measure"
        return self._lengths

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the shards' names, sizes, member hashes and excluded rows; where they lie does not count."""
        rows = [
            (index.path.name, index.size, index.members_sha256, *([] if out is None else [out.tolist()]))
            for index, out in zip(self.indexes, self._excluded, strict=True)
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def read(self, i: int) -> dict[str, bytes]:
        """The bytes of each field of sample i; CorruptSample if they are not the indexed ones."""
        shard = bisect.bisect_right(self._starts, i) - 1
        reader = self._readers.get(shard)
        if reader is None or self._left_out[shard] is not None:
            reader, sample = self._locate(i)
            return reader.read(sample)
        return reader.read(i - self._starts[shard])  # a fortieth less of all that a small sample takes

    def key(self, i: int) -> str:
        """The name of sample i, "shard.tar:key"."""
        reader, sample = self._locate(i)
        return f"{reader.index.path.name}:{reader.key(sample)}"

    def corrupt(self, i: int, reason: str) -> CorruptSample:
        """The exception to raise where sample i was read but cannot be used."""
        reader, sample = self._locate(i)
        return reader.corrupt(sample, reason)

    def _locate(self, i: int) -> tuple[ShardReader, int]:
        starts = self._starts
        if not 0 <= i < starts[-1]:
            raise IndexError(f"sample {i} of a corpus of {starts[-1]}")
        shard = bisect.bisect_right(starts, i) - 1  # of a list: np.searchsorted takes ten times as long
        reader, left_out = self._readers.get(shard) or self._open(shard), self._left_out[shard]
        sample = i - starts[shard]
        return reader, sample if left_out is None else stored_row(sample, left_out)

    def _open(self, shard: int) -> ShardReader:
        if len(self._readers) >= MAX_OPEN_SHARDS:
            self._readers.pop(next(iter(self._readers))).close()
        reader = self._readers[shard] = ShardReader(self.indexes[shard], self.fields)
        return reader

    def _count(self) -> None:
        counts = [
            index.num_samples - (0 if out is None else len(out))
            for index, out in zip(self.indexes, self._left_out, strict=True)
        ]
        self.shard_starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        """(shards + 1,) the first sample of each shard, then the number of all"""
        self._starts: list[int] = self.shard_starts.tolist()

    def _measure(self, measure: Measure, name: str, workers: int | None, progress: Progress | None) -> None:
        missing = [index for index in self.indexes if load_column(index, name) is None]
        job = functools.partial(_measure_shard, fields=self.fields, measure=measure, name=name)
        map_shards(job, missing, workers, progress, f"measured {name} of")

    def _leave_out_short(self, name: str, min_length: int) -> dict[str, int]:
        """Keep samples of `min_length` or more; the counts of those left out."""
        num_empty, num_short = 0, 0
        for shard, index in enumerate(self.indexes):
            column = _used_column(self.indexes, self._excluded, name, shard)
            rows = np.flatnonzero(column < max(min_length, 1)).astype(np.uint32)
            empty, without = int((column == 0).sum()), self._left_out[shard]
            if without is not None:  # those have length 0 too
                assert not column[without].any(), f"{name} of {index.path} was measured of other members"
                num_empty -= len(without)
            num_empty += empty
            num_short += len(rows) - empty
            self._left_out[shard] = rows if len(rows) else None
        self._count()
        rows_of = np.array([index.num_samples for index in self.indexes])
        load = functools.partial(_used_column, self.indexes, self._excluded, name)
        self._lengths = Lengths(load, rows_of, self._left_out, max(min_length, 1))
        return {"empty or unreadable": num_empty, f"below {min_length} {name}": num_short}

    def _report(self, paths: list[Shard], reasons: dict[str, int], total: int) -> None:
        self.skipped = total - len(self)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        if not len(self):
            raise ValueError(f"none of the {total} samples of {_name(paths)} can be used: {why}")
        if self.skipped:
            log.warning("%d of %d samples of %s are left out: %s", self.skipped, total, _name(paths), why)

    def _no_field_message(self, paths: list[Shard], fields: dict[str, str]) -> str:
        seen = Counter[str]()
        for index in self.indexes:
            seen.update(index.extension_counts)
        extensions = ", ".join(extension for extension, _ in seen.most_common(20))
        return (
            f"no sample of {_name(paths)} has {fields}; the extensions seen are: {extensions}. "
            "Name those that hold the fields (an extension begins at the first dot of a file's name)"
        )


def _without(index: ShardIndex, fields: Fields) -> np.ndarray | None:
    """The samples of a shard that lack a field; None where none does, as in most."""
    kept = samples_with(index, fields)
    if kept is None:
        return None
    return np.setdiff1d(np.arange(index.num_samples, dtype=np.uint32), kept, assume_unique=True)


def _join(without: np.ndarray | None, excluded: np.ndarray | None) -> np.ndarray | None:
    """Both lists of rows as one, ascending; None if both are."""
    if without is None or excluded is None:
        return excluded if without is None else without
    return np.union1d(without, excluded)


def _used_column(
    indexes: list[ShardIndex], excluded: list[np.ndarray | None], name: str, shard: int
) -> np.ndarray:
    """A column of a shard, mmapped; where samples are excluded a copy with 0 for them."""
    column, rows = _column(indexes[shard], name), excluded[shard]
    if rows is None:
        return column
    column = column.copy()
    column[rows] = 0
    return column


def _column(index: ShardIndex, name: str) -> np.ndarray:
    column = load_column(index, name)
    if column is None:
        raise ValueError(
            f"{name} of {index.path} was measured but cannot be read; start again to measure it anew"
        )
    return column


def _measure_shard(index: ShardIndex, fields: Fields, measure: Measure, name: str) -> None:
    fetch_column(index, name)
    if index.remote and load_column(index, name) is not None:
        return
    kept = samples_with(index, fields)
    lengths, faults = np.zeros(index.num_samples, dtype=np.uint32), []
    reader = ShardReader(index, fields)
    for sample in range(index.num_samples) if kept is None else kept.tolist():
        try:
            lengths[sample] = measure(reader.read(sample))
        except ValueError as error:  # length 0: counted by whoever opens the corpus
            reason = error.reason if isinstance(error, CorruptSample) else str(error)
            faults.append({"key": reader.key(sample), "reason": reason})
    reader.close()
    write_column(index, name, lengths)
    _tell_faults(index, name, faults)


def _tell_faults(index: ShardIndex, name: str, faults: list[dict[str, str]]) -> None:
    """Lists them beside the column, and warns: how many of which reason, an example of each."""
    file = sidecar(index.folder, index.path, f"{name}.faults.jsonl")
    if not faults:
        file.unlink(missing_ok=True)
        return
    write_atomically(file, "".join(json.dumps(fault) + "\n" for fault in faults).encode())
    by_reason: dict[str, list[str]] = {}
    for fault in faults:
        by_reason.setdefault(re.sub(r"\d+", "#", fault["reason"]), []).append(fault["key"])
    for keys in by_reason.values():
        reason = next(fault["reason"] for fault in faults if fault["key"] == keys[0])
        log.warning(
            "%s: %d samples without %s, as %s: %s (all: %s)", index, len(keys), name, keys[0], reason, file
        )


def _expand(pattern: str) -> Iterator[Shard]:
    if is_url(pattern):
        for name in braceexpand.braceexpand(pattern):
            yield from (RemoteShard(url, settings()) for url in expand_url(name))
        return
    for name in braceexpand.braceexpand(os.path.expanduser(pattern)):
        found = _expand_name(name)
        if not found:
            raise ValueError(
                f"shard pattern {pattern!r}: {name} matches nothing; name tars, a folder that holds *.tar, "
                f"or a pattern with {{000..003}} or * that matches some{_near(name)}"
            )
        yield from found


def _expand_name(name: str) -> list[Path]:
    """A name with brackets may be one; hidden files (of macOS: ._a.tar) are no shards, nor what a pattern finds
    beside tars: a.tar.idx."""
    if os.path.isdir(name):
        return sorted(path for path in Path(name).glob("*.tar") if not path.name.startswith("."))
    if os.path.isfile(name):
        return [Path(name)]
    found = sorted(map(Path, glob.glob(name, recursive=True)))
    return [path for path in found if path.suffix == ".tar"] or found


def _near(name: str) -> str:
    """Where tars are, when none are where they were looked for."""
    folder = Path(name if os.path.isdir(name) else os.path.dirname(name) or ".")
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        return f". {folder} may not be read (permission denied)"
    below = sorted({str(path.parent) for path in folder.glob("*/*.tar")})
    beside = sorted(path.name for path in folder.glob("*.tar"))
    if beside:
        return f". {folder} holds {len(beside)} tars: {', '.join(beside[:3])}{', ...' * (len(beside) > 3)}"
    return f". Below it there are tars in {', '.join(below[:3])}" if below else ""


def _name(paths: list[Shard]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} .. {paths[-1].name}"

"""Which samples go into which shard, and the copying of their bytes into it, by N processes.

The order is drawn from the seed alone and shards are cut by size, so what each shard holds is known before the first
is written, whoever writes it. A shard counts as done when its record is there, which is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2v_ds.data import ShardIndex, build_index
from d2v_ds.data.shard import load_index
from shards.listing import Found, Listing, Skipped, Stored, stamp_file
from shards.writer import TEMPORARY, HashedFile, Sample, write_bytes, write_tar

MAX_OPEN = 32
"""Archives that a worker holds open."""


class Shard(NamedTuple):
    """Rows of the listing, in the order in which the shard holds them."""

    file: str
    split: str
    rows: np.ndarray
    size: int
    """bytes, about: long names take more"""


class ReadError(ValueError):
    """A member's bytes are not those that were listed."""


def plan_shards(listing: Listing, name: str, seed: int, max_bytes: int) -> list[Shard]:
    """Every sample once, in an order drawn from the seed for each split; shards `<name>-<split>-<number>.tar`."""
    shards = []
    for number, split in sorted(enumerate(listing.splits), key=lambda pair: pair[1]):
        rows = np.flatnonzero(listing.rows["split"] == number)
        rows = rows[np.random.RandomState([seed, zlib.crc32(split.encode())]).permutation(len(rows))]
        sizes = listing.rows["bytes"][rows]
        for shard, (start, stop) in enumerate(cut_by_size(sizes, max_bytes)):
            file = f"{name}-{split}-{shard:06d}.tar"
            shards.append(Shard(file, split, rows[start:stop], int(sizes[start:stop].sum())))
    return shards


def cut_by_size(sizes: np.ndarray, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Runs (start, stop) that fit into `max_bytes` each; a larger sample is a run of its own."""
    ends = np.cumsum(sizes.astype(np.int64))
    start = 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + max_bytes, side="right")))
        yield start, stop
        start = stop


def is_done(shard: Shard, out: Path, records: Path) -> bool:
    """Its record is there, and the tar that the record is of."""
    record = read_record(shard, records)
    path = out / shard.file
    return record is not None and path.is_file() and path.stat().st_size == record["size"]


def read_record(shard: Shard, records: Path) -> dict[str, Any] | None:
    file = records / f"{shard.file}.json"
    return json.loads(file.read_bytes()) if file.is_file() else None


def pack_shard(shard: Shard, listing: Listing, out: Path, records: Path) -> Shard:
    """Writes a shard, its index and its record. ValueError if more than one in a hundred samples cannot be read."""
    path = out / shard.file
    dropped: list[Skipped] = []
    hashed = HashedFile(None)

    def write(file: Any) -> None:
        hashed.file = file
        write_tar(read_samples(shard, listing, dropped), hashed)

    write_bytes(path, write)
    index = build_index(path)  # reads the tar again, so what is recorded is what can be read
    record = {
        "size": hashed.size,
        "sha256": hashed.sha256.hexdigest(),
        "samples": index.num_samples,
        "members_sha256": index.members_sha256,
        "dropped": dropped,
    }
    write_bytes(records / f"{shard.file}.json", lambda file: file.write(json.dumps(record).encode()))
    return shard


def ensure_indexed(shard: Shard, out: Path) -> ShardIndex:
    """Its index, built again if someone removed it."""
    return load_index(out / shard.file) or build_index(out / shard.file)


def read_samples(shard: Shard, listing: Listing, dropped: list[Skipped]) -> Iterator[Sample]:
    """The samples of a shard with their bytes; those that cannot be read any more go to `dropped`."""
    limit = max(1, len(shard.rows) // 100)
    kept = 0
    with Archives(listing.archives) as archives:
        for row in shard.rows:
            found = listing.read(int(row))
            try:
                yield read_sample(found, archives)
                kept += 1
            except ReadError as error:
                dropped.append(Skipped(file_of(found), str(error)))
                if len(dropped) > limit:
                    raise ValueError(
                        f"{shard.file}: {len(dropped)} of its {len(shard.rows)} samples cannot be read any more, at "
                        f"last {dropped[-1].file}: {error}. If the source is away, bring it back, and the same "
                        "command goes on; if it changed, remove the output folder and begin again"
                    ) from error
    if not kept:
        raise ValueError(
            f"{shard.file}: none of its samples can be read, {dropped[0].file}: {dropped[0].reason}"
        )


def read_sample(found: Found, archives: Archives) -> Sample:
    sample: Sample = {"__key__": found.key}
    for extension, where in found.members.items():
        sample[extension] = where.encode() if isinstance(where, str) else archives.read(where)
    return sample


def file_of(found: Found) -> str:
    return next((where.file for where in found.members.values() if isinstance(where, Stored)), found.key)


class Archives:
    """Reads members by their place; files that hold many stay open."""

    def __init__(self, stamps: dict[str, str]) -> None:
        self._stamps = stamps
        self._open: dict[str, int] = {}

    def __enter__(self) -> Archives:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def read(self, where: Stored) -> bytes:
        """The bytes. ReadError if they cannot be read or are fewer, or a file of its own has another size."""
        try:
            descriptor = os.open(where.file, os.O_RDONLY) if where.is_whole else self._descriptor(where.file)
            try:
                size = os.fstat(descriptor).st_size
                if where.is_whole and size != where.size:
                    raise ReadError(f"has {size} bytes, had {where.size} when it was listed")
                return read_exactly(descriptor, where)
            finally:
                if where.is_whole:
                    os.close(descriptor)
        except OSError as error:
            raise ReadError(error.strerror or str(error)) from error

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            if stamp_file(Path(file)) != self._stamps[file]:
                raise ReadError("changed since it was listed")
            if len(self._open) >= MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]


def read_exactly(descriptor: int, where: Stored) -> bytes:
    pieces, done = [], 0
    while done < where.size:
        piece = os.pread(descriptor, where.size - done, where.offset + done)
        if not piece:
            raise ReadError(f"ends at byte {where.offset + done}, inside a member")
        pieces.append(piece)
        done += len(piece)
    return b"".join(pieces)


def fingerprint(indexes: list[ShardIndex]) -> str:
    """That of a corpus of these shards."""
    rows = [(index.path.name, index.size, index.members_sha256) for index in indexes]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def remove_unfinished(out: Path, shards: list[Shard]) -> None:
    """Temporary files that a killed run left."""
    for shard in shards:
        for pattern in (f"{shard.file}{TEMPORARY}", f".{shard.file}.*.tmp"):
            for file in out.glob(pattern):
                file.unlink()

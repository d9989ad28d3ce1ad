"""Tars that are the same bytes whenever they are written: fixed owner, mode and time, members in given order.

webdataset's TarWriter makes them. A tar has its final name only when it is whole and on the disk.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

Sample = dict[str, str | bytes]  # "__key__" first, then one entry per member, in the order of the tar

TEMPORARY = ".tmp"  # ends the name of whatever is not whole yet


def num_tar_bytes(sample: Sample) -> int:
    """What a sample takes in a tar: a 512-byte header per member, contents rounded up to 512."""
    return tar_bytes(len(value) for name, value in sample.items() if name != "__key__")


def tar_bytes(sizes: Iterable[int]) -> int:
    """What members of these sizes take in a tar, without the extra headers of long names."""
    return sum(512 + -(-size // 512) * 512 for size in sizes)


def group_by_bytes(samples: Iterable[Sample], max_bytes: int) -> Iterator[list[Sample]]:
    """The samples in runs that fit into `max_bytes`; a larger sample is a run of its own."""
    group, total = [], 0
    for sample in samples:
        size = num_tar_bytes(sample)
        if group and total + size > max_bytes:
            yield group
            group, total = [], 0
        group.append(sample)
        total += size
    if group:
        yield group


def write_bytes(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then renames it: a crash leaves no half file."""
    temporary = path.with_name(path.name + TEMPORARY)
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_tar(samples: Iterable[Sample], file: BinaryIO) -> None:
    """Writes the samples one by one as they come."""
    from webdataset import TarWriter

    with TarWriter(file, user="d2v", group="d2v", mode=0o644, mtime=0, encoder=False) as tar:
        for sample in samples:
            for name, value in sample.items():
                if name != "__key__":  # NOTE one call per member: a call with all would sort them by name
                    tar.write({"__key__": sample["__key__"], name: value})


class HashedFile(io.RawIOBase):
    """A file being written, and the sha256 of what went in."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        self.size += len(content)
        return self.file.write(content)

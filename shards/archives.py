"""Where do the members of an archive lie? Plain tars are read in place; compressed ones are unpacked to a plain file.

A member is then a range of bytes of one file, and nothing is written out one by one: a hundred thousand small files
are slow to make and slow to remove.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shards.listing import Stored, stamp_file
from shards.writer import write_bytes

OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
CHUNK = 1 << 20


class Member(NamedTuple):
    """A plain file inside a tar."""

    name: str
    where: Stored


class Window(io.RawIOBase):
    """A range of bytes of an open file, as a file of its own."""

    def __init__(self, file: Any, start: int, size: int) -> None:
        self.file, self.start, self.size, self.at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.at)
        piece = self.file.read(max(0, min(len(buffer), self.size - self.at)))
        buffer[: len(piece)] = piece
        self.at += len(piece)
        return len(piece)


def list_tar(path: Path, inside: Stored | None = None) -> Iterator[Member]:
    """The plain files of a tar, which may itself be a member of another; ValueError if it is not whole."""
    inside = inside or Stored(str(path), 0, path.stat().st_size)
    with open(inside.file, "rb") as file:
        window = io.BufferedReader(Window(file, inside.offset, inside.size))
        try:
            with tarfile.open(fileobj=window, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # tarfile would keep them all
                    if member.isreg():
                        where = Stored(inside.file, inside.offset + member.offset_data, member.size)
                        if member.offset_data + member.size > inside.size:
                            raise ValueError(f"{path} is truncated inside {member.name}; get it again")
                        yield Member(member.name, where)
                end = tar.offset
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no whole tar: {error}; get it again") from error
        window.seek(end)
        rest = window.read(tarfile.BLOCKSIZE)  # tarfile takes a damaged header for the end
        if len(rest) < tarfile.BLOCKSIZE or any(rest):
            raise ValueError(f"{path} is damaged or truncated at byte {end}; get it again")


def unpack(path: Path, scratch: Path, inside: Stored | None = None) -> Path:
    """The plain content of a compressed file, in `scratch`; the file itself if it is not compressed.

    `inside`: the compressed file is a member of another. ValueError if it is not whole: gzip and xz hold checksums.
    """
    inside = inside or Stored(str(path), 0, path.stat().st_size)
    with open(inside.file, "rb") as file:
        file.seek(inside.offset)
        start = file.read(6)
        opener = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), None)
        if opener is None:
            return path
        stamp = f"{stamp_file(Path(inside.file))} {inside.offset}"
        plain = scratch / f"{path.stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:8]}"
        if plain.is_file():
            return plain
        window = io.BufferedReader(Window(file, inside.offset, inside.size), CHUNK)
        try:
            with opener(window) as content:
                write_bytes(plain, lambda out: shutil.copyfileobj(content, out, CHUNK))
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno:  # the disk's; those of gzip and bz2 have none
                raise
            raise ValueError(f"{path} is damaged or truncated: {error}; get it again") from error
    return plain

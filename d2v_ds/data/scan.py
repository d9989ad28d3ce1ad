"""Is this tar whole, and where does each member of each sample lie in it?

One pass with the stdlib's tarfile, which knows PAX and GNU long names. tarfile takes a corrupt header for
the end of the archive and loses the rest without a word, so the end is checked here: two zero blocks must
follow the last member, and nothing but zeros after them.
"""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

try:
    from isal.isal_zlib import crc32 as crc32_of  # eight times as fast
except ImportError:  # there is no wheel for this machine
    from zlib import crc32 as crc32_of

MEMBER = np.dtype([("sample", "<u4"), ("field", "<u2"), ("offset", "<u8"), ("size", "<u8"), ("crc32", "<u4")])

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MAX_EXTENSIONS = np.iinfo(MEMBER["field"]).max
_REMEDY = "fetch or pack the shard again"
_METADATA = re.compile(r"__[^/]*__($|/)")


class NoSamples(ValueError):
    """A tar that is whole, or all zeros, and holds no sample."""


class Scan:
    """The samples of one tar, added member by member in stored order."""

    def __init__(self, path: Path | str) -> None:
        self.path = path  # or what it is called in messages
        self.offsets: list[int] = []  # of the first header of each sample, then of the end of the last one
        self.members: list[tuple[int, int, int, int, int]] = []  # rows of MEMBER
        self.extensions: dict[str, tuple[int, int]] = {}  # -> (`field` in MEMBER, number of samples)
        self._keys: set[str] = set()
        self._key: str | None = None
        self._seen: set[str] = set()  # extensions of this sample

    def add(self, key: str, extension: str, member: tarfile.TarInfo, crc32: int) -> None:
        if key != self._key:
            self._start_sample(key, member.offset)
        if extension in self._seen:
            raise ValueError(
                f"{self.path}: sample {key!r} has two members .{extension}, the second at byte "
                f"{member.offset}; an extension comes once in a sample: rename one and pack it again"
            )
        self._seen.add(extension)
        field_id, count = self.extensions.setdefault(extension, (len(self.extensions), 0))
        self.extensions[extension] = field_id, count + 1
        if field_id > _MAX_EXTENSIONS:
            raise ValueError(
                f"{self.path} has more than {_MAX_EXTENSIONS} extensions, .{extension} for one; an extension "
                "begins at the first dot of a file's name: take the dots out of the keys"
            )
        self.members.append((len(self.offsets) - 1, field_id, member.offset_data, member.size, crc32))

    def _start_sample(self, key: str, offset: int) -> None:
        if key in self._keys:
            raise ValueError(
                f"{self.path}: key {key!r} comes a second time at byte {offset}; a key is unique in its "
                "shard and its members are consecutive: pack it again, sorted by name"
            )
        self._keys.add(key)
        self._key, self._seen = key, set()
        self.offsets.append(offset)

    def after(self) -> str:
        """Where the scan stands, for messages."""
        return f"after sample {self._key!r} ({len(self.offsets)} read)" if self._key else "before any sample"


def scan_tar(path: Path, name: str | None = None) -> Scan:
    """Index every sample of a tar, with the crc32 of each member; ValueError unless the tar is whole, NoSamples if it
    holds none.

    `name` is what messages call it.
    """
    size = path.stat().st_size
    scan = Scan(name or path)
    with path.open("rb") as file:
        _check_start(scan.path, file, size)
        try:
            end = _scan_members(scan, file, size)
        except (tarfile.TarError, OSError) as error:
            raise ValueError(
                f"{scan.path} is truncated or corrupt {scan.after()}: {error}; {_REMEDY}"
            ) from error
        _check_end(scan, file, end, size)
    if not scan.offsets:
        raise NoSamples(f"{scan.path} holds no sample; a sample is made of files named <key>.<extension>")
    scan.offsets.append(end)
    return scan


def split_name(name: str) -> tuple[str, str] | None:
    """(key, lower-case extension), split at the first dot of the basename; None if it is no sample's file."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or _METADATA.match(name):
        return None
    return folder + slash + stem, extension.lower()


def _scan_members(scan: Scan, file: BinaryIO, size: int) -> int:
    """Add all members to the scan; the offset where tarfile saw the end of the archive."""
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as tar:
        for member in _iterate(tar):
            _check_member(scan, member, size)
            name = split_name(member.name) if member.isreg() else None
            if name is not None:
                scan.add(*name, member, _crc32(file, member))
        return tar.offset


def _iterate(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All members; ReadError also for what tarfile does not expect of a header."""
    while True:
        try:
            member = tar.next()
        except (ValueError, OverflowError, RecursionError, MemoryError, OSError) as error:
            raise tarfile.ReadError(f"unreadable header at byte {tar.offset} ({error})") from error
        if member is None:
            return
        if member.size < 0:
            raise tarfile.ReadError(f"a size of {member.size} bytes in the header at byte {member.offset}")
        tar.members.clear()  # tarfile would keep them all: 1 GB at a million members
        yield member


class _Member(tarfile.TarInfo):
    """A size below zero sends tarfile back to where it was, for ever (CVE-2025-8194)."""

    def _block(self, count: int) -> int:
        if count < 0:  # no InvalidHeaderError, which tarfile takes for the end of the archive
            raise tarfile.ReadError(f"a size below zero in the header at byte {self.offset}")
        return super()._block(count)


def _crc32(file: BinaryIO, member: tarfile.TarInfo) -> int:
    file.seek(member.offset_data)
    crc32, left = 0, member.size
    while left and (piece := file.read(min(left, _CHUNK))):
        crc32 = crc32_of(piece, crc32)
        left -= len(piece)
    return crc32


def _check_start(path: Path | str, file: BinaryIO, size: int) -> None:
    start = file.read(_BLOCK)
    file.seek(0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is compressed ({name}); shards are plain tar: decompress it first")
    if b"\0" not in start and start.partition(b"\n")[0].rstrip().endswith(b".tar"):
        raise ValueError(
            f"{path} lists shards and is none; give their folder, a pattern, or their names joined by ::"
        )
    if size < _BLOCK:
        raise ValueError(f"{path} is truncated at byte {size} before any sample; {_REMEDY}")
    if not any(start):
        raise NoSamples(
            f"{path} holds no sample: its first header is empty; {_REMEDY}, or leave it out if it never held any"
        )


def _check_member(scan: Scan, member: tarfile.TarInfo, size: int) -> None:
    stored = -(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0
    if member.islnk() or member.issym() or member.issparse():
        raise ValueError(
            f"{scan.path}: member {member.name!r} is a link or sparse; samples are plain files: "
            "pack it again with tar --dereference --hard-dereference and without --sparse"
        )
    if not member.isreg() and not member.isdir() and member.size and split_name(member.name):
        raise ValueError(
            f"{scan.path}: member {member.name!r} at byte {member.offset} is of type "
            f"{member.type.decode('latin-1')!r}, which no reader takes for a file; samples are plain: pack it again"
        )
    if member.offset_data + stored > size:
        raise ValueError(f"{scan.path} is truncated at byte {size} {scan.after()}; {_REMEDY}")


def _check_end(scan: Scan, file: BinaryIO, end: int, size: int) -> None:
    """From `end` to the end of the file there are two zero blocks or more, and nothing else."""
    file.seek(end)
    first = file.read(_BLOCK)
    if len(first) == _BLOCK and any(first):
        raise ValueError(f"{scan.path} has a corrupt header at byte {end} {scan.after()}; {_REMEDY}")
    if size < end + 2 * _BLOCK:
        raise ValueError(f"{scan.path} is truncated at byte {size} {scan.after()}; {_REMEDY}")
    while piece := file.read(_CHUNK):
        if piece.strip(b"\0"):
            raise ValueError(
                f"{scan.path} goes on after its end-of-archive at byte {end} {scan.after()}: an overwritten "
                f"header, or bytes appended (tars cannot be joined by cat); {_REMEDY}"
            )

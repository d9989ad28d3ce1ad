"""What are the bytes of one sample's fields? Reads one shard by its index, each member checked by crc32."""

import bisect
import fcntl
import functools
import io
import json
import os
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from d2v_ds.data.cache import is_gone
from d2v_ds.data.scan import MEMBER, crc32_of, split_name
from d2v_ds.data.shard import ShardIndex

_ROW = struct.Struct("<IHQQI")
"""One row of MEMBER; a tenth of what numpy takes to give one"""
assert _ROW.size == MEMBER.itemsize
_unpack = _ROW.unpack_from

Row = tuple[int, int, int, int, int]


class CorruptSample(ValueError):
    """A sample whose stored bytes cannot be used."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}:{self.key}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Alternative:
    """One place where a field may be: a member, or one key of a JSON member."""

    extension: str
    """empty: nowhere, the field may be absent"""
    json_key: str | None = None


Fields = dict[str, tuple[Alternative, ...]]


def parse_fields(fields: dict[str, str]) -> Fields:
    """{"text": "txt;json.text"} -> the member `txt`, else the key `text` of the member `json`.

    After a last `;` stands nothing: "cls;json.label;" is a field that a sample may lack, then it is empty.
    """
    return {name: tuple(map(_parse_alternative, text.split(";"))) for name, text in fields.items()}


def samples_with(index: ShardIndex, fields: Fields) -> np.ndarray | None:
    """Which samples of a shard have one of each field's members; None for all of them."""
    usable = np.ones(index.num_samples, dtype=bool)
    for alternatives in fields.values():
        wanted = {alternative.extension for alternative in alternatives}
        if "" in wanted:
            continue  # it may be absent
        if any(index.extension_counts.get(extension) == index.num_samples for extension in wanted):
            continue  # the usual shard: no column is touched
        ids = [i for i, extension in enumerate(index.extension_counts) if extension in wanted]
        members = index.members()
        if len(members) and members["sample"].max() >= index.num_samples:
            raise ValueError(
                f"{index}: its .tar.members.npy is damaged; delete its .tar.json, and it is built anew"
            )
        has_field = np.zeros(index.num_samples, dtype=bool)
        has_field[members["sample"][np.isin(members["field"], ids)]] = True
        usable &= has_field
    return None if usable.all() else np.flatnonzero(usable).astype(np.uint32)


class ShardReader:
    """One open shard."""

    def __init__(self, index: ShardIndex, fields: Fields) -> None:
        self.index, self._size = index, index.size
        self.fields = fields
        self._file, self._pid = index.open(), os.getpid()
        if index.remote:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._pread = self._pread_cached
        else:
            self._pread = functools.partial(os.pread, self._file.fileno())
        members = index.members()
        self._sample_column = members["sample"]
        self._rows_bytes = memoryview(members.view(np.uint8))
        self._extensions = list(index.extension_counts)
        all_alike = set(index.extension_counts.values()) == {index.num_samples}
        self._stride = len(self._extensions) * _ROW.size if all_alike else 0
        """Bytes of a sample's rows in the usual shard, whose samples all have the same members; else 0"""
        self._places = {name: list(self._find(alternatives)) for name, alternatives in fields.items()}
        """field -> where it may be in this shard: (`field` of MEMBER or -1 for nowhere, JSON key)"""
        self._usual = list(self._find_usual())
        """(name, `field`, where its row lies among those of a sample) of all fields, if each sample of this shard has
        them as members, and most in one order; else none"""

    def _find(self, alternatives: tuple[Alternative, ...]) -> Iterator[tuple[int, str | None]]:
        for alternative in alternatives:
            if not alternative.extension:
                yield -1, None
            elif alternative.extension in self._extensions:
                yield self._extensions.index(alternative.extension), alternative.json_key

    def _find_usual(self) -> Iterator[tuple[str, int, int]]:
        firsts = [(name, *places[0]) for name, places in self._places.items() if places]
        are_members = all(field >= 0 and json_key is None for _, field, json_key in firsts)
        if self._stride and are_members and len(firsts) == len(self._places):
            for name, field, _ in firsts:
                yield name, field, field * _ROW.size

    def close(self) -> None:
        self._file.close()

    def read(self, sample: int) -> dict[str, bytes]:
        """The bytes of each field; CorruptSample if they are not the indexed ones."""
        contents, rows = {}, sample * self._stride
        try:
            for name, field, place in self._usual:  # a sixth less of all that a small sample takes
                _, found, offset, size, crc32 = _unpack(self._rows_bytes, rows + place)
                if found != field or offset + size > self._size:
                    return self._read_anywhere(sample)
                contents[name] = content = self._pread(size, offset)
                if crc32_of(content) != crc32 or len(content) < size:
                    return self._read_anywhere(sample)
        except OSError:
            return self._read_anywhere(sample)
        return contents or self._read_anywhere(sample)

    def _read_anywhere(self, sample: int) -> dict[str, bytes]:
        """As `read`, wherever the members of a sample stand; CorruptSample says what is wrong with it."""
        rows, contents = {}, {}  # loops: comprehensions take a tenth more of all that a small sample takes
        for row in self._rows(sample):
            rows[row[1]] = row
        for name, places in self._places.items():
            contents[name] = self._read_field(places, sample, rows)
        return contents

    def members(self, sample: int) -> dict[str, bytes]:
        """The bytes of all members by extension, whatever fields are read; CorruptSample as `read`."""
        rows = list(self._rows(sample))
        if any(row[1] >= len(self._extensions) for row in rows):
            raise self.corrupt(sample, "its index is damaged, as a member has no extension")
        return {self._extensions[row[1]]: self._read_member(sample, row) for row in rows}

    def key(self, sample: int) -> str:
        """The sample's key, from its header in the tar: keys are wanted only for messages, so not indexed."""
        offset, first_row = int(self._offsets[sample]), next(self._rows(sample), None)
        if first_row is None or not offset < first_row[2] < self.index.size:
            return f"sample {sample}"  # the index is damaged
        try:
            headers = self._pread(first_row[2] - offset, offset)
            with tarfile.open(fileobj=io.BytesIO(headers), mode="r:") as tar:
                first = tar.next()
        except (
            tarfile.TarError,
            ValueError,
            OverflowError,
            OSError,
        ):  # of records of a PAX header that lie, of a disk
            first = None
        name = split_name(first.name) if first else None
        return name[0] if name else f"sample {sample}"

    @functools.cached_property
    def _offsets(self) -> np.ndarray:
        return self.index.offsets()

    def _pread_cached(self, size: int, offset: int) -> bytes:
        if self._pid != os.getpid():  # a lock is of what was opened, and a forked worker shares that
            self._file.close()
            self._file, self._pid = self.index.open(), os.getpid()
        fcntl.flock(self._file, fcntl.LOCK_SH)  # only while it is read: what is open can still be evicted
        try:
            if is_gone(self._file):
                self._file.close()
                self._file = self.index.open()
            return os.pread(self._file.fileno(), size, offset)
        finally:
            if not self._file.closed:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _rows(self, sample: int) -> Iterator[Row]:
        if stride := self._stride:
            return _ROW.iter_unpack(self._rows_bytes[sample * stride : (sample + 1) * stride])
        # bisect touches some 15 rows; np.searchsorted would copy the whole column for each sample.
        first = bisect.bisect_left(self._sample_column, sample)
        last = bisect.bisect_right(self._sample_column, sample, lo=first)
        return _ROW.iter_unpack(self._rows_bytes[first * _ROW.size : last * _ROW.size])

    def _read_field(self, places: list[tuple[int, str | None]], sample: int, rows: dict[int, Row]) -> bytes:
        reason = "its index is damaged, as a member is not where it was listed"
        for place, json_key in places:
            if place < 0:
                return b""
            if row := rows.get(place):
                content = self._read_member(sample, row)
                if json_key is None:
                    return content
                value = self._json_value(sample, content, json_key)
                if value is not None:
                    return value
                reason = f"its JSON has no {json_key!r}"
        raise self.corrupt(sample, reason)

    def _read_member(self, sample: int, row: Row) -> bytes:
        _, _, offset, size, crc32 = row
        if offset + size > self.index.size:
            raise self.corrupt(sample, "its index is damaged, as it lies outside the tar")
        try:
            content = self._pread(size, offset)
        except OSError as error:
            if self.index.remote:  # nothing of it comes
                raise
            raise self.corrupt(sample, f"the disk does not give it ({error.strerror})") from error
        if len(content) < size:
            raise self.corrupt(sample, "the tar ends inside it")
        if crc32_of(content) != crc32:
            raise self.corrupt(sample, "its bytes differ from the index (crc32)")
        return content

    def _json_value(self, sample: int, content: bytes, key: str) -> bytes | None:
        try:
            value = json.loads(content).get(key)
        except (ValueError, AttributeError, RecursionError) as error:
            raise self.corrupt(sample, "its JSON is not an object") from error
        if value in (None, []):
            return None
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = "\n".join(
                value
            )  # several captions of one sound, as LAION's CLAP has them: all of them, in lines
        return (value if isinstance(value, str) else json.dumps(value)).encode()

    def corrupt(self, sample: int, reason: str) -> CorruptSample:
        return CorruptSample(self.index.path.name, self.key(sample), reason)


def _parse_alternative(text: str) -> Alternative:
    extension, dot, key = text.strip().partition(".")
    if extension.lower() == "json" and dot:
        return Alternative("json", key)
    return Alternative(text.strip().lower())

"""What are the bytes of one sample's fields? Reads one shard by its index, each member checked by crc32."""

import bisect
import fcntl
import functools
import io
import json
import os
import tarfile
import zlib
from dataclasses import dataclass

import numpy as np

from d2v_ds.data.cache import is_gone
from d2v_ds.data.scan import split_name
from d2v_ds.data.shard import ShardIndex


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
        has_field = np.zeros(index.num_samples, dtype=bool)
        has_field[members["sample"][np.isin(members["field"], ids)]] = True
        usable &= has_field
    return None if usable.all() else np.flatnonzero(usable).astype(np.uint32)


class ShardReader:
    """One open shard."""

    def __init__(self, index: ShardIndex, fields: Fields) -> None:
        self.index = index
        self.fields = fields
        self._file = index.open()
        if index.remote:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._members = index.members()
        self._sample_column = self._members["sample"]
        self._extensions = list(index.extension_counts)
        members, samples = len(self._members), index.num_samples
        self._members_each = members // samples if samples and members % samples == 0 else 0

    def close(self) -> None:
        self._file.close()

    def read(self, sample: int) -> dict[str, bytes]:
        """The bytes of each field; CorruptSample if they are not the indexed ones."""
        members = {self._extensions[row[1]]: row for row in self._rows(sample)}
        return {name: self._read_field(name, sample, members) for name in self.fields}

    def members(self, sample: int) -> dict[str, bytes]:
        """The bytes of all members by extension, whatever fields are read; CorruptSample as `read`."""
        return {self._extensions[row[1]]: self._read_member(sample, row) for row in self._rows(sample)}

    def key(self, sample: int) -> str:
        """The sample's key, from its header in the tar: keys are wanted only for messages, so not indexed."""
        offset = int(self._offsets[sample])
        first_row = self._rows(sample)[0]
        headers = self._pread(first_row[2] - offset, offset)
        try:
            with tarfile.open(fileobj=io.BytesIO(headers), mode="r:") as tar:
                first = tar.next()
        except tarfile.TarError:
            first = None
        name = split_name(first.name) if first else None
        return name[0] if name else f"sample {sample}"

    @functools.cached_property
    def _offsets(self) -> np.ndarray:
        return self.index.offsets()

    def _pread(self, size: int, offset: int) -> bytes:
        if self.index.remote is None:
            return os.pread(self._file.fileno(), size, offset)
        fcntl.flock(self._file, fcntl.LOCK_SH)  # only while it is read: what is open can still be evicted
        try:
            if is_gone(self._file):
                self._file.close()
                self._file = self.index.open()
            return os.pread(self._file.fileno(), size, offset)
        finally:
            if not self._file.closed:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _rows(self, sample: int) -> list[tuple[int, int, int, int, int]]:
        column, each = self._sample_column, self._members_each
        first, last = sample * each, (sample + 1) * each
        is_there = each and column[first] == sample and column[last - 1] == sample
        if (
            is_there
            and (not first or column[first - 1] < sample)
            and (last == len(column) or column[last] > sample)
        ):
            return self._members[first:last].tolist()  # the usual shard: all samples have as many members
        # bisect touches some 15 rows; np.searchsorted would copy the whole column for each sample.
        first = bisect.bisect_left(self._sample_column, sample)
        last = bisect.bisect_right(self._sample_column, sample, lo=first)
        return self._members[first:last].tolist()

    def _read_field(self, name: str, sample: int, members: dict[str, tuple]) -> bytes:
        alternatives = self.fields[name]
        may_be_absent = not alternatives[-1].extension
        for alternative in alternatives:
            if not alternative.extension:
                return b""
            if alternative.extension not in members:
                continue
            content = self._read_member(sample, members[alternative.extension])
            if alternative.json_key is None:
                return content
            return self._json_value(sample, content, alternative.json_key, may_be_absent)
        raise AssertionError(f"{self.index.path.name} sample {sample} without {name} was not left out")

    def _read_member(self, sample: int, row: tuple[int, int, int, int, int]) -> bytes:
        _, _, offset, size, crc32 = row
        content = self._pread(size, offset)
        if len(content) < size:
            raise self.corrupt(sample, "the tar ends inside it")
        if zlib.crc32(content) != crc32:
            raise self.corrupt(sample, "its bytes differ from the index (crc32)")
        return content

    def _json_value(self, sample: int, content: bytes, key: str, may_be_absent: bool) -> bytes:
        try:
            value = json.loads(content).get(key)
        except (ValueError, AttributeError) as error:
            raise self.corrupt(sample, "its JSON is not an object") from error
        if value in (None, []) and may_be_absent:
            return b""
        if value is None:
            raise self.corrupt(sample, f"its JSON has no {key!r}")
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
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

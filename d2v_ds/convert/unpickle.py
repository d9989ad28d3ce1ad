"""Reads files that torch.save wrote (.pt, .pth, .bin) without running anything that they ask for.

Both formats: the zip archive (torch 1.6 and later) and the stream of pickles before it. `pickle_machine` says what
is built of a pickle and what is refused. Every record of an archive is checked against its checksum and every size
against the file's before memory is taken, so a damaged file is an error and never wrong weights; the older format
has no checksums, there only what is missing is noticed. Storages are read once, straight into their tensors.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from d2v_ds.convert.pickle_machine import Machine
from d2v_ds.convert.pickle_names import STORAGES
from d2v_ds.convert.standin import Name, StandIn, plain

__all__ = ["Name", "StandIn", "plain", "read_torch_file"]

MAX_PICKLE = 256 << 20
"""Bytes of a pickle; those of checkpoints, whose tensors lie elsewhere, have less than 10 MB."""
CHUNK = 1 << 20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
REMEDY = "download or copy it again"


def read_torch_file(path: str | Path) -> Any:
    """What torch.save stored at `path`: containers, plain values, tensors on the CPU, and `StandIn`s.

    OrderedDict, defaultdict and Counter come as dict, parameters as tensors, numpy's numbers as Python's; tensors
    that shared a storage share it still. Raises ValueError, which names the file and the reason, for a file that is
    damaged, that is no such file, or that asks for more than data (with the name of what it wanted).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a .pt file that torch.save wrote")
    try:
        with path.open("rb") as file:
            start = file.read(512)
            file.seek(0)
            if not start:
                raise ValueError(f"it is empty; {REMEDY}")
            if start.startswith(b"PK"):
                return read_zip(file, path.stat().st_size)
            if start[257:262] == b"ustar":
                raise ValueError(
                    "it has torch's tar format of 2017 (before 0.1.10), which is not read; load and save it anew "
                    "with torch 1.x"
                )
            return read_legacy(file, path.stat().st_size, start)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_storage_id(given: tuple[Any, ...]) -> tuple[str, torch.dtype, int, Any]:
    """(key, dtype, number of values, view) of ('storage', type, key, device, number, [view])."""
    _, kind, key, _, numel, *view = given if len(given) in (5, 6) else (None,) * 5
    if not (isinstance(kind, Name) and str(kind) in STORAGES and isinstance(key, str)):
        raise ValueError(f"it wants a storage of a kind that is not known: {kind}")
    if type(numel) is not int or not 0 <= numel < 1 << 60:
        raise ValueError(f"storage {key!r} has no number of values")
    return key, STORAGES[str(kind)], numel, view[0] if view else None


# ---- zip -------------------------------------------------------------------------------------------------------

ZIP_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    UnicodeError,
)
"""What Python's zipfile raises for damaged archives, each somewhere."""


def read_zip(file: BinaryIO, size: int) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            return Archive(archive, size).read()
    except ZIP_ERRORS as error:
        raise ValueError(f"its archive is damaged ({error}); {REMEDY}") from error


class Archive:
    """The records of a zip archive as torch.save lays them out: NAME/data.pkl, NAME/data/KEY, ..."""

    def __init__(self, archive: zipfile.ZipFile, size: int):
        self.archive = archive
        self.records = {info.filename: info for info in archive.infolist()}
        self.unread = dict(self.records)
        self.check_records(size)
        tops = [name.removesuffix("/data.pkl") for name in self.records if name.endswith("/data.pkl")]
        if len(tops) != 1 or "/" in tops[0]:
            raise ValueError(
                f"its archive holds {len(tops) or 'no'} data.pkl, must hold one: torch.save did not write it"
            )
        self.top = tops[0]
        self.storages: dict[str, Tensor] = {}

    def check_records(self, size: int) -> None:
        if len(self.records) != len(self.archive.infolist()):
            raise ValueError("its archive has two records of one name")
        for name, info in self.records.items():
            if "\\" in name or name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"its archive has a record {name[:80]!r}, which leads out of it")
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise ValueError(
                    f"record {name[:80]} of its archive is compressed; torch.save stores plain bytes"
                )
        if sum(info.file_size for info in self.records.values()) > size:
            raise ValueError(f"its archive says that its records are larger than the file; {REMEDY}")

    def read(self) -> Any:
        if f"{self.top}/constants.pkl" in self.records:
            raise ValueError("it is a TorchScript program; give the checkpoint that it was made of")
        order = f"{self.top}/byteorder"
        if order in self.records and self.read_small(order, 16) != b"little":
            raise ValueError(
                "it was written on a big-endian machine; load and save it anew there as safetensors"
            )
        content = self.read_small(f"{self.top}/data.pkl", MAX_PICKLE)
        result = Machine(self.load_storage).run(io.BytesIO(content))
        for name in list(self.unread):  # of no use, but damage there may mean that a name was damaged
            self.read_into(name, lambda chunk: None)
        return result

    def load_storage(self, given: tuple[Any, ...]) -> Tensor:
        key, dtype, numel, _ = parse_storage_id(given)
        nbytes = numel * dtype.itemsize
        if key not in self.storages:
            self.storages[key] = self.read_storage(f"{self.top}/data/{key}", nbytes)
        if self.storages[key].numel() != nbytes:
            raise ValueError(f"storage {key} has {self.storages[key].numel()} bytes, and {nbytes} elsewhere")
        return self.storages[key].view(dtype)

    def read_storage(self, name: str, nbytes: int) -> Tensor:
        if name not in self.records:
            raise ValueError(f"its archive lacks {name}; {REMEDY}")
        if self.records[name].file_size != nbytes:
            raise ValueError(
                f"record {name} has {self.records[name].file_size} bytes, a storage of {nbytes} was announced"
            )
        storage, done = torch.empty(nbytes, dtype=torch.uint8), 0
        target = memoryview(storage.numpy())

        def fill(chunk: bytes) -> None:
            nonlocal done
            target[done : done + len(chunk)] = chunk
            done += len(chunk)

        self.read_into(name, fill)
        return storage

    def read_small(self, name: str, most: int) -> bytes:
        if self.records[name].file_size > most:
            raise ValueError(f"record {name} has {self.records[name].file_size} bytes, more than {most}")
        chunks: list[bytes] = []
        self.read_into(name, chunks.append)
        return b"".join(chunks)

    def read_into(self, name: str, use: Callable[[bytes], None]) -> None:
        """A record in chunks; zipfile compares its checksum at the end, its length is compared here."""
        info = self.unread.pop(name, None) or self.records[name]
        done = 0
        with self.archive.open(info) as record:
            while chunk := record.read(CHUNK):
                done += len(chunk)
                use(chunk)
        if done != info.file_size:
            raise ValueError(f"record {name} ends after {done} of {info.file_size} bytes; {REMEDY}")


# ---- the format before torch 1.6 -------------------------------------------------------------------------------


def read_legacy(file: BinaryIO, size: int, start: bytes) -> Any:
    """Pickles of a magic number, the version, the machine, the object and the storages' keys; then the storages,
    each as its number of values (int64) and its bytes."""
    legacy = Legacy(size)
    with mmap.mmap(
        file.fileno(), 0, access=mmap.ACCESS_READ
    ) as pickles:  # a read takes no more than there is
        try:
            magic = Machine(no_storage).run(pickles)
        except ValueError as error:
            if start[:1] != b"\x80":
                raise ValueError(f"{what_it_is(start)}, no file that torch.save wrote") from error
            raise
        if magic != LEGACY_MAGIC:
            raise ValueError(
                "it is a pickle, but torch.save did not write it; save its state dict with torch.save"
            )
        version, machine = Machine(no_storage).run(pickles), Machine(no_storage).run(pickles)
        if version != LEGACY_PROTOCOL:
            raise ValueError(
                f"it has version {str(version)[:20]} of torch's old format, must be {LEGACY_PROTOCOL}"
            )
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise ValueError("it was written on a big-endian machine; load and save it anew there")
        result = Machine(legacy.load_storage).run(pickles)
        keys = Machine(no_storage).run(pickles)
        file.seek(pickles.tell())
    legacy.fill(file, keys)
    return result


def no_storage(given: tuple[Any, ...]) -> Tensor:
    raise ValueError("it has a storage where none can be")


def what_it_is(start: bytes) -> str:
    """The start of a foreign file in words."""
    head = start.lstrip()[:100].lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page (was the download refused?)"
    if start[8:9] == b"{" and b'"' in start[8:32]:
        return "it seems to be a safetensors file"
    if all(byte in b"\t\n\r\f" or byte >= 32 for byte in start):
        return f"it begins with {start[:24]!r}: a text"
    return f"it begins with {start[:8].hex(' ')}"


class Legacy:
    """The storages of the old format: announced by the pickle, filled from what follows it."""

    def __init__(self, size: int):
        self.left = size
        self.storages: dict[str, tuple[Tensor, torch.dtype]] = {}

    def load_storage(self, given: tuple[Any, ...]) -> Tensor:
        key, dtype, numel, view = parse_storage_id(given)
        if key not in self.storages:
            self.left -= numel * dtype.itemsize
            if self.left < 0:
                raise ValueError(f"it announces storages larger than the file (at {key!r}); {REMEDY}")
            self.storages[key] = (torch.empty(numel * dtype.itemsize, dtype=torch.uint8), dtype)
        storage, held = self.storages[key]
        if held != dtype or storage.numel() != numel * dtype.itemsize:
            raise ValueError(f"storage {key!r} has {storage.numel()} bytes of {held}, and others elsewhere")
        values = storage.view(dtype)
        return values if view is None else part_of(values, view)

    def fill(self, file: BinaryIO, keys: Any) -> None:
        if (
            not isinstance(keys, list)
            or set(map(str, keys)) != set(self.storages)
            or len(keys) != len(self.storages)
        ):
            raise ValueError(f"its list of storages does not fit its tensors; {REMEDY}")
        for key in keys:
            storage, dtype = self.storages[key]
            count = file.read(8)
            if len(count) < 8 or struct.unpack("<q", count)[0] * dtype.itemsize != storage.numel():
                raise ValueError(f"storage {key!r} is missing or of another size than announced; {REMEDY}")
            target, done = memoryview(storage.numpy()), 0
            while done < storage.numel():
                got = file.readinto(target[done : done + CHUNK])
                if not got:
                    raise ValueError(f"it ends within storage {key!r}; {REMEDY}")
                done += got


def part_of(values: Tensor, view: Any) -> Tensor:
    """The part of a storage that (key, offset, number) says."""
    if not (isinstance(view, tuple) and len(view) == 3 and all(type(v) is int and v >= 0 for v in view[1:])):
        raise ValueError("a part of a storage has no offset or number")
    _, offset, numel = view
    if offset + numel > values.numel():
        raise ValueError("a part of a storage does not lie inside it")
    return values[offset : offset + numel]

"""What stands beside a shard: the index of one tar, built once and read by mmap.

`<shard>.tar.idx` holds N+1 little-endian uint64 offsets, as Megatron-Energon writes them; the last is where
the end-of-archive blocks begin. `<shard>.tar.members.npy` says where each member lies and its crc32.
`<shard>.tar.json` is written last and makes the others valid. A folder that cannot be written to has its
indexes in a cache; those of a remote shard lie where the tar is cached, and stay when it goes. Nothing here is ever
pickled.
"""

import hashlib
import io
import json
import logging
import mmap
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from d2v_ds.data.cache import RemoteShard, acquire, drop, fetch_beside, remote_size
from d2v_ds.data.scan import MEMBER, crc32_of, scan_tar

VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The index of one tar; small enough to hold ten thousand, the columns stay on disk."""

    path: Path
    folder: Path
    """where the sidecars lie"""
    size: int
    """bytes of the tar"""
    num_samples: int
    extension_counts: dict[str, int]
    """extension -> samples that have it; the place of an extension here is a member's `field`"""
    members_sha256: str
    remote: RemoteShard | None = None
    """where the tar comes from, if it is not always there"""

    def __str__(self) -> str:
        return str(self.remote or self.path)

    def open(self) -> BinaryIO:
        """The tar; a remote one is fetched if it is not cached, and locked shared."""
        if self.remote is None:
            return self.path.open("rb", buffering=0)
        return acquire(self.remote, self.size, self.differs)

    def differs(self, path: Path) -> str | None:
        """How a tar that was fetched differs from what was indexed; None if not at all."""
        if path.stat().st_size != self.size:
            return f"{path.stat().st_size} bytes came, {self.size} were indexed"
        with path.open("rb", buffering=0) as file:
            wrong = [
                row["sample"]
                for row in self.members()
                if crc32_of(os.pread(file.fileno(), int(row["size"]), int(row["offset"]))) != row["crc32"]
            ]
        if not wrong:
            return None
        return f"{len(set(wrong))} of {self.num_samples} samples differ from the index (crc32)"

    def offsets(self) -> np.ndarray:
        """(N+1,) uint64 offsets of the samples."""
        return np.fromfile(sidecar(self.folder, self.path, "idx"), dtype="<u8")

    def members_file(self) -> Path:
        return sidecar(self.folder, self.path, "members.npy")

    def members(self) -> np.ndarray:
        """Rows of MEMBER in stored order, mmapped."""
        with self.members_file().open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # The rows are the end of the file. np.load parses the header with ast, 150 us for each shard opened.
        num_rows = sum(self.extension_counts.values())
        return np.frombuffer(content, dtype=MEMBER, offset=len(content) - num_rows * MEMBER.itemsize)


def build_index(path: Path, name: str | None = None) -> ShardIndex:
    """Scan a tar and write its sidecars; ValueError if it is truncated, corrupt or ambiguous.

    `name` is what messages call it.
    """
    path = Path(path)
    size = path.stat().st_size
    scan = scan_tar(path, name)
    members = npy_bytes(np.array(scan.members, dtype=MEMBER))
    offsets = np.array(scan.offsets, dtype="<u8").tobytes()
    record = {
        "version": VERSION,
        "size": size,
        "last_offset": scan.offsets[-2],
        "last_header": _header_crc32(path, scan.offsets[-2]),
        "samples": len(scan.offsets) - 1,
        "extensions": {extension: count for extension, (_, count) in scan.extensions.items()},
        "members_sha256": hashlib.sha256(members).hexdigest(),
        "sidecars": {"members.npy": len(members), "idx": len(offsets)},
    }
    record["sha256"] = _digest(record)
    folder = _index_folder(path, offsets)
    sidecar(folder, path, "json").unlink(missing_ok=True)
    write_atomically(sidecar(folder, path, "members.npy"), members)
    write_atomically(sidecar(folder, path, "idx"), offsets)
    write_atomically(sidecar(folder, path, "json"), json.dumps(record, indent=1).encode())
    return _from_record(path, folder, record)


def index_remote(shard: RemoteShard) -> ShardIndex:
    """The index that is published beside a remote tar, else built: the tar is fetched into the cache once."""
    shard.make_folder()
    if index := find_remote_index(shard):
        return index
    was_there = shard.path.is_file()
    try:
        return _build_remote_index(shard)
    except ValueError:
        if not was_there:
            raise
        return _build_remote_index(shard)  # what lay in the cache was cut; now it is what the server has


def _build_remote_index(shard: RemoteShard) -> ShardIndex:
    file = acquire(shard)
    try:
        return replace(load_remote_index(shard) or build_index(shard.path, str(shard)), remote=shard)
    except ValueError:
        file.close()
        drop(shard)  # what is read next time is what the server has then
        raise
    finally:
        file.close()


def find_remote_index(shard: RemoteShard) -> ShardIndex | None:
    """The index of a remote tar that is in the cache, or published beside the tar."""
    shard.make_folder()
    return load_remote_index(shard) or _fetch_index(shard)


def load_remote_index(shard: RemoteShard) -> ShardIndex | None:
    """The index of a remote tar if it is in the cache; the tar is compared with it when it is fetched."""
    index = stored_index(shard.path)
    return index and replace(index, remote=shard)


def _fetch_index(shard: RemoteShard) -> ShardIndex | None:
    content = fetch_beside(shard, "json")
    try:
        record = json.loads(content or b"")
        sizes = record["sidecars"]
        if record["version"] != VERSION or record["size"] != remote_size(shard):
            return None
        if record.get("sha256", "") not in ("", _digest(record)):
            return None
    except (ValueError, KeyError, TypeError):  # there is none, or it is another tool's
        return None
    fetched = {name: fetch_beside(shard, name) for name in ("members.npy", "idx")}
    if any(part is None or len(part) != sizes.get(name) for name, part in fetched.items()):
        return None
    if hashlib.sha256(fetched["members.npy"]).hexdigest() != record.get("members_sha256"):
        return None
    for name, part in [*fetched.items(), ("json", content)]:
        write_atomically(sidecar(shard.folder, shard.path, name), part)
    return load_remote_index(shard)


def fetch_column(index: ShardIndex, name: str) -> None:
    """Takes over the column that is published beside a remote tar, if there is one; whether it fits, loading says."""
    if index.remote and (content := fetch_beside(index.remote, f"{name}.npy")):
        write_atomically(sidecar(index.folder, index.path, f"{name}.npy"), content)


def load_index(path: Path) -> ShardIndex | None:
    """The index of a tar if it is there and not stale, else None.

    Sizes are multiples of 10 kB, so many rewritten tars keep theirs: the last sample's header is compared
    too. A tar that differs only elsewhere fails at each read by crc32.
    """
    return next((index for record, index in _stored(path) if index and _is_fresh(path, record)), None)


def read_record(path: Path) -> dict | None:
    """What the index of a tar says, whether or not it is whole and of this tar; None if there is none."""
    return next((record for record, _ in _stored(path)), None)


def stored_index(path: Path) -> ShardIndex | None:
    """The index of a tar if it is whole itself, be the tar as it may."""
    return next((index for _, index in _stored(path) if index), None)


def load_column(index: ShardIndex, name: str) -> np.ndarray | None:
    """A column of one uint32 per sample that `write_column` stored for this very tar, else None."""
    for folder in (index.path.parent, cache_folder(index.path)):
        file = sidecar(folder, index.path, f"{name}.npy")
        column = _map_column(file, index.num_samples + 1) if file.exists() else None
        if column is not None and column[-1] == _stamp(index):
            return column[:-1]
    return None


def _map_column(file: Path, length: int) -> np.ndarray | None:
    """What lies after the 128 bytes of a .npy header; np.load parses that with ast, 150 us for each shard."""
    if file.stat().st_size != 128 + 4 * length:
        return None
    with file.open("rb") as opened:
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(content, dtype="<u4", offset=128)


def write_column(index: ShardIndex, name: str, values: np.ndarray) -> None:
    """Store a column of one uint32 per sample, and a last entry that ties it to the tar's content."""
    file = sidecar(_writable_folder(index.path), index.path, f"{name}.npy")
    write_atomically(file, npy_bytes(np.append(values, _stamp(index)).astype("<u4")))


def sidecar(folder: Path, path: Path, name: str) -> Path:
    return folder / f"{path.name}.{name}"


def cache_folder(path: Path) -> Path:
    """Where the indexes of a folder lie that cannot be written to."""
    root = os.environ.get("D2V_INDEX_DIR") or Path.home() / ".cache" / "d2v_ds" / "index"
    folder = str(path.parent.absolute())
    return Path(root) / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]


def is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK)


def write_atomically(file: Path, content: bytes) -> None:
    """Write a temporary name, then rename: a reader sees the old file or the new one, never a part."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _writable_folder(path: Path) -> Path:
    if is_writable(path.parent):
        return path.parent
    folder = cache_folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _index_folder(path: Path, offsets: bytes) -> Path:
    """Where a new index goes: beside the tar, unless a .tar.idx of another tool is there that says something else, for
    what that tool reads must stay as it is."""
    folder = _writable_folder(path)
    theirs = sidecar(path.parent, path, "idx")
    if sidecar(path.parent, path, "members.npy").exists() or not theirs.exists():
        return folder
    content = theirs.read_bytes()
    if content == offsets:
        return folder
    count, found = len(content) // 8 - 1, len(offsets) // 8 - 1
    if (
        content[: 8 * found] != offsets[:-8] or count != found
    ):  # else only the end differs, which some put elsewhere
        log.warning(
            "%s names other samples than the tar has (%d, %d were found): it is of another tar, or of a tool that "
            "groups members otherwise; it is not used, and stays as it is",
            theirs,
            count,
            found,
        )
    folder = cache_folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _from_record(path: Path, folder: Path, record: dict) -> ShardIndex:
    return ShardIndex(
        path=path,
        folder=folder,
        size=record["size"],
        num_samples=record["samples"],
        extension_counts=record["extensions"],
        members_sha256=record["members_sha256"],
    )


def _stored(path: Path) -> Iterator[tuple[dict, ShardIndex | None]]:
    """(record, index) of each folder where a tar's index may lie; no index if it is not whole."""
    for folder in (path.parent, cache_folder(path)):
        file = sidecar(folder, path, "json")
        if not file.exists():
            continue
        try:
            record = json.loads(file.read_bytes())
            if record.get("sha256", "") not in ("", _digest(record)):
                raise ValueError("its bytes differ from those that were written")
            sizes = record["sidecars"] if record["version"] == VERSION else None
            is_whole = sizes is not None and all(
                _size_of(sidecar(folder, path, name)) == size for name, size in sizes.items()
            )
            yield record, _from_record(path, folder, record) if is_whole else None
        except (ValueError, KeyError, TypeError, AttributeError):  # damaged, or another tool's
            yield {}, None


def _digest(record: dict) -> str:
    """Of all that an index says but this; older indexes say none."""
    said = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _is_fresh(path: Path, record: dict) -> bool:
    if path.stat().st_size != record["size"]:
        return False
    return _header_crc32(path, record["last_offset"]) == record["last_header"]


def _header_crc32(path: Path, offset: int) -> int:
    with path.open("rb", buffering=0) as file:
        return crc32_of(os.pread(file.fileno(), 512, offset))


def _size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1


def _stamp(index: ShardIndex) -> int:
    return int(index.members_sha256[:8], 16)

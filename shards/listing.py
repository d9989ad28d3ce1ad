"""Which samples there are, and where the bytes of each member lie, before a byte of them is copied.

A source is listed in parts, by several processes. Each part writes three files, the last of which makes the others
valid: `<n>.jsonl`, a line a sample; `<n>.skipped.jsonl`, a line for whatever is left out, and why; `<n>-<stamp>.npy`,
a row a sample, with what the plan needs. So ten million samples are a few hundred MB of numbers in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from d2v_ds.data.scan import split_name
from shards.writer import tar_bytes, write_bytes

ROW = np.dtype([("part", "<u4"), ("offset", "<u8"), ("bytes", "<u8"), ("key", "<u8"), ("split", "<u2")])
"""part: its number; offset: of the line in it; bytes: in a tar; key: a hash, of the split's name too; split: its place
in `splits`."""

MAX_KEY = 180
"""Characters. A component of a path may have 255, and an extension follows."""


class Stored(NamedTuple):
    """A member's bytes: `size` of them from `offset` of a file."""

    file: str
    offset: int
    size: int
    is_whole: bool = False
    """The file holds nothing else, so another size of it means that it changed."""


class Found(NamedTuple):
    """A sample of a source."""

    key: str
    split: str
    members: dict[str, Stored | str]
    """extension -> where its bytes are, or its text itself; in the order of the tar"""


class Skipped(NamedTuple):
    """Something of a source that becomes no sample."""

    file: str
    reason: str


class Part(NamedTuple):
    """One piece of a source that one process lists: `list(scratch)` gives its samples in stored order.

    `scratch` is a folder for what must be unpacked before it can be read at any place. It stays until the last
    shard is written.
    """

    name: str
    list: Callable[[Path], Iterable[Found | Skipped]]
    stamp: str
    """Another one if the source is another: its size and time, for example."""


class Listing:
    """The listed parts of a source, merged; lines stay on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        record = json.loads((folder / "listing.json").read_text())
        self.splits: list[str] = record["splits"]
        self.num_skipped: int = record["skipped"]
        self.archives: dict[str, str] = record["archives"]
        """Files that hold many members, with their stamps when they were listed."""
        self.rows = np.load(folder / "rows.npy", mmap_mode="r", allow_pickle=False)
        self._open: dict[int, Any] = {}
        self._pid = os.getpid()

    @staticmethod
    def is_there(folder: Path) -> bool:
        return (folder / "listing.json").is_file()

    def read(self, row: int) -> Found:
        part, offset = int(self.rows[row]["part"]), int(self.rows[row]["offset"])
        if (
            self._pid != os.getpid()
        ):  # a forked worker opens its own files: offsets of inherited ones are shared
            self._open, self._pid = {}, os.getpid()
        if part not in self._open:
            if len(self._open) >= 64:
                self._open.pop(next(iter(self._open))).close()
            self._open[part] = (self.folder / f"{part}.jsonl").open("rb")
        file = self._open[part]
        file.seek(offset)
        key, split, members = json.loads(file.readline())
        return Found(
            key,
            split,
            {name: where if isinstance(where, str) else Stored(*where) for name, where in members.items()},
        )


def make_key(name: str) -> str:
    """A key from a file's path without its extension: ASCII, without dots or spaces, and another for any other path.

    Whatever is not A-Z a-z 0-9 _ - / is written %XX, as in addresses on the web, so `urllib.parse.unquote` gives the
    path again, unless it was too long: then its end is a hash. The extension of a member begins at the first dot of
    its name, so a dot in a key would be read as one; what lies in `__x__/` would be read as metadata of the tar.
    """
    key = quote(os.fsencode(name.lstrip("/") or "/"), safe="/").replace(".", "%2E").replace("~", "%7E")
    if key.endswith("/"):
        key = f"{key[:-1]}%2F"
    if split_name(f"{key}.txt") is None:
        key = f"%5F{key[1:]}"
    if len(key) <= MAX_KEY:
        return key
    return f"{key[: MAX_KEY - 17]}-{hash_key(key):016x}"


def hash_key(key: str, seed: int = 0) -> int:
    digest = hashlib.blake2b(key.encode(), digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def draw_split(key: str, seed: int, val: float) -> str:
    """`val` for a share `val` of all keys, drawn from the key, so that a sample keeps its split among others."""
    return "val" if hash_key(key, seed + 1) < val * 2**64 else "train"


def stamp_file(path: Path) -> str:
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def list_part(number: int, part: Part, folder: Path, scratch: Path) -> int:
    """Lists a part unless that is done; the number of its samples."""
    done = _rows_file(number, part, folder)
    if done.is_file():
        return len(np.load(done, mmap_mode="r", allow_pickle=False))
    rows, splits, skipped = [], [], []
    archives: dict[str, str] = {}

    def write_lines(file: Any) -> None:
        offset = 0
        for found in part.list(scratch):
            if isinstance(found, Skipped):
                skipped.append(found)
                continue
            if found.split not in splits:
                splits.append(found.split)
            for where in found.members.values():
                if isinstance(where, Stored) and not where.is_whole and where.file not in archives:
                    archives[where.file] = stamp_file(Path(where.file))
            line = json.dumps([found.key, found.split, found.members]).encode() + b"\n"
            sizes = [len(w.encode()) if isinstance(w, str) else w.size for w in found.members.values()]
            key = hash_key(f"{found.split}/{found.key}")
            rows.append((number, offset, tar_bytes(sizes), key, splits.index(found.split)))
            file.write(line)
            offset += len(line)

    write_bytes(folder / f"{number}.jsonl", write_lines)
    write_bytes(folder / f"{number}.skipped.jsonl", lambda file: write_skipped(file, skipped))
    write_bytes(
        folder / f"{number}.found.json", lambda file: file.write(json.dumps([splits, archives]).encode())
    )
    write_bytes(done, lambda file: np.save(file, np.array(rows, dtype=ROW), allow_pickle=False))
    return len(rows)


def merge_parts(parts: list[Part], folder: Path) -> None:
    """Joins what all parts listed: of samples of a split with one key the first stays. ValueError if there is none."""
    tables, splits, skipped = [], [], []
    archives: dict[str, str] = {}
    for number, part in enumerate(parts):
        table = np.load(_rows_file(number, part, folder), allow_pickle=False)
        own, files = json.loads((folder / f"{number}.found.json").read_text())
        archives |= files
        splits += [name for name in own if name not in splits]
        table["split"] = np.array([splits.index(name) for name in own] or [0], dtype="<u2")[table["split"]]
        tables.append(table)
        skipped.append((folder / f"{number}.skipped.jsonl").read_bytes())
    rows = np.concatenate([*tables, np.empty(0, dtype=ROW)])
    repeated = find_repeated(rows)
    write_bytes(folder / "rows.npy", lambda file: np.save(file, rows, allow_pickle=False))
    record = {"splits": splits, "skipped": 0, "archives": archives}
    if len(repeated):
        _write_record(folder, record)
        listing = Listing(folder)
        again = [Skipped(*_why_repeated(listing.read(int(row)))) for row in repeated]
        (folder / "listing.json").unlink()
        rows = np.delete(rows, repeated)
        write_bytes(folder / "rows.npy", lambda file: np.save(file, rows, allow_pickle=False))
        skipped.append(b"".join(map(skipped_line, again)))
    lines = b"".join(skipped)
    write_bytes(folder / "skipped.jsonl", lambda file: file.write(lines))
    record["skipped"] = lines.count(b"\n")
    if not len(rows):
        raise ValueError(nothing_found(lines))
    _write_record(folder, record)


def find_repeated(rows: np.ndarray) -> np.ndarray:
    """Rows whose key stood in an earlier row already, ascending."""
    order = np.argsort(rows["key"], kind="stable")
    keys = rows["key"][order]
    return np.sort(order[1:][keys[1:] == keys[:-1]])


def write_skipped(file: Any, skipped: Iterable[Skipped]) -> None:
    for item in skipped:
        file.write(skipped_line(item))


def skipped_line(item: Skipped) -> bytes:
    return json.dumps({"file": item.file, "reason": item.reason}).encode() + b"\n"


def nothing_found(lines: bytes) -> str:
    """Why a source gives no sample at all."""
    reasons: dict[str, int] = {}
    for line in lines.splitlines():
        reason = json.loads(line)["reason"]
        reasons[reason] = reasons.get(reason, 0) + 1
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda x: -x[1])[:8])
    return f"the source holds no sample: {why or 'it is empty'}; name a folder or file that holds some"


def _why_repeated(found: Found) -> tuple[str, str]:
    files = [where.file for where in found.members.values() if isinstance(where, Stored) and where.is_whole]
    return (files or [found.key])[0], f"key {found.key} is there already"


def _rows_file(number: int, part: Part, folder: Path) -> Path:
    return folder / f"{number}-{hashlib.blake2b(part.stamp.encode(), digest_size=8).hexdigest()}.npy"


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    write_bytes(folder / "listing.json", lambda file: file.write(json.dumps(record).encode()))

"""What lies in the folder of a shard, or above it, beside the tars? Small files, here or at a URL."""

from __future__ import annotations

import glob
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from d2v_ds.data import remote
from d2v_ds.data.cache import RemoteShard, locked
from d2v_ds.data.shard import write_atomically

SECONDS_FRESH = 60
"""So long what a server said of a small file counts, for all processes of a machine: ranks that start ask once."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes | None:
        """The content of a file by its path inside the folder; None if there is none."""
        file = self.path / name
        return file.read_bytes() if file.is_file() else None

    read_lately = read

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def with_parents(self) -> Iterator[LocalFolder]:
        """This one, and those above it."""
        folder = self.path.absolute()
        yield from map(LocalFolder, (folder, *folder.parents))

    def name_of(self, shard: Path | RemoteShard) -> str:
        """How a shard below this folder is called from here."""
        assert isinstance(shard, Path), f"{shard} does not lie in {self}"
        return shard.absolute().relative_to(self.path).as_posix()


@dataclass(frozen=True)
class RemoteFolder:
    """What a URL stands for without its last part."""

    url: str
    settings: remote.Remote = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes | None:
        """As a local one; a page of HTML is what some servers say of a file that they do not have."""
        with remote.reading(self.settings):
            try:
                content = remote.read_all(f"{self.url}/{name}")
            except remote.Missing:
                return None
        return None if content.lstrip()[:1] == b"<" else content

    def read_lately(self, name: str) -> bytes | None:
        """What the server says of a file now or said within a minute; while it cannot be reached, what it said last.

        RemoteError if it was never reached.
        """
        place = RemoteShard(f"{self.url}/{name}", self.settings)
        place.make_folder()
        kept = place.folder / "content"  # empty: there is no such file
        with locked(place.folder / "lock"):
            if not kept.exists():
                write_atomically(kept, self.read(name) or b"")
            elif time.time() - kept.stat().st_mtime > SECONDS_FRESH:
                hasty = self.settings.model_copy(update={"retry_minutes": 1e-3})
                try:
                    write_atomically(kept, RemoteFolder(self.url, hasty).read(name) or b"")
                except remote.RemoteError as error:
                    log.warning("what %s/%s said last is taken, since now: %s", self.url, name, error)
                    kept.touch()
            return kept.read_bytes() or None

    def has(self, name: str) -> bool:
        with remote.reading(self.settings):
            try:
                remote.size_of(f"{self.url}/{name}")
            except remote.Missing:
                return False
        return True

    def with_parents(self) -> Iterator[RemoteFolder]:
        """This one, and those above it that are no more than a server, a bucket or a repository."""
        scheme, _, path = self.url.partition("://")
        parts = path.split("/")
        fewest = 1
        if scheme == "hf":
            fewest = 3 if parts[0] in ("datasets", "spaces", "buckets") else 2
        for count in range(len(parts), fewest - 1, -1):
            yield RemoteFolder(f"{scheme}://{'/'.join(parts[:count])}", self.settings)

    def name_of(self, shard: Path | RemoteShard) -> str:
        """How a shard below this folder is called from here."""
        assert isinstance(shard, RemoteShard), f"{shard} does not lie in {self}"
        name = shard.url.removeprefix(f"{self.url}/")
        return unquote(name) if shard.url.startswith("http") else name


Folder = LocalFolder | RemoteFolder


def folder_of(shard: Path | RemoteShard) -> Folder | None:
    """Where a shard lies; None for the output of a command or of a script."""
    if isinstance(shard, Path):
        return LocalFolder(shard.absolute().parent)
    if shard.url.startswith("pipe:") or urlsplit(shard.url).query:
        return None
    return RemoteFolder(shard.url.rpartition("/")[0], shard.settings)


def is_pattern(part: str) -> bool:
    """Whether a part of `data=` names shards itself."""
    if os.path.isdir(part):
        return False
    return part.endswith(".tar") or bool(set(part) & set("*{?")) or part.startswith("pipe:")


def as_folder(folder: str) -> tuple[str, Folder | None]:
    """A folder as a pattern, since its own name may have brackets and braces, and what reads its files."""
    if os.path.isdir(folder):
        return re.sub(r"([\\{},])", r"\\\1", glob.escape(folder)), LocalFolder(Path(folder))
    if remote.is_url(folder):
        remote.check_url(folder)
        return folder, RemoteFolder(folder.rstrip("/"), remote.settings())
    return folder, None

"""Where do remote shards lie while they are used? Whole, in a folder with a byte limit that many processes share.

Each URL has a folder of its own, named by its hash: `lock`, `url`, the index beside where the tar lies, the tar itself
while it is cached, and `<name>.part` while it is fetched. Sizes count before a byte is fetched: the space is reserved.
Who reads holds a shared lock on the open file; what is evicted is locked alone, cut to nothing, which frees the disk at
once, and unlinked. What goes first is what the plans of all running loaders need last; locks die with their process.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from d2v_ds.data import remote
from d2v_ds.data.remote import Remote, RemoteError

TRIES = 3
"""Of a shard whose bytes are not the indexed ones."""
_WAIT = 0.05
_SECONDS_OF_PATIENCE = 2.0
"""Before a shard that is needed now displaces one that a plan names, and, if no plan names it, one that was just used:
who plans may be behind who reads."""

log = logging.getLogger(__name__)


class NoRoom(RemoteError):
    """The cache is full of what is needed sooner."""


class TooLarge(RemoteError):
    """The cache may not hold it."""


@dataclass(frozen=True)
class RemoteShard:
    """A tar elsewhere, and its place in the cache."""

    url: str
    settings: Remote = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    @property
    def root(self) -> Path:
        chosen = self.settings.cache or os.environ.get("D2V_CACHE_DIR")
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "d2v_ds" / "shards"

    @property
    def limit(self) -> int:
        return int(min(self.settings.cache_gib, 1 << 30) * (1 << 30))  # it may be infinite

    @property
    def id(self) -> str:
        return hashlib.sha256(self.url.encode()).hexdigest()[:24]

    @property
    def name(self) -> str:
        """The file's own; of a command the last word that ends in .tar."""
        if self.url.startswith("pipe:"):
            names = re.findall(r"[\w.-]+\.tar\b", self.url)
            return names[-1] if names else f"pipe-{self.id[:8]}.tar"
        base = urlsplit(self.url).path.rpartition("/")[2]
        return base if base.endswith(".tar") else f"{base or 'shard'}.tar"

    @property
    def folder(self) -> Path:
        return self.root / self.id

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def make_folder(self) -> None:
        try:
            if not (self.folder / "url").is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "url").write_text(self.url + "\n")
        except OSError as error:
            raise RemoteError(
                f"the cache {self.root} cannot be written: {error.strerror}; set remote.cache (--cache) to a folder "
                "on a disk of this machine that can be"
            ) from error


def acquire(
    shard: RemoteShard,
    size: int | None = None,
    check: Callable[[Path], str | None] | None = None,
    position: int = -1,
) -> BinaryIO:
    """The open file of a shard, locked shared; fetched if it is not in the cache.

    `size`: what it must have; `check`: what is wrong with a fetched file, or None. `position`: where it stands in the
    plan; -1 = it is needed now. RemoteError if it cannot be had, NoRoom if only what is needed sooner could make room.
    """
    shard.make_folder()
    deadline = time.monotonic() + 60 * shard.settings.retry_minutes
    while True:
        if file := open_locked(shard.path):
            found = os.fstat(file.fileno()).st_size
            if size in (None, found):
                return file
            file.close()
            if not drop(shard):  # cut by a crash of the machine, or replaced, and somebody reads it
                if time.monotonic() > deadline:
                    raise RemoteError(
                        f"{shard.path} has {found} bytes, when {shard} was indexed {size}, and other processes read "
                        "it; wait for them, or set another remote.cache"
                    )
                time.sleep(_WAIT)
            continue
        with locked(shard.folder / "lock"):
            if not shard.path.is_file():  # no other process fetched it meanwhile
                with remote.reading(shard.settings):
                    return _fetch(shard, size, check, position)


def is_gone(file: BinaryIO) -> bool:
    """Whether a locked file was evicted before it was locked."""
    return os.fstat(file.fileno()).st_nlink == 0


def open_locked(path: Path) -> BinaryIO | None:
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if is_gone(file):
        file.close()
        return None
    with suppress(PermissionError):  # another user's
        os.utime(file.fileno())
    return file


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with it.

    NOTE: given back by name, since a process that was forked meanwhile has the file open too, and would keep it.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def fetch_beside(shard: RemoteShard, name: str) -> bytes | None:
    """`<url>.<name>`, if it is published; sidecars are kept and do not count."""
    if shard.url.startswith("pipe:") or urlsplit(shard.url).query:
        return None
    with remote.reading(shard.settings):
        try:
            return remote.read_all(f"{shard.url}.{name}")
        except remote.Missing:
            return None


def drop(shard: RemoteShard) -> bool:
    """Removes a tar from the cache, so that what is read next is what the server has; False if it is being read."""
    _remove(shard.path)
    return not shard.path.is_file()


def remote_size(shard: RemoteShard) -> int | None:
    with remote.reading(shard.settings):
        return remote.size_of(shard.url)


def _fetch(
    shard: RemoteShard, size: int | None, check: Callable[[Path], str | None] | None, position: int
) -> BinaryIO:
    found, tag = remote.version_of(shard.url)
    if size is not None and found is not None and found != size:
        raise RemoteError(
            f"{shard} has {found} bytes, when it was indexed {size}: it was replaced. Give back the old one, or remove "
            f"{shard.folder}, and it is indexed anew"
        )
    part = shard.folder / f"{shard.name}.part"
    with locked(
        shard.root / "lock"
    ):  # or another process finds it before it is locked, and takes it for abandoned
        part.unlink(missing_ok=True)  # of a process that was killed
        file = part.open("x+b", buffering=0)
        fcntl.flock(file, fcntl.LOCK_SH)
    try:
        for attempt in range(1, TRIES + 1):
            _receive(shard, file, size or found, position)
            if check:
                problem = check(part)
            else:  # nothing else says that all pieces are of one file
                before, (found, tag) = (found, tag), remote.version_of(shard.url)
                problem = "it was replaced while it was fetched" if before != (found, tag) else None
            if problem is None:
                break
            log.warning("%s: %s (try %d of %d)", shard, problem, attempt, TRIES)
        os.fsync(file.fileno())  # else what a crash of the machine leaves under its name may be zeros
        with locked(
            shard.root / "lock"
        ):  # or who adds up what lies there misses a file that changes its name
            os.replace(part, shard.path)
        return file
    except BaseException:
        file.close()
        part.unlink(missing_ok=True)
        raise


def _receive(shard: RemoteShard, file: BinaryIO, size: int | None, position: int) -> None:
    """Fills the file; the pipe's whole output again if its command fails, or others that grow keep its room."""
    began = time.monotonic()
    with ExitStack() as turn:
        is_alone = size is not None
        while True:
            done = 0
            reserve(shard, file, size or 0, position)
            try:
                for piece in remote.pieces(shard.url, size):
                    if size is None:
                        seconds = None if is_alone else 2 * _SECONDS_OF_PATIENCE
                        reserve(shard, file, done + len(piece), position, seconds)
                    _write(file, piece, done)
                    done += len(piece)
            except NoRoom:
                if is_alone:
                    raise
                os.ftruncate(file.fileno(), 0)  # else files that grow wait for each other
                turn.enter_context(locked(shard.root / "growing"))
                is_alone, began = True, time.monotonic()
                continue
            except RemoteError as error:
                if not shard.url.startswith("pipe:") or isinstance(error, TooLarge):
                    raise
                if time.monotonic() - began > 60 * shard.settings.retry_minutes or size is None and done == 0:
                    raise
                time.sleep(remote.FIRST_WAIT)
                continue
            if size is not None and done != size:
                raise RemoteError(
                    f"{shard} gave {done} bytes, when it was indexed it had {size}: it was replaced, or cut"
                )
            os.ftruncate(file.fileno(), done)
            return


def _write(file: BinaryIO, piece: bytes, at: int) -> None:
    view = memoryview(piece)
    while view:
        written = os.pwrite(file.fileno(), view, at)
        view, at = view[written:], at + written


# ---- room ----


def reserve(
    shard: RemoteShard, file: BinaryIO, size: int, position: int, seconds: float | None = None
) -> None:
    """Disk space for `size` bytes of a file in the cache, evicting what is needed later than `position`; NoRoom
    after so many seconds, None: `retry_minutes`."""
    if size > shard.limit:
        raise TooLarge(
            f"{shard} has {size / 1e6:.1f} MB, the cache {shard.root} may hold {shard.limit / 1e6:.1f} MB; "
            f"set remote.cache_gib to {_gib(2 * size)} or more"
        )
    began = time.monotonic()
    deadline = began + (60 * shard.settings.retry_minutes if seconds is None else seconds)
    is_patient = position < 0 and not shard.settings.refetch
    while True:
        with locked(shard.root / "lock"):
            waits = is_patient and time.monotonic() < began + _SECONDS_OF_PATIENCE
            plans = needs(shard.root) if waits else {}
            unused_for = _SECONDS_OF_PATIENCE if plans and shard.id not in plans else -math.inf
            reason = _try_to_reserve(shard, file, size, math.inf if waits else position, unused_for)
        if reason is None:
            return
        if position >= 0 or time.monotonic() > deadline:
            raise NoRoom(f"{shard} of {size / 1e6:.1f} MB has no room: {reason}")
        time.sleep(_WAIT)  # until readers let go


def _try_to_reserve(
    shard: RemoteShard, file: BinaryIO, size: int, position: float, unused_for: float
) -> str | None:
    """Why there is no room; None if there is, and then it is taken."""
    own = os.fstat(file.fileno()).st_size
    if size <= own:
        return None
    over = used(shard.root) - own + size - shard.limit
    freed = evict(shard.root, over, position, unused_for) if over > 0 else 0
    if freed < over:
        return (
            f"the cache {shard.root} is full of shards that are in use (limit {shard.limit / 1e6:.1f} MB); set "
            "remote.cache_gib higher"
        )
    while True:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return None
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            if not evict(shard.root, size, position, unused_for):
                free = shutil.disk_usage(shard.root).free
                return (
                    f"the disk of {shard.root} is full ({free / 1e6:.1f} MB are free, the cache holds "
                    f"{used(shard.root) / 1e6:.1f} MB of its limit of {shard.limit / 1e6:.1f} MB); free some, or set "
                    "remote.cache to a folder on another disk"
                )


def used(root: Path) -> int:
    """Bytes of all shards in the cache, those being fetched included; removes what killed processes left."""
    total = 0
    for entry in _files(root):
        if entry.name.endswith(".part") and _is_abandoned(Path(entry.path)):
            Path(entry.path).unlink(missing_ok=True)
            continue
        try:
            total += entry.stat().st_size
        except FileNotFoundError:
            continue
    return total


def evict(root: Path, size: int, position: float = -1, unused_for: float = -math.inf) -> int:
    """Removes at least `size` bytes if it can; how many it did. Nothing that is being read, or needed by `position`, or
    was opened within `unused_for` seconds."""
    next_use = needs(root)
    oldest = time.time() - unused_for
    candidates = []
    for entry in _files(root):
        if entry.name.endswith(".part"):
            continue
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue
        needed = next_use.get(Path(entry.path).parent.name, math.inf)
        if (needed > position or needed == math.inf) and status.st_atime <= oldest:
            candidates.append((-needed, status.st_atime_ns, entry.path))
    freed = 0
    for _, _, path in sorted(candidates):
        if freed >= size:
            break
        freed += _remove(Path(path))
    return freed


def _remove(path: Path) -> int:
    """Bytes that were freed: none if someone reads it."""
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        return 0
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        size = os.fstat(file.fileno()).st_size
        path.unlink(missing_ok=True)
        os.ftruncate(file.fileno(), 0)  # who has it open keeps no disk space
    return size


def _files(root: Path) -> Iterator[os.DirEntry]:
    """Tars and parts."""
    for folder in os.scandir(root):
        if not folder.is_dir():
            continue
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if entry.name.endswith((".tar", ".part")))


def _is_abandoned(part: Path) -> bool:
    try:
        with part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True


def _gib(size: float) -> str:
    return f"{max(size / (1 << 30), 0.01):.2g}"


# ---- what is needed next ----


class Needs:
    """What one loader needs, soonest first, for all who evict; gone when its process is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "plans").mkdir(parents=True, exist_ok=True)
        with locked(root / "lock"):
            self._file = (root / "plans" / f"{os.getpid()}-{time.monotonic_ns()}").open("w+")
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def write(self, shards: list[RemoteShard]) -> None:
        with locked(self.root / "lock"):
            self._file.seek(0)
            self._file.truncate()
            self._file.write("\n".join(shard.id for shard in shards))
            self._file.flush()

    def close(self) -> None:
        Path(self._file.name).unlink(missing_ok=True)
        self._file.close()


def needs(root: Path) -> dict[str, int]:
    """id of a shard -> its place in the plan that needs it first; the root's lock is held."""
    places: dict[str, int] = {}
    folder = root / "plans"
    for path in folder.iterdir() if folder.is_dir() else ():
        with path.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                for place, shard_id in enumerate(file.read().split()):
                    places[shard_id] = min(place, places.get(shard_id, place))
                continue
        path.unlink(missing_ok=True)  # its process is gone
    return places

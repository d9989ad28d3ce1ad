"""Files from the web that arrive whole or not at all: resumed by byte ranges, tried again, checked by checksum.

What has arrived lies in `<name>.part` and is gone on with, after a broken connection as after a kill; the file has its
own name only when its length, and its checksum where one is published, are right. Length alone proves little: servers
end bodies early and answer with pages of their own.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from d2v_ds import __version__
from d2v_ds.data.progress import ProgressLine
from shards.writer import write_bytes

CHUNK = 1 << 20
CONNECTIONS = 4
"""Files at a time."""
TIMEOUT_SECONDS = 60.0
"""Without a byte, then the connection is given up and opened again."""
FAILURES = 8
"""In a row without a byte, then a file is given up."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before trying again; each wait is twice the one before."""
PASSING = {408, 425, 429, 500, 502, 503, 504}
"""HTTP answers that another try may not give."""


class Remote(NamedTuple):
    """One file of the web."""

    name: str
    urls: tuple[str, ...]
    """The same file in several places, best first."""
    checksum: str | None = None
    """"md5:..." or "sha256:...", as published"""


class Refused(Exception):
    """An answer that no other try will change."""


class Again(Exception):
    """A failure that another try may mend."""


def fetch_all(remotes: list[Remote], folder: Path, records: Path, say: Any) -> list[Path]:
    """The paths of the files, several downloaded at a time; `records` holds what was checked already.

    Raises ValueError if one cannot be had, or has another checksum twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [remote for remote in remotes if not (folder / remote.name).is_file()]
    if missing:
        say(f"downloading {len(missing)} files to {folder}: {', '.join(remote.name for remote in missing)}")
    unchecked = [remote.name for remote in missing if remote.checksum is None]
    if unchecked:
        say(f"no checksum is known of {', '.join(unchecked)}: their length alone is checked")
    traffic = Traffic()
    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        running = [pool.submit(fetch, remote, folder, records, traffic) for remote in remotes]
        line = ProgressLine(1, what="downloaded", unit="MB")
        while not all(future.done() for future in running):
            line.total, line.start = max(traffic.total // 1_000_000, 1), traffic.before // 1_000_000
            line.show(traffic.done // 1_000_000)
            time.sleep(0.05)
        line.close()
        return [future.result() for future in running]
    finally:
        traffic.stop.set()  # after an interrupt: the threads end at their next chunk
        pool.shutdown(cancel_futures=True)


class Traffic:
    """Bytes of all files together, for the line of progress."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.before = 0
        """Bytes that were there before this run."""
        self._files: dict[str, tuple[int, int]] = {}

    @property
    def done(self) -> int:
        return sum(done for done, _ in list(self._files.values()))

    @property
    def total(self) -> int:
        return sum(total for _, total in list(self._files.values()))

    def count(self, name: str, done: int, total: int) -> None:
        """A file has so many bytes now, of so many."""
        if name not in self._files:
            self.before += done
        self._files[name] = done, total


def fetch(remote: Remote, folder: Path, records: Path, traffic: Traffic | None = None) -> Path:
    """Downloads one file unless it is there, and checks it."""
    path = folder / remote.name
    if path.is_file():
        verify(path, remote.checksum, records)
        return path
    part = folder / f"{remote.name}.part"
    with locked(part):
        if path.is_file():  # arrived while this process waited
            return path
        found = []
        for attempt in range(2):
            download(remote, part, traffic or Traffic(), attempt)
            if remote.checksum is None:
                break
            found.append(digest(part, remote.checksum.partition(":")[0]))
            if found[-1] == remote.checksum:
                break
            part.unlink()
        else:
            raise ValueError(
                f"{remote.name} has the checksum {' and then '.join(found)}, but {remote.checksum} is published: the "
                f"server {' or '.join(remote.urls)} gives another file. Try again later, or download it elsewhere into "
                f"{folder}"
            )
        os.replace(part, path)
        state_of(part).unlink(missing_ok=True)
        record_verified(path, remote.checksum, records)
    return path


def download(remote: Remote, part: Path, traffic: Traffic, turn: int = 0) -> None:
    """Fills `part` to its end, from where it ends now; begins with the mirror at `turn`."""
    failures, restarts, mirror, refused = 0, 0, turn, {}
    while True:
        url = remote.urls[mirror % len(remote.urls)]
        size = size_of(part)
        try:
            receive(url, part, traffic)
            return
        except Refused as error:
            refused[url] = str(error)
            if len(refused) == len(remote.urls):
                told = "; ".join(f"{url}: {why}" for url, why in refused.items())
                raise ValueError(f"{remote.name} cannot be downloaded: {told}") from error
            mirror += 1
            continue
        except (Again, OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.filename is not None or traffic.stop.is_set():
                raise  # the disk's, not the connection's
            failures = 0 if size_of(part) > size else failures + 1
            restarts += size_of(part) < size
            if max(failures, restarts) >= FAILURES:
                why = f"{failures} tries in a row brought nothing"
                if restarts >= FAILURES:
                    why = f"it had to be begun again {restarts} times"
                raise ValueError(
                    f"{remote.name} cannot be downloaded: {why}, at last {url}: "
                    f"{error}. What arrived is kept, and the same command goes on"
                ) from error
            if failures:
                mirror += 1
            traffic.stop.wait(min(FIRST_WAIT * 2**failures, LONGEST_WAIT))


def receive(url: str, part: Path, traffic: Traffic) -> None:
    """Appends to `part` what a server has of the file beyond; Again unless the end is reached."""
    start = size_of(part)
    state = read_state(part)
    headers = {"User-Agent": f"d2v_ds/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if state.get("url") == url and state.get("etag"):
            headers["If-Range"] = state["etag"]  # another version now: the whole of it
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and start:
                if total_of(error.headers) == start:
                    return
                part.unlink()
                raise Again("what arrived is longer than the file is; beginning again") from error
            if error.code in PASSING:
                raise Again(f"HTTP {error.code} {error.reason}") from error
            raise Refused(f"HTTP {error.code} {error.reason}") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise Refused(str(error)) from error
    with answer:
        is_rest = answer.status == 206
        if is_rest and range_start(answer.headers) != start:
            raise Again(f"asked for bytes from {start}, got {answer.headers.get('Content-Range')}")
        total = length = length_of(answer.headers)
        if is_rest:  # "bytes 5-9/*" says no total
            total = total_of(answer.headers) or (start + length if length is not None else None)
        if is_rest and state.get("size") not in (None, total):
            part.unlink()
            raise Again(f"has {total} bytes now, had {state['size']}; beginning again")
        etag = answer.headers.get("ETag", "")
        write_state(part, {"url": url, "size": total, "etag": "" if etag.startswith("W/") else etag})
        traffic.count(part.name, start if is_rest else 0, total or 0)
        write_answer(answer, part, start if is_rest else 0, total, traffic)
    if total is not None and size_of(part) != total:
        raise Again(f"the connection ended after {size_of(part)} of {total} bytes")


def write_answer(answer: Any, part: Path, start: int, total: int | None, traffic: Traffic) -> None:
    with part.open("r+b" if start else "wb", buffering=0) as file:
        file.seek(start)
        file.truncate()
        while piece := answer.read1(CHUNK):
            write_piece(file, piece, part)
            start += len(piece)
            traffic.count(part.name, start, total or 0)
            if traffic.stop.is_set():
                raise Again("stopped")
        os.fsync(file.fileno())


def write_piece(file: Any, piece: bytes, part: Path) -> None:
    """With the name of the file in the error: a full disk is no broken connection."""
    try:
        while piece := piece[file.write(piece) :]:
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(part)) from error


def length_of(headers: Any) -> int | None:
    length = headers.get("Content-Length", "")
    return int(length) if re.fullmatch(r"[0-9]+", length) else None


def total_of(headers: Any) -> int | None:
    """The length of the whole file, as `Content-Range` says it."""
    found = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def range_start(headers: Any) -> int | None:
    found = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
    return int(found[1]) if found else None


# ---- what was checked ----


def check(path: Path, checksum: str | None, records: Path, say: Any) -> None:
    """A file that was there, and says so; one without a checksum cannot be checked, and that is said too."""
    known = f"checking {path}" if checksum else f"no checksum is known of {path}: it is taken unchecked"
    say(known)
    verify(path, checksum, records)


def verify(path: Path, checksum: str | None, records: Path) -> None:
    """ValueError if the file is not the published one. What was checked once is not read again."""
    if checksum is None or verified(path, checksum, records):
        return
    found = digest(path, checksum.partition(":")[0])
    if found != checksum:
        raise ValueError(
            f"{path} has the checksum {found}, but {checksum} is published: it is damaged, incomplete or another "
            "file; remove it and get it again"
        )
    record_verified(path, checksum, records)


def verified(path: Path, checksum: str, records: Path) -> bool:
    file = records / f"{path.name}.json"
    return file.is_file() and json.loads(file.read_bytes()) == stamp(path, checksum)


def record_verified(path: Path, checksum: str | None, records: Path) -> None:
    records.mkdir(parents=True, exist_ok=True)
    content = json.dumps(stamp(path, checksum)).encode()
    write_bytes(records / f"{path.name}.json", lambda file: file.write(content))


def stamp(path: Path, checksum: str | None) -> list[Any]:
    status = path.stat()
    return [checksum, status.st_size, status.st_mtime_ns]


def digest(path: Path, kind: str) -> str:
    """ "md5:..." or "sha256:..." of a file."""
    if kind not in ("md5", "sha256"):
        raise ValueError(f"checksum of kind {kind!r}; md5 and sha256 are known")
    content = hashlib.new(kind)
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            content.update(piece)
    return f"{kind}:{content.hexdigest()}"


def read_checksums(path: Path) -> dict[str, str]:
    """name -> checksum, of a file as md5sum and sha256sum write it."""
    kinds = {32: "md5", 64: "sha256"}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        value, _, name = line.strip().partition(" ")
        if not line.strip():
            continue
        if len(value) not in kinds or not re.fullmatch("[0-9a-fA-F]+", value) or not name.strip(" *"):
            raise ValueError(f"{path}: line {number} is not as md5sum or sha256sum writes it: {line!r}")
        found[name.strip(" *").rpartition("/")[2]] = f"{kinds[len(value)]}:{value.lower()}"
    return found


# ---- what arrived ----


def size_of(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def state_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def read_state(part: Path) -> dict[str, Any]:
    file = state_of(part)
    return json.loads(file.read_bytes()) if file.is_file() and size_of(part) else {}


def write_state(part: Path, state: dict[str, Any]) -> None:
    write_bytes(state_of(part), lambda file: file.write(json.dumps(state).encode()))


@contextmanager
def locked(part: Path) -> Iterator[None]:
    """One process downloads a file; the lock goes with it."""
    with part.with_name(part.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{part} is being downloaded by another process; wait for it") from error
        yield
        Path(file.name).unlink(missing_ok=True)

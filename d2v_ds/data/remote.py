"""How do the bytes of a URL arrive? In ranges by fsspec and its kin, or from a command; tried again and again.

A client is imported when a URL of its scheme is first read. What a server gives is never trusted to be whole: what is
missing of a range is asked for again.
"""

from __future__ import annotations

import logging
import os
import random
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from pydantic import PositiveFloat, PositiveInt, ValidationError

from d2v_ds.config import Config, explain

CLIENTS = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
}
PIECE, SMALLEST_PIECE = 8 << 20, 64 << 10
"""Bytes of a request; after a failure half of it."""
UNRANGED = 128 << 20
"""Bytes that are taken of an answer by a server without ranges, which begins anew each time."""
CONNECT_SECONDS, SILENT_SECONDS = 20, 30
"""Without an answer, without a byte: then the connection is given up and opened again."""
LONGEST_SILENCE = 1e9
"""Of a command, where `retry_minutes` is infinite: what `select` takes."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before trying again; each wait is twice the one before."""
SECONDS_UNTOLD = 5.0
"""Of trying again before it is said."""
PASSING = {408, 425, 429, 500, 502, 503, 504}
"""HTTP answers that another try may not give."""
TAGS = "ETag", "etag", "generation", "blob_id", "Last-Modified"
"""What the clients call a file's version."""

log = logging.getLogger(__name__)


class Remote(Config):
    """Shards that lie elsewhere: fetched whole, ahead of their use, into a cache that a machine's processes share."""

    cache: str | None = None
    """Folder of the cache; None = $D2V_CACHE_DIR, else ~/.cache/d2v_ds/shards. On a disk of the machine."""
    cache_gib: PositiveFloat = 100.0
    """The most that shards take there; what is needed last goes first."""
    connections: PositiveInt = 4
    """Shards fetched at a time."""
    retry_minutes: PositiveFloat = 10.0
    """How long a server that gives nothing is tried again."""
    refetch: bool = False
    """Whether a run may start whose shards do not fit the cache and will be fetched again and again."""
    pipe: bool = False
    """Whether `pipe:COMMAND` may run commands."""


def remote_of(**values: Any) -> Remote:
    """Checked settings; one ValueError for what does not fit."""
    try:
        return Remote(**values)
    except ValidationError as error:
        raise explain(error, Remote.model_fields, "remote shards") from error


_settings: ContextVar[Remote] = ContextVar("remote")


@contextmanager
def reading(settings: Remote) -> Iterator[None]:
    """URLs that are opened meanwhile are read so."""
    token = _settings.set(settings)
    try:
        yield
    finally:
        _settings.reset(token)


def settings() -> Remote:
    return _settings.get(None) or Remote()


class RemoteError(OSError):
    """A remote shard cannot be had; the message says which, why, and what to do."""


class Missing(RemoteError):
    """There is nothing at a URL, or it may not be read."""


def is_url(pattern: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", pattern) is not None


def check_url(url: str) -> None:
    """ValueError for a scheme that is not read, a command that is not allowed, or a client that is not installed."""
    scheme = url.partition(":")[0]
    if scheme == "pipe":
        if not settings().pipe:
            raise ValueError(
                f"{url!r} would run a command; if you trust it, allow it by remote.pipe=true (other "
                "commands: --pipe)"
            )
        return
    if scheme not in CLIENTS or not url.startswith(f"{scheme}://"):
        known = ", ".join(f"{name}://" for name in CLIENTS)
        raise ValueError(
            f"{url!r} is no URL that shards can be read from; known are {known} and pipe:COMMAND"
        )
    try:
        import_module(CLIENTS[scheme])
    except ImportError as error:
        raise ValueError(
            f"{url!r} needs {CLIENTS[scheme]}, which is not installed: pip install 'd2v_ds[remote]'"
        ) from error


def expand_url(url: str) -> list[str]:
    """The URLs of tars that a name, a glob or a folder stands for; braces are expanded before.

    RemoteError if the server does not say, ValueError if there are none.
    """
    check_url(url)
    scheme = url.partition(":")[0]
    has_magic = set("*[") & set(url) if scheme in ("http", "https") else set("*[?") & set(url)
    if scheme == "pipe" or not has_magic and urlsplit(url).path.endswith(".tar"):
        return [url]
    if scheme in ("http", "https") and not has_magic and urlsplit(url).query:
        return [url]  # a script that gives a tar
    pattern = url if has_magic else f"{url.rstrip('/')}/*.tar"
    client, path = connect(pattern)
    found = patiently(lambda: client.glob(path), pattern)
    names = sorted(name if "://" in name else f"{scheme}://{name}" for name in found)
    if not names:
        raise ValueError(
            f"{pattern} matches nothing; name tars, or a folder or pattern that the server can list"
        )
    return names


def size_of(url: str) -> int | None:
    """Bytes of a file; None where nobody says before it is read. Missing if it is not there."""
    return version_of(url)[0]


def version_of(url: str) -> tuple[int | None, str | None]:
    """Bytes of a file, and what its server calls its content; None where it does not say."""
    if url.startswith("pipe:"):
        return None, None
    client, path = connect(url)
    info = patiently(lambda: fresh_info(client, path), url)
    return info.get("size"), next((str(info[name]) for name in TAGS if info.get(name)), None)


def fresh_info(client: Any, path: str) -> dict[str, Any]:
    client.invalidate_cache()  # else a file that came since is missing, and one that grew has its old size
    return client.info(path)


def read_all(url: str) -> bytes:
    """A small file; Missing if it is not there."""
    client, path = connect(url)
    return patiently(lambda: client.cat_file(path), url)


def pieces(url: str, size: int | None) -> Iterator[bytes]:
    """The content of a file of `size` bytes in order; each byte once, whatever the connection does."""
    if url.startswith("pipe:"):
        yield from command_output(url.removeprefix("pipe:"))
        return
    client, path = connect(url)
    if size is None:
        yield patiently(partial(client.cat_file, path), url)
        return
    done, wanted = 0, [PIECE]
    while done < size:
        piece = patiently(partial(read_range, client, path, done, size, wanted), url)
        yield piece
        done += len(piece)


def read_range(client: Any, path: str, start: int, size: int, wanted: list[int]) -> bytes:
    """Bytes from `start` on, at most to the end, at least one; `wanted[0]` of them, which a failure halves."""
    end = min(start + wanted[0], size)
    wanted[0] = max(wanted[0] // 2, SMALLEST_PIECE)
    if is_http(client):
        content = read_http(client, path, start, end, size)
    else:
        options = {"cache_type": "none"} if is_hub(client) else {}
        content = client.cat_file(path, start=start, end=end, **options)
    if not 0 < len(content) <= size - start:
        raise OSError(f"{len(content)} bytes came where {end - start} of {size} were asked for")
    if len(content) >= end - start:
        wanted[0] = min(4 * wanted[0], PIECE)
    return content


def read_http(client: Any, url: str, start: int, end: int, size: int) -> bytes:
    """What arrives of a range before the connection ends, however it ends, if it is anything."""
    from fsspec.asyn import sync

    arrived = bytearray()
    try:
        sync(client.loop, receive, client, url, start, end, size, arrived)
    except Exception:
        if not arrived:
            raise
    return bytes(arrived)


async def receive(client: Any, url: str, start: int, end: int, size: int, arrived: bytearray) -> None:
    """Adds the range to `arrived`; of a server that gives the whole file of `size` bytes, up to UNRANGED of them."""
    session = await client.set_session()
    options = dict(client.kwargs)
    headers = {
        **options.pop("headers", {}),
        "Range": f"bytes={start}-{end - 1}",
        "Accept-Encoding": "identity",
    }
    async with session.get(client.encode_url(url), headers=headers, **options) as response:
        client._raise_not_found_for_status(response, url)
        if response.status == 200:
            is_plain = "Content-Encoding" not in response.headers
            if is_plain and response.content_length not in (None, size):  # a page that says something else
                raise OSError(f"{response.content_length} bytes came as the file, which has {size}")
            end = min(start + UNRANGED, size)
        told = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        skip = start - (int(told[1]) if told else 0)
        if skip < 0:
            raise OSError(f"bytes from {told[1]} on came where those from {start} on were asked for")
        async for piece in response.content.iter_any():
            arrived += piece[skip:]
            skip = max(skip - len(piece), 0)
            if len(arrived) >= end - start:
                break
    del arrived[end - start :]


_clients: dict[int, Any] = {}
"""Kept for good: a forked process that let go of its parent's would close their connections, and take these from the
epoll that it shares with the parent, who would then hear nothing of them until a timeout."""


def connect(url: str) -> tuple[Any, str]:
    """(fsspec's client, the path in it); a client belongs to the process that made it."""
    import fsspec

    scheme = url.partition(":")[0]
    check_url(url)
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
        options["client_kwargs"] = {"timeout": timeout}
    elif scheme == "s3":
        options["config_kwargs"] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": SILENT_SECONDS}
    client = fsspec.filesystem(scheme, **options)
    _clients[id(client)] = client
    return client, client._strip_protocol(url)


def is_http(client: Any) -> bool:
    return type(client).__name__ == "HTTPFileSystem"


def is_hub(client: Any) -> bool:
    return type(client).__module__.startswith("huggingface_hub")


def patiently(action: Callable[[], Any], url: str) -> Any:
    """What the action gives, tried again until `retry_minutes` have passed; RemoteError then, Missing at once."""
    began, wait, is_told = time.monotonic(), FIRST_WAIT, False
    patience = 60 * settings().retry_minutes
    while True:
        try:
            return action()
        except (TypeError, AttributeError, NameError, AssertionError):
            raise  # ours
        except Exception as error:
            reason = describe(error)
            if is_final(error):
                raise Missing(f"{url} cannot be read: {reason}") from error
            if time.monotonic() - began + wait > patience:
                raise RemoteError(
                    f"{url} cannot be read, tried for {time.monotonic() - began:.0f} s, at last: {reason}. What is "
                    "fetched is kept, and the same command goes on; remote.retry_minutes says how long is tried"
                ) from error
            if not is_told and time.monotonic() - began > SECONDS_UNTOLD:
                is_told = True
                log.warning("%s: %s; tried again for up to %g minutes", url, reason, settings().retry_minutes)
        time.sleep(wait * random.SystemRandom().uniform(0.5, 1))
        wait = min(2 * wait, LONGEST_WAIT)


def is_final(error: Exception) -> bool:
    """Whether no other try will change it: it is not there, not allowed, or no such thing can be asked."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return is_final(error.__cause__)  # fsspec says so of whatever kept it from finding the size of a URL
    if isinstance(error, FileNotFoundError | PermissionError | NotImplementedError | IsADirectoryError):
        return True
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError"):
        return True
    code = getattr(error, "status", None)
    if code is None:
        code = getattr(getattr(error, "response", None), "status_code", getattr(error, "code", None))
    code = int(code) if str(code).isdigit() else 0
    return 400 <= code < 500 and code not in PASSING


def describe(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def command_output(command: str) -> Iterator[bytes]:
    """What a shell command writes; RemoteError if it fails, or is silent for `retry_minutes`."""
    silent, piece = min(60 * settings().retry_minutes, LONGEST_SILENCE), bytearray()
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=told,
            start_new_session=True,
        )
        try:
            while True:
                if not select.select([process.stdout], [], [], silent)[0]:
                    raise RemoteError(f"pipe:{command} wrote nothing for {silent:.0f} s")
                arrived = os.read(
                    process.stdout.fileno(), PIECE
                )  # a pipe holds 64 kB, and room is made for each piece
                piece += arrived
                if piece and (not arrived or len(piece) >= PIECE):
                    yield bytes(piece)
                    piece.clear()
                if not arrived:
                    break
            if process.wait():
                told.seek(0)
                last = " ".join(told.read()[-300:].decode(errors="replace").split())
                raise RemoteError(f"pipe:{command} ended with exit code {process.returncode}: {last}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()

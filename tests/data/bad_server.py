"""A server on localhost whose faults are chosen: slow, cut, short, damaged, failing, without ranges, away."""

import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What is served, and how; `asked` is filled by the server."""

    files: dict[str, bytes]
    """path without its first slash -> content"""
    respond: Callable[[str, bytes], bytes | None] | None = None
    """(path with query, body of a POST) -> content, in place of `files`"""
    cut_after: int | None = None
    """Bytes of a body after which the connection is cut, although more were promised"""
    cuts: float = math.inf
    """How many connections are cut at most"""
    short: int | None = None
    """Bytes that a body has at most, and the header says no more"""
    errors: int = 0
    """How many of the first requests are answered by 503"""
    damaged: int = 0
    """How many of the next bodies are zeros"""
    ranges: bool = True
    seconds_per_piece: float = 0.0
    """Of 4096 bytes"""
    tag: str = ""
    """ETag of all files"""
    is_away: bool = False
    """Connections are closed without an answer"""
    asked: list[str] = field(default_factory=list)
    """the path of each GET"""
    is_cut: int = 0
    """connections that were cut"""


@contextmanager
def serve(site: Site) -> Iterator[str]:
    """The address of a server that runs meanwhile."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

        def do_HEAD(self) -> None:
            self.answer(has_body=False)

        def do_GET(self) -> None:
            with lock:
                site.asked.append(self.path.lstrip("/"))
            self.answer(has_body=True)

        do_POST = do_GET

        def answer(self, has_body: bool) -> None:
            if site.is_away:
                self.close_connection = True
                return
            with lock:
                fails = site.errors > 0
                site.errors -= fails
            posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if site.respond:
                content = site.respond(self.path.lstrip("/"), posted)
            else:
                content = site.files.get(self.path.lstrip("/").partition("?")[0])
            if fails or content is None:
                self.send_response(503 if fails else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, end = (int(asked[1]), int(asked[2]) + 1) if asked and site.ranges else (0, len(content))
            body = content[start:end]
            if has_body and site.short:
                body = body[: site.short]
            self.send_response(206 if asked and site.ranges else 200)
            if asked and site.ranges:
                self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(body)))
            if site.tag:
                self.send_header("ETag", site.tag)
            self.end_headers()
            if has_body:
                self.send(body)

        def send(self, body: bytes) -> None:
            with lock:
                body = bytes(len(body)) if site.damaged else body
                site.damaged = max(site.damaged - 1, 0)
            if site.cut_after is not None and len(body) > site.cut_after and site.is_cut < site.cuts:
                body, self.close_connection = body[: site.cut_after], True
                site.is_cut += 1
            for at in range(0, len(body), 4096):
                self.wfile.write(body[at : at + 4096])
                time.sleep(site.seconds_per_piece)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a client that was killed

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

"""A server on localhost that behaves as servers of archives do on their bad days."""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Manners:
    """What is served, and how; `asked` is filled by the server."""

    files: dict[str, bytes]
    """path without its first slash -> content"""
    drop_after: int | None = None
    """Bytes of a body after which the connection is cut"""
    drops: int = 10**9
    """How often that is done"""
    ranges: bool = True
    etag: bool = True
    total: str | None = None
    """What `Content-Range` says of the length"""
    errors: list[int] = field(default_factory=list)
    """HTTP codes for the first requests"""
    seconds_per_piece: float = 0.0
    lies: dict[str, int] = field(default_factory=dict)
    """path -> how often another content of the same length is served first"""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """(path, Range header) of every request"""


@contextmanager
def serve(manners: Manners) -> Iterator[str]:
    """The address of a server that runs meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path, asked = self.path.lstrip("/"), self.headers.get("Range")
            manners.asked.append((path, asked))
            if manners.errors:
                return self.refuse(manners.errors.pop(0))
            if path not in manners.files:
                return self.refuse(404)
            content = manners.files[path]
            if lies[path] > 0:
                lies[path] -= 1
                content = bytes(len(content))
            return self.give(content, asked)

        def refuse(self, code: int) -> None:
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def give(self, content: bytes, asked: str | None) -> None:
            etag = f'"{hashlib.md5(content).hexdigest()}"'
            start = 0
            if asked and manners.ranges and self.headers.get("If-Range", etag) == etag:
                start = int(asked.removeprefix("bytes=").partition("-")[0])
            if start >= len(content) > 0:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{manners.total or len(content)}"
                )
            if manners.etag:
                self.send_header("ETag", etag)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.send_body(content[start:])

        def send_body(self, body: bytes) -> None:
            is_cut = manners.drop_after is not None and manners.drops > 0 and len(body) > manners.drop_after
            if is_cut:
                manners.drops -= 1
                body = body[: manners.drop_after]
            for at in range(0, len(body), 4096):
                self.wfile.write(body[at : at + 4096])
                time.sleep(manners.seconds_per_piece)
            if is_cut:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a client that was killed

    lies = Counter(manners.lies)
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

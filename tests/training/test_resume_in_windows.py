"""A run on remote shards that its cache does not hold goes on in the windows it began with, whatever room there is."""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ranks import SAMPLE
from runs import STEPS, Command, read_rows, start_all, without_timings

SHARD = SAMPLE / "multimodal-train-000000.tar"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Eight times the same shard, on localhost."""
    folder = tmp_path / "site"
    folder.mkdir()
    for number in range(8):
        shutil.copy(SHARD, folder / f"train-{number}.tar")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/train-{{0..7}}.tar"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_run_goes_on_in_the_windows_it_began_with(tmp_path: Path, url: str) -> None:
    """Stopped in the middle of 6 steps; then a cache that holds all of it, or one that holds no two windows."""

    def settings(cache: str, shards: float) -> list[str]:
        gib = shards * SHARD.stat().st_size / (1 << 30)
        return [
            "--deepspeed", "zero0", "modalities.audio=null", "modalities.text=null", f"data={url}",
            f"remote.cache={tmp_path / cache}", f"remote.cache_gib={gib}",
        ]  # fmt: skip

    run, more, less = tmp_path / "run", tmp_path / "more", tmp_path / "less"
    results = start_all(
        tmp_path,
        {
            "run": Command(run, settings("cache", 5)),
            "more": Command(more, settings("other", 100), after=run),
            "less": Command(less, settings("cache", 4.5), after=run),
        },
    )
    assert [done["code"] for done in results.values()] == [0, 0, 2], results
    assert "its 8 shards come in windows of 0.00465 GiB, about 2 shards" in results["run"]["out"]
    assert "in windows of 0.00499 GB; of windows two" in results["less"]["err"]
    rows, others = (without_timings(read_rows(folder)) for folder in (run, more))
    assert [row["step"] for row in others] == list(range(1, STEPS + 1)) and rows == others

"""A run on remote shards that its cache does not hold: in windows that it keeps, with a cache that its ranks share."""

from __future__ import annotations

import contextlib
import functools
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ranks import SAMPLE
from runs import STEPS, Command, read_rows, start_all, without_timings

SHARD = SAMPLE / "multimodal-train-000000.tar"
SAMPLES = 158
"""In it"""


ASKED: list[tuple[str, str, int]] = []
"""Of each shard that was asked for: the cache that is in use, the shard, and what the cache held then, in bytes"""


def held_by(cache: Path) -> int:
    """Bytes of shards, whole or not yet."""
    total = 0
    for file in cache.rglob("*"):
        if file.suffix in (".tar", ".part"):
            with contextlib.suppress(FileNotFoundError):  # it went meanwhile
                total += file.stat().st_size
    return total


class Quiet(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.endswith(".tar"):
            root = Path(self.directory).parent
            name = "cache" if (root / "cache").exists() else "other"
            ASKED.append((name, self.path, held_by(root / name)))
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Eight times the same shard, on localhost."""
    folder = tmp_path / "site"
    folder.mkdir()
    ASKED.clear()
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


@pytest.mark.slow
def test_ranks_share_a_cache_of_windows(tmp_path: Path, url: str) -> None:
    """For an epoch and a half: they are the steps of one rank, no shard is fetched twice, the cache keeps its limit."""
    gib = 5 * SHARD.stat().st_size / (1 << 30)

    def settings(cache: str) -> list[str]:
        return [
            "--deepspeed", "zero3", "modalities.audio=null", "modalities.text=null", f"data={url}",
            f"modalities.image.data.batch={SAMPLES // 2}", "train.steps=12", "train.workers=1",
            f"remote.cache={tmp_path / cache}", f"remote.cache_gib={gib}",
        ]  # fmt: skip

    alone, both = tmp_path / "alone", tmp_path / "both"
    done = start_all(tmp_path, {"alone": Command(alone, settings("other"))})
    done |= start_all(tmp_path, {"both": Command(both, settings("cache"))}, ranks=2)
    assert [result["code"] for result in done.values()] == [0, 0], done
    assert "come in windows" in done["both"]["out"]
    rows, others = (read_rows(folder) for folder in (alone, both))
    assert [row["image/loss"] for row in others] == pytest.approx(
        [row["image/loss"] for row in rows], rel=1e-5
    )
    for folder in ("other", "cache"):
        fetched = Counter(path for at, path, _ in ASKED if at == folder)
        assert len(fetched) == 8 and max(fetched.values()) <= 3, f"{folder}: index and two epochs: {fetched}"
        sizes = [size for at, _, size in ASKED if at == folder]
        assert 0 < max(sizes) <= gib * (1 << 30), f"{folder}: {sizes}"

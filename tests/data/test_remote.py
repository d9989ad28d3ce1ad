"""Shards that lie elsewhere give the same batches, whatever the server does, on bounded disk."""

import fcntl
import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bad_server import Site, serve
from tars import payload
from test_loader import ByteSamples, as_values, make_plan

from d2v_ds.cli import main
from d2v_ds.data import Corpus, CorruptSample, Source, StepLoader, build_index, expand_shards
from d2v_ds.data import cache as caches
from d2v_ds.data import remote as remotes
from d2v_ds.data.cache import Needs, RemoteShard, acquire, evict, locked, needs, used
from d2v_ds.data.remote import Missing, Remote, RemoteError, reading

Writer = Callable[..., list[Path]]
SHARDS, SAMPLES = 5, 7
NAMES = "train-{000000..000004}.tar"


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remotes, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(remotes, "SMALLEST_PIECE", 1024)


@pytest.fixture
def local(write_shards: Writer) -> list[Path]:
    return write_shards(shards=SHARDS, samples=SAMPLES)


@pytest.fixture
def site(local: list[Path]) -> Site:
    return Site({path.name: path.read_bytes() for path in local})


def settings_of(tmp_path: Path, **more) -> Remote:
    return Remote(cache=str(tmp_path / "cache"), **{"retry_minutes": 0.2, **more})


def gib(size: float) -> float:
    return size / (1 << 30)


def open_corpus(pattern: str, settings: Remote) -> Corpus:
    with reading(settings):
        return Corpus.open(expand_shards(pattern), ByteSamples.fields, progress=None, workers=1)


def sources_of(corpus: Corpus) -> list[Source]:
    return [Source("image", corpus, ByteSamples(corpus), 4, 6)]


def batches(corpus: Corpus, steps: int = 3, workers: int = 0) -> list:
    sources = sources_of(corpus)
    return [as_values(step) for step in StepLoader(sources, make_plan(sources), 0, 1, 0, steps, workers)]


def local_batches(local: list[Path], steps: int = 3) -> list:
    return batches(Corpus.open(local, ByteSamples.fields, progress=None, workers=1), steps)


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*/*.tar"))


# ---- the same data ----

MANNERS = {
    "well": {},
    "sluggish": {"seconds_per_piece": 0.01},
    "cut": {"cut_after": 3000},
    "short": {"short": 2500},
    "failing": {"errors": 4},
    "without ranges": {"ranges": False},
    "without ranges and cut": {"ranges": False, "cut_after": 9000},
}


@pytest.mark.parametrize("manner", MANNERS)
def test_batches_are_those_of_local_shards(local, site, tmp_path, manner):
    """And the fingerprint; nothing is left half fetched."""
    if manner == "without ranges and cut":
        site.cut_after = max(len(content) for content in site.files.values()) - 1
    for key, value in MANNERS[manner].items():
        setattr(site, key, value)
    with serve(site) as url:
        if manner == "without ranges and cut":
            threading.Timer(0.4, lambda: setattr(site, "cut_after", None)).start()
        corpus = open_corpus(f"{url}/{NAMES}", settings_of(tmp_path))
        assert batches(corpus) == local_batches(local)
    assert corpus.fingerprint == Corpus.open(local, ByteSamples.fields, progress=None).fingerprint
    assert not list((tmp_path / "cache").rglob("*.part")) and len(cached(tmp_path)) == SHARDS
    assert site.is_cut or "cut" not in manner


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_smaller_than_the_corpus_gives_the_same_and_stays_within_its_limit(
    local, site, tmp_path, workers
):
    limit = int(2.2 * max(len(content) for content in site.files.values()))
    largest, watching = [0], True

    def watch() -> None:
        root = tmp_path / "cache"
        while watching:
            if (root / "lock").is_file():
                with locked(root / "lock"):
                    files = [
                        os.stat(p) for p in root.glob("*/*") if p.suffix in (".tar", ".part") and p.is_file()
                    ]
                largest[0] = max(largest[0], sum({file.st_ino: file.st_size for file in files}.values()))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with serve(site) as url:
            corpus = open_corpus(f"{url}/{NAMES}", settings_of(tmp_path, cache_gib=gib(limit), refetch=True))
            assert batches(corpus, workers=workers) == local_batches(local)
    finally:
        watching = False
        watcher.join()
    assert 0 < largest[0] <= limit and len(site.asked) > 3 * SHARDS


def test_a_shard_gets_its_name_while_nobody_adds_up_the_cache(local, site, tmp_path):
    """Who lists the folder meanwhile would count it under neither name, and let the cache grow above its limit."""
    adding, seen = threading.Event(), []

    def add_up() -> None:
        with locked(tmp_path / "cache" / "lock"):
            adding.set()
            time.sleep(0.3)
            seen.extend(path.suffix for path in (tmp_path / "cache").glob("*/*.tar*"))

    def check(path) -> None:
        thread.start()
        adding.wait()

    thread = threading.Thread(target=add_up)
    with serve(site) as url:
        shard = RemoteShard(f"{url}/{next(iter(site.files))}", settings_of(tmp_path))
        acquire(shard, check=check).close()
    thread.join()
    assert seen == [".part"] and shard.path.is_file()


def test_a_server_that_goes_away_is_waited_for(local, site, tmp_path):
    """For a while; training stands still and goes on."""
    limit = int(2.2 * max(len(content) for content in site.files.values()))
    settings = settings_of(tmp_path, cache_gib=gib(limit), retry_minutes=0.5, refetch=True)
    with serve(site) as url:
        sources = sources_of(open_corpus(f"{url}/{NAMES}", settings))
        steps = iter(StepLoader(sources, make_plan(sources), 0, 1, 0, 3))
        read = [as_values(next(steps))]
        site.is_away = True
        threading.Timer(1.0, lambda: setattr(site, "is_away", False)).start()
        read += [as_values(step) for step in steps]
    assert read == local_batches(local)


def test_a_server_that_stays_away_is_named(site, tmp_path):
    with serve(site) as url:
        corpus = open_corpus(f"{url}/train-000000.tar", settings_of(tmp_path, retry_minutes=0.01))
        cached(tmp_path)[0].unlink()
        site.is_away = True
        with pytest.raises(
            RemoteError, match=r"train-000000.tar cannot be read, tried for .*remote.retry_minutes"
        ):
            corpus.read(0)


def test_ahead_of_the_plan(local, site, tmp_path):
    """Shards come although nobody reads them; what the plan needs first comes first."""
    with serve(site) as url:
        corpus = open_corpus(f"{url}/{NAMES}", settings_of(tmp_path, connections=1))
        for path in cached(tmp_path):
            path.unlink()
        site.asked.clear()
        sources = sources_of(corpus)
        steps = iter(StepLoader(sources, make_plan(sources), 0, 1, 0, 3, workers=1))
        next(steps)
        until = time.monotonic() + 10
        while len(cached(tmp_path)) < SHARDS and time.monotonic() < until:
            time.sleep(0.05)
        steps.close()
    assert len(cached(tmp_path)) == SHARDS
    assert len(site.asked) == SHARDS  # once each, by whoever came first


def test_a_server_without_ranges_is_asked_for_a_shard_once(site, tmp_path, monkeypatch):
    """It begins anew each time."""
    monkeypatch.setattr(remotes, "PIECE", 1024)
    site.ranges = False
    name, content = next(iter(site.files.items()))
    with serve(site) as url, acquire(RemoteShard(f"{url}/{name}", settings_of(tmp_path))) as file:
        assert os.pread(file.fileno(), 1 << 20, 0) == content
    assert site.asked == [name]


# ---- the index ----


def test_a_page_in_the_place_of_a_shard_is_not_taken_for_its_first_bytes(local, site, tmp_path):
    """As a gateway gives one now and then, with status 200."""
    pages = ["train-000000.tar", "train-000003.tar"]

    def respond(path: str, _: bytes) -> bytes | None:
        if path in pages and site.asked[-1] == path:
            pages.remove(path)
            return b"<html>One moment, please</html>"
        return site.files.get(path)

    site.respond, site.ranges = respond, False
    with serve(site) as url:
        corpus = open_corpus(f"{url}/{NAMES}", settings_of(tmp_path))
        assert batches(corpus) == local_batches(local) and not pages


def test_a_published_index_is_taken_and_tars_wait_until_they_are_read(local, site, tmp_path):
    for path in local:
        build_index(path)
        for name in ("idx", "json", "members.npy"):
            site.files[f"{path.name}.{name}"] = path.with_name(f"{path.name}.{name}").read_bytes()
    with serve(site) as url:
        corpus = open_corpus(f"{url}/{NAMES}", settings_of(tmp_path))
        assert len(corpus) == SHARDS * SAMPLES and cached(tmp_path) == []
        assert corpus.read(9)["content"] == payload(1, 2) and len(cached(tmp_path)) == 1


def test_a_published_index_of_another_tar_is_not_taken(local, site, tmp_path, write_shards):
    build_index(local[0])
    for name in ("idx", "json", "members.npy"):
        site.files[f"{local[0].name}.{name}"] = local[0].with_name(f"{local[0].name}.{name}").read_bytes()
    (other,) = write_shards(shards=1, samples=30, folder="other")
    site.files[local[0].name] = other.read_bytes()
    with serve(site) as url:
        assert len(open_corpus(f"{url}/{local[0].name}", settings_of(tmp_path))) == 30


def test_the_index_is_built_once_and_needs_no_server_later(site, tmp_path):
    with serve(site) as url:
        first = open_corpus(f"{url}/{NAMES}", settings_of(tmp_path))
    asked = len(site.asked)
    again = open_corpus(f"{url}/{NAMES}", settings_of(tmp_path))
    assert again.fingerprint == first.fingerprint and len(site.asked) == asked
    assert again.read(3)["content"] == payload(0, 3)


def test_lengths_are_measured_while_a_shard_is_cached(site, tmp_path):
    """One fetch a shard, although the cache holds one only."""
    limit = int(1.2 * max(len(content) for content in site.files.values()))
    with serve(site) as url, reading(settings_of(tmp_path, cache_gib=gib(limit))):
        corpus = Corpus.open(
            expand_shards(f"{url}/{NAMES}"),
            ByteSamples.fields,
            lambda s: 1 + len(s["content"]),
            "n",
            0,
            1,
            None,
        )
    assert len(corpus) == SHARDS * SAMPLES
    assert sum(path.endswith(".tar") for path in site.asked) == SHARDS


def test_a_broken_remote_shard_is_refused_by_its_url(site, tmp_path):
    site.files["train-000001.tar"] = site.files["train-000001.tar"][:3000]
    with (
        serve(site) as url,
        pytest.raises(ValueError, match=f"{url}/train-000001.tar is truncated at byte 3000"),
    ):
        open_corpus(f"{url}/train-000001.tar", settings_of(tmp_path))


def test_a_remote_shard_that_was_refused_is_fetched_anew(local, site, tmp_path):
    """It stayed in the cache, and was refused for ever."""
    site.damaged = 1
    with serve(site) as url:
        with pytest.raises(ValueError, match="train-000000.tar holds no sample: its first header is empty"):
            open_corpus(f"{url}/train-000000.tar", settings_of(tmp_path))
        assert not cached(tmp_path)
        corpus = open_corpus(f"{url}/{NAMES}", settings_of(tmp_path))
        assert batches(corpus) == local_batches(local)


def test_equal_names_at_other_urls_do_not_mix(site, tmp_path):
    site.files |= {f"other/{name}": site.files["train-000003.tar"] for name in ("train-000000.tar",)}
    with serve(site) as url:
        settings = settings_of(tmp_path)
        one, two = (open_corpus(f"{url}/{p}train-000000.tar", settings) for p in ("", "other/"))
        three = open_corpus(f"{url}/train-000000.tar?version=2", settings)
    assert one.read(1)["content"] == payload(0, 1) and two.read(1)["content"] == payload(3, 1)
    assert three.indexes[0].path.name == "train-000000.tar" and len(cached(tmp_path)) == 3


# ---- faults ----


def test_a_replaced_shard_of_another_size_is_named(site, tmp_path):
    with serve(site) as url:
        corpus = open_corpus(f"{url}/train-000000.tar", settings_of(tmp_path))
        cached(tmp_path)[0].unlink()
        site.files["train-000000.tar"] += bytes(10240)
        with pytest.raises(
            RemoteError, match=r"train-000000.tar has \d+ bytes, when it was indexed \d+: it was replaced"
        ):
            corpus.read(0)


def test_a_shard_that_is_replaced_while_it_is_fetched_is_fetched_again(site, tmp_path, caplog, monkeypatch):
    """By one of the same size: half of each would be indexed as what it should be."""
    monkeypatch.setattr(remotes, "PIECE", 8192)
    old, new = (site.files[f"train-00000{i}.tar"] for i in (0, 1))
    assert len(old) == len(new)

    def respond(path: str, _: bytes) -> bytes | None:
        if site.asked.count("train-000000.tar") > 1:
            site.tag = "new"
        return {"train-000000.tar": new if site.tag == "new" else old}.get(path)

    site.respond, site.tag = respond, "old"
    with serve(site) as url, caplog.at_level(logging.WARNING):
        corpus = open_corpus(f"{url}/train-000000.tar", settings_of(tmp_path))
        assert [corpus.read(i)["content"] for i in range(7)] == [payload(1, i) for i in range(7)]
    assert "train-000000.tar: it was replaced while it was fetched (try 1 of 3)" in caplog.text
    assert "try 2" not in caplog.text


def test_samples_that_rotted_at_the_source_are_quarantined_alone(site, tmp_path, caplog):
    with serve(site) as url:
        corpus = open_corpus(f"{url}/train-000000.tar", settings_of(tmp_path))
        cached(tmp_path)[0].unlink()
        content = bytearray(site.files["train-000000.tar"])
        content[content.index(payload(0, 2)) + 3] ^= 1
        site.files["train-000000.tar"] = bytes(content)
        with caplog.at_level(logging.WARNING):
            assert corpus.read(3)["content"] == payload(0, 3)
        with pytest.raises(CorruptSample, match="part/0-00002: its bytes differ"):
            corpus.read(2)
    assert "1 of 7 samples differ from the index" in caplog.text and "try 3 of 3" in caplog.text


def test_a_body_that_was_damaged_on_its_way_is_fetched_again(site, tmp_path):
    with serve(site) as url:
        corpus = open_corpus(f"{url}/train-000000.tar", settings_of(tmp_path))
        cached(tmp_path)[0].unlink()
        site.damaged, before = 2, len(site.asked)
        assert [corpus.read(i)["content"] for i in range(7)] == [payload(0, i) for i in range(7)]
    assert len(site.asked) == before + 3


def test_what_is_not_there_is_told_at_once(site, tmp_path):
    with serve(site) as url, pytest.raises(Missing, match="absent.tar cannot be read: "):
        open_corpus(f"{url}/absent.tar", settings_of(tmp_path, retry_minutes=10))


def test_a_shard_above_the_limit_is_told_with_numbers(site, tmp_path):
    with (
        serve(site) as url,
        pytest.raises(RemoteError, match=r"has 0\.0 MB, the cache .* may hold 0\.0 MB; set"),
    ):
        open_corpus(f"{url}/train-000000.tar", settings_of(tmp_path, cache_gib=gib(5000)))


def test_a_cache_that_cannot_be_written_is_told_with_its_remedy(site, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with (
        serve(site) as url,
        pytest.raises(RemoteError, match=r"cache .* cannot be written: .* set remote.cache"),
    ):
        open_corpus(f"{url}/train-000000.tar", settings_of(tmp_path))


def test_a_server_that_is_tried_again_is_said_once(site, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(remotes, "SECONDS_UNTOLD", 0.0)
    site.errors = 4
    with serve(site) as url, caplog.at_level(logging.WARNING):
        open_corpus(f"{url}/train-000000.tar", settings_of(tmp_path))
    assert caplog.text.count("503") == 1 and "tried again for up to 0.2 minutes" in caplog.text


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("ftp://host/a.tar", "no URL that shards can be read from"),
        ("pipe:cat a.tar", "would run a command; .* remote.pipe=true"),
        ("https:/host/a.tar", "no URL that shards can be read from"),
    ],
)
def test_urls_that_are_not_read_are_errors(pattern, message):
    with pytest.raises(ValueError, match=message):
        expand_shards(pattern)


def test_a_client_that_is_not_installed_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        ValueError, match=r"needs s3fs, which is not installed: pip install 'd2v_ds\[remote\]'"
    ):
        expand_shards("s3://bucket/a.tar")


# ---- commands ----


def test_a_command_gives_shards_where_it_is_allowed(local, tmp_path):
    settings = settings_of(tmp_path, pipe=True)
    corpus = open_corpus(f"pipe:cat {local[0].parent}/{NAMES}", settings)
    assert batches(corpus) == local_batches(local) and corpus.indexes[2].path.name == "train-000002.tar"


def test_room_is_made_for_large_pieces_of_what_a_command_writes(tmp_path, monkeypatch):
    """Each time the cache is added up."""
    monkeypatch.setattr(remotes, "PIECE", 1 << 20)
    with reading(settings_of(tmp_path, pipe=True)):
        sizes = [len(piece) for piece in remotes.command_output("head -c 2500000 /dev/zero")]
    assert sum(sizes) == 2_500_000 and len(sizes) == 3


def test_settings_may_be_infinite(local, tmp_path):
    forever = settings_of(tmp_path, pipe=True, cache_gib=math.inf, retry_minutes=math.inf)
    assert len(open_corpus(f"pipe:cat {local[0]}", forever)) == SAMPLES


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo broken >&2; echo twice >&2; exit 3", "ended with exit code 3: broken twice"),
        ("false | cat", "ended with exit code 1"),
    ],
)
def test_a_command_that_fails_is_named(tmp_path, command, message):
    with pytest.raises(RemoteError, match=message):
        open_corpus(f"pipe:{command}", settings_of(tmp_path, pipe=True))


def test_a_command_that_ends_too_early_is_a_truncated_shard(local, tmp_path):
    with pytest.raises(ValueError, match="is truncated at byte 4000"):
        open_corpus(f"pipe:head -c 4000 {local[0]}", settings_of(tmp_path, pipe=True))


def test_a_command_that_gives_more_than_the_cache_may_hold_runs_once(local, tmp_path, monkeypatch):
    """It was run again and again, for `retry_minutes`."""
    monkeypatch.setattr(remotes, "PIECE", 1024)
    ran = tmp_path / "ran"
    settings = settings_of(tmp_path, pipe=True, cache_gib=gib(3000))
    with pytest.raises(RemoteError, match="may hold 0.0 MB; set remote.cache_gib"):
        open_corpus(f"pipe:echo >> {ran}; cat {local[0]}", settings)
    assert ran.read_text() == "\n"


def test_commands_that_fill_the_cache_at_once_take_turns(local, tmp_path, monkeypatch):
    """Neither says its size: each had half of the room, and waited for the other's until `retry_minutes` were over."""
    monkeypatch.setattr(remotes, "PIECE", 512)
    monkeypatch.setattr(caches, "_SECONDS_OF_PATIENCE", 0.1)
    settings = settings_of(tmp_path, pipe=True, cache_gib=gib(1.5 * local[0].stat().st_size))
    shards = [
        RemoteShard(f"pipe:head -c 9000 {path}; sleep 0.2; tail -c +9001 {path}", settings) for path in local
    ]
    with ThreadPoolExecutor(len(shards)) as pool:
        list(pool.map(lambda shard: acquire(shard).close(), shards))
    assert used(tmp_path / "cache") <= settings.cache_gib * (1 << 30)


# ---- the cache, shared ----


def shards_in(tmp_path: Path, url: str, **more) -> list[RemoteShard]:
    with reading(settings_of(tmp_path, **more)):
        return expand_shards(f"{url}/{NAMES}")


def test_processes_that_want_a_shard_at_once_fetch_it_once(site, tmp_path):
    site.seconds_per_piece = 0.02
    with serve(site) as url:
        shard = shards_in(tmp_path, url)[0]
        processes = [
            multiprocessing.get_context("fork").Process(target=acquire, args=(shard,)) for _ in range(4)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0] * 4 and len(site.asked) == 1


def test_a_file_is_locked_before_others_can_take_it_for_abandoned(site, tmp_path):
    """Who counts the cache holds its lock, and removes what no process has locked."""
    with serve(site) as url:
        shard = RemoteShard(f"{url}/train-000000.tar", settings_of(tmp_path))
        shard.make_folder()
        with ThreadPoolExecutor(1) as pool:
            with locked(shard.root / "lock"):
                fetched = pool.submit(acquire, shard)
                time.sleep(0.3)
                assert not list(shard.root.rglob("*.part"))
            fetched.result(timeout=30).close()


def test_a_process_forked_inside_a_lock_does_not_keep_it(tmp_path):
    """Its copy of the open file would."""
    path = tmp_path / "lock"
    with locked(path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError while somebody has it
    child.kill()
    child.join()


def test_a_forked_child_reads_a_cached_shard_with_a_lock_of_its_own(site, tmp_path):
    """What the child unlocks, its parent still holds."""
    with serve(site) as url:
        corpus = open_corpus(f"{url}/train-000000.tar", settings_of(tmp_path))
        expected = corpus.read(1)
        file = corpus._readers[0]._file
        fcntl.flock(file, fcntl.LOCK_SH)  # as in the middle of a read
        child = os.fork()
        if not child:
            os._exit(int(corpus.read(1) != expected))
        assert os.waitpid(child, 0)[1] == 0
        with open(file.name, "rb") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_a_killed_process_leaves_is_taken_over(site, tmp_path):
    """Its half of a file is removed and counts no more; its lock is free."""
    site.seconds_per_piece = 0.2
    with serve(site) as url:
        shard = shards_in(tmp_path, url)[0]
        process = multiprocessing.get_context("fork").Process(target=acquire, args=(shard,))
        process.start()
        until = time.monotonic() + 10
        while not list((tmp_path / "cache").glob("*/*.part")) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert list((tmp_path / "cache").glob("*/*.part"))
        assert used(tmp_path / "cache") == 0
        site.seconds_per_piece = 0
        with acquire(shard) as file:
            assert os.pread(file.fileno(), 1 << 20, 0) == site.files["train-000000.tar"]


@pytest.mark.parametrize("left", [0, 4000])
@pytest.mark.parametrize("has_index", [True, False])
def test_a_cached_shard_that_lost_its_end_is_fetched_again(local, site, tmp_path, left, has_index):
    """As a machine that lost its power may leave one: good samples were quarantined."""
    with serve(site) as url:
        open_corpus(f"{url}/{NAMES}", settings_of(tmp_path))
        os.truncate(cached(tmp_path)[2], left)
        if not has_index:
            cached(tmp_path)[2].with_suffix(".tar.json").unlink()
        assert batches(open_corpus(f"{url}/{NAMES}", settings_of(tmp_path))) == local_batches(local)
    assert len(site.asked) > SHARDS


def test_a_cached_shard_of_another_size_that_is_read_is_told(site, tmp_path):
    """It cannot be fetched again meanwhile: the wait ends, and names it."""
    with serve(site) as url:
        shard = RemoteShard(f"{url}/train-000000.tar", settings_of(tmp_path, retry_minutes=0.005))
        with acquire(shard), pytest.raises(RemoteError, match="was indexed 7, and other processes read it"):
            acquire(shard, 7)


def test_what_is_needed_last_goes_first(site, tmp_path):
    root = tmp_path / "cache"
    with serve(site) as url:
        shards = shards_in(tmp_path, url)
        for shard in shards:
            acquire(shard).close()
    plan = Needs(root)
    plan.write([shards[i] for i in (3, 0, 4)])
    gone = []
    for _ in range(SHARDS):
        before = {path.name for path in cached(tmp_path)}
        with locked(root / "lock"):
            assert evict(root, 1) > 0
        (name,) = before - {path.name for path in cached(tmp_path)}
        gone.append(int(name[6:12]))
    assert gone == [1, 2, 4, 0, 3]  # 1 and 2 are in no plan: the older first
    plan.close()
    with locked(root / "lock"):
        assert needs(root) == {}


def test_what_is_fetched_ahead_displaces_nothing_that_is_needed_sooner(site, tmp_path):
    limit = int(1.5 * max(len(content) for content in site.files.values()))
    with serve(site) as url:
        shards = shards_in(tmp_path, url, cache_gib=gib(limit), refetch=True)
        acquire(shards[0]).close()
        plan = Needs(tmp_path / "cache")
        plan.write(shards[:2])
        with pytest.raises(caches.NoRoom):
            acquire(shards[1], position=1)
        acquire(shards[1]).close()  # needed now
        plan.close()
    assert [path.name for path in cached(tmp_path)] == ["train-000001.tar"]


def test_who_reads_ahead_of_the_plan_displaces_nothing_that_it_just_read(site, tmp_path, monkeypatch):
    """0 and 1 are planned, but 2, 3 and then 2 again are read: 3 waits for the plan, which then frees 0."""
    monkeypatch.setattr(caches, "_SECONDS_OF_PATIENCE", 60.0)
    size = max(len(content) for content in site.files.values())
    with serve(site) as url:
        shards = shards_in(tmp_path, url, cache_gib=gib(3 * size))
        for shard in shards[:3]:
            acquire(shard).close()
        plan = Needs(tmp_path / "cache")
        plan.write(shards[:2])
        reader = threading.Thread(target=lambda: acquire(shards[3]).close())
        reader.start()
        time.sleep(0.3)
        assert {path.name for path in cached(tmp_path)} == {f"train-00000{i}.tar" for i in range(3)}
        plan.write(shards[1:4])
        reader.join(10)
        plan.close()
    assert {path.name for path in cached(tmp_path)} == {f"train-00000{i}.tar" for i in range(1, 4)}


def test_what_is_being_read_stays(site, tmp_path):
    with serve(site) as url:
        shards = shards_in(tmp_path, url)
        file = acquire(shards[0])
        acquire(shards[1]).close()
    root = tmp_path / "cache"
    with locked(root / "lock"):
        evict(root, 10**9)
    assert [path.name for path in cached(tmp_path)] == ["train-000000.tar"]
    file.close()
    with locked(root / "lock"):
        evict(root, 10**9)
    assert cached(tmp_path) == []


def test_a_reader_whose_shard_was_evicted_fetches_it_again(site, tmp_path):
    with serve(site) as url:
        corpus = open_corpus(f"{url}/train-000000.tar", settings_of(tmp_path))
        assert corpus.read(1)["content"] == payload(0, 1)
        with locked(tmp_path / "cache" / "lock"):
            assert evict(tmp_path / "cache", 1) > 0
        assert corpus.read(2)["content"] == payload(0, 2)


def test_a_full_disk_is_named_and_leaves_nothing_half(site, tmp_path):
    """On a file system of 64 kB of our own."""
    (tmp_path / "disk").mkdir()
    script = f"""
mount -t tmpfs -o size=64k none {tmp_path}/disk || exit 77
{sys.executable} - <<'EOF'
from d2v_ds.data import expand_shards
from d2v_ds.data.cache import acquire, RemoteError
from d2v_ds.data.remote import Remote, reading
with reading(Remote(cache="{tmp_path}/disk", retry_minutes=0.005)):
    shards = expand_shards("http://127.0.0.1:{{port}}/{NAMES}")
kept = [acquire(shards[i]) for i in (0,)]
try:
    for shard in shards[1:]:
        kept.append(acquire(shard))
    print("no error")
except RemoteError as error:
    print(error)
kept.clear()
acquire(shards[4]).close()
print("others make room")
EOF
ls -a {tmp_path}/disk/*
"""
    with serve(site) as url:
        done = subprocess.run(
            [
                "unshare",
                "--user",
                "--map-root-user",
                "--mount",
                "bash",
                "-c",
                script.replace("{port}", url.rpartition(":")[2]),
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
        )
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip(f"no mount of our own: {done.stderr}")
    assert "is full (0.0 MB are free, the cache holds" in done.stdout, done.stdout + done.stderr
    assert "others make room" in done.stdout and ".part" not in done.stdout


# ---- object stores ----


@pytest.fixture(scope="module")
def s3() -> str:
    """The address of an S3 server of our own."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_s3_gives_the_same_batches_by_names_globs_and_folders(local, s3, tmp_path, monkeypatch):
    import boto3

    for key, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    client = boto3.client("s3", endpoint_url=s3)
    client.create_bucket(Bucket="bucket")
    for path in local:
        client.put_object(Bucket="bucket", Key=f"in/{path.name}", Body=path.read_bytes())
    settings = settings_of(tmp_path)
    corpus = open_corpus(f"s3://bucket/in/{NAMES}", settings)
    assert batches(corpus, workers=1) == local_batches(local)
    with reading(settings):
        names = [str(shard) for shard in expand_shards("s3://bucket/in/*.tar")]
        assert names == [f"s3://bucket/in/{path.name}" for path in local]
        assert [str(shard) for shard in expand_shards("s3://bucket/in")] == names
        with pytest.raises(ValueError, match="matches nothing"):
            expand_shards("s3://bucket/out/*.tar")
        with pytest.raises(Missing, match="s3://bucket/in/absent.tar cannot be read"):
            open_corpus("s3://bucket/in/absent.tar", settings)


# ---- from a shell ----


def test_index_verify_and_preview_work_on_urls(site, tmp_path, capsys):
    with serve(site) as url:
        options = ["--cache", str(tmp_path / "cache"), "--retry-minutes", "0.5", "--workers", "2"]
        assert main(["index", f"{url}/{NAMES}", *options]) == 0
        assert "35 samples in 5 shards" in capsys.readouterr().out
        assert main(["verify", f"{url}/{NAMES}", *options]) == 0
        assert "all in order" in capsys.readouterr().out
        assert main(["preview", f"{url}/{NAMES}", "--out", str(tmp_path / "p.png"), *options]) == 0
        assert ".bin" in capsys.readouterr().out
        content = bytearray(site.files["train-000002.tar"])
        content[content.index(payload(2, 3)) + 5] ^= 1
        site.files["train-000002.tar"] = bytes(content)
        assert main(["verify", f"{url}/{NAMES}", *options]) == 1
        assert f"{url}/train-000002.tar: 1 of 7 samples differ" in capsys.readouterr().out
        site.files["empty.tar"] = b""
        for _ in range(2):  # an empty file is taken away from the cache too, which nobody reads
            assert main(["verify", f"{url}/empty.tar", *options]) == 1
            assert "being read by another process" not in capsys.readouterr().out
        assert main(["verify", f"{url}/absent.tar", *options]) == 1
        assert "absent.tar cannot be read" in capsys.readouterr().out
    assert main(["index", "pipe:cat a.tar"]) == 2

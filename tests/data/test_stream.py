"""A corpus larger than the cache streams through it, window by window: every sample once, every shard fetched once."""

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from bad_server import Site, serve
from layouts import write_tar
from test_loader import ByteSamples, as_values, make_plan
from test_remote import gib, open_corpus, settings_of

from d2v_ds.data import Corpus, MicroBatch, Source, StepLoader, build_index, prefetch
from d2v_ds.data import remote as remotes
from d2v_ds.data.cache import locked
from d2v_ds.data.room import cut_windows, windows_of

SHARDS, SAMPLES = 20, 8
STEPS = SHARDS * SAMPLES // 16
"""Of an epoch."""
NAMES = "train-{000000..000019}.tar"


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remotes, "FIRST_WAIT", 0.02)


@pytest.fixture
def local(write_shards) -> list[Path]:
    """Indexed; a cache of four of the twenty holds two windows of two."""
    paths = write_shards(shards=SHARDS, samples=SAMPLES)
    for path in paths:
        build_index(path)
    return paths


@pytest.fixture
def site(local: list[Path]) -> Site:
    """With the indexes beside the shards."""
    return Site({path.name: path.read_bytes() for path in local[0].parent.iterdir()})


def room_of(local: list[Path], shards: float) -> float:
    return gib(shards * max(path.stat().st_size for path in local))


def sources_of(corpus: Corpus, window="auto") -> list[Source]:
    return cut_windows([source_of(corpus, window)])


def source_of(corpus: Corpus, window="auto") -> Source:
    return Source("image", corpus, ByteSamples(corpus), 4, 4, window=window)


def open_remote(url: str, tmp_path: Path, cache_gib: float, **more) -> list[Source]:
    return sources_of(open_corpus(f"{url}/{NAMES}", settings_of(tmp_path, cache_gib=cache_gib, **more)))


def with_cache(corpus: Corpus, cache_gib: float, refetch: bool = False) -> Corpus:
    """The same, with another cache."""
    change = {"cache_gib": cache_gib, "refetch": refetch}
    indexes = [
        replace(index, remote=replace(index.remote, settings=index.remote.settings.model_copy(update=change)))
        for index in corpus.indexes
    ]
    return Corpus(indexes, corpus.fields)


def open_local(local: list[Path], window) -> list[Source]:
    return sources_of(Corpus.open(local, ByteSamples.fields, progress=None, workers=1), window)


def load(sources: list[Source], first: int, last: int, rank=0, world=1, workers=0) -> list[list[MicroBatch]]:
    return list(StepLoader(sources, make_plan(sources), rank, world, first, last, workers))


def in_order(ranks: list[list[list[MicroBatch]]]) -> list:
    """The global batch of each step, from those of its ranks."""
    return [
        as_values(sorted((m for step in steps for m in step), key=lambda m: m.index))
        for steps in zip(*ranks, strict=True)
    ]


def units_of(steps: list) -> list[int]:
    return [row[0] for step in steps for micro in step for row in micro[3]]


def tars(site: Site) -> Counter:
    """How often each was asked for."""
    return Counter(name for name in site.asked if name.endswith(".tar"))


@contextmanager
def watched(root: Path) -> Iterator[list[int]]:
    """The most bytes that tars and parts of a cache took meanwhile."""
    most, watching = [0], True

    def watch() -> None:
        while watching:
            if (root / "lock").is_file():
                with locked(root / "lock"):
                    files = [
                        os.stat(p) for p in root.glob("*/*") if p.suffix in (".tar", ".part") and p.is_file()
                    ]
                most[0] = max(most[0], sum({file.st_ino: file.st_size for file in files}.values()))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        watching = False
        watcher.join()


def test_an_epoch_of_five_caches_fetches_each_shard_once(local, site, tmp_path, monkeypatch):
    """Every sample once, the disk never above its limit, and the order that local shards have in such windows."""
    monkeypatch.setattr(prefetch, "MAX_AHEAD", 1)  # so that the rest of a window is known from the window
    cache_gib = room_of(local, 4)
    with serve(site) as url, watched(tmp_path / "cache") as most:
        sources = open_remote(url, tmp_path, cache_gib)
        read = in_order([load(sources, 0, STEPS)])
    assert sorted(units_of(read)) == list(range(SHARDS * SAMPLES))
    assert tars(site) == {path.name: 1 for path in local}
    assert 0 < most[0] <= cache_gib * (1 << 30)
    assert read == in_order([load(open_local(local, cache_gib / 2), 0, STEPS)])


def test_the_next_window_is_fetched_while_one_is_read(local, site, tmp_path, monkeypatch):
    """And no more than there is room for; the plan of the draws is not read so far ahead."""
    monkeypatch.setattr(prefetch, "MAX_AHEAD", 1)
    with serve(site) as url:
        sources = open_remote(url, tmp_path, room_of(local, 4))
        plan = make_plan(sources)
        steps = iter(StepLoader(sources, plan, 0, 1, 0, STEPS))
        next(steps)
        (ahead,) = plan.windows_ahead("image", 0, 4 * STEPS)
        two = {local[shard].name for _ in range(2) for shard in next(ahead)}
        until = time.monotonic() + 10
        while set(tars(site)) < two and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.2)
        assert set(tars(site)) == two
        steps.close()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_from_the_middle_on_only_what_is_left_is_fetched(local, site, tmp_path):
    """By three workers, to the bit; a sample that cannot be used is replaced by one that is there."""
    cache_gib, middle = room_of(local, 4), STEPS // 2
    whole = open_local(local, cache_gib / 2)
    unreadable = units_of(in_order([load(whole, 0, STEPS)]))[-20::9]
    for source in whole:
        source.samples.unreadable = unreadable
    with serve(site) as url, watched(tmp_path / "cache") as most:
        sources = open_remote(url, tmp_path, cache_gib)
        sources[0].samples.unreadable = unreadable
        read = in_order([load(sources, middle, STEPS, workers=3)])
    assert read == in_order([load(whole, 0, STEPS)])[middle:]
    assert sum(len(micro[5]) for step in read for micro in step) >= len(unreadable)
    assert set(tars(site).values()) == {1} and len(tars(site)) == SHARDS // 2
    assert most[0] <= cache_gib * (1 << 30)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_in_windows_know_neither_ranks_nor_workers(local):
    """Stopped in the second epoch and gone on with; epochs have orders and windows of their own."""
    sources, stop = open_local(local, room_of(local, 3)), STEPS + 4
    whole = in_order([load(sources, 0, 2 * STEPS)])
    for world, workers in ((1, 3), (2, 1), (4, 0)):
        ranks = [load(sources, stop, 2 * STEPS, rank, world, workers) for rank in range(world)]
        assert in_order(ranks) == whole[stop:]
    first, second = units_of(whole[:STEPS]), units_of(whole[STEPS:])
    assert sorted(first) == sorted(second) == list(range(SHARDS * SAMPLES)) and first != second
    assert first != units_of(in_order([load(open_local(local, "whole"), 0, STEPS)]))


# ---- room ----


def test_windows_are_chosen_once_and_are_part_of_what_a_run_knows_of_its_data(local, site, tmp_path):
    """With more room it goes on as it was; with too little it says how much it needs."""
    with serve(site) as url:
        opened = open_corpus(f"{url}/{NAMES}", settings_of(tmp_path))
    corpora = {shards: with_cache(opened, room_of(local, shards)) for shards in (3.9, 4, 8, 20)}
    begun = sources_of(corpora[8])
    (window,) = windows_of(begun).values()
    assert window == int(room_of(local, 8) * (1 << 30)) // 2
    for shards in (8, 20):
        on = cut_windows([source_of(corpora[shards])], windows_of(begun))
        assert on[0].fingerprint == begun[0].fingerprint and make_plan(on).draws(9, "image", 1) == make_plan(
            begun
        ).draws(9, "image", 1)
    whole = sources_of(corpora[20])
    assert windows_of(whole) == {} and whole[0].fingerprint == corpora[20].fingerprint
    assert sources_of(corpora[4])[0].fingerprint != begun[0].fingerprint != whole[0].fingerprint
    need = r"image .* in windows of .*; of windows two.* remote.cache_gib=0.00\d or more"
    with pytest.raises(ValueError, match=need):
        cut_windows([source_of(corpora[4])], windows_of(begun))
    with pytest.raises(ValueError, match="as a whole.* remote.cache_gib=0.00.*data.window_gib, or .*refetch"):
        cut_windows([source_of(corpora[8])], {})  # of a run that had none
    assert windows_of(sources_of(with_cache(opened, room_of(local, 4), refetch=True), "whole")) == {}
    with pytest.raises(
        ValueError, match=r"two windows of two of them.*, need .* remote.cache_gib=0.00\d or more"
    ):
        sources_of(corpora[3.9])
    with pytest.raises(
        ValueError, match=r"data.window_gib=.* holds no two of its shards.* set 0.00\d or more"
    ):
        open_local(local, room_of(local, 1.9))


def test_local_shards_beside_remote_ones_need_no_room(local, site, tmp_path):
    """They counted as if they were fetched: the run was cut into windows, or refused."""
    with serve(site) as url:
        here, settings = local[0].parent, settings_of(tmp_path, cache_gib=room_of(local, 2.5))
        corpus = open_corpus(f"{here}/train-0000{{00..17}}.tar::{url}/train-0000{{18..19}}.tar", settings)
        for window in ("auto", "whole"):
            assert windows_of(sources_of(corpus, window)) == {}
        read = in_order([load(sources_of(corpus), 0, 3)])
    assert read == in_order([load(open_local(local, "whole"), 0, 3)])


def test_the_advised_cache_is_what_all_remote_shards_need_where_that_is_less(local, site, tmp_path):
    """One large local shard beside them: windows of two like it would need 20 MB."""
    big = tmp_path / "big.tar"
    write_tar(
        big, {f"{i}.{name}": bytes(size) for i in range(5) for name, size in (("bin", 10**6), ("cls", 1))}
    )
    with serve(site) as url:
        names = f"{big}::{url}/train-0000{{18..19}}.tar"
        with pytest.raises(ValueError, match="two windows of two") as refused:
            sources_of(open_corpus(names, settings_of(tmp_path, cache_gib=room_of(local, 1.5))))
        advised = float(re.search(r"remote.cache_gib=([\d.]+)", str(refused.value))[1])
        assert advised < room_of(local, 2) + 0.002
        assert windows_of(sources_of(open_corpus(names, settings_of(tmp_path, cache_gib=advised)))) == {}


def test_small_corpora_stay_whole_and_large_ones_share_the_room(local, site, tmp_path):
    """Of 10 shards of cache 2 are the small one's; two windows of each of the others take 4."""
    with serve(site) as url:
        settings = settings_of(tmp_path, cache_gib=room_of(local, 10.1))
        names = ("{000000..000001}", "{000002..000010}", "{000011..000019}")
        sources = [
            replace(source_of(open_corpus(f"{url}/train-{name}.tar", settings)), name=stream)
            for stream, name in zip(("text", "image", "audio"), names, strict=True)
        ]
        cut = cut_windows(sources)
        windows, size = windows_of(cut), max(path.stat().st_size for path in local)
        assert windows.keys() == {"image", "audio"}
        assert all(2 * size <= limit < 2.3 * size for limit in windows.values())
        with watched(tmp_path / "cache") as most:
            steps = load(cut, 0, 3)
    assert sum(len(step) for step in steps) == 3 * 12
    assert set(tars(site).values()) == {1} and most[0] <= room_of(local, 10.1) * (1 << 30)

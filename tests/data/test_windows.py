"""Windows of shards: every sample once in an epoch, from few shards at a time, wherever one begins."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from columns import lengths_of, librispeech

from d2v_ds.data import Buckets, Plan, Share, Stream, Windows

SHARDS, LIMIT, STEPS = 53, 400, 3
KNOWN = {"plain": [517, 513, 536, 640, 533, 621, 86], "by length": [409, 746, 402]}


def corpus(kind: str, seed: int = 0, first: int = 0, name: str = "audio/a") -> Share:
    """53 shards of unequal size, some of them empty; with lengths or without."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 40, SHARDS)
    sizes = rng.integers(50, 100, SHARDS)
    shards, starts, buckets = range(SHARDS), np.concatenate([[0], np.cumsum(counts)]), None
    if kind == "by length":
        lengths = lengths_of([librispeech(int(n), shard) // 160 for shard, n in enumerate(counts)])
        buckets = Buckets(lengths, shards, 10_000, 31, 2_500)
    windows = Windows(name, LIMIT, shards, sizes, first + starts, buckets)
    return Share(name, first, int(starts[-1]), 1, buckets, windows)


def plan_of(kind: str) -> Plan:
    share = corpus(kind)
    return Plan(3, [Stream("audio", share.size, 7, 4, (share,))])


def window_of(windows: Windows, epoch: int) -> dict[int, int]:
    """shard -> its window."""
    first = epoch * windows.num_places
    groups = windows.ahead(3, first, first + windows.num_places)
    return {shard: number for number, shards in enumerate(groups) for shard in shards}


@pytest.fixture(params=["plain", "by length"])
def plan(request: pytest.FixtureRequest) -> Plan:
    return plan_of(request.param)


def epoch_of(plan: Plan, epoch: int, name: str = "audio") -> list[list[int]]:
    """The units of an epoch, micro-batch after micro-batch."""
    (stream,) = plan.streams
    (share,) = stream.shares
    places = share.windows.num_places
    batch = 1 if share.buckets else stream.batch
    first, last = epoch * places // batch, -(-(epoch + 1) * places // batch)
    batches = []
    for position in range(first, last):
        draws = plan.draws(position // stream.micro_batches, name, position % stream.micro_batches)
        batches.append([draw.unit for draw in draws if draw.epoch == epoch])
    return batches


def shards_of(share: Share, units: list[int]) -> list[int]:
    return (np.searchsorted(share.windows._unit_starts, units, side="right") - 1).tolist()


def test_each_sample_comes_once_in_an_epoch_and_epochs_differ(plan: Plan) -> None:
    share = plan.streams[0].shares[0]
    epochs = [[unit for batch in epoch_of(plan, epoch) for unit in batch] for epoch in (0, 1)]
    assert all(sorted(units) == list(range(share.size)) for units in epochs)
    assert epochs[0] != epochs[1]
    groups = [frozenset(Counter(window_of(share.windows, e)).items()) for e in range(2)]
    assert groups[0] != groups[1]


def test_windows_follow_one_another_and_hold_no_more_than_their_bytes(plan: Plan) -> None:
    """Inside of one all shards are mixed."""
    share = plan.streams[0].shares[0]
    for epoch in (0, 5):
        windows = window_of(share.windows, epoch)
        sizes = Counter()
        for shard, window in windows.items():
            sizes[window] += int(share.windows._sizes[shard])
        assert max(sizes.values()) <= LIMIT and len(sizes) <= share.windows.max_windows()
        assert len(windows) == (np.diff(share.windows._unit_starts) > 0).sum()
        order = [windows[s] for batch in epoch_of(plan, epoch) for s in shards_of(share, batch)]
        assert order == sorted(order)
        batches = [shards_of(share, batch) for batch in epoch_of(plan, epoch) if len(batch) > 3]
        assert np.mean([len(set(shards)) for shards in batches]) > 2


def test_by_length_no_micro_batch_is_over_its_budget_nor_of_two_windows() -> None:
    plan = plan_of("by length")
    share = plan.streams[0].shares[0]
    for epoch in (0, 5):
        windows = window_of(share.windows, epoch)
        for batch in epoch_of(plan, epoch):
            lengths = [share.buckets.lengths.of_unit(unit) for unit in batch]
            assert 1 <= len(batch) <= 31 and len(batch) * max(lengths) <= 10_000
            assert len({share.buckets.bucket_of(unit) for unit in batch}) == 1
            assert len({windows[shard] for shard in shards_of(share, batch)}) == 1


def test_a_replacement_is_of_the_same_window(plan: Plan) -> None:
    """So it never wants a shard that was evicted, or is not there yet; and of like length."""
    share = plan.streams[0].shares[0]
    for step in range(0, 60, 7):
        for draw in plan.draws(step, "audio", 1):
            windows = window_of(share.windows, draw.epoch)
            others = [plan.replacement(draw, "audio", attempt).unit for attempt in range(1, 10)]
            found = {windows[shard] for shard in shards_of(share, [draw.unit, *others])}
            assert len(found) == 1
            assert not share.buckets or len({share.buckets.bucket_of(u) for u in [draw.unit, *others]}) == 1
            further = [plan.replacement(draw, "audio", attempt).unit for attempt in range(11, 21)]
            assert {windows[shard] for shard in shards_of(share, further)} == found
            assert not share.buckets or len({share.buckets.bucket_of(u) for u in further}) > 1


@pytest.fixture
def mix() -> Plan:
    """Three corpora, two of them in windows."""
    first = corpus("plain", 1, 0, "audio/a")
    second = corpus("plain", 2, first.size, "audio/b")
    end = first.size + second.size
    shares = (replace(first, count=5), replace(second, count=12), Share("audio/c", end, 40, 7))
    return Plan(3, [Stream("audio", end + 40, 4, 6, shares)])


def test_a_mix_has_exact_counts_and_epochs(mix: Plan) -> None:
    """As without windows: in every block the same counts, each sample of a corpus once before any comes again."""
    stream, drawn, orders = mix.streams[0], {}, set()
    for block in range(45):
        places = [(4 * block + step, index) for step in range(4) for index in range(6)]
        names = [mix.corpus(step, "audio", index) for step, index in places]
        assert [names.count(share.name) for share in stream.shares] == [5, 12, 7]
        orders.add(tuple(names))
        for name, place in zip(names, places, strict=True):
            drawn.setdefault(name, []).extend(mix.draws(place[0], "audio", place[1]))
    assert len(orders) > 40
    for share in stream.shares:
        seen = Counter((draw.epoch, draw.unit - share.first) for draw in drawn[share.name])
        whole = (len(drawn[share.name]) - 24) // share.size
        assert max(seen.values()) == 1 and whole >= 0
        assert all(seen[epoch, unit] for epoch in range(whole) for unit in range(share.size))


def test_what_a_step_draws_is_in_the_windows_that_are_fetched_for_it(mix: Plan) -> None:
    """The one that it is in, or the next."""
    stream = mix.streams[0]
    for step in range(60):
        fetched = mix.windows_ahead("audio", 6 * step, 6000)
        for share, ahead in zip(stream.shares, fetched, strict=False):
            at_hand = {*next(ahead), *next(ahead)}
            for index in range(6):
                if mix.corpus(step, "audio", index) == share.name:
                    units = [draw.unit for draw in mix.draws(step, "audio", index)]
                    assert at_hand >= set(shards_of(share, units))


def test_windows_have_known_values() -> None:
    """Others would be a new plan."""
    assert {kind: [d.unit for d in plan_of(kind).draws(99, "audio", 2)] for kind in KNOWN} == KNOWN

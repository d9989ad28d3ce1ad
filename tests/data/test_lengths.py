"""Lengths, blocks and buckets of millions of samples, of which memory holds counts."""

import numpy as np
import pytest
from columns import lengths_of, librispeech

from d2v_ds.data import Buckets, Plan, Share, Stream, TextBlocks
from d2v_ds.data import lengths as module

KNOWN_BUCKETS = ([3, 7, 10, 14, 17, 19, 21, 24, 27], [6, 9, 13, 16, 18, 20, 23, 26, 29])
KNOWN_UNITS = [[34, 19, 47], [9, 18, 53, 25, 31, 37, 3, 46]]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few samples are many chunks."""
    for name in ("lengths", "blocks", "buckets"):
        monkeypatch.setattr(f"d2v_ds.data.{name}.CHUNK", 8)
    monkeypatch.setattr(module, "_PIECE", 24)
    monkeypatch.setattr(module, "MAX_OPEN_COLUMNS", 2)


def random_columns(seed: int = 0, high: int = 30) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, high, rows) for rows in (11, 1, 64, 100, 8)]


@pytest.mark.parametrize("shortest", [1, 7])
def test_units_are_the_samples_that_are_long_enough(shortest: int) -> None:
    columns = random_columns()
    lengths = lengths_of(columns, shortest)
    rows = [
        (s, row) for s, column in enumerate(columns) for row in np.flatnonzero(column >= shortest).tolist()
    ]
    assert lengths.shard_starts[-1] == len(rows) < 184
    values = [int(columns[s][row]) for s, row in rows]
    assert lengths.all().tolist() == values
    assert [lengths.locate(unit) for unit in range(len(rows))] == rows
    assert [lengths.unit(*row) for row in rows] == list(range(len(rows)))
    assert [lengths.of_unit(unit) for unit in range(len(rows))] == values
    assert lengths.total(range(1, 4)) == sum(
        v for (s, _), v in zip(rows, values, strict=True) if s in (1, 2, 3)
    )
    assert lengths.count(range(5), 20).tolist() == np.bincount(np.minimum(values, 20), minlength=21).tolist()


@pytest.mark.parametrize("block", [1, 4, 7, 13, 29])
def test_blocks_tile_the_tokens_of_each_shard(block: int) -> None:
    """Documents without a token are none of the corpus."""
    columns = random_columns(high=6)
    blocks = TextBlocks.build(lengths_of(columns), block)
    expected, unit = [], 0
    for column in columns:
        tokens = []
        for length in column[column > 0].tolist():
            tokens += [(unit, offset) for offset in range(length)]
            unit += 1
        pieces = [tokens[i : i + block] for i in range(0, len(tokens) - block + 1, block)]
        expected += [(*piece[0], piece[-1][0]) for piece in pieces]
    assert [blocks.locate(i) for i in range(len(blocks))] == expected


def test_text_shorter_than_a_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="5 tokens in its largest shard, less than one block of 6"):
        TextBlocks.build(lengths_of([[2, 3], [1]]), 6)


def batches_of(plan: Plan, steps: int) -> list[list]:
    (stream,) = plan.streams
    return [plan.draws(step, stream.name, i) for step in range(steps) for i in range(stream.micro_batches)]


@pytest.mark.parametrize(
    ("budget", "most", "extra"), [(60, 1000, 0), (60, 4, 0), (29, 1000, 0), (61, 1000, 1)]
)
def test_an_epoch_has_every_sample_once_within_the_budget(budget: int, most: int, extra: int) -> None:
    """In another order each time, and nothing of what is left out."""
    lengths = lengths_of(random_columns(high=40), 3)
    buckets = Buckets(lengths, range(5), budget, most, 29, extra) if budget >= 29 + extra else None
    size, per_epoch = int(lengths.shard_starts[-1]), buckets.num_batches
    assert buckets.num_samples == size
    plan = Plan(3, [Stream("audio", size, most, 1, (Share("audio", 0, size, 1, buckets),))])
    batches = batches_of(plan, 3 * per_epoch)
    orders = []
    for epoch in range(3):
        draws = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert {draw.epoch for batch in draws for draw in batch} == {epoch}
        orders.append([draw.unit for batch in draws for draw in batch])
        assert sorted(orders[-1]) == list(range(size))
        for batch in draws:
            longest = max(min(lengths.of_unit(draw.unit), 29) for draw in batch)
            assert 1 <= len(batch) <= most and len(batch) * (longest + extra) <= budget
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize(("budget", "longest"), [(40 * 6, 39), (10**30, 39), (10**30, 2**31)])
def test_a_budget_and_a_limit_above_all_lengths_cost_and_change_nothing(budget: int, longest: int) -> None:
    """A count for each length up to 2**31 would take 17 GB."""
    lengths = lengths_of(random_columns(high=40), 3)
    assert len(lengths.count(range(5), longest)) == 40
    buckets = Buckets(lengths, range(5), budget, 6, longest)
    assert buckets.budget == budget
    assert buckets.fingerprint() == Buckets(lengths, range(5), 40 * 6, 6, 40).fingerprint()


def test_buckets_of_some_shards_have_only_theirs() -> None:
    lengths = lengths_of(random_columns(high=40), 3)
    buckets = Buckets(lengths, range(2, 4), 80, 100, 29)
    found = {
        buckets.unit(bucket, rank)
        for bucket in range(len(buckets.tops))
        for rank in range(buckets.sizes[bucket])
    }
    assert found == set(range(*lengths.shard_starts[[2, 4]].tolist()))
    for unit in found:
        bucket = buckets.bucket_of(unit)
        length = min(lengths.of_unit(unit), 29)
        assert buckets.shortest[bucket] <= length <= buckets.tops[bucket]


def measure_loss(buckets: Buckets, batches: list[list]) -> tuple[float, float, float]:
    """(cropped to the shortest, padded to the longest) as shares, and how full the budget is on average."""
    lengths = [
        np.minimum([buckets.lengths.of_unit(draw.unit) for draw in batch], buckets.longest)
        for batch in batches
    ]
    stored = sum(int(x.sum()) for x in lengths)
    cropped = sum(len(x) * int(x.min()) for x in lengths)
    padded = sum(len(x) * int(x.max()) for x in lengths)
    return 1 - cropped / stored, 1 - stored / padded, padded / len(batches)


@pytest.mark.parametrize(("number", "limit"), [(400, 0.1), (2_000, 0.05)])
def test_little_is_lost_on_lengths_like_librispeechs(number: int, limit: float) -> None:
    """With 62.5 s a micro-batch, as released; batches of 5 at random lose a third. What is told is what is."""
    lengths = lengths_of([librispeech(number)], 32_000)
    buckets = Buckets(lengths, range(1), 1_000_000, 31, 320_000)
    size = buckets.num_samples
    plan = Plan(1, [Stream("audio", size, 31, 1, (Share("audio", 0, size, 1, buckets),))])
    batches = batches_of(plan, buckets.num_batches)
    cropped, padded, full = measure_loss(buckets, batches)
    assert cropped < limit and padded < limit
    assert full > 0.85 * 1_000_000
    filling = buckets.filling()
    assert 1 - filling.cropped / filling.stored == pytest.approx(cropped, abs=0.01)
    assert 1 - filling.stored / filling.padded == pytest.approx(padded, abs=0.01)
    units = np.random.default_rng(0).permutation(size)[: size // 5 * 5].reshape(-1, 5).tolist()
    values = [[min(lengths.of_unit(unit), 320_000) for unit in row] for row in units]
    assert 1 - sum(5 * min(row) for row in values) / sum(map(sum, values)) > 0.3


def test_samples_meet_others_in_each_epoch() -> None:
    """Not the same neighbours, as sorting by exact length gives; of the rare short ones all make one micro-batch."""
    lengths = lengths_of([librispeech(3000)], 32_000)
    buckets = Buckets(lengths, range(1), 1_000_000, 31, 320_000)
    size = buckets.num_samples
    plan = Plan(1, [Stream("audio", size, 31, 1, (Share("audio", 0, size, 1, buckets),))])
    batches = batches_of(plan, 2 * buckets.num_batches)
    pairs = [
        {
            frozenset((a.unit, b.unit))
            for batch in epoch
            if len(batch) < 6
            for a in batch
            for b in batch
            if a != b
        }
        for epoch in (batches[: buckets.num_batches], batches[buckets.num_batches :])
    ]
    assert len(pairs[0] & pairs[1]) < 0.05 * len(pairs[0])


def test_a_replacement_is_of_like_length() -> None:
    """A short one would crop the whole micro-batch."""
    lengths = lengths_of([librispeech(2000)], 32_000)
    buckets = Buckets(lengths, range(1), 1_000_000, 31, 320_000)
    size = buckets.num_samples
    plan = Plan(1, [Stream("audio", size, 31, 1, (Share("audio", 0, size, 1, buckets),))])
    for draw in plan.draws(3, "audio", 0):
        others = [plan.replacement(draw, "audio", attempt) for attempt in range(1, 9)]
        wanted = min(lengths.of_unit(draw.unit), 320_000)
        assert all(wanted / 1.11 < min(lengths.of_unit(o.unit), 320_000) < wanted * 1.11 for o in others)
        assert len({draw.seed, *(o.seed for o in others)}) == 9 and len({o.unit for o in others}) > 3


def test_the_only_sample_of_its_length_is_replaced_by_a_shorter_one_and_the_shortest_by_a_longer() -> None:
    """Else one that is unreadable would end a run."""
    lengths = lengths_of([np.array([100, 50, 50, 11, 11])])
    buckets = Buckets(lengths, range(1), 100, 2, 100)
    plan = Plan(1, [Stream("audio", 5, 2, 1, (Share("audio", 0, 5, 1, buckets),))])
    draws = {d.unit: d for step in range(3) for d in plan.draws(step, "audio", 0)}
    found = {plan.replacement(draws[0], "audio", attempt).unit for attempt in range(1, 12)}
    assert found & {1, 2} and found <= {0, 1, 2}
    found = {plan.replacement(draws[3], "audio", attempt).unit for attempt in range(1, 21)}
    assert {3, 4} <= found and found & {0, 1, 2}


def test_another_budget_or_other_lengths_have_another_fingerprint() -> None:
    columns = random_columns(high=40)
    first = Buckets(lengths_of(columns, 3), range(5), 80, 9, 29).fingerprint()
    assert Buckets(lengths_of(columns, 3), range(5), 80, 9, 29).fingerprint() == first
    columns[3][50] = 3 if columns[3][50] > 20 else 29
    assert Buckets(lengths_of(columns, 3), range(5), 80, 9, 29).fingerprint() != first
    assert Buckets(lengths_of(random_columns(high=40), 3), range(5), 90, 9, 29).fingerprint() != first


def test_an_order_by_length_has_known_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others would be a new plan; how many samples are counted together does not matter."""
    for size in (8, 16, 4096):
        for name in ("lengths", "blocks", "buckets"):
            monkeypatch.setattr(f"d2v_ds.data.{name}.CHUNK", size)
        monkeypatch.setattr(module, "_PIECE", 2 * size)
        buckets = Buckets(
            lengths_of([[9 * i % 31 for i in range(60)], [7, 8, 9, 30]], 3), range(2), 80, 9, 29
        )
        share = Share("audio", 0, buckets.num_samples, 1, buckets)
        plan = Plan(3, [Stream("audio", share.size, 9, 2, (share,))])
        units = [[draw.unit for draw in plan.draws(10**9, "audio", index)] for index in range(2)]
        assert (buckets.shortest.tolist(), buckets.tops.tolist()) == KNOWN_BUCKETS
        assert units == KNOWN_UNITS


def test_more_chunks_than_are_kept_sorted_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = lengths_of(random_columns(high=40), 3)
    buckets = Buckets(lengths, range(5), 80, 9, 29)
    places = [(bucket, rank) for bucket, size in enumerate(buckets.sizes) for rank in range(size)] * 2
    expected = [buckets.unit(*place) for place in places]
    assert len(buckets._sorted) > 20
    monkeypatch.setattr("d2v_ds.data.buckets.MAX_SORTED_CHUNKS", 2)
    buckets = Buckets(lengths, range(5), 80, 9, 29)
    assert [buckets.unit(*place) for place in places] == expected and len(buckets._sorted) == 2

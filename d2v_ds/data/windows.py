"""Which shards are read together, where only some are at hand? An epoch goes through windows of shards.

Each epoch permutes the shards and cuts them, in that order, into windows of so many bytes; what is in a window is
permuted as a whole, and windows follow one another. So a cache that holds two of them, one that is read and one that
is fetched, streams any number of shards, and an epoch fetches each once. What an epoch looks like is computed
once, in a time that grows with the shards, and kept; then any place in it costs the same.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from d2v_ds.data.buckets import Buckets, near_bucket
from d2v_ds.data.permutation import permute, seed_of

_MAX_EPOCHS = 3
"""Kept; a micro-batch may lie in two."""


@dataclass(frozen=True, slots=True)
class _Epoch:
    """W windows, S shards, B buckets."""

    order: np.ndarray
    """(S,) the shards as they come"""
    turns: np.ndarray
    """(S,) when each comes: the inverse"""
    starts: np.ndarray
    """(W + 1,) the first turn of each window"""
    firsts: np.ndarray
    """(W + 1,) the first place of each window"""
    units: np.ndarray
    """(S + 1,) units before each turn"""
    sizes: np.ndarray | None = None
    """(W, B) samples"""
    batches: np.ndarray | None = None
    """(W, B) micro-batches"""


class Windows:
    """The windows of one corpus. A place is that of a unit in its epoch, with buckets that of a micro-batch."""

    def __init__(
        self,
        name: str,
        limit: int,
        shards: range,
        sizes: np.ndarray,
        unit_starts: np.ndarray,
        buckets: Buckets | None = None,
    ) -> None:
        """Windows of at most `limit` bytes of shards of `sizes` (S,), with units from `unit_starts` (S + 1,) on.

        `name`: what their order is drawn from; `shards`: their numbers among all that are read.
        """
        self.name, self.limit, self.shards = name, limit, shards
        self._unit_starts = np.asarray(unit_starts, dtype=np.int64)
        num_units = np.diff(self._unit_starts)
        self._sizes = np.where(num_units > 0, sizes, 0)  # what holds nothing is not fetched
        self._num_units = num_units
        self._epochs: OrderedDict[tuple[int, int], _Epoch] = OrderedDict()
        self._buckets = buckets
        self.num_places = int(num_units.sum())
        """Of each epoch"""
        if buckets:
            self._before = buckets.before_shards()
            self._counts = np.ascontiguousarray(np.diff(self._before, axis=1).T)  # (S, B)
            room, most = buckets.room, self.max_windows()
            wanted = (buckets.sizes + most * (room - 1)) // room  # as many as the worst cuts want
            self.num_places = int(np.minimum(buckets.sizes, wanted).sum())

    def max_windows(self) -> int:
        """More than so many cannot be: two that follow one another hold more than `limit` together, and each but
        the last more than `limit` without the largest shard."""
        total, largest = int(self._sizes.sum()), int(self._sizes.max())
        by_two = 2 * -(-total // self.limit) - 1
        return min(by_two, -(-total // (self.limit - largest))) if self.limit > largest else by_two

    def num_windows(self, seed: int, epoch: int) -> int:
        return len(self._epoch(seed, epoch).starts) - 1

    def units(self, seed: int, epoch: int, first: int, last: int) -> np.ndarray:
        """The units at places first .. last - 1 of an epoch, where there are no buckets."""
        cut, found = self._epoch(seed, epoch), []
        while first < last:
            window, begin, end = self._window(cut, first)
            stop = min(last, end)
            key = seed_of(seed, "order", self.name, epoch, window)
            places = permute(np.arange(first - begin, stop - begin), end - begin, key)
            found.append(self._units_at(cut, begin + places))
            first = stop
        return np.concatenate(found)

    def units_of_batch(self, seed: int, epoch: int, place: int) -> list[int]:
        """The units of a micro-batch, where there are buckets; all of one window."""
        cut = self._epoch(seed, epoch)
        window, begin, end = self._window(cut, place)
        number = permute(place - begin, end - begin, seed_of(seed, "batches", self.name, epoch, window))
        ends = np.cumsum(cut.batches[window])
        bucket = int(ends.searchsorted(number, side="right"))
        batches, size = int(cut.batches[window, bucket]), int(cut.sizes[window, bucket])
        number -= int(ends[bucket]) - batches
        ranks = np.arange(number * size // batches, (number + 1) * size // batches)
        key = seed_of(seed, "order", self.name, epoch, window, bucket)
        return self._units_of_bucket(cut, window, bucket, permute(ranks, size, key))

    def replacement(self, seed: int, epoch: int, unit: int, number: int, further: int = 0) -> int:
        """A unit of the same window, and of like length or of a bucket `further` on; any number chooses one."""
        cut = self._epoch(seed, epoch)
        shard = int(self._unit_starts.searchsorted(unit, side="right")) - 1
        window = int(cut.starts.searchsorted(cut.turns[shard], side="right")) - 1
        if self._buckets:
            bucket = near_bucket(self._buckets.bucket_of(unit), cut.sizes[window], further)
            rank = number % int(cut.sizes[window, bucket])
            return self._units_of_bucket(cut, window, bucket, np.array([rank]))[0]
        begin, end = int(cut.firsts[window]), int(cut.firsts[window + 1])
        return int(self._units_at(cut, np.array([begin + number % (end - begin)]))[0])

    def ahead(self, seed: int, first: int, last: int) -> Iterator[list[int]]:
        """The shards of the window of place `first`, then of those that follow and begin before `last`; places are
        counted over all epochs."""
        epoch, place = divmod(first, self.num_places)
        while epoch * self.num_places < last:
            cut = self._epoch(seed, epoch)
            windows = np.flatnonzero(np.diff(cut.firsts)).tolist()
            for window in windows:
                if cut.firsts[window + 1] <= place:
                    continue
                if epoch * self.num_places + cut.firsts[window] >= last:
                    return
                shards = cut.order[cut.starts[window] : cut.starts[window + 1]]
                yield (self.shards.start + shards[self._sizes[shards] > 0]).tolist()
            epoch, place = epoch + 1, 0

    def _window(self, cut: _Epoch, place: int) -> tuple[int, int, int]:
        """(number, first place, place after the last) of the window that holds a place."""
        window = int(cut.firsts.searchsorted(place, side="right")) - 1
        return window, int(cut.firsts[window]), int(cut.firsts[window + 1])

    def _units_at(self, cut: _Epoch, places: np.ndarray) -> np.ndarray:
        """Units counted in the order in which the shards come -> units of the corpus."""
        turns = cut.units.searchsorted(places, side="right") - 1
        return self._unit_starts[cut.order[turns]] + places - cut.units[turns]

    def _units_of_bucket(self, cut: _Epoch, window: int, bucket: int, ranks: np.ndarray) -> list[int]:
        """The units at these ranks among those of a bucket in a window, shard after shard."""
        shards = cut.order[cut.starts[window] : cut.starts[window + 1]]
        ends = np.cumsum(self._counts[shards, bucket], dtype=np.int64)
        at = ends.searchsorted(ranks, side="right")
        stored = self._before[bucket, shards[at] + 1].astype(np.int64) - ends[at] + ranks
        return [self._buckets.unit(bucket, rank) for rank in stored.tolist()]

    def _epoch(self, seed: int, epoch: int) -> _Epoch:
        if (seed, epoch) not in self._epochs:
            if len(self._epochs) >= _MAX_EPOCHS:
                self._epochs.popitem(last=False)
            self._epochs[seed, epoch] = self._cut(seed, epoch)
        return self._epochs[seed, epoch]

    def _cut(self, seed: int, epoch: int) -> _Epoch:
        num_shards = len(self._sizes)
        order = permute(np.arange(num_shards), num_shards, seed_of(seed, "shards", self.name, epoch))
        turns = np.empty(num_shards, dtype=np.int64)
        turns[order] = np.arange(num_shards)
        ends, starts, before = np.cumsum(self._sizes[order]).tolist(), [0], 0
        while starts[-1] < num_shards:
            stop = bisect_right(ends, before + self.limit, lo=starts[-1])
            starts.append(stop)
            before = ends[stop - 1]
        starts, units = np.array(starts), np.concatenate([[0], np.cumsum(self._num_units[order])])
        if self._buckets is None:
            return _Epoch(order, turns, starts, units[starts], units)
        sizes = np.add.reduceat(self._counts[order], starts[:-1], axis=0, dtype=np.int64)
        batches = self._share_out(sizes)
        firsts = np.concatenate([[0], np.cumsum(batches.sum(axis=1))])
        return _Epoch(order, turns, starts, firsts, units, sizes, batches)

    def _share_out(self, sizes: np.ndarray) -> np.ndarray:
        """(W, B) micro-batches: as few as the budget allows, and evenly more until there are `num_places`, so that all
        epochs have the same number whatever their cuts."""
        batches = -(-sizes // self._buckets.room)
        could_be_more = np.cumsum((sizes - batches).ravel())
        missing = self.num_places - int(batches.sum())
        assert 0 <= missing <= could_be_more[-1], f"{missing} micro-batches are missing"
        shared = missing * could_be_more // max(int(could_be_more[-1]), 1)
        return batches + np.diff(shared, prepend=0).reshape(batches.shape)

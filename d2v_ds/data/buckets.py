"""Which samples make a micro-batch where lengths differ? Those of like length, as many as a budget holds.

A bucket is a stretch of lengths: the longest is at most a tenth longer than the shortest, so that little is padded
or cropped, and where it can be, a bucket ends where one sample more fits the budget. An epoch permutes each bucket
by itself and cuts it into micro-batches, and the plan permutes those: a micro-batch is found from its number without
reading the ones before. Against fairseq, which sorts by exact length, a sample meets others in each epoch.
"""

import hashlib
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from d2v_ds.data.lengths import CHUNK, Lengths

MAX_SORTED_CHUNKS = 1024
"""8 MB of a worker; all chunks of 4 million samples."""
_SPREAD = 10, 11  # shortest : longest of a bucket


class Filling(NamedTuple):
    """What the micro-batches of an epoch hold, in the unit of the lengths."""

    stored: int
    """of all samples, each up to `longest`"""
    cropped: float
    """if each micro-batch is cropped to its shortest sample; the expectation, like `padded`"""
    padded: float
    """if each is padded to its longest"""


class Buckets:
    """The samples of some shards of a corpus, in micro-batches of like length."""

    def __init__(
        self, lengths: Lengths, shards: range, budget: int, most: int, longest: int, extra: int = 0
    ) -> None:
        """At most `most` samples, and number x longest <= `budget`, in a micro-batch.

        A sample counts as no longer than `longest`, and has `extra` besides its length (a begin token).
        """
        assert budget >= longest + extra, f"a budget of {budget} holds no sample of {longest}"
        self.lengths, self.budget, self.extra = lengths, budget, extra
        self._counts = lengths.count(shards, longest)
        self.longest = longest = len(self._counts) - 1
        budget = min(budget, most * (longest + extra))  # more holds no more, and may be no number of numpy's
        edges = _cut(self._counts, budget, most, extra)
        self.shortest, self.tops = np.array(edges, dtype=np.int64).T
        """(buckets,) the first and last length of each"""
        cumulative = np.cumsum(self._counts)
        self.sizes = cumulative[self.tops] - cumulative[self.shortest - 1]
        """(buckets,) samples"""
        self.room = np.minimum(most, budget // (self.tops + extra))
        """(buckets,) the most samples of a micro-batch"""
        self.batch_starts = np.concatenate([[0], np.cumsum(-(-self.sizes // self.room))])
        """(buckets + 1,) the first micro-batch of each"""
        self.shards = shards
        self._first_chunk = int(lengths.chunk_starts[shards.start])
        self._bucket_of_length = np.full(longest + 1, len(self.tops), dtype=np.uint16)  # that is: in none
        for bucket, (first, last) in enumerate(zip(self.shortest, self.tops, strict=True)):
            self._bucket_of_length[first : last + 1] = bucket
        self._before = self._count_before(shards)
        self._sorted: OrderedDict[int, tuple[int, int, np.ndarray, list[int]]] = OrderedDict()

    @property
    def num_samples(self) -> int:
        return int(self.sizes.sum())

    @property
    def num_batches(self) -> int:
        """Micro-batches of an epoch."""
        return int(self.batch_starts[-1])

    def batch(self, number: int) -> tuple[int, range]:
        """(bucket, places in the order of its epoch) of micro-batch `number`: sizes differ by at most one."""
        bucket = int(np.searchsorted(self.batch_starts, number, side="right")) - 1
        k, size = int(number - self.batch_starts[bucket]), int(self.sizes[bucket])
        batches = int(self.batch_starts[bucket + 1] - self.batch_starts[bucket])
        return bucket, range(k * size // batches, (k + 1) * size // batches)

    def unit(self, bucket: int, rank: int) -> int:
        """The unit that comes at place `rank` among those of a bucket in stored order."""
        before = self._before[bucket]
        chunk = int(before.searchsorted(before.dtype.type(rank), side="right")) - 1  # else `before` is copied
        if chunk not in self._sorted:
            if len(self._sorted) >= MAX_SORTED_CHUNKS:
                self._sorted.popitem(last=False)
            self._sorted[chunk] = self._sort(chunk)
        shard, first_row, rows, starts = self._sorted[chunk]
        return self.lengths.unit(shard, first_row + int(rows[starts[bucket] + rank - int(before[chunk])]))

    def bucket_of(self, unit: int) -> int:
        length = min(self.lengths.of_unit(unit), self.longest)
        return int(np.searchsorted(self.shortest, length, side="right")) - 1

    def before_shards(self) -> np.ndarray:
        """(buckets, shards + 1) the samples of a bucket in the shards before each: the places that `unit` takes."""
        chunks = self.lengths.chunk_starts[self.shards.start : self.shards.stop + 1] - self._first_chunk
        return self._before[:, chunks]

    def filling(self) -> Filling:
        """What is expected of samples that are drawn from their buckets at random."""
        values = np.arange(len(self._counts)) + self.extra
        cropped = padded = 0.0
        for bucket, (first, last) in enumerate(zip(self.shortest, self.tops, strict=True)):
            batches = int(self.batch_starts[bucket + 1] - self.batch_starts[bucket])
            number = self.sizes[bucket] / batches
            low, high = expected_extremes(values[first : last + 1], self._counts[first : last + 1], number)
            cropped += self.sizes[bucket] * low
            padded += self.sizes[bucket] * high
        return Filling(int(values @ self._counts), cropped, padded)

    def fingerprint(self) -> str:
        """sha256 of which samples are in which bucket and how many make a micro-batch."""
        parts = (self.shortest, self.tops, self.room, self._before)
        return hashlib.sha256(
            b"".join(np.ascontiguousarray(p).astype("<i8").tobytes() for p in parts)
        ).hexdigest()

    def _sort(self, chunk: int) -> tuple[int, int, np.ndarray, list[int]]:
        """(shard, first row, rows by bucket, where each bucket begins in them) of a chunk."""
        shard, first_row, column = self.lengths.chunk(self._first_chunk + chunk)
        rows = (
            self._bucket_of_length[np.minimum(column, self.longest)].argsort(kind="stable").astype(np.uint16)
        )
        counts = self._before[:, chunk + 1] - self._before[:, chunk]
        return shard, first_row, rows, [0, *np.cumsum(counts).tolist()]

    def _count_before(self, shards: range) -> np.ndarray:
        """(buckets, chunks + 1) the samples of a bucket in the chunks before each."""
        num_buckets = len(self.tops)
        num_chunks = int(self.lengths.chunk_starts[shards.stop]) - self._first_chunk
        before = np.zeros((num_buckets, num_chunks + 1), dtype=np.uint32)
        for chunk, column in self.lengths.pieces(shards):
            cells = np.arange(len(column)) // CHUNK * (num_buckets + 1)
            cells += self._bucket_of_length[np.minimum(column, self.longest)]
            chunks = -(-len(column) // CHUNK)
            counts = np.bincount(cells, minlength=chunks * (num_buckets + 1)).reshape(chunks, -1)
            at = chunk - self._first_chunk + 1
            before[:, at : at + chunks] = counts[:, :-1].T
        return np.cumsum(before, axis=1, dtype=np.uint32)


def near_bucket(bucket: int, sizes: np.ndarray, further: int) -> int:
    """The bucket that is so many further on, of those that hold something: shorter ones first, which fit the budget."""
    filled = np.flatnonzero(sizes).tolist()
    at = filled.index(bucket)
    order = [*filled[at::-1], *filled[at + 1 :]]
    return order[min(further, len(order) - 1)]


def expected_extremes(values: np.ndarray, counts: np.ndarray, number: float) -> tuple[float, float]:
    """The means of the smallest and the largest of `number` values, drawn at random by their counts."""
    share = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    all_above, all_below = (1 - share) ** number, share**number
    return float(values @ (all_above[:-1] - all_above[1:])), float(values @ np.diff(all_below))


def _cut(counts: np.ndarray, budget: int, most: int, extra: int) -> list[tuple[int, int]]:
    """(first, last) length of each bucket, ascending; each length that occurs is in one.

    A bucket of fewer samples than a micro-batch holds takes shorter ones, however short.
    """
    cumulative = np.cumsum(counts)
    first, last = (int(x) for x in np.flatnonzero(counts)[[0, -1]])
    buckets = []
    while last >= first:
        below = _limit(last + extra, budget, most) - extra
        room = min(most, budget // (last + extra))
        enough = int(np.searchsorted(cumulative, cumulative[last] - room, side="right")) - 1
        below = min(below, enough)  # lengths above `below` are `room` or more
        buckets.append((max(below + 1, first), last))
        last = below
        while last >= first and not counts[last]:
            last -= 1
    return buckets[::-1]


def _limit(top: int, budget: int, most: int) -> int:
    """The longest length that is too short for a bucket that ends at `top`."""
    small, large = _SPREAD
    narrow = top * small // large
    room, room_of_narrow = budget // top, budget // max(narrow, 1)
    if room < most and room_of_narrow > room:
        return max(narrow, budget // room_of_narrow)
    return narrow

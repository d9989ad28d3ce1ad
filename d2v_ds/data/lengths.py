"""How long is each sample? A column beside each shard, mmapped, never held in memory as a whole.

Length is what a modality measures: sound samples, tokens. What must be known of all of it at once is kept as
counts of CHUNK stored samples of one shard: 100 million samples are 25,000 chunks.
"""

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np

CHUNK = 4096
MAX_OPEN_COLUMNS = 64
_PIECE = 256 * CHUNK


class Lengths:
    """The lengths of the stored samples of a list of shards; 0 or less than `shortest` is no sample of the corpus.

    A stored sample has a row in its shard; samples of the corpus, the units of a plan, are numbered without those
    left out.
    """

    def __init__(
        self,
        load: Callable[[int], np.ndarray],
        num_rows: np.ndarray,
        left_out: list[np.ndarray | None],
        shortest: int = 1,
    ) -> None:
        """`load(shard)`: its column, mmapped; `num_rows`: stored samples of each; `left_out`: rows, ascending."""
        self.shortest = shortest
        self._load, self._left_out = load, left_out
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        kept = [rows - (0 if out is None else len(out)) for rows, out in zip(num_rows, left_out, strict=True)]
        self.num_rows = np.asarray(num_rows, dtype=np.int64)
        self.shard_starts = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])
        """(shards + 1,) the first unit of each"""
        self.chunk_starts = np.concatenate([[0], np.cumsum(-(-self.num_rows // CHUNK))])
        """(shards + 1,) the first chunk of each"""

    def chunk(self, number: int) -> tuple[int, int, np.ndarray]:
        """(shard, first row, lengths) of a chunk; 0 for what is left out."""
        shard = int(np.searchsorted(self.chunk_starts, number, side="right")) - 1
        first = int(number - self.chunk_starts[shard]) * CHUNK
        return shard, first, self._used(self._column(shard)[first : first + CHUNK])

    def pieces(self, shards: range) -> Iterator[tuple[int, np.ndarray]]:
        """(first chunk, lengths as `chunk` has them), in order, some hundred at a time; leaves nothing open."""
        for shard in shards:
            column = self._load(shard)
            for first in range(0, len(column), _PIECE):
                yield (
                    int(self.chunk_starts[shard]) + first // CHUNK,
                    self._used(column[first : first + _PIECE]),
                )

    def unit(self, shard: int, row: int) -> int:
        """The number in the corpus of a stored sample that is not left out."""
        out = self._left_out[shard]
        before = 0 if out is None else int(np.searchsorted(out, row))
        return int(self.shard_starts[shard]) + row - before

    def of_unit(self, unit: int) -> int:
        shard, row = self.locate(unit)
        return int(self._column(shard)[row])

    def locate(self, unit: int) -> tuple[int, int]:
        """(shard, row) of a sample of the corpus."""
        shard = int(np.searchsorted(self.shard_starts, unit, side="right")) - 1
        return shard, stored_row(int(unit - self.shard_starts[shard]), self._left_out[shard])

    def count(self, shards: range, longest: int) -> np.ndarray:
        """How many samples have each length, up to the longest that occurs; what is longer counts as `longest`."""
        counts = np.zeros(1, dtype=np.int64)
        for _, column in self.pieces(shards):
            fewer, counts = sorted([counts, np.bincount(np.minimum(column, longest))], key=len)
            counts[: len(fewer)] += fewer
        counts[0] = 0
        return counts

    def total(self, shards: range) -> int:
        """The lengths of all samples together."""
        return sum(int(column.sum(dtype=np.int64)) for _, column in self.pieces(shards))

    def shards_of(self, first: int, size: int) -> range:
        """The shards that hold these units."""
        start = int(np.searchsorted(self.shard_starts, first, side="right")) - 1
        return range(start, int(np.searchsorted(self.shard_starts, first + size, side="left")))

    def all(self) -> np.ndarray:
        """(units,) uint32, for corpora that memory holds."""
        columns = (column for _, column in self.pieces(range(len(self.num_rows))))
        return np.concatenate([column[column > 0] for column in columns])

    def _used(self, column: np.ndarray) -> np.ndarray:
        return column if self.shortest <= 1 else np.where(column >= self.shortest, column, 0)

    def _column(self, shard: int) -> np.ndarray:
        """(rows,) uint32 of all that is stored."""
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN_COLUMNS:
                self._open.popitem(last=False)
            self._open[shard] = self._load(shard)
        self._open.move_to_end(shard)
        return self._open[shard]


def stored_row(position: int, left_out: np.ndarray | None) -> int:
    """The row of the sample with this number among those that are not left out."""
    if left_out is None:
        return position
    rows_before = range(len(left_out))  # of sample left_out[j], left_out[j] - j samples come before it
    return position + bisect.bisect_right(rows_before, position, key=lambda j: int(left_out[j]) - j)

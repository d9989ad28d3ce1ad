"""Which tokens make a block of text? Documents of a shard in stored order, cut into equal blocks.

What is held is the number of tokens before each chunk of documents; the rest is read from the mmapped column of
lengths when a block is looked up.
"""

from dataclasses import dataclass

import numpy as np

from d2v_ds.data.lengths import CHUNK, Lengths


@dataclass(frozen=True, slots=True)
class TextBlocks:
    """Documents cut into blocks of `block_tokens` consecutive tokens; a block never crosses shards."""

    block_tokens: int
    lengths: Lengths
    """tokens of each document, its end token included"""
    starts: np.ndarray
    """(chunks + 1,) the first token of each chunk, counted over all shards"""
    block_starts: np.ndarray
    """(shards + 1,) the first block of each shard; the tokens after a shard's last block are dropped"""

    @classmethod
    def build(cls, lengths: Lengths, block_tokens: int) -> "TextBlocks":
        sums = [
            np.add.reduceat(column, np.arange(0, len(column), CHUNK), dtype=np.int64)
            for _, column in lengths.pieces(range(len(lengths.num_rows)))
        ]
        starts = np.concatenate([[0], np.cumsum(np.concatenate(sums))])
        tokens = np.diff(starts[lengths.chunk_starts])
        blocks = np.concatenate([[0], np.cumsum(tokens // block_tokens)])
        if blocks[-1] < 1:
            raise ValueError(
                f"the text has {tokens.max()} tokens in its largest shard, less than one block of "
                f"{block_tokens}; add text or shorten the block"
            )
        return cls(block_tokens, lengths, starts, blocks)

    def __len__(self) -> int:
        return int(self.block_starts[-1])

    def locate(self, block: int) -> tuple[int, int, int]:
        """(first document, the block's first token in it, last document)."""
        assert 0 <= block < len(self), f"block {block} of {len(self)}"
        shard = int(np.searchsorted(self.block_starts, block, side="right")) - 1
        first_token = int(self.starts[self.lengths.chunk_starts[shard]])
        begin = first_token + int(block - self.block_starts[shard]) * self.block_tokens
        first, offset = self._find(begin)
        last, _ = self._find(begin + self.block_tokens - 1)
        return first, offset, last

    def _find(self, token: int) -> tuple[int, int]:
        """(document, place in it) of a token."""
        chunk = int(np.searchsorted(self.starts, token, side="right")) - 1
        shard, first_row, column = self.lengths.chunk(chunk)
        ends = np.cumsum(column, dtype=np.int64)
        place = token - int(self.starts[chunk])
        row = int(np.searchsorted(ends, place, side="right"))  # one of length 0 is passed over
        return self.lengths.unit(shard, first_row + row), place - int(ends[row] - column[row])

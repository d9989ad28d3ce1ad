"""Which unit goes where? The order of all data as a pure function of (seed, step); no state, no I/O.

A stream repeats its units for ever, each epoch in another order (a Feistel permutation, so any position
costs the same). A step takes a fixed number of micro-batches from each stream; rank r of N has r, r+N, ... of
them, so the global batch knows neither N nor the number of workers, and all ranks see the same modalities in
the same order. Changing what these functions return changes every run: tests hold known values.
"""

import functools
import hashlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS = 8
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and on nothing else, the same in every process and version."""
    encoded = b"".join(map(_encode, parts))
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little") >> 1


def permute(index: int | np.ndarray, size: int, key: int) -> int | np.ndarray:
    """Where a permutation of range(size), chosen by a 64-bit key, sends an index or an array of them."""
    half = np.uint64(max(1, math.ceil((size - 1).bit_length() / 2)))
    walked = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    assert size > 0 and (walked < size).all(), f"indices must lie in range({size})"
    outside = np.ones(walked.shape, dtype=bool)
    while outside.any():  # cycle walking: the network permutes fewer than 4 * size values, 4 turns at worst
        walked[outside] = _feistel(walked[outside], half, _round_keys(key))
        outside = walked >= size
    result = walked.astype(np.int64)
    return result if isinstance(index, np.ndarray) else int(result[0])


@dataclass(frozen=True, slots=True)
class Stream:
    """One modality's share of a step."""

    name: str
    size: int
    """units: samples, or blocks of text"""
    batch: int
    """units of a micro-batch"""
    micro_batches: int
    """of a step, over all ranks"""

    def __post_init__(self) -> None:
        for name in ("size", "batch", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"stream {self.name}: {name} is {getattr(self, name)}; it must be 1 or more")


@dataclass(frozen=True, slots=True)
class Draw:
    """One unit in one epoch."""

    unit: int
    epoch: int
    seed: int
    """what crops and masks are drawn from"""


@dataclass(frozen=True)
class Plan:
    """The order of all streams."""

    seed: int
    streams: Sequence[Stream]

    def __post_init__(self) -> None:
        names = [stream.name for stream in self.streams]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"streams are {names}; there must be one or more, each with a name of its own")

    def draws(self, step: int, stream_name: str, index: int) -> list[Draw]:
        """The units of micro-batch `index` of a step."""
        stream = self.stream(stream_name)
        assert 0 <= index < stream.micro_batches, f"micro-batch {index} of {stream.micro_batches}"
        start = (step * stream.micro_batches + index) * stream.batch
        draws = []
        for epoch in range(start // stream.size, (start + stream.batch - 1) // stream.size + 1):
            first = max(start - epoch * stream.size, 0)
            last = min(start + stream.batch - epoch * stream.size, stream.size)
            key = seed_of(self.seed, "order", stream_name, epoch)
            units = permute(np.arange(first, last), stream.size, key)
            draws += [self._draw(stream_name, epoch, unit) for unit in units.tolist()]
        return draws

    def replacement(self, draw: Draw, stream_name: str, attempt: int) -> Draw:
        """What stands in for a unit that cannot be used, at the given attempt; may be unusable itself."""
        seed = seed_of(self.seed, "replacement", stream_name, draw.epoch, draw.unit, attempt)
        return Draw(unit=seed % self.stream(stream_name).size, epoch=draw.epoch, seed=seed)

    def order(self, step: int) -> list[str]:
        """The modalities in the order of this step, equal on all ranks."""
        names = [stream.name for stream in self.streams]
        return sorted(names, key=lambda name: seed_of(self.seed, "modality", step, name))

    def items(self, step: int, rank: int, world: int) -> list[tuple[str, int]]:
        """(stream, micro-batch) in the order in which this rank runs them."""
        self.check_world(world)
        return [
            (name, index)
            for name in self.order(step)
            for index in range(rank, self.stream(name).micro_batches, world)
        ]

    def check_world(self, world: int) -> None:
        """ValueError unless each stream's micro-batches can be dealt out evenly to `world` ranks."""
        for stream in self.streams:
            if stream.micro_batches % world:
                more = math.ceil(stream.micro_batches / world) * world
                raise ValueError(
                    f"{stream.name} has {stream.micro_batches} micro-batches per step, not a multiple of "
                    f"{world} ranks; set {more} micro-batches or run {self._possible_worlds()} ranks"
                )

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each stream is seen in so many steps."""
        return {s.name: steps * s.micro_batches * s.batch / s.size for s in self.streams}

    def stream(self, name: str) -> Stream:
        return next(stream for stream in self.streams if stream.name == name)

    def _draw(self, stream_name: str, epoch: int, unit: int) -> Draw:
        return Draw(unit, epoch, seed_of(self.seed, "draw", stream_name, epoch, unit))

    def _possible_worlds(self) -> str:
        common = math.gcd(*(stream.micro_batches for stream in self.streams))
        *some, last = [str(world) for world in range(1, common + 1) if common % world == 0]
        return f"{', '.join(some)} or {last}" if some else last


@dataclass(frozen=True, slots=True)
class TextBlocks:
    """Documents cut into blocks of `block_tokens` consecutive tokens; a block never crosses shards."""

    block_tokens: int
    starts: np.ndarray
    """(documents + 1,) the first token of each document, counted over all shards"""
    shard_starts: np.ndarray
    """(shards,) the first document of each shard"""
    block_starts: np.ndarray
    """(shards + 1,) the first block of each shard; the tokens after a shard's last block are dropped"""

    @classmethod
    def build(cls, lengths: np.ndarray, shard_starts: np.ndarray, block_tokens: int) -> "TextBlocks":
        """`lengths`: tokens of each document, its end token included; `shard_starts` as a Corpus has them."""
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        tokens = np.diff(starts[shard_starts])
        blocks = np.concatenate([[0], np.cumsum(tokens // block_tokens)])
        if blocks[-1] < 1:
            raise ValueError(
                f"the text has {tokens.max()} tokens in its largest shard, less than one block of "
                f"{block_tokens}; add text or shorten the block"
            )
        return cls(block_tokens, starts, np.asarray(shard_starts[:-1]), blocks)

    def __len__(self) -> int:
        return int(self.block_starts[-1])

    def locate(self, block: int) -> tuple[int, int, int]:
        """(first document, the block's first token in it, last document) by binary search."""
        assert 0 <= block < len(self), f"block {block} of {len(self)}"
        shard = int(np.searchsorted(self.block_starts, block, side="right")) - 1
        begin = self.starts[self.shard_starts[shard]] + (block - self.block_starts[shard]) * self.block_tokens
        ends = begin, begin + self.block_tokens - 1
        first, last = (int(doc) - 1 for doc in np.searchsorted(self.starts, ends, side="right"))
        return first, int(begin - self.starts[first]), last


def _encode(part: int | str) -> bytes:
    if isinstance(part, str):
        text = part.encode()
        return b"s%d:" % len(text) + text
    return b"i%d;" % operator.index(part)


@functools.lru_cache(maxsize=256)
def _round_keys(key: int) -> np.ndarray:
    digest = hashlib.blake2b(_encode(key), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(values: np.ndarray, half: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    """A bijection of the numbers of 2 * half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_key in round_keys:
        mixed = (right ^ round_key) * _MULTIPLIER
        mixed = (mixed ^ (mixed >> np.uint64(32))) * _MULTIPLIER
        left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
    return (left << half) | right

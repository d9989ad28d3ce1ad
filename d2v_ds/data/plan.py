"""Which unit goes where? The order of all data as a pure function of (seed, step); no state, no I/O.

A stream repeats its units for ever, each epoch in another order (permutations, of all or window by window, that
are looked up, so any position costs the same). A step takes a fixed number of micro-batches from each stream; rank r
of N has r, r+N, ... of them, so the global batch knows neither N nor the number of workers, and all ranks see the
same modalities in the same order. A stream of several corpora deals its micro-batches out to them in blocks, each
with the same counts. Changing what these functions return changes every run: tests hold known values.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import numpy as np

from d2v_ds.data.buckets import Buckets, near_bucket
from d2v_ds.data.permutation import permute, seed_of, seeds_of_each
from d2v_ds.data.windows import Windows

NEAR = 10
"""Attempts to replace a unit by one of its own bucket."""


@dataclass(frozen=True, slots=True)
class Share:
    """One corpus of a stream."""

    name: str
    """what its order is drawn from"""
    first: int
    """its first unit in the stream"""
    size: int
    """units"""
    count: int = 1
    """micro-batches in a block of the mix"""
    buckets: Buckets | None = None
    """units of like length make a micro-batch; None: as many as the stream says, whatever their length"""
    windows: Windows | None = None
    """an epoch goes from one group of shards to the next; None: all of them are drawn from at any time"""

    def batches(self, batch: int) -> float:
        """Micro-batches of an epoch."""
        if self.windows and self.buckets:
            return self.windows.num_places
        return self.buckets.num_batches if self.buckets else self.size / batch


@dataclass(frozen=True, slots=True)
class Stream:
    """One modality's share of a step."""

    name: str
    size: int
    """units: samples, or blocks of text"""
    batch: int
    """units of a micro-batch; with buckets the most of them"""
    micro_batches: int
    """of a step, over all ranks"""
    shares: tuple[Share, ...] = ()
    """The corpora that it mixes, and how; () = one, without buckets."""

    def __post_init__(self) -> None:
        for name in ("size", "batch", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"stream {self.name}: {name} is {getattr(self, name)}; it must be 1 or more")
        object.__setattr__(self, "shares", self.shares or (Share(self.name, 0, self.size),))
        firsts = [share.first for share in self.shares]
        ends = [share.first + share.size for share in self.shares]
        assert [*firsts, self.size] == [0, *ends], "shares follow one another and hold all units"

    @property
    def block(self) -> int:
        """Micro-batches of a block of the mix."""
        return sum(share.count for share in self.shares)

    @property
    def mean_batch(self) -> float:
        """Units of a micro-batch, on average."""
        counts = (s.count * s.size / s.batches(self.batch) for s in self.shares)
        return sum(counts) / self.block

    def share_of(self, unit: int) -> Share:
        """The corpus of a unit."""
        return next(share for share in reversed(self.shares) if unit >= share.first)


_STRETCH = 4096
"""Places of an epoch that are drawn together and kept for the micro-batches that follow: as quick as a few of them"""


class Draw(NamedTuple):
    """One unit in one epoch."""

    unit: int
    epoch: int
    seed: int
    """what crops and masks are drawn from"""


_make_draw = functools.partial(tuple.__new__, Draw)
"""Half the time of Draw._make"""


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
        share, number = self._share(stream, step * stream.micro_batches + index)
        if share.buckets:
            epoch, units = self._units_of_bucket(share, share.buckets, number)
            seeds = seeds_of_each(seed_of(self.seed, "draw", stream_name, epoch), units)
            return _draws(epoch, units, seeds.tolist())
        start, draws = number * stream.batch, []
        stop = start + stream.batch
        while start < stop:
            epoch, place = divmod(start, share.size)
            stretch, first = divmod(place, _STRETCH)
            units, seeds = _stretch(self.seed, stream_name, share, epoch, stretch)
            last = min(first + stop - start, len(units))
            draws += _draws(epoch, units[first:last].tolist(), seeds[first:last].tolist())
            start += last - first
        return draws

    def corpus(self, step: int, stream_name: str, index: int) -> str:
        """The name of the share that micro-batch `index` of a step is of."""
        stream = self.stream(stream_name)
        return self._share(stream, step * stream.micro_batches + index)[0].name

    def windows_ahead(self, stream_name: str, first: int, last: int) -> list[Iterator[list[int]]]:
        """Of each share that has windows the shards of the window that it is in at micro-batch `first` of the stream,
        then of each that follows before micro-batch `last`; all steps in a row."""
        stream = self.stream(stream_name)
        begins, ends = self._places(stream, first), self._places(stream, last)
        return [
            share.windows.ahead(self.seed, begin, end)
            for share, begin, end in zip(stream.shares, begins, ends, strict=True)
            if share.windows
        ]

    def replacement(self, draw: Draw, stream_name: str, attempt: int) -> Draw:
        """What stands in for a unit that cannot be used, at the given attempt; may be unusable itself.

        It is of the same corpus and, where there are some, of the same window and of like length, or after `NEAR`
        attempts of a length next to it: a few samples may be all that there are of one.
        """
        further = max(attempt - NEAR, 0)
        seed = seed_of(self.seed, "replacement", stream_name, draw.epoch, draw.unit, attempt)
        share = self.stream(stream_name).share_of(draw.unit)
        if share.windows:
            unit = share.windows.replacement(self.seed, draw.epoch, draw.unit, seed, further)
            return Draw(unit, draw.epoch, seed)
        if share.buckets:
            bucket = near_bucket(share.buckets.bucket_of(draw.unit), share.buckets.sizes, further)
            return Draw(share.buckets.unit(bucket, seed % int(share.buckets.sizes[bucket])), draw.epoch, seed)
        return Draw(unit=share.first + seed % share.size, epoch=draw.epoch, seed=seed)

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
                    f"{world} ranks; set {more} micro-batches or run {self.possible_worlds()} ranks"
                )

    def possible_worlds(self) -> str:
        """Numbers of ranks that all streams divide among."""
        common = math.gcd(*(stream.micro_batches for stream in self.streams))
        *some, last = [str(world) for world in range(1, common + 1) if common % world == 0]
        return f"{', '.join(some)} or {last}" if some else last

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each corpus is seen in so many steps."""
        return {
            share.name: steps
            * stream.micro_batches
            * share.count
            / stream.block
            / share.batches(stream.batch)
            for stream in self.streams
            for share in stream.shares
        }

    def samples_a_step(self) -> float:
        """Of all streams and ranks, on average."""
        return sum(stream.micro_batches * stream.mean_batch for stream in self.streams)

    def stream(self, name: str) -> Stream:
        return next(stream for stream in self.streams if stream.name == name)

    def _share(self, stream: Stream, position: int) -> tuple[Share, int]:
        """Whose micro-batch stands at a position of the stream, and which of its own it is."""
        if len(stream.shares) == 1:
            return stream.shares[0], position
        if any(share.windows for share in stream.shares):
            return self._share_in_turn(stream, position)
        block, place = divmod(position, stream.block)
        place = permute(place, stream.block, seed_of(self.seed, "mix", stream.name, block))
        for share in stream.shares:
            if place < share.count:
                return share, block * share.count + place
            place -= share.count
        raise AssertionError("the counts add up to the block")

    def _places(self, stream: Stream, position: int) -> list[int]:
        """The place in its epochs, all in a row, of each share with windows at a position of the stream; else 0."""
        if len(stream.shares) == 1:
            numbers = [position]
        else:  # of a mix at the start of the step
            numbers = self._numbers(stream, position // stream.micro_batches * stream.micro_batches)
        return [
            number * (1 if share.buckets else stream.batch) if share.windows else 0
            for share, number in zip(stream.shares, numbers, strict=True)
        ]

    def _share_in_turn(self, stream: Stream, position: int) -> tuple[Share, int]:
        """As `_share`, with the micro-batches of each share in their order, spread evenly over the block: who leaves a
        window does not come back to it. Those of one step change places."""
        step, index = divmod(position, stream.micro_batches)
        index = permute(index, stream.micro_batches, seed_of(self.seed, "mix", stream.name, step))
        place = step * stream.micro_batches + index
        now, after = self._numbers(stream, place), self._numbers(stream, place + 1)
        pairs = zip(stream.shares, now, after, strict=True)
        return next((share, number) for share, number, then in pairs if then > number)

    def _numbers(self, stream: Stream, place: int) -> list[int]:
        """How many micro-batches of each share come before a place, where they are spread evenly."""
        block, place = divmod(place, stream.block)
        numbers, left = [], stream.block
        for share in stream.shares:
            phase = seed_of(self.seed, "phase", share.name, block) % left
            before = (place * share.count + phase) // left  # of the places that shares before this one left
            numbers.append(block * share.count + before)
            place, left = place - before, left - share.count
        return numbers

    def _units_of_bucket(self, share: Share, buckets: Buckets, number: int) -> tuple[int, list[int]]:
        """(epoch, units) of a micro-batch of a share."""
        if share.windows:
            epoch, place = divmod(number, share.windows.num_places)
            return epoch, share.windows.units_of_batch(self.seed, epoch, place)
        epoch, place = divmod(number, buckets.num_batches)
        key = seed_of(self.seed, "batches", share.name, epoch)
        bucket, places = buckets.batch(permute(place, buckets.num_batches, key))
        key = seed_of(self.seed, "order", share.name, epoch, bucket)
        ranks = permute(np.arange(places.start, places.stop), int(buckets.sizes[bucket]), key)
        return epoch, [buckets.unit(bucket, rank) for rank in ranks.tolist()]


@functools.lru_cache(maxsize=256)
def _stretch(
    seed: int, stream_name: str, share: Share, epoch: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """The units of a stretch of an epoch without buckets, and the seeds of their draws."""
    first, last = number * _STRETCH, min(share.size, (number + 1) * _STRETCH)
    if share.windows:
        units = share.windows.units(seed, epoch, first, last)
    else:
        key = seed_of(seed, "order", share.name, epoch)
        units = share.first + permute(np.arange(first, last), share.size, key)
    return units, seeds_of_each(seed_of(seed, "draw", stream_name, epoch), units)


def _draws(epoch: int, units: list[int], seeds: list[int]) -> list[Draw]:
    return [*map(_make_draw, zip(units, repeat(epoch), seeds, strict=False))]


def deal(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """`total` in whole numbers by weight, each less than one off (largest remainder; ties go by name)."""
    names = sorted(weights)
    wanted = {name: total * weights[name] / sum(weights.values()) for name in names}
    counts = {name: math.floor(wanted[name]) for name in names}
    by_remainder = sorted(names, key=lambda name: counts[name] - wanted[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts

"""How much of a corpus is at hand at a time? Windows that a cache holds twice, where it does not hold all shards.

A window is chosen when a run begins and stays with it: another one is another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from d2v_ds.data.cache import RemoteShard
from d2v_ds.data.index import ShardIndex
from d2v_ds.data.plan import Share
from d2v_ds.data.windows import Windows

if TYPE_CHECKING:
    from d2v_ds.data.loader import Source


@dataclass
class _Part:
    """A share, and its shards that hold something."""

    source: Source
    share: Share
    shards: range
    indexes: list[ShardIndex]

    @property
    def total(self) -> int:
        return sum(index.size for index in self.indexes)

    @property
    def remote(self) -> list[ShardIndex]:
        return [index for index in self.indexes if index.remote]

    @property
    def fetched(self) -> int:
        """Bytes of its remote shards; others need no room."""
        return sum(index.size for index in self.remote)

    @property
    def two(self) -> int:
        """Bytes of the smallest window: of any two shards."""
        return 2 * max(index.size for index in self.indexes)


def cut_windows(sources: list[Source], saved: Mapping[str, int] | None = None) -> list[Source]:
    """The sources with their windows: of the size that `Source.window` says, "auto" as the cache has room.

    `saved`: what `windows_of` gave when the run was begun. ValueError for a window that holds no two shards, and where
    what is drawn from at a time does not fit the cache.
    """
    parts = [part for source in sources for part in _parts(source)]
    limits = _choose(parts) if saved is None else saved
    shares = {part.share.name: _with_windows(part, limits.get(part.share.name)) for part in parts}
    cut = [
        replace(source, shares=tuple(shares[share.name] for share in source.stream.shares))
        for source in sources
    ]
    check_room(cut)
    return cut


def windows_of(sources: list[Source]) -> dict[str, int]:
    """share -> bytes of its windows, of those that have any."""
    return {s.name: s.windows.limit for source in sources for s in source.shares if s.windows}


def check_room(sources: list[Source]) -> None:
    """ValueError if the remote shards that are drawn from at a time do not fit the cache."""
    parts = [part for source in sources for part in _parts(source) if part.remote]
    if not parts:
        return
    remote, needed = _cache_of(parts), _at_hand(parts, windows_of(sources))
    if needed <= remote.limit or remote.settings.refetch:
        return
    what = [
        f"{part.share.name} {_gb(part.fetched)}"
        + (f" in windows of {_gb(part.share.windows.limit)}" if part.share.windows else " as a whole")
        for part in parts
    ]
    raise ValueError(
        f"the cache of remote shards may hold {_gb(remote.limit)}, and {_gb(needed)} are needed at a time "
        f"({', '.join(what)}; of windows two, one that is read and one that is fetched). Set "
        f"remote.cache_gib={_gib(needed)} or more (remote.cache: on a disk that has it), begin a run with another "
        "data.window_gib, or allow that shards are fetched again and again by remote.refetch=true"
    )


def _parts(source: Source) -> list[_Part]:
    parts = []
    for share in source.stream.shares:
        shards = source.shelf.shards_between(share.first, share.first + share.size)
        if share.buckets:
            shards = share.buckets.shards
        counts = np.diff(source.samples.unit_starts[shards.start : shards.stop + 1])
        indexes = [source.corpus.indexes[shards.start + i] for i in np.flatnonzero(counts).tolist()]
        parts.append(_Part(source, share, shards, indexes))
    return parts


def _choose(parts: list[_Part]) -> dict[str, int]:
    """share -> bytes of its windows: what was asked for, and half of its part of the cache for those on "auto"."""
    asked = {
        p.share.name: int(min(p.source.window, 1 << 30) * (1 << 30))  # it may be infinite
        for p in parts
        if not isinstance(p.source.window, str)
    }
    limits = {p.share.name: asked[p.share.name] for p in parts if asked.get(p.share.name, p.total) < p.total}
    remote = [part for part in parts if part.remote]
    if not remote or (whole := _at_hand(remote, limits)) <= _cache_of(remote).limit:
        return limits
    auto = sorted((p for p in remote if p.source.window == "auto"), key=lambda part: part.fetched)
    cache = _cache_of(remote).limit
    room = cache - _at_hand([p for p in remote if p.source.window != "auto"], limits)
    while auto and auto[0].fetched <= room / len(auto):  # small ones stay whole
        room -= auto.pop(0).fetched
    for part in auto:
        limits[part.share.name] = window = max(room, 0) // (2 * len(auto))
        if window < part.two:
            more = min(whole, cache - room + 2 * len(auto) * max(p.two for p in auto))
            raise ValueError(
                f"{part.share.name} has shards of up to {_gb(part.two // 2)}; two windows of two of them, one that is "
                f"read and one that is fetched, need {_gb(2 * part.two)}, and a cache of {_gb(cache)} has "
                f"{_gb(2 * window)} for them. Set remote.cache_gib={_gib(more)} or more (remote.cache: on a disk that "
                "has it), or write smaller shards"
            )
    return limits


def _with_windows(part: _Part, limit: int | None) -> Share:
    if limit is None:
        return part.share
    if limit < part.two:
        raise ValueError(
            f"{part.share.name}: data.window_gib={limit / (1 << 30):.3g} holds no two of its shards, of up to "
            f"{_gb(part.two // 2)}, and a window of one would draw micro-batches from one shard; set "
            f"{_gib(part.two)} or more"
        )
    starts = part.source.samples.unit_starts[part.shards.start : part.shards.stop + 1]
    sizes = np.array(
        [index.size for index in part.source.corpus.indexes[part.shards.start : part.shards.stop]]
    )
    return replace(
        part.share,
        windows=Windows(part.share.name, limit, part.shards, sizes, starts, part.share.buckets),
    )


def _cache_of(remote: list[_Part]) -> RemoteShard:
    return next(index.remote for part in remote for index in part.remote)


def _at_hand(parts: list[_Part], limits: Mapping[str, int]) -> int:
    """Bytes of the cache that are needed at a time: two windows; of what has none all remote shards, those that several
    use once."""
    whole = {index.path: index.size for p in parts if p.share.name not in limits for index in p.remote}
    return sum(whole.values()) + sum(
        min(2 * limits[p.share.name], p.fetched) for p in parts if p.share.name in limits
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _gib(size: int) -> str:
    """Rounded up."""
    return f"{size / (1 << 30) * 1.01 + 0.001:.3f}" if size < 1 << 30 else str(-(-size // (1 << 30)))

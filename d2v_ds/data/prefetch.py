"""Which remote shards come next? A process beside the data workers that reads the plan ahead and fetches them.

One for the ranks of a machine. It only makes the data come sooner: what it has not fetched, or cannot, a worker
fetches when it needs it, and is the one to complain. It ends with its parent, however that ends.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2v_ds.data.cache import Needs, NoRoom, RemoteShard, acquire
from d2v_ds.data.index import Corpus
from d2v_ds.data.plan import Plan
from d2v_ds.data.shard import ShardIndex

MAX_AHEAD = 50_000
"""Units that the plan is read ahead at most."""
_WAIT = 0.05
_SECONDS_OF_PLANNING = 0.1  # between two looks at what was fetched
_SECONDS_AFTER_FAILURE = 10.0
_SECONDS_WITHOUT_ROOM = 0.5


@dataclass(frozen=True)
class Shelf:
    """Where the units of a stream lie."""

    corpus: Corpus
    unit_starts: np.ndarray
    """(shards + 1,) the first unit of each shard"""

    def shards_of(self, units: list[int]) -> list[ShardIndex]:
        found = np.searchsorted(self.unit_starts, units, side="right") - 1
        return self.numbered(dict.fromkeys(found.tolist()))

    def numbered(self, shards: Iterable[int]) -> list[ShardIndex]:
        return [self.corpus.indexes[shard] for shard in shards]

    def shards_between(self, first: int, end: int) -> range:
        """The numbers of those that hold the units from `first` to `end` - 1."""
        start = int(np.searchsorted(self.unit_starts, first, side="right")) - 1
        return range(start, int(np.searchsorted(self.unit_starts, end, side="left")))


class Outlook:
    """The remote shards that the plan needs from a place on, in the order in which it does, as many as have room.

    A place is the number of an item of this rank, all steps in a row.
    """

    def __init__(self, shelves: dict[str, Shelf], plan: Plan, ranks: Sequence[int], world: int, steps: range):
        self.shelves, self.plan, self.ranks, self.world, self.steps = shelves, plan, ranks, world, steps
        self.limit = min(
            index.remote.limit for s in shelves.values() for index in s.corpus.indexes if index.remote
        )
        self.items_per_step = len(plan.items(steps.start, ranks[0], world))
        self._read: deque[tuple[int, int, list[ShardIndex]]] = deque()  # (place after it, units, shards)
        self._next = steps.start
        self._units = 0

    def move(self, place: int) -> list[ShardIndex]:
        """Forgets what comes before `place`, reads some more of the plan; what is needed from there on.

        First what the draws that were read need, then the rest of the windows, which will be drawn from, then the
        windows that come next.
        """
        while self._read and self._read[0][0] <= place:
            self._units -= self._read.popleft()[1]
        self._next = max(self._next, place // self.items_per_step)
        until = time.monotonic() + _SECONDS_OF_PLANNING
        needed = {index.path: index for _, _, shards in self._read for index in shards}
        while self._next < self.steps.stop and self._units < MAX_AHEAD and time.monotonic() < until:
            if sum(index.size for index in needed.values()) > self.limit:
                break  # more would have no room
            for index in self._read_step():
                needed.setdefault(index.path, index)
        for shards in self._in_windows(place):
            for index in shards:
                needed.setdefault(index.path, index)
            if sum(index.size for index in needed.values()) > self.limit:
                break
        ends = np.cumsum([index.size for index in needed.values()])
        return list(needed.values())[: int(np.searchsorted(ends, self.limit, side="right"))]

    def _in_windows(self, place: int) -> Iterator[list[ShardIndex]]:
        """What streams in windows are in at a place, with all that they hold whole; then what comes next."""
        coming: list[Iterator[list[ShardIndex]]] = []
        whole: list[ShardIndex] = []
        for name, shelf in self.shelves.items():
            stream = self.plan.stream(name)
            if any(share.windows for share in stream.shares):
                last = self.steps.stop * stream.micro_batches
                groups = self.plan.windows_ahead(name, self._position(name, place), last)
                coming += [map(shelf.numbered, group) for group in groups]
                for share in stream.shares:
                    if not share.windows:
                        whole += shelf.numbered(shelf.shards_between(share.first, share.first + share.size))
        for depth in itertools.count():
            shards = [index for group in coming for index in next(group, [])] + whole * (depth == 0)
            if not shards:
                return
            yield [index for index in shards if index.remote]

    def _position(self, name: str, place: int) -> int:
        """The first micro-batch of a stream that may still be read on this machine, all steps in a row."""
        step, done = divmod(place, self.items_per_step)
        size = self.plan.stream(name).micro_batches
        if len(self.ranks) > 1:  # another one may be a step behind
            return max(step - 1, self.steps.start) * size
        left = self.plan.items(step, self.ranks[0], self.world)[done:]
        return step * size + min((index for stream, index in left if stream == name), default=size)

    def _read_step(self) -> list[ShardIndex]:
        """What all ranks of the machine need in the next step, item by item."""
        found = []
        ranks = [self.plan.items(self._next, rank, self.world) for rank in self.ranks]
        for number, items in enumerate(zip(*ranks, strict=True)):
            units, shards = 0, []
            for name, micro_batch in items:
                if name in self.shelves:
                    draws = self.plan.draws(self._next, name, micro_batch)
                    units += len(draws)
                    shards += self.shelves[name].shards_of([draw.unit for draw in draws])
            shards = [shard for shard in shards if shard.remote]
            self._read.append((self._next * self.items_per_step + number + 1, units, shards))
            self._units += units
            found += shards
        self._next += 1
        return found


class Prefetcher:
    """The process; `at` tells it how many items of this rank were consumed, all steps in a row."""

    def __init__(self, outlook: Outlook) -> None:
        context = multiprocessing.get_context("fork")
        self._place = context.RawValue("q", outlook.steps.start * outlook.items_per_step)
        self._process = context.Process(target=_run, args=(outlook, self._place, os.getpid()), daemon=True)
        self._process.start()

    @classmethod
    def start(
        cls, shelves: dict[str, Shelf], plan: Plan, rank: int, world: int, steps: range
    ) -> Prefetcher | None:
        """None where nothing is remote, or another rank of the machine does it."""
        remote = {
            name: shelf
            for name, shelf in shelves.items()
            if any(index.remote for index in shelf.corpus.indexes)
        }
        if not remote or int(os.environ.get("LOCAL_RANK", "0")) != 0:
            return None
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        return cls(Outlook(remote, plan, range(rank, min(rank + here, world)), world, steps))

    def at(self, place: int) -> None:
        self._place.value = place

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _run(outlook: Outlook, place: Any, parent: int) -> None:
    signal.set_wakeup_fd(-1)  # a pipe of the main process
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    first = next(i.remote for shelf in outlook.shelves.values() for i in shelf.corpus.indexes if i.remote)
    needs = Needs(first.root)
    pool = ThreadPoolExecutor(first.settings.connections)
    running: dict[Any, Future] = {}
    not_before: dict[Any, float] = {}
    told: list[RemoteShard] = []
    while os.getppid() == parent:
        upcoming = outlook.move(place.value)
        shards = [index.remote for index in upcoming]
        if shards != told:
            needs.write(shards)
            told = shards
        for path in [path for path, future in running.items() if future.done()]:
            error = running.pop(path).exception()
            if isinstance(error, OSError):
                wait = _SECONDS_WITHOUT_ROOM if isinstance(error, NoRoom) else _SECONDS_AFTER_FAILURE
                not_before[path] = time.monotonic() + wait
        for position, index in enumerate(upcoming):
            if len(running) >= first.settings.connections:
                break
            is_wanted = index.path not in running and not_before.get(index.path, 0) < time.monotonic()
            if is_wanted and not index.path.is_file():
                running[index.path] = pool.submit(_fetch, index, position)
        time.sleep(_WAIT)
    os._exit(0)  # threads that fetch would be waited for


def _fetch(index: ShardIndex, position: int) -> None:
    acquire(index.remote, index.size, index.differs, position).close()

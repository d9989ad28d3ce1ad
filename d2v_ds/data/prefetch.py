"""Which remote shards come next? A process beside the data workers that reads the plan ahead and fetches them.

One for the ranks of a machine. It only makes the data come sooner: what it has not fetched, or cannot, a worker
fetches when it needs it, and is the one to complain. It ends with its parent, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2v_ds.data.cache import Needs, RemoteShard, acquire
from d2v_ds.data.index import Corpus
from d2v_ds.data.plan import Plan
from d2v_ds.data.shard import ShardIndex

MAX_AHEAD = 50_000
"""Units that the plan is read ahead at most."""
_WAIT = 0.05
_SECONDS_OF_PLANNING = 0.1  # between two looks at what was fetched
_SECONDS_AFTER_FAILURE = 10.0


@dataclass(frozen=True)
class Shelf:
    """Where the units of a stream lie."""

    corpus: Corpus
    unit_starts: np.ndarray
    """(shards + 1,) the first unit of each shard"""

    def shards_of(self, units: list[int]) -> list[ShardIndex]:
        found = np.searchsorted(self.unit_starts, units, side="right") - 1
        return [self.corpus.indexes[shard] for shard in dict.fromkeys(found.tolist())]


class Window:
    """The remote shards that a stretch of the plan needs, in the order in which it does."""

    def __init__(self, shelves: dict[str, Shelf], plan: Plan, ranks: Sequence[int], world: int, steps: range):
        self.shelves, self.plan, self.ranks, self.world, self.steps = shelves, plan, ranks, world, steps
        self.limit = min(
            index.remote.limit for s in shelves.values() for index in s.corpus.indexes if index.remote
        )
        self._steps: deque[tuple[int, int, list[ShardIndex]]] = deque()  # (step, units, shards)
        self._next = steps.start
        self._units = 0

    def move(self, step: int) -> list[ShardIndex]:
        """Forgets the steps before `step`, reads some more of the plan; what is needed from `step` on."""
        while self._steps and self._steps[0][0] < step:
            self._units -= self._steps.popleft()[1]
        self._next = max(self._next, step)
        until = time.monotonic() + _SECONDS_OF_PLANNING
        needed = self._needed()
        while self._next < self.steps.stop and self._units < MAX_AHEAD and time.monotonic() < until:
            if sum(index.size for index in needed.values()) > self.limit:
                break  # more would have no room
            self._read_step()
            for index in self._steps[-1][2]:
                needed.setdefault(index.path, index)
        return list(needed.values())

    def _needed(self) -> dict[Any, ShardIndex]:
        """By path, in the order of first need."""
        return {index.path: index for _, _, shards in self._steps for index in shards}

    def _read_step(self) -> None:
        units, shards = 0, []
        for rank in self.ranks:
            for name, micro_batch in self.plan.items(self._next, rank, self.world):
                if name not in self.shelves:
                    continue
                draws = self.plan.draws(self._next, name, micro_batch)
                units += len(draws)
                shards += self.shelves[name].shards_of([draw.unit for draw in draws])
        self._steps.append((self._next, units, [shard for shard in shards if shard.remote]))
        self._units += units
        self._next += 1


class Prefetcher:
    """The process; `at(step)` tells it what was consumed."""

    def __init__(self, window: Window) -> None:
        context = multiprocessing.get_context("fork")
        self._step = context.RawValue("q", window.steps.start)
        self._process = context.Process(target=_run, args=(window, self._step, os.getpid()), daemon=True)
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
        return cls(Window(remote, plan, range(rank, min(rank + here, world)), world, steps))

    def at(self, step: int) -> None:
        self._step.value = step

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def check_room(shelves: dict[str, Shelf], plan: Plan, rank: int, world: int, step: int) -> None:
    """ValueError if the shards of a corpus do not fit the cache: the plan draws from all of them in every step."""
    indexes = {i.path: i for shelf in shelves.values() for i in shelf.corpus.indexes if i.remote}
    if not indexes:
        return
    first = next(iter(indexes.values())).remote
    total = sum(index.size for index in indexes.values())
    if total <= first.limit or first.settings.refetch:
        return
    window = Window(shelves, plan, [rank], world, range(step, step + 1))
    needed = window.move(step)
    again = sum(index.size for index in needed) * (1 - first.limit / total)
    raise ValueError(
        f"{len(indexes)} remote shards of {total / 1e9:.3g} GB do not fit a cache of {first.limit / 1e9:.3g} GB, and a "
        f"step of this rank draws from {len(needed)} of them: some {again / 1e9:.2g} GB would be fetched again in each "
        f"step. Set remote.cache_gib={_rounded_up(total)} or more (remote.cache: on a disk that has it), name fewer "
        "shards, or allow it by remote.refetch=true"
    )


def _rounded_up(size: int) -> str:
    return f"{size / (1 << 30) * 1.01 + 0.001:.3f}" if size < 1 << 30 else str(-(-size // (1 << 30)))


def _run(window: Window, step: Any, parent: int) -> None:
    signal.set_wakeup_fd(-1)  # a pipe of the main process
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    first = next(i.remote for shelf in window.shelves.values() for i in shelf.corpus.indexes if i.remote)
    needs = Needs(first.root)
    pool = ThreadPoolExecutor(first.settings.connections)
    running: dict[Any, Future] = {}
    not_before: dict[Any, float] = {}
    told: list[RemoteShard] = []
    while os.getppid() == parent:
        upcoming = window.move(step.value)
        shards = [index.remote for index in upcoming]
        if shards != told:
            needs.write(shards)
            told = shards
        for path in [path for path, future in running.items() if future.done()]:
            if isinstance(running.pop(path).exception(), OSError):
                not_before[path] = time.monotonic() + _SECONDS_AFTER_FAILURE
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

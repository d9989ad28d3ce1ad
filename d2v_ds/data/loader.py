"""How do the plan's micro-batches reach this rank? A torch DataLoader over (step, modality, micro-batch).

A worker is told what to read by the plan and keeps no state, so the stream is the same at any number of
workers and from any step. A unit that cannot be read is replaced as the plan says and reported, never hidden.
"""

import gc
import hashlib
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from d2v_ds.data.buckets import Buckets
from d2v_ds.data.index import Corpus, CorruptSample
from d2v_ds.data.memory import keep_memory
from d2v_ds.data.plan import Draw, Plan, Share, Stream
from d2v_ds.data.prefetch import Prefetcher, Shelf

MAX_ATTEMPTS = 20
MAX_DEATHS = 3
"""Of data workers in a run; then it stops."""

log = logging.getLogger(__name__)

Item = tuple[int, str, int]  # (step, stream, micro-batch)


class Samples(Protocol):
    """What a modality knows about its samples."""

    fields: dict[str, str]
    """field -> alternatives, as Corpus.open takes them"""

    @property
    def unit_starts(self) -> np.ndarray:
        """(shards + 1,) the first unit of each shard, then the number of all; a unit is a sample of the corpus
        unless there are more or fewer of them (blocks of text)."""

    def buckets(self, corpus: Corpus, shards: range) -> Buckets | None:
        """How the samples of some shards make micro-batches of like length; None: as many as `batch` says."""

    def read(self, corpus: Corpus, unit: int) -> Any:
        """One unit decoded, nothing random yet; ValueError if that cannot be."""

    def collate(self, decoded: list[Any], draws: list[Draw]) -> Any:
        """The batch: crops and masks come from the seeds of the draws."""

    def volume(self, corpus: Corpus, share: Share, batch: int) -> "Volume":
        """How much the samples of a share are."""

    def label(self, corpus: Corpus, unit: int) -> str:
        """What a unit is, for people: "shard.tar:key" and its length."""


@dataclass(frozen=True, slots=True)
class Volume:
    """How much data there is, in a unit of the modality's."""

    unit: str
    """seconds, tokens, images"""
    total: float
    micro_batch: float
    """what a micro-batch holds on average: cropped, or without padding"""
    padding: float = 0.0
    """share of what is computed"""
    cropped: float = 0.0
    """share of what is stored that is lost since a micro-batch is cropped to its shortest"""
    budget: float | None = None
    """the most that a micro-batch may hold, padding included"""


@dataclass
class Source:
    """One modality's samples, and how many of them make a step."""

    name: str
    corpus: Corpus
    samples: Samples
    batch: int
    micro_batches: int
    shares: tuple[Share, ...] = ()
    """The corpora that it mixes; () = one, with micro-batches of `batch` units."""
    window: float | Literal["auto", "whole"] = "auto"
    """GiB of shards that are read together, as `room.cut_windows` takes it"""

    @property
    def size(self) -> int:
        """Units."""
        return int(self.samples.unit_starts[-1])

    @property
    def shelf(self) -> Shelf:
        return Shelf(self.corpus, self.samples.unit_starts)

    @property
    def stream(self) -> Stream:
        return Stream(self.name, self.size, self.batch, self.micro_batches, self.shares)

    @property
    def fingerprint(self) -> str:
        """Of all bytes, and of how they are mixed, grouped by length and cut into windows."""
        rows = [
            (s.name, s.size, s.count, s.buckets and s.buckets.fingerprint())
            + ((s.windows.limit,) if s.windows else ())
            for s in self.shares
        ]
        if not any(share.buckets or share.windows for share in self.shares) and len(rows) <= 1:
            return self.corpus.fingerprint
        return hashlib.sha256(json.dumps([self.corpus.fingerprint, rows]).encode()).hexdigest()

    def key(self, unit: int) -> str:
        """What a unit is called where it is told of: "shard.tar:key" of a sample."""
        is_sample = self.size == len(self.corpus)
        return self.corpus.key(unit) if is_sample else f"{self.name}:unit {unit}"

    def keys(self, plan: Plan, micro: "MicroBatch") -> list[str]:
        """Of what a micro-batch holds, replacements of what could not be read included."""
        unreadable = {fault.key for fault in micro.faults}
        found = []
        for wanted in plan.draws(micro.step, self.name, micro.index):
            draw, attempt = wanted, 0
            while self.key(draw.unit) in unreadable:
                attempt += 1
                draw = plan.replacement(wanted, self.name, attempt)
            found.append(self.key(draw.unit))
        return found


@dataclass(frozen=True, slots=True)
class Fault:
    """A unit that was replaced; `key` is "shard.tar:key"."""

    modality: str
    key: str
    reason: str
    step: int


@dataclass(slots=True)
class MicroBatch:
    modality: str
    step: int
    index: int
    batch: Any
    faults: list[Fault] = field(default_factory=list)

    def pin_memory(self) -> "MicroBatch":
        """What a DataLoader calls, in a thread, where there is a GPU."""
        return replace(self, batch=self.batch.pin_memory())


class StepLoader:
    """For each step in [first_step, last_step) the list of this rank's micro-batches, in the plan's order.

    A worker that is killed is replaced, and the step read again: the plan knows what was in it.
    """

    _leave: Any = None

    def __init__(
        self,
        sources: list[Source],
        plan: Plan,
        rank: int,
        world: int,
        first_step: int,
        last_step: int,
        workers: int = 0,
        prefetch_steps: int = 2,
    ) -> None:
        plan.check_world(world)
        assert prefetch_steps >= 1, "nothing would be read"
        assert {s.stream for s in sources} == set(plan.streams), "the plan was made for other sources"
        self.sources, self.plan, self.rank, self.world = sources, plan, rank, world
        self.steps = range(first_step, last_step)
        self.workers, self.prefetch_steps = workers, prefetch_steps
        self.items_per_step = len(plan.items(first_step, rank, world))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        shelves = {source.name: source.shelf for source in self.sources}
        prefetcher = Prefetcher.start(shelves, self.plan, self.rank, self.world, self.steps)
        micro_batches, deaths = self._start(self.steps.start), 0
        try:
            for step in self.steps:
                while True:
                    read = []
                    try:
                        for item in range(self.items_per_step):
                            if prefetcher:
                                prefetcher.at(step * self.items_per_step + item)
                            read.append(next(micro_batches))
                        break
                    except (RuntimeError, OSError, EOFError) as error:
                        deaths += 1
                        self._say_death(error, step, deaths)
                        micro_batches = self._start(step)
                yield read
        finally:
            if prefetcher:
                prefetcher.close()

    def _start(self, step: int) -> Iterator[MicroBatch]:
        """All micro-batches of this rank from a step on; workers that were started before end."""
        data = _MicroBatches(self.sources, self.plan)
        items = _Items(self.plan, self.rank, self.world, range(step, self.steps.stop))
        pin = torch.cuda.is_available()
        if not self.workers:  # a DataLoader takes as long between two batches as ten small samples
            return (micro.pin_memory() if pin else micro for micro in map(data.__getitem__, items))
        workers, leaving = self.workers, multiprocessing.get_context("fork").Event()
        if self._leave:
            self._leave()
        self._leave = weakref.finalize(self, leaving.set)  # at the latest when the process exits
        loader = DataLoader(
            data,
            batch_size=None,
            sampler=items,
            num_workers=workers,
            collate_fn=_identity,
            worker_init_fn=partial(_init_worker, leaving),
            multiprocessing_context="fork",
            prefetch_factor=math.ceil(self.prefetch_steps * self.items_per_step / workers),
            pin_memory=pin,
            generator=torch.Generator(),  # else each iteration draws from the global one
        )
        started = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # torch's handler raises wherever the process stands when a worker dies, in the middle of a step too; the
            # iterator looks after its workers by itself.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return started

    def _say_death(self, error: Exception, step: int, deaths: int) -> None:
        """Raises what is no death of a worker, and DataError after too many."""
        text = str(error)
        is_lost = isinstance(error, ConnectionError | EOFError)  # the kernel closed what it had open
        is_lost &= "Original Traceback" not in text  # else it is an error of the worker's
        if not self.workers or not (is_lost or "exited unexpectedly" in text):
            raise error
        told = f"a data worker of rank {self.rank} was killed while step {step} was read ({error})"
        if deaths > MAX_DEATHS:
            raise DataError(
                f"{told}, {deaths} times in this run. The machine may have no memory left (its log names the process): "
                "lower train.workers or the batch; or a file makes a decoder crash: train.workers=0 shows where"
            ) from error
        log.warning("%s; the step is read again by new workers (%d of %d)", told, deaths, MAX_DEATHS)


class DataError(RuntimeError):
    """The data cannot be used, or not enough of them; the message says what, and what to do."""


class FaultLog:
    """Writes faults to quarantine.jsonl, and stops the run when they are more than a share of the samples."""

    def __init__(self, path: Path, max_share: float = 0.001, min_count: int = 20) -> None:
        self.path = Path(path)
        self.max_share = max_share
        self.min_count = min_count
        self.counts: Counter[tuple[str, str, str]] = Counter()
        """(modality, shard, reason) -> faults; numbers in a reason are replaced by #"""

    def add(self, faults: list[Fault], samples_seen: int) -> None:
        """Record; DataError when the faults are more than `min_count` and `max_share` of all seen."""
        for fault in faults:
            self._append(json.dumps(asdict(fault)) + "\n")
            reason = re.sub(r"0x[0-9a-fA-F]+|\d+", "#", fault.reason)
            self.counts[fault.modality, fault.key.partition(":")[0], reason] += 1
        count = self.counts.total()
        if faults and count > self.min_count and count > self.max_share * samples_seen:
            raise DataError(self._message(count, samples_seen))

    def _append(self, line: str) -> None:
        # One write of one line at the end: the ranks of a run share the file.
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def _message(self, count: int, samples_seen: int) -> str:
        rows = [
            f"  {number} x {modality} {shard}: {reason}"
            for (modality, shard, reason), number in self.counts.most_common(20)
        ]
        return (
            f"{count} of {samples_seen} samples could not be used, more than {self.max_share:.2%}:\n"
            + "\n".join(rows)
            + f"\nRepair or leave out these shards ({self.path} names each sample; of one that was rewritten "
            "delete the .tar.json, and it is indexed anew), or allow a larger share"
        )


class _MicroBatches(Dataset):
    def __init__(self, sources: list[Source], plan: Plan) -> None:
        self.sources = {source.name: source for source in sources}
        self.plan = plan

    def __getitem__(self, item: Item) -> MicroBatch:
        step, name, index = item
        source, faults = self.sources[name], []
        read, corpus = source.samples.read, source.corpus
        draws, decoded = self.plan.draws(step, name, index), []
        for place, draw in enumerate(draws):
            try:
                decoded.append(read(corpus, draw.unit))
            except ValueError as error:
                faults.append(_fault(source, draw.unit, error, step))
                unit, draws[place] = _replace(source, self.plan, draw, step, faults)
                decoded.append(unit)
        return MicroBatch(name, step, index, source.samples.collate(decoded, draws), faults)


class _Items(Sampler):
    """All (step, stream, micro-batch) of one rank."""

    def __init__(self, plan: Plan, rank: int, world: int, steps: range) -> None:
        self.plan, self.rank, self.world, self.steps = plan, rank, world, steps

    def __iter__(self) -> Iterator[Item]:
        for step in self.steps:
            for name, index in self.plan.items(step, self.rank, self.world):
                yield step, name, index


def _replace(source: Source, plan: Plan, wanted: Draw, step: int, faults: list[Fault]) -> tuple[Any, Draw]:
    """The first replacement of a draw that can be read, and its draw."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        draw = plan.replacement(wanted, source.name, attempt)
        try:
            return source.samples.read(source.corpus, draw.unit), draw
        except ValueError as error:
            faults.append(_fault(source, draw.unit, error, step))
    raise DataError(
        f"{source.name}: {faults[-1].key} and {MAX_ATTEMPTS} units before it could not be used "
        f"({faults[-1].reason}); verify the shards and the fields that are read"
    )


def _fault(source: Source, unit: int, error: ValueError, step: int) -> Fault:
    if isinstance(error, CorruptSample):
        return Fault(source.name, f"{error.shard}:{error.key}", error.reason, step)
    return Fault(source.name, source.key(unit), str(error), step)


def _identity(item: Any) -> Any:
    return item


def _tell_unless_lost(tell: Any, kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """A main process that was asked to stop leaves in the middle of taking a batch: no news."""
    if not issubclass(kind, ConnectionError):
        tell(kind, error, trace)


def _init_worker(leaving: Any, _: int) -> None:
    """The main process decides when to stop: a signal to the whole group must not end its workers first.

    But once it is leaving, SIGTERM is what multiprocessing ends them with; else it would wait for them for ever.
    """
    sys.excepthook = partial(_tell_unless_lost, sys.excepthook)
    signal.set_wakeup_fd(-1)  # a pipe of the main process, which must not take what comes here for its own
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.is_set() else None)
    torch.set_num_threads(1)
    keep_memory()
    gc.freeze()  # a collection over all of torch's objects took 60-80 ms

"""A step that never ends: every thread's stack is written to the run folder, then the run ends with a code of its own.

On every rank by itself, since a rank that hangs takes the others with it into the next collective. A step is too long
at `factor` times the median of the last hundred, and at least `seconds`; before there is a median, and while saving,
the limit is the patience of collectives. All ranks write before the first ends, as a launcher then ends the others.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import statistics
import threading
import time
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist

from d2v_ds.training.codes import HUNG
from d2v_ds.training.signals import leave_now, stat_of, tell

TICK = 0.5
OTHERS_WRITE_SECONDS = 5.0


class Watchdog:
    def __init__(self, folder: Path, rank: int, factor: float, seconds: float, patience: float):
        self.folder, self.rank = folder / "hang", rank
        self.factor, self.seconds, self.patience = factor, seconds, patience
        self.what = "starting"
        """What this rank is about, for the message."""
        self.step = 0
        self.durations: deque[float] = deque(maxlen=101)
        self._awake = self._began = 0.0
        self._limit = patience
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._barked = False
        if factor:
            self._thread.start()

    def begin(self, step: int) -> None:
        """A step begins, with the wait for its data."""
        self.step, self.what, self._began = step, "waiting for data", self._awake
        median = statistics.median(self.durations) if len(self.durations) >= 3 else None
        self._limit = self.patience if median is None else max(self.seconds, self.factor * median)

    def end(self, seconds: float) -> None:
        """It ended, after so long."""
        self.durations.append(seconds)
        self.what = "between two steps"

    def wait_patiently(self, what: str) -> None:
        """Until the next step begins, for what may take longer: a checkpoint, an evaluation."""
        self.what, self._limit, self._began = what, self.patience, self._awake

    def close(self) -> None:
        """No more of it. Does not return once it has found a hang: the loss of the other ranks, which end by it too, is
        not what ended this one."""
        self._end.set()
        if self._barked:
            self._thread.join()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._end.wait(TICK):
            now = time.monotonic()
            self._awake += min(now - last, 4 * TICK)  # a process that was stopped as a whole did not hang
            last = now
            if self._awake - self._began > self._limit:
                self._bark()

    def _bark(self) -> None:
        self._barked = True
        seconds, what = self._awake - self._began, self.what
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"stacks_rank_{self.rank:05d}.txt"
        with path.open("a", encoding="utf-8") as file:
            file.write(f"step {self.step + 1}, {what} for {seconds:.0f} s {stopped_workers()}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        write_collectives(self.folder / f"nccl_rank_{self.rank:05d}.pickle")
        usual = f", median {statistics.median(self.durations):.2f} s" if self.durations else ""
        tell(
            f"error: step {self.step + 1} has taken {seconds:.0f} s{usual} (train.hang_seconds={self.seconds:g}, "
            f"train.hang_factor={self.factor:g}); this rank was {what}{stopped_workers()}; all stacks: {path}"
        )
        time.sleep(OTHERS_WRITE_SECONDS)
        leave_now(HUNG)


def stopped_workers() -> str:
    """Data workers that something has stopped."""
    found = []
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            if stat_of(child.pid)[0] in "Tt":
                found.append(str(child.pid))
    return f", its data workers {', '.join(found)} are stopped (state T)" if found else ""


def write_collectives(path: Path) -> None:
    """NCCL's flight recorder: the last collectives of this rank, `torch.distributed.flight_recorder` reads them."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        path.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())

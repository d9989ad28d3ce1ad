"""Saves beside the training: a snapshot in host memory, a thread that writes it, a commit that all ranks agree on.

A save has two stages, each in a thread of its own: every rank writes its file into a temporary folder; rank 0 writes
loop.json and manifest.json, renames the folder, and deletes checkpoints that need not be kept. A thread never
communicates. The ranks agree in the main thread that a stage is over: between two steps they begin to add up small
CPU tensors over gloo, and look at the sum one step later, when it has long been there. So no step waits for a disk,
for a device, or for the network. What is committed is equal to the bit however it was saved.

A save that fails (disk full, quota, a folder that became read-only) leaves the previous checkpoint as it was, is
told loudly and counted; training goes on, until too many in a row have failed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds.engine.checkpoint import (
    checkpoints,
    collect,
    commit,
    delete,
    describe,
    engine_counters,
    is_kept,
    make_folder,
    refuse_links,
    write_json,
    write_manifest,
    write_rank,
)
from d2v_ds.engine.ema import TeacherEMA
from d2v_ds.engine.launch import control_group
from d2v_ds.engine.partition import is_replicated

Mode = Literal["async", "sync"]


class SaveFailed(OSError):
    """Too many saves in a row, or the last one of a run, could not be written."""


@dataclass
class Pending:
    """One save on its way."""

    step: int
    loop: dict[str, Any]
    parameters: dict[str, Any]
    temporary: Path
    began: float
    spared: Callable[[], Collection[Path]]
    paused: float = 0.0
    """Seconds that this rank's training stood still for it."""
    stage: Literal["write", "commit"] = "write"
    thread: threading.Thread | None = None
    outcome: dict[str, Any] = field(default_factory=dict)
    """What the thread came to: a record of the rank's file, {"error": ...}, or nothing."""
    files: list[dict[str, Any]] = field(default_factory=list)
    vote: tuple[Any, Tensor] | None = None
    """A sum that is being made, and the number of ranks that are not done."""


class Saver:
    """Owns the saving of a run. All ranks call `begin`, `advance` and `finish` at the same places."""

    def __init__(
        self,
        engine: Any,
        ema: TeacherEMA,
        run: Path,
        *,
        mode: Mode = "async",
        keep: int = 2,
        keep_every: int = 0,
        max_failures: int = 3,
        last_good: Path | None = None,
    ):
        self.engine, self.ema, self.run = engine, ema, run
        self.mode, self.keep, self.keep_every, self.max_failures = mode, keep, keep_every, max_failures
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.last_good = last_good
        """The newest committed checkpoint."""
        self.failures = 0
        """Saves that failed since the process started."""
        self.failures_in_a_row = 0
        self.lost: set[int] = set()
        """Steps that could not be saved."""
        self.paused = 0.0
        """Seconds that training stood still for saves, since `take_pause`."""
        self.pending: Pending | None = None
        self.buffers: dict[str, Tensor] = {}
        if self.rank == 0:
            remove_leftovers(run)

    def begin(self, step: int, loop: dict[str, Any], spared: Callable[[], Collection[Path]] = tuple) -> None:
        """Takes the state after `step` steps and begins to write it; `finish`es the save before it, if it must.
        `spared` gives older checkpoints that stay, once this one is there.

        Raises SaveFailed on all ranks if that one was one too many that failed; `sync`, this one too.
        """
        self.finish()
        began = time.perf_counter()
        pending = self.pending = Pending(
            step,
            {**loop, "step": step, **engine_counters(self.engine)},
            describe(self.engine),
            self.run / f".tmp-{folder_name(step)}",
            began,
            spared,
        )
        if self.rank == 0 or not is_replicated(self.engine):
            tensors = collect(self.engine, self.ema)
            is_snapshot = self.mode == "async" and self.take_snapshot(tensors)
            self.start(lambda: self.write(pending, self.buffers if is_snapshot else tensors))
            if not is_snapshot:
                pending.thread.join()  # the values are the live ones
        self.count_pause(began)
        if self.mode == "sync":
            self.finish()

    def take_snapshot(self, tensors: dict[str, Tensor]) -> bool:
        """Copies into host memory, which is kept for the next time; False if there is none left."""
        try:
            if self.buffers.keys() != tensors.keys():
                self.buffers = {}
                is_pinned = any(value.is_cuda for value in tensors.values())
                for key, value in tensors.items():
                    self.buffers[key] = torch.empty(value.numel(), pin_memory=is_pinned)
        except (MemoryError, RuntimeError) as error:  # torch's way to say that there is no memory
            self.buffers = {}
            tell(
                sys.stderr,
                f"warning: no host memory for a snapshot ({str(error).splitlines()[0]}); this rank writes while the "
                "training waits, as train.save=sync does",
            )
            return False
        for key, value in tensors.items():
            self.buffers[key].copy_(value, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return True

    def advance(self) -> None:
        """Between two steps: brings a save forward if all ranks have come as far. Waits for nothing."""
        if self.pending is None:
            return
        began = time.perf_counter()
        pending = self.pending
        if pending.vote is None or not self.is_over(pending.vote):
            is_done = pending.thread is None or not pending.thread.is_alive()
            count = torch.tensor(0 if is_done else 1)
            pending.vote = dist.all_reduce(count, group=control_group(), async_op=True), count
            self.count_pause(began)
            return
        pending.vote = None
        self.proceed(pending)
        if self.pending is not None:
            self.count_pause(began)

    def finish(self) -> bool:
        """Waits until nothing is on its way; whether the last save was committed."""
        while self.pending is not None:
            if self.pending.thread is not None:
                began = time.perf_counter()
                self.pending.thread.join()
                self.count_pause(began)
            self.advance()
        return self.failures_in_a_row == 0

    def finish_last(self) -> None:
        """At the end of a run; SaveFailed if its last state is not on the disk."""
        if not self.finish():
            raise SaveFailed(f"the last state of the run was not saved; {self.what_is_left()}")

    def take_pause(self) -> float:
        """Seconds of training lost to saves since the last call."""
        paused, self.paused = self.paused, 0.0
        return paused

    # ---- stages

    def is_over(self, vote: tuple[Any, Tensor]) -> bool:
        """What the ranks said a step ago."""
        work, count = vote
        work.wait()
        return int(count) == 0

    def proceed(self, pending: Pending) -> None:
        """All ranks are done with a stage: the next one, or the end. The same on all of them."""
        outcomes: list[Any] = [None] * self.world
        dist.all_gather_object(outcomes, pending.outcome, group=control_group())
        errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
        if errors:
            self.fail(pending, errors[0])
        elif pending.stage == "write":
            pending.stage, pending.thread, pending.outcome = "commit", None, {}
            pending.files = [outcome for outcome in outcomes if outcome]
            if self.rank == 0:
                self.start(lambda: self.commit(pending))
        else:
            self.succeed(pending, outcomes[0]["bytes"])

    def start(self, job: Callable[[], dict[str, Any]]) -> None:
        """Runs a stage of the pending save beside the training; errors become its outcome."""
        pending = self.pending
        assert pending is not None

        def run() -> None:
            try:
                pending.outcome = job()
            except Exception as error:  # told by all ranks in `fail`: nothing is swallowed
                is_plain = isinstance(error, (OSError, ValueError))
                pending.outcome = {"error": str(error) if is_plain else f"{type(error).__name__}: {error}"}

        # a daemon: a process that must go does not wait for a disk that hangs
        pending.thread = threading.Thread(target=run, name=f"save {pending.step}", daemon=True)
        pending.thread.start()

    def write(self, pending: Pending, tensors: dict[str, Tensor]) -> dict[str, Any]:
        refuse_links(self.run)
        make_folder(pending.temporary)
        return write_rank(pending.temporary, self.rank, tensors)

    def commit(self, pending: Pending) -> dict[str, Any]:
        files = [*pending.files, write_json(pending.temporary / "loop.json", pending.loop)]
        manifest = {
            "step": pending.step,
            "world_size": self.world,
            "stage": self.engine.zero_optimization_stage(),
            "parameters": pending.parameters,
            "files": files,
        }
        write_manifest(pending.temporary, manifest)
        commit(pending.temporary, self.run / folder_name(pending.step))
        try:
            prune(self.run, self.keep, self.keep_every, pending.spared())
        except OSError as error:  # the new one is committed all the same
            tell(sys.stderr, f"warning: an old checkpoint could not be deleted: {error}")
        return {"bytes": sum(file["bytes"] for file in files)}

    def succeed(self, pending: Pending, size: int) -> None:
        self.last_good = self.run / folder_name(pending.step)
        self.failures_in_a_row = 0
        self.pending = None
        took = time.perf_counter() - pending.began
        if self.rank == 0:
            tell(
                sys.stdout,
                f"saved {self.last_good} ({size / 1e6:.1f} MB in {took:.2f} s, training paused {pending.paused:.3f} s)",
            )

    def fail(self, pending: Pending, error: str) -> None:
        self.pending = None
        self.failures += 1
        self.failures_in_a_row += 1
        self.lost.add(pending.step)
        if self.rank == 0:
            with contextlib.suppress(OSError):  # a folder that became read-only keeps what it has
                remove_leftovers(self.run)
            tell(
                sys.stderr,
                f"WARNING: the checkpoint of step {pending.step} could NOT be written ({error}); "
                f"{self.failures_in_a_row} in a row, stopping at {self.max_failures}; {self.what_is_left()}",
            )
        dist.barrier(group=control_group())  # nobody begins the same folder while it is deleted
        if self.failures_in_a_row >= self.max_failures:
            raise SaveFailed(
                f"{self.failures_in_a_row} saves in a row failed (train.save_failures={self.max_failures}), the last "
                f"with: {error}; {self.what_is_left()}"
            )

    def what_is_left(self) -> str:
        if self.last_good is None:
            return f"there is no checkpoint yet; make {self.run} writable, with room for one"
        return (
            f"the last good checkpoint is {self.last_good}, untouched; make room there, or it writable, and the "
            "same command goes on from it"
        )

    def count_pause(self, began: float) -> None:
        seconds = time.perf_counter() - began
        self.paused += seconds
        if self.pending is not None:
            self.pending.paused += seconds


def tell(stream: TextIO, text: str) -> None:
    """A launcher that is gone does not read."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=stream, flush=True)


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def prune(run: Path, keep: int, keep_every: int, spared: Collection[Path] = ()) -> None:
    """Deletes all checkpoints but the last `keep`, those at multiples of `keep_every` steps, and those `spared`."""
    for old in checkpoints(run)[max(keep, 1) :]:
        if old not in spared and not is_kept(old, keep_every):
            delete(old)


def remove_leftovers(run: Path) -> None:
    """What a save that failed, or a process that was killed, left behind."""
    if run.is_dir():
        for entry in os.scandir(run):
            if entry.name.startswith(".tmp-") and not entry.is_symlink():
                shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)

"""Two runs in one folder would write each other's checkpoints: the first has it to itself until its process ends.

A lock of POSIX, which the kernel takes from a process that is killed and which data workers do not inherit. Where a
file system has none, nothing is locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from d2v_ds.training.agreement import together

FILE = ".lock"
WAIT_SECONDS = 120.0
"""A run that was asked to stop may still be saving, and NFS keeps the lock of a machine that is lost for 90 s."""


@contextlib.contextmanager
def alone(folder: Path, rank: int) -> Iterator[None]:
    """Rank 0 holds the folder meanwhile. All ranks call it; ValueError on all if another run goes on there."""
    is_new = not folder.exists()
    lock = together(lambda: take(folder) if rank == 0 else None)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                (folder / FILE).unlink()
            lock.close()
            with contextlib.suppress(OSError):
                if is_new:
                    folder.rmdir()  # of a mistake: nothing was written


def take(folder: Path) -> TextIO | None:
    """The locked file; None where there are no locks."""
    path, end = folder / FILE, time.monotonic() + WAIT_SECONDS
    is_told = False
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except OSError:  # told where the run's own files are written
            return None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_same(file, path):
                file.truncate(0)
                print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
                return file
        except (BlockingIOError, PermissionError):
            file.seek(0)
            who = file.read().strip() or "another process"
            if time.monotonic() > end:
                raise ValueError(
                    f"a run goes on in {folder}, of {who}; wait for it or stop it, or set another out= (if that "
                    f"machine is gone, delete {path})"
                ) from None
            if not is_told:
                print(f"waiting for the run in {folder}, of {who}", flush=True)
                is_told = True
            time.sleep(0.5)
        except OSError:  # a file system without locks, or a full disk
            return file
        file.close()


def is_same(file: TextIO, path: Path) -> bool:
    """Whether the file still has its name: whoever had it before deletes it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False

"""How are many jobs done by N processes that never outlive the one that started them?"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

AHEAD = 4
"""Jobs handed out for each process; more would only cost memory."""

_job: Callable[[Any], Any]  # of a worker process, set when it starts


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def run_jobs(job: Callable[[Any], Any], items: list[Any], workers: int) -> Iterator[Any]:
    """job(item) for every item, as they are done; the first error is raised when the others have stopped.

    The job is inherited by fork, so it may be a closure; items and results are pickled between our own processes.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(job, items)
        return
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(
        workers, mp_context=fork, initializer=_start_worker, initargs=(job, os.getpid())
    )
    try:
        waiting = iter(items)
        running = {pool.submit(_run_job, item) for item in itertools.islice(waiting, AHEAD * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(_run_job, item) for item in itertools.islice(waiting, len(done))}
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed, for want of memory perhaps; the same command goes on where it was, "
            f"with fewer --workers than {workers} if memory was short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(job: Callable[[Any], Any], parent: int) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A parent killed with -9 cannot say goodbye, and its workers would wait for jobs for ever."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _run_job(item: Any) -> Any:
    return _job(item)

"""How is a job done for each of many shards, on all cores, with a line of progress and one at the end?"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from d2v_ds.data.progress import ProgressLine

Progress = Callable[[str], Any]

_job: Callable[[Any], Any]  # of a worker process, set when it starts


def map_shards(
    job: Callable[[Any], Any], items: list[Any], workers: int | None, progress: Progress | None, what: str
) -> list[Any]:
    """[job(item) for item in items] in `workers` processes (None: one per core); the first error is raised.

    The job is inherited by fork, so it may be a closure; items and results are pickled between our own
    processes. With `progress`, standard error shows how far it is, and `progress` gets one line at the end.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(items))
    started = time.monotonic()
    line = ProgressLine(len(items), what=what, unit="shards")
    results = []
    for result in _results(job, items, workers):
        results.append(result)
        if progress:
            line.show(len(results))
    if progress and items:
        line.close()
        progress(f"{what} {len(items)} shards in {time.monotonic() - started:.1f} s")
    return results


def _results(job: Callable[[Any], Any], items: list[Any], workers: int) -> Iterator[Any]:
    if workers <= 1:
        yield from map(job, items)
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=fork, initializer=_set_job, initargs=(job,)) as pool:
        try:
            yield from pool.map(_run_job, items)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"a process of {workers} was killed, for want of memory perhaps; with fewer workers each has more"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _set_job(job: Callable[[Any], Any]) -> None:
    global _job
    _job = job
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a run decides when it ends
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C goes to all, and one word of it is enough


def _run_job(item: Any) -> Any:
    return _job(item)

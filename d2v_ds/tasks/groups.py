"""Items -> groups of prepared rows, read and decoded ahead of the model by threads, always in the same order."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from torch import Tensor

from d2v_ds.convert.features import Encoder
from d2v_ds.tasks.items import Content, Items, Name
from d2v_ds.tasks.table import Bad

GROUP_BATCHES = 8
GROUP_BYTES = 256 << 20
"""Rows and results of a group at most, unless one item alone is larger."""

AHEAD_BYTES = 64 << 20
"""Of files that are read and not yet decoded: an hour of MP3 has 30 MB, and 230 MB when it is decoded."""

BATCH_ATTENTION = 1 << 24
"""B * T^2 at most: attention with 12 heads then needs 0.8 GB."""

T = TypeVar("T")


class Ready(NamedTuple):
    """One item, read and prepared; `row` is None and `reason` says why if it cannot be used."""

    number: int
    name: Name
    label: str
    row: Tensor | None
    notice: str | None
    reason: str | None


@dataclass
class Group:
    """Items that are sorted by length among themselves."""

    ready: list[Ready] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    next_item: int = 0


def prepare(encoder: Encoder, items: Items, start: int, workers: int | None) -> Iterator[Ready]:
    """Every item from `start` on, in order; read here, decoded by threads that are some items ahead."""
    workers = workers or min(8, len(os.sched_getaffinity(0)))
    pending: deque[tuple[int, Future[Ready]]] = deque()
    ahead_bytes = 0
    with ThreadPoolExecutor(workers) as pool:
        for i in range(start, len(items)):
            size, future = start_one(pool, encoder, items, i)
            pending.append((size, future))
            ahead_bytes += size
            while len(pending) > 4 * workers or ahead_bytes > AHEAD_BYTES:
                size, future = pending.popleft()
                ahead_bytes -= size
                yield future.result()
        for _, future in pending:
            yield future.result()


def start_one(pool: ThreadPoolExecutor, encoder: Encoder, items: Items, i: int) -> tuple[int, Future[Ready]]:
    """Reads an item and hands it to a thread; how many bytes it has."""
    name = items.name(i)
    try:
        content, label = items.read(i)
    except ValueError as error:
        done: Future[Ready] = Future()
        done.set_result(Ready(i, name, "", None, None, str(error)))
        return 0, done
    size = len(content) if isinstance(content, bytes) else sum(map(len, content))
    return size, pool.submit(prepare_one, encoder, i, name, content, label)


def prepare_one(encoder: Encoder, i: int, name: Name, content: Content, label: str) -> Ready:
    try:
        row, notice = encoder.inputs.prepare(encoder.samples, content)
    except ValueError as error:
        return Ready(i, name, label, None, None, str(error))
    return Ready(i, name, label, row, notice, None)


def make_groups(
    ready: Iterator[Ready], encoder: Encoder, batch: int, bytes_per_token: int = 0
) -> Iterator[Group]:
    """As many items as some batches have, fewer where they or their results (`bytes_per_token`) are large; where one
    ends depends on its items alone."""
    group, size = Group(), 0
    for item in ready:
        group.next_item = item.number + 1
        if item.row is None:
            group.bad.append(Bad(item.name.full, item.reason or ""))
            continue
        group.ready.append(item)
        size += item.row.nbytes + bytes_per_token * encoder.inputs.num_tokens(encoder.samples, item.row)
        if len(group.ready) == GROUP_BATCHES * batch or size >= GROUP_BYTES:
            yield group
            group, size = Group(), 0
    if group.next_item:
        yield group


def cut_batches(group: Group, encoder: Encoder, batch: int) -> Iterator[list[Ready]]:
    """All of its items, those of like length together: that needs little padding."""
    lengths = [encoder.inputs.num_tokens(encoder.samples, item.row) for item in group.ready]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    while order:
        chosen = cut_batch(order, lengths, batch)
        order = order[len(chosen) :]
        yield [group.ready[i] for i in chosen]


def cut_batch(order: list[int], lengths: list[int], batch: int) -> list[int]:
    """The next items that go together: at most `batch`, and no more than attention has room for."""
    size = 1
    while size < min(batch, len(order)) and (size + 1) * lengths[order[size]] ** 2 <= BATCH_ATTENTION:
        size += 1
    return order[:size]


def ahead(source: Iterator[T]) -> Iterator[T]:
    """The same things, made one ahead by a thread; its errors are raised here, and it ends when nobody wants more."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=1)
    is_over = threading.Event()

    def offer(thing: T | None, error: BaseException | None = None) -> bool:
        while not is_over.is_set():
            try:
                ready.put((thing, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for thing in source:
                if not offer(thing):
                    return
            offer(None)
        except BaseException as error:  # raised where it is awaited
            offer(None, error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            thing, error = ready.get()
            if error is not None:
                raise error
            if thing is None:
                return
            yield thing
    finally:
        is_over.set()
        thread.join()

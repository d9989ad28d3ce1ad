"""What a signal does to a run: this step is finished, all ranks save, all end with an exit code of its own.

SIGTERM, SIGUSR1 or SIGINT once asks for that; a second one ends the process now. The end of a launcher above this
process asks too, so that no rank outlives it. During start-up there is nothing to save, and the first ends it.

Python runs handlers in the main thread, which may hang in a collective. So the numbers also go to a pipe, as the C
level writes them, and a thread reads it. Imports nothing large: it listens before torch is imported.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from d2v_ds.training.codes import STOPPED, record_code

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 0.5
"""A signal often comes by two ways at once, from a scheduler and through its launcher."""
LAUNCHERS = {
    "deepspeed", "deepspeed.launcher.launch", "deepspeed.launcher.runner", "torchrun", "torch.distributed.run",
    "torch.distributed.launch", "accelerate", "mpirun", "mpiexec", "orted", "prted", "hydra_pmi_proxy",
}  # fmt: skip

Item = TypeVar("Item")
_listening: Signals | None = None


def listen() -> Signals:
    """The one listener of this process, until `stop_listening`."""
    global _listening
    if _listening is None:
        _listening = Signals()
    return _listening


def stop_listening() -> None:
    global _listening
    if _listening is not None:
        _listening.close()
    _listening = None


class _Asked(BaseException):
    """Ends the wait for data."""


class Signals:
    """Hears signals and the end of launchers; the loop asks it before each step."""

    def __init__(self) -> None:
        self.asked: str | None = None
        """By what: SIGTERM, ..."""
        self.phase = "starting"
        """starting, running, saving or leaving"""
        self.patience: float | None = None
        """Seconds from being asked to leaving unsaved, where no step's boundary comes."""
        self._is_waiting = False
        self._first: float | None = None
        self._launchers = launchers()
        self._is_own = False
        self._main = threading.main_thread().ident
        self._is_open = threading.current_thread() is threading.main_thread()
        if not self._is_open:  # only the main thread may handle signals; someone else's program does then
            return
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._pid = os.getpid()
        self._before = {number: signal.signal(number, self._handle) for number in NUMBERS}
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def close(self) -> None:
        """As it was before: Ctrl-C interrupts again."""
        if self._is_open:
            self._is_open = False
            signal.set_wakeup_fd(self._fd_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.write(self._write, b"\0")

    def until_asked(self, steps: Iterator[list[Item]] | Any) -> Iterator[list[Item]]:
        """Each of `steps`; once asked, also in the middle of waiting for one, an empty list and no more."""
        source = iter(steps)
        while True:
            try:
                self._is_waiting = True
                if self.asked:
                    raise _Asked
                item = next(source)
            except _Asked:
                self._is_waiting = False
                yield []
                return
            except StopIteration:
                return
            finally:
                self._is_waiting = False
            yield item

    def _handle(self, number: int, _: Any) -> None:
        """In the main thread, when it gets to it."""
        if os.getpid() != self._pid:  # a child process that has not set its own handlers yet
            return
        self.asked = self.asked or signal.Signals(number).name
        if self._is_waiting:
            self._is_waiting = False
            raise _Asked

    def _listen(self) -> None:
        """In its own thread, at once."""
        while True:
            ready, _, _ = select.select([self._read], [], [], 0.5)
            numbers = os.read(self._read, 64) if ready else b""
            if 0 in numbers:
                os.close(self._read)
                os.close(self._write)
                return
            for number in numbers:
                if number in NUMBERS:
                    self._heard(number)
            if self._launchers and not all(lives(pid, started) for pid, started in self._launchers):
                self._launchers = []
                self._lost_launcher()
            if (
                self._first is not None
                and self.patience is not None
                and self.phase == "running"
                and time.monotonic() - self._first > self.patience
            ):
                tell(
                    f"no step's end came within {self.patience:.0f} s (train.stop_seconds): leaving without saving"
                )
                leave_now(STOPPED)

    def _heard(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.phase == "leaving":
            return
        if self.phase == "starting":
            tell(f"{name} during start-up: nothing to save, leaving")
            leave_now(STOPPED)
        elif self._is_own:
            self._is_own, self._first = False, now
        elif self._first is None:
            self._first, self.asked = now, self.asked or name
            tell(f"{name}: finishing this step, saving, leaving (again: leaving now, unsaved)")
        elif now - self._first > SAME_REQUEST_SECONDS:
            tell(f"{name} again: leaving now")
            leave_now(128 + number)

    def _lost_launcher(self) -> None:
        if self.phase == "starting":
            tell("the launcher has ended during start-up: leaving")
            leave_now(STOPPED)
        if self.asked is None:
            self.asked, self._is_own = "the end of the launcher", True
            tell("the launcher has ended: finishing this step, saving, leaving")
            signal.pthread_kill(self._main, signal.SIGTERM)  # ends a wait for data


def leave_now(code: int) -> None:
    """Ends this process and its data workers, from any thread, whatever the main thread hangs in."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(record_code(code))


def tell(text: str) -> None:
    """To stderr, from any thread, also when nobody reads it any more."""
    rank = os.environ.get("RANK", "0")
    with contextlib.suppress(OSError):
        os.write(2, f"{'' if rank == '0' else f'(rank {rank}) '}{text}\n".encode())


def launchers() -> list[tuple[int, str]]:
    """(pid, start time) of the launchers among the processes above this one; [] where /proc does not say.

    Not of a shell: a run under nohup goes on when its shell ends.
    """
    found, pid = [], os.getppid()
    while pid > 1:
        try:
            state = stat_of(pid)
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            break
        if name == "slurmstepd" or any(Path(word).name in LAUNCHERS for word in words[:4]):
            found.append((pid, state[19]))
        pid = int(state[1])
    return found


def lives(pid: int, started: str) -> bool:
    try:
        state = stat_of(pid)
    except OSError:
        return False
    return state[0] not in "ZX" and state[19] == started


def stat_of(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name: state, parent, ..., the 20th is the start time."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()

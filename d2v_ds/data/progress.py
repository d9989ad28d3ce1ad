"""One line that says how far a task is: rewritten on a terminal, seldom where nobody watches."""

from __future__ import annotations

import sys
import time
from typing import TextIO

SECONDS = {True: 0.5, False: 30.0}
"""Between lines, on a terminal and elsewhere."""


class ProgressLine:
    """`show(done)` as often as one likes; "packed 120 of 700 MB ..." for what="packed" and unit="MB"."""

    def __init__(
        self, total: int, start: int = 0, stream: TextIO | None = None, what: str = "", unit: str = ""
    ):
        self.what, self.unit = what and f"{what} ", unit and f" {unit}"
        self.total, self.start = total, start
        self.stream = sys.stderr if stream is None else stream
        self.is_terminal = self.stream.isatty()
        self.began = self.shown = time.monotonic()

    def show(self, done: int, bad: int = 0) -> None:
        now = time.monotonic()
        if now - self.shown < SECONDS[self.is_terminal]:
            return
        self.shown = now
        rate = (done - self.start) / (now - self.began)
        left = f", {duration((self.total - done) / rate)} left" if rate else ""
        faults = f", {bad} bad" if bad else ""
        share = 100 * done // max(self.total, 1)
        line = f"{self.what}{done} of {self.total}{self.unit} ({share} %), {rate:.1f}/s{faults}{left}"
        self.stream.write(f"\r{line:<70}" if self.is_terminal else line + "\n")
        self.stream.flush()

    def close(self) -> None:
        if self.is_terminal:
            self.stream.write("\r" + " " * 70 + "\r")
            self.stream.flush()


def duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"

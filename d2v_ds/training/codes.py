"""How a run ended, for those who start it again: exit codes beside 0."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

FAILED, MISTAKE, COLLAPSED, STOPPED, HUNG, LOST = 1, 2, 3, 85, 86, 87

EXIT_CODES = {
    0: "finished",
    FAILED: "the run cannot go on: data, disk, gradients, or a fault of the program (traceback)",
    MISTAKE: "a mistake in what was asked for: recipe, ds_config, data, number of ranks",
    COLLAPSED: "its health has ended the run (health.*): it learns nothing; change the recipe before another",
    STOPPED: "stopped because a signal, or the end of the launcher, asked for it: start it again, it goes on",
    HUNG: "a step took far too long: stacks are in hang/ of the run folder; goes on from the last checkpoint",
    LOST: "another rank was lost: its own message says why; goes on from the last checkpoint",
}
"""A second signal ends a process at once with 128 + its number: 130 SIGINT, 138 SIGUSR1, 143 SIGTERM."""


def describe_codes() -> str:
    """The table of `--help`."""
    return "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())


def record_code(code: int) -> int:
    """The code, also written to the file D2V_EXIT_FILE by the first rank that ends: srun reports the highest of all
    ranks, of those too that it ended itself because another had failed."""
    if path := os.environ.get("D2V_EXIT_FILE"):
        with contextlib.suppress(OSError), Path(path).open("x", encoding="ascii") as file:
            file.write(f"{code}\n")
    return code


class Stopped(SystemExit):
    """The run was asked to stop, and did at a step's boundary, on all ranks, saved."""

    def __init__(self, message: str):
        super().__init__(STOPPED)
        self.message = message

    def __str__(self) -> str:
        return self.message

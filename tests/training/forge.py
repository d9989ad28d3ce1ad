"""Starts ranks by fork, which saves them the imports: real processes, real process groups, with a fault if wanted.

Reads a line of JSON for each start from stdin, {"argv": one list a rank, "fault": NAME|null, "out": FOLDER}; answers
{"pids": [...]}, and when all have ended {"codes": [...]}. What rank r says goes to OUT/rank_r.txt.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import deepspeed  # noqa: F401  (imported once, for all)

from d2v_ds.engine.launch import end_process, free_port
from d2v_ds.training import loop, run
from d2v_ds.training.signals import listen

FOREVER = 1000.0


def sleep_in_step(rank: int) -> None:
    """Rank 1 is late by 0.4 s in every step, and never done with the sixth."""
    if rank == 1:
        wrap(loop, "set_learning_rate", lambda step: time.sleep(FOREVER if step == 5 else 0.4))


def slow_step(rank: int) -> None:
    wrap(loop, "apply_step", lambda step: say_and_sleep("in step 3") if step == 2 else None)


def slow_save(rank: int) -> None:
    wrap(run.Run, "save", lambda _: say_and_sleep("saving"))


def slow_start(rank: int) -> None:
    wrap(run, "open_sources", lambda _: time.sleep(FOREVER))


def other_order(rank: int) -> None:
    """Rank 1 runs the modalities of the third step in another order."""
    if rank == 1:
        items = run.Plan.items
        run.Plan.items = lambda self, step, *a: items(self, step, *a)[:: -1 if step == 2 else 1]


def say_and_sleep(text: str) -> None:
    print(text, flush=True)
    time.sleep(2.0)


def wrap(module: object, name: str, before: object) -> None:
    """`before(number of the call)`, then what it was."""
    original, calls = getattr(module, name), iter(range(1_000_000))

    def wrapped(*arguments: object, **keywords: object) -> object:
        before(next(calls))
        return original(*arguments, **keywords)

    setattr(module, name, wrapped)


def become(rank: int, request: dict, port: int) -> None:
    """This process is that rank from here on."""
    file = os.open(Path(request["out"]) / f"rank_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    world = len(request["argv"])
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if request["fault"]:
        globals()[request["fault"]](rank)
    listen()
    end_process(run.main(request["argv"][rank], prog="train.py"))


if __name__ == "__main__":
    for line in sys.stdin:
        request, port, pids = json.loads(line), free_port(), []
        for rank in range(len(request["argv"])):
            pid = os.fork()
            if pid == 0:
                become(rank, request, port)
            pids.append(pid)
        print(json.dumps({"pids": pids}), flush=True)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        print(json.dumps({"codes": [os.waitstatus_to_exitcode(status) for status in statuses]}), flush=True)

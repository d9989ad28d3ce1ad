"""A run in which one rank hangs, dies, or does something else ends on all ranks, and says what it was."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import environment, python, read_rows
from test_signals import Forge, children, is_gone, wait

from d2v_ds.training.codes import HUNG, LOST, MISTAKE
from d2v_ds.training.log import straggler

QUICK = ["train.steps=600", "train.hang_seconds=4", "train.hang_factor=3"]


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    forge = Forge()
    yield forge
    forge.process.stdin.close()
    forge.process.wait(30)


def test_a_slow_rank_is_named() -> None:
    """If it is slow enough; nobody is when all are alike."""
    metrics = {"slowest_rank": 3, "slowest_rank_seconds": 0.31, "median_rank_seconds": 0.2}
    assert straggler(metrics, 1.5) == "  slow: rank 3 takes 0.31 s, others 0.20 s"
    assert straggler(metrics, 1.6) == ""


def test_the_flight_recorder_is_on() -> None:
    """Before torch starts its process group, and not over what a user has set."""
    code = (
        "import os, torch; from pathlib import Path; from d2v_ds.engine.launch import record_collectives; "
        "record_collectives(Path('run')); print({k: v for k, v in os.environ.items() if k.startswith('TORCH_')})"
    )
    done = subprocess.run(
        python("-c", code), env=environment(TORCH_NCCL_DUMP_ON_TIMEOUT="0"), capture_output=True, text=True
    )
    shown = done.stdout
    assert "'2000'" in shown and "'run/nccl_timeout_rank_'" in shown, done.stderr
    assert "'TORCH_NCCL_DUMP_ON_TIMEOUT': '0'" in shown


def test_a_long_step_is_a_hang_and_a_long_save_is_none(tmp_path: Path) -> None:
    """Alone: the third step's median is 0.1 s, the save takes longer than a step may, the fifth step never ends."""
    code = f"""
import time
from pathlib import Path
from d2v_ds.training import watchdog
watchdog.OTHERS_WRITE_SECONDS = 0.1
dog = watchdog.Watchdog(Path({str(tmp_path)!r}), 0, factor=3, seconds=1.0, patience=60)
def step_that_hangs(): time.sleep(60)
for step in range(4):
    dog.begin(step); time.sleep(0.1); dog.end(0.1)
dog.wait_patiently("saving")
time.sleep(2.5)
print("saved", flush=True)
dog.begin(4)
step_that_hangs()
"""
    done = subprocess.run(python("-c", code), env=environment(), capture_output=True, text=True)
    assert done.returncode == HUNG and done.stdout == "saved\n", done.stderr
    assert "step 5 has taken" in done.stderr and "median 0.10 s (train.hang_seconds=1" in done.stderr
    assert "step_that_hangs" in (tmp_path / "hang" / "stacks_rank_00000.txt").read_text()


def test_a_hang_is_not_called_the_loss_of_the_rank_that_it_ended_first(tmp_path: Path) -> None:
    """The main thread comes free, and would end with a code of its own, while the watchdog lets the others write."""
    code = f"""
import time
from pathlib import Path
from d2v_ds.training import watchdog
watchdog.OTHERS_WRITE_SECONDS = 1.0
dog = watchdog.Watchdog(Path({str(tmp_path)!r}), 0, factor=3, seconds=0.5, patience=0.5)
dog.begin(0)
while not list(Path({str(tmp_path)!r}).rglob("stacks*")): time.sleep(0.01)
dog.close()
raise SystemExit({LOST})
"""
    done = subprocess.run(python("-c", code), env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == HUNG, done.stderr


@pytest.mark.slow
def test_a_rank_that_sleeps_is_named_and_then_ends_the_run(forge, tmp_path) -> None:
    """It is late by 0.4 s at first, and then for ever: both ranks write their stacks and end."""
    forge.start(tmp_path / "a", QUICK, QUICK, fault="sleep_in_step")
    assert forge.codes() == [HUNG, HUNG], forge.text()
    rows = read_rows(tmp_path / "a" / "run")
    assert {row["slowest_rank"] for row in rows} == {1}
    assert all(row["slowest_rank_seconds"] > row["median_rank_seconds"] + 0.3 for row in rows[1:])
    stacks = [(tmp_path / "a" / "run" / "hang" / f"stacks_rank_0000{r}.txt").read_text() for r in (0, 1)]
    assert "all_reduce" in stacks[0] and "waiting for the other ranks" in stacks[0]
    assert "forge.py" in stacks[1] and "step 6 has taken" in forge.text(1)


@pytest.mark.slow
def test_a_data_worker_that_stops_ends_the_run(forge, tmp_path) -> None:
    settings = [*QUICK, "train.workers=1"]
    pids = forge.start(tmp_path / "a", settings, settings)
    forge.wait_for("step 4/")
    workers = [child for pid in pids for child in children(pid)]
    stopped = children(pids[1])[0]
    os.kill(stopped, signal.SIGSTOP)
    assert forge.codes() == [HUNG, HUNG], forge.text()
    assert f"waiting for data, its data workers {stopped} are stopped" in forge.text(1)
    wait(lambda: all(map(is_gone, workers)), seconds=20)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others(forge, tmp_path) -> None:
    pids = forge.start(tmp_path / "a", QUICK, QUICK)
    forge.wait_for("step 2/")
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    assert forge.codes() == [LOST, -signal.SIGKILL], forge.text()
    assert "another rank was lost" in forge.text() and time.monotonic() - began < 30


@pytest.mark.slow
def test_a_rank_that_does_something_else_is_an_error_on_all(forge, tmp_path) -> None:
    """Another recipe at the start, another order of modalities later: both values, on both ranks."""
    forge.start(tmp_path / "a", ["optim.lr=1e-3"], ["optim.lr=3e-3"])
    assert forge.codes() == [MISTAKE, MISTAKE]
    assert "rank 1 has optim.lr 0.003, rank 0 has 0.001" in forge.text(0)
    assert "rank 0 has optim.lr 0.001, rank 1 has 0.003" in forge.text(1)
    forge.start(tmp_path / "b", [], [], fault="other_order")
    assert forge.codes() == [MISTAKE, MISTAKE]
    for rank in (0, 1):
        text = forge.text(rank)
        assert "['audio', 'image', 'text']" in text and "['text', 'image', 'audio']" in text

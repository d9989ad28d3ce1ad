"""A signal, or the end of a launcher, ends all ranks between two steps, saved, with code 85; a second one at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import ROOT
from runs import (
    STEPS,
    TINY,
    deepspeed,
    environment,
    python,
    read_rows,
    torchrun,
    two_rank_run,
    without_timings,
    zero3_config,
)

from d2v_ds.training.codes import EXIT_CODES, STOPPED
from d2v_ds.training.signals import launchers

HEARS = """
import os, signal, sys, time
from d2v_ds.training.signals import listen
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests without it
signals = listen()
signals.phase = "running"
"""


class Forge:
    """Ranks that forge.py starts, one start after another."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            python(ROOT / "tests" / "training" / "forge.py"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=ROOT,
        )

    def start(self, folder: Path, *argvs: list[object], fault: str | None = None) -> list[int]:
        """One rank for each argument list, in the run folder `run` of `folder`; process ids."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        listed = [[*TINY, f"out={folder / 'run'}", *map(str, argv)] for argv in argvs]
        request = {"argv": listed, "fault": fault, "out": str(folder)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["pids"]

    def codes(self) -> list[int]:
        return json.loads(self.process.stdout.readline())["codes"]

    def text(self, rank: int = 0) -> str:
        path = self.folder / f"rank_{rank}.txt"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait_for(self, text: str, rank: int = 0) -> None:
        wait(lambda: text in self.text(rank), lambda: self.text(rank))


def wait(is_so: Callable[[], object], tell: Callable[[], str] = lambda: "", seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, tell()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    forge = Forge()
    yield forge
    forge.process.stdin.close()
    forge.process.wait(30)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def children(pid: int) -> list[int]:
    """Direct ones, and theirs."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    direct = [int(word) for word in listed.split()]
    return direct + [grandchild for child in direct for grandchild in children(child)]


# ---- alone ----


def end_of(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", HEARS + code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )


def test_a_signal_ends_the_wait_for_data() -> None:
    """At once, with an empty list; one that came before is not waited after."""
    done = end_of(
        "def steps():\n"
        "    yield [1]\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    time.sleep(60)\n"
        "print(list(signals.until_asked(steps())), list(signals.until_asked(steps())), signals.asked)\n"
        "time.sleep(1)\n"
    )
    assert done.stdout.split("\n")[0] == "[[1], []] [[]] SIGUSR1", done.stderr
    assert "SIGUSR1: finishing this step, saving, leaving" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_ends_the_process_now(number: signal.Signals) -> None:
    """Also where the main thread would never run a handler; one sent down two ways at once is no second."""
    done = end_of(
        f"def send(): os.kill(os.getpid(), {int(number)})\n"
        "import threading\n"
        "for delay in (0.2, 0.3, 1.2): threading.Timer(delay, send).start()\n"
        "threading.Timer(1.0, lambda: print('lives', flush=True)).start()\n"
        "lock = threading.Lock(); lock.acquire(); lock.acquire()\n"
    )
    assert done.returncode == 128 + number and done.stdout == "lives\n", done.stderr


def test_a_signal_during_start_up_ends_it(tmp_path: Path) -> None:
    """Nothing is there to save; the code is written down for a batch script."""
    file = tmp_path / "code"
    done = end_of(f"os.environ['D2V_EXIT_FILE'] = {str(file)!r}\nsignals.phase = 'starting'\n"
                  "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)")  # fmt: skip
    assert done.returncode == STOPPED and file.read_text() == f"{STOPPED}\n"


def test_a_run_that_reaches_no_step_end_leaves_unsaved() -> None:
    done = end_of("signals.patience = 1.0\nos.kill(os.getpid(), signal.SIGTERM); time.sleep(60)")
    assert done.returncode == STOPPED and "leaving without saving" in done.stderr


def test_listening_ends(tmp_path: Path) -> None:
    """A notebook that trained can be interrupted again."""
    done = end_of(
        "from d2v_ds.training.signals import stop_listening\nstop_listening()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    assert done.stdout == "interrupted\n" and done.returncode == 0, done.stderr


def test_a_shell_is_no_launcher() -> None:
    """A run under nohup goes on when its shell ends; torchrun by any of its names is one."""
    ours = {pid for pid, _ in launchers()}
    assert os.getppid() not in ours or "torch" in Path(f"/proc/{os.getppid()}/cmdline").read_text()
    code = "from d2v_ds.training.signals import launchers; print(len(launchers()))"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}"; true deepspeed'],
        env=environment(), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == f"{len(ours)}\n", done.stderr


def test_exit_codes_are_documented() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in text


# ---- ranks ----


@pytest.mark.slow
def test_ranks_stop_together_and_go_on_to_the_bit(forge, tmp_path, tmp_path_factory) -> None:
    """USR1 to one of two, in the middle of a step; then TERM to all while they save; the losses are those of a run
    that nobody stopped."""
    config = ["--deepspeed", zero3_config(tmp_path), "train.save_every=4"]
    pids = forge.start(tmp_path / "a", config, config, fault="slow_step")
    forge.wait_for("in step 3")
    os.kill(pids[1], signal.SIGUSR1)
    assert forge.codes() == [STOPPED, STOPPED], forge.text()
    assert "stopped after step 3 of 6" in forge.text() and "(rank 1) SIGUSR1: finishing" in forge.text(1)
    run = tmp_path / "a" / "run"
    assert (run / "latest").read_text() == "step_00000003"

    pids = forge.start(tmp_path / "a", config, config, fault="slow_save")
    forge.wait_for("saving")
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert forge.codes() == [STOPPED, STOPPED], forge.text()
    assert "stopped after step 4 of 6" in forge.text()

    forge.start(tmp_path / "a", config, config)
    assert forge.codes() == [0, 0], forge.text()
    expected = read_rows(two_rank_run(tmp_path_factory))
    assert without_timings(read_rows(run)) == without_timings(expected)
    assert len(expected) == STEPS


@pytest.mark.slow
def test_a_signal_while_data_does_not_come(forge, tmp_path) -> None:
    """The data worker of rank 0 is stopped; both ranks save what they have, and end with their workers."""
    settings = ["train.workers=1", "train.steps=600"]
    pids = forge.start(tmp_path / "a", settings, settings)
    forge.wait_for("step 2/")
    workers = [child for pid in pids for child in children(pid)]
    os.kill(children(pids[0])[0], signal.SIGSTOP)
    time.sleep(1.0)
    for worker in workers:
        os.kill(worker, signal.SIGUSR1)  # a signal to the whole group
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    assert forge.codes() == [STOPPED, STOPPED], forge.text()
    assert "saved" in forge.text() and "stopped after step" in forge.text()
    wait(lambda: all(map(is_gone, workers)), seconds=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "victim", "number", "code"),
    [
        (deepspeed, "runner", signal.SIGUSR1, -signal.SIGUSR1),  # dies of it, in silence
        (deepspeed, "launch", signal.SIGTERM, None),  # 1 or 85: ends its ranks one by one
        (torchrun, "runner", signal.SIGTERM, None),
    ],
)
def test_no_rank_outlives_its_launcher(launcher, victim, number, code, tmp_path) -> None:
    """They save and end, whatever happened to it."""
    run = tmp_path / "run"
    script = ["train.py"] if launcher is torchrun else []
    with (tmp_path / "out.txt").open("w") as file:
        process = subprocess.Popen(
            launcher(*script, f"out={run}", *TINY, "train.steps=600", "train.save_every=600"),
            env=environment(), cwd=ROOT, stdout=file, stderr=file,
        )  # fmt: skip
    wait(lambda: "step 2/" in (tmp_path / "out.txt").read_text(), (tmp_path / "out.txt").read_text)
    everyone = children(process.pid)
    os.kill(process.pid if victim == "runner" else everyone[0], number)
    assert process.wait(120) == code or code is None
    wait(lambda: all(map(is_gone, everyone)), (tmp_path / "out.txt").read_text, 60)
    text = (tmp_path / "out.txt").read_text()
    assert "stopped after step" in text and (run / "latest").exists(), text

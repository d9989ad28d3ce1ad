"""A run folder is one run's: another waits and is refused, until that one has ended or was killed."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from d2v_ds.training import alone as module
from d2v_ds.training.alone import FILE, alone, take


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "together", lambda work: work())
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.2)


def hold(folder: Path) -> int:
    """A process with the lock, and its data worker, which outlives it for a while."""
    taken, told = os.pipe()
    if pid := os.fork():
        os.read(taken, 1)
        return pid
    lock = take(folder)
    if os.fork():
        os.write(told, b"1")
    time.sleep(5)
    os._exit(lock is None)


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    pid = hold(folder)
    said = f"a run goes on in .*, of process {pid} on .*; wait for it or"
    with pytest.raises(ValueError, match=said), alone(folder, rank=0):
        pass
    assert f"waiting for the run in {folder}" in capsys.readouterr().out
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with alone(folder, rank=0):
        (folder / "recipe.yaml").touch()
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]


def test_a_mistake_leaves_no_folder_and_without_locks_nothing_is_locked(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "a" / "run"
    with pytest.raises(ValueError, match="a mistake"), alone(folder, rank=0):
        assert (folder / FILE).exists()
        raise ValueError("a mistake")
    assert not folder.exists()

    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with alone(folder, rank=0), alone(folder, rank=0):
        pass
    with alone(Path("/proc/run"), rank=0):  # cannot be made, which is told later
        pass

"""A run saves beside its training, goes on where it cannot save, and stops where it could not too often."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT
from runs import STEPS, TINY, Command, environment, python, read_rows, start_all, without_timings
from test_run import assert_same_checkpoint

from d2v_ds.engine.checkpoint import checkpoints, newest

LAST = f"step_{STEPS:08d}"
EACH = ["train.save_every=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saving")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict]:
    """One rank: beside the training and while it waits; with files where checkpoints should lie; with links."""
    blocked = {"once": (2,), "always": (1, 2, 3, 4), "at last": (STEPS,)}
    for name, steps in blocked.items():
        (folder / name).mkdir()
        for step in steps:
            (folder / name / f"step_{step:08d}").write_text("no folder")
    (folder / "outside").mkdir()
    for name in ("metrics.jsonl", "latest", "step_00000003", ".tmp-step_00000003", "tensorboard"):
        (folder / "linked" / name).mkdir(parents=True)
        (folder / "linked" / name / name).symlink_to(folder / "outside")
    commands = {
        "async": Command(folder / "async", [*EACH, "train.keep_every=4", "train.keep_checkpoints=1"]),
        "sync": Command(folder / "sync", [*EACH, "train.save=sync"]),
        "odd": Command(folder / "unused", ["train.save_every=3", "train.keep_every=10"]),
        "once": Command(folder / "once", EACH),
        "always": Command(folder / "always", EACH),
        "at last": Command(folder / "at last", []),
    }
    for path in (folder / "linked").iterdir():
        commands[f"linked {path.name}"] = Command(path, [])
    return start_all(folder, commands)


def test_a_run_is_the_same_however_it_is_saved(results, folder):
    """To the bit: metrics and checkpoint, saved at every step."""
    for name in ("async", "sync"):
        assert results[name]["code"] == 0, results[name]["err"]
    assert without_timings(read_rows(folder / "async")) == without_timings(read_rows(folder / "sync"))
    assert_same_checkpoint(folder / "async" / LAST, folder / "sync" / LAST)


def test_a_save_says_what_it_cost(results, folder):
    """Bytes, time and pause in the output; the pause in the metrics."""
    for name in ("async", "sync"):
        saved = re.findall(
            r"saved (\S+) \((\d+\.\d) MB in \d+\.\d\d s, training paused \d+\.\d\d\d s\)",
            results[name]["out"],
        )
        assert [Path(path).name for path, _ in saved] == [f"step_{s:08d}" for s in range(1, STEPS + 1)]
        files = (folder / name / LAST).iterdir()
        size = sum(p.stat().st_size for p in files if p.name != "manifest.json")
        assert float(saved[-1][1]) == pytest.approx(size / 1e6, abs=0.06)
        rows = read_rows(folder / name)
        assert sum(row["save_pause_seconds"] for row in rows) > 0
        assert all(row["failed_saves"] == 0 for row in rows)


def test_the_last_and_every_nth_checkpoint_stay(results, folder):
    assert [p.name for p in checkpoints(folder / "async")] == [LAST, "step_00000004"]
    assert [p.name for p in checkpoints(folder / "sync")] == [LAST, "step_00000005"]
    assert results["odd"]["code"] == 2
    assert "train.keep_every=10 must be a multiple of train.save_every=3" in results["odd"]["err"]


def test_a_run_goes_on_where_it_cannot_save_once(results, folder):
    """With a loud warning and a count; it trains what an undisturbed one does, and the file is still there."""
    result = results["once"]
    assert result["code"] == 0, result["err"]
    assert "WARNING: the checkpoint of step 2 could NOT be written" in result["err"]
    assert "step_00000002 is a file in the place of a checkpoint; move it away" in result["err"]
    assert f"last good checkpoint is {folder / 'once' / 'step_00000001'}, untouched" in result["err"]
    rows = read_rows(folder / "once")
    assert [row["failed_saves"] for row in rows][0] == 0 and rows[-1]["failed_saves"] == 1
    plain = [{k: v for k, v in row.items() if k != "failed_saves"} for row in without_timings(rows)]
    assert plain == [
        {k: v for k, v in row.items() if k != "failed_saves"}
        for row in without_timings(read_rows(folder / "sync"))
    ]
    assert (folder / "once" / "step_00000002").read_text() == "no folder"
    assert not list((folder / "once").glob(".tmp-*"))


def test_a_run_stops_after_too_many_failures_in_a_row(results, folder):
    result = results["always"]
    assert result["code"] == 1
    error = result["err"].splitlines()[-1]
    assert error.startswith("error: 3 saves in a row failed (train.save_failures=3), the last with: ")
    assert "there is no checkpoint yet; make" in error and "Traceback" not in result["err"]
    assert len(read_rows(folder / "always")) < STEPS and not list((folder / "always").glob(".tmp-*"))


def test_a_run_whose_last_state_was_not_saved_is_no_success(results, folder):
    result = results["at last"]
    assert result["code"] == 1
    error = result["err"].splitlines()[-1]
    assert error.startswith("error: the last state of the run was not saved; the last good checkpoint is ")
    assert "finished" not in result["out"] and newest(folder / "at last")[0].name == "step_00000003"


def test_links_in_a_run_folder_are_refused_before_anything_is_written(results, folder):
    for path in (folder / "linked").iterdir():
        result = results[f"linked {path.name}"]
        assert result["code"] == 2
        assert result["err"].startswith(f"error: {path / path.name} is a symbolic link (to ")
        assert [p.name for p in path.iterdir()] == [path.name]
    assert not list((folder / "outside").iterdir())


# ---- disks ----


def run_in_mounts(script: str) -> subprocess.CompletedProcess:
    """A shell script in mounts of its own; skipped where that is not permitted. `mount` fails with 77."""
    if not shutil.which("unshare"):
        pytest.skip("this machine has no unshare (util-linux)")
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=300,
    )
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip("this machine does not let us mount")
    return done


def train(*settings: object) -> str:
    return " ".join(map(repr, map(str, python("train.py", *TINY, *EACH, *settings))))


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint(tmp_path):
    """Room for one checkpoint alone: the first stays whole, the run stops, and goes on once there is room."""
    out = tmp_path / "disk"
    out.mkdir()
    command = train(f"out={out}/run")
    done = run_in_mounts(
        f"mount -t tmpfs -o size=6m none {out} || exit 77\n"
        f"{command}; echo code $?; ls -A {out}/run; df --output=avail -k {out} | tail -1\n"
        f"{sys.executable} -c 'from pathlib import Path; from d2v_ds.engine.checkpoint import newest; "
        f'print("newest", newest(Path("{out}/run")))\'\n'
        f"mount -o remount,size=60m {out}\n"
        f"{command}; echo code $?; wc -l < {out}/run/metrics.jsonl\n"
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("code")] == ["code 1", "code 0"], done
    assert "No space left on device" in done.stderr and "error: 3 saves in a row failed" in done.stderr
    kept = next(line for line in lines if line.startswith("newest"))
    assert re.fullmatch(r"newest \(PosixPath\('.*/step_0000000\d'\), \[\]\)", kept)
    assert not any(line.startswith(".tmp-") for line in lines)
    assert any("resuming from" in line for line in lines) and lines[-1] == str(STEPS)


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_stops_the_run_in_time(tmp_path):
    """Made so after the first checkpoint; training goes on for three saves, then says what to do."""
    out = tmp_path / "run"
    out.mkdir()
    command = train(f"out={out}", "train.steps=40")
    done = run_in_mounts(
        f"mount --bind {out} {out} || exit 77\n"
        f"{command} & pid=$!\n"
        f"until [ -e {out}/latest ] || ! kill -0 $pid; do sleep 0.01; done\n"
        f"mount -o remount,ro,bind {out} || exit 77\n"
        "wait $pid; echo code $?\n"
    )
    assert "code 1" in done.stdout.splitlines(), done
    assert "Read-only file system" in done.stderr and "error: 3 saves in a row failed" in done.stderr
    assert "WARNING: the log of step" in done.stderr
    found, problems = newest(out)
    assert found is not None and not problems
    assert f"the last good checkpoint is {found}, untouched" in done.stderr


@pytest.mark.slow
def test_a_limit_on_file_sizes_stops_the_run_with_a_clear_error(tmp_path):
    """RLIMIT_FSIZE, as a quota shows itself: no rank file fits, and none is left half-written."""
    out = tmp_path / "run"
    command = train(f"out={out}")
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 400; {command}"],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    assert done.returncode == 1, done
    assert "File too large" in done.stderr and "error: 3 saves in a row failed" in done.stderr
    assert not checkpoints(out) and not list(out.glob(".tmp-*"))
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1

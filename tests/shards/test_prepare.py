"""What holds for every preparer: killed, out of disk or told to stop, the same command ends in the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from corpora import tar_of
from trees import all_bytes, noise, prepare, read_shards, start_prepare, write_tree

from shards.pool import run_jobs
from shards.prepare import WORK


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """1,600 files, 10 MB, in 36 shards."""
    files = {f"{i % 7}/{i}.jpg": noise(i, 2000 + i * 5) for i in range(1600)}
    return write_tree(tmp_path_factory.mktemp("tree") / "src", files)


SETTINGS = ("--shard-mib", 0.3, "--workers", 2, "--labels", "folder", "--val", 0.1)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    running = start_prepare("folder", source, "--out", out, *SETTINGS)
    said = running.communicate()[0]
    assert running.returncode == 0, said
    return all_bytes(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_random_moments_the_same_command_writes_the_same_bytes(source, whole, tmp_path, seed):
    """kill -9 of the main process alone, again and again; its workers end by themselves.

    Where a fast machine is done before it is killed, the next kill finds nothing left to do: that is no fault.
    """
    moments = random.Random(seed)
    out = tmp_path / "out"
    records = out / WORK / "done"
    for _ in range(4):
        running = start_prepare("folder", source, "--out", out, *SETTINGS)
        until = len(list(records.glob("*.json"))) + moments.randint(1, 3)
        while running.poll() is None and len(list(records.glob("*.json"))) < until:
            time.sleep(0.001)
        time.sleep(moments.random() * 0.02)
        running.kill()
        running.communicate()
    running = start_prepare("folder", source, "--out", out, *SETTINGS)
    assert running.communicate()[0] and running.returncode == 0
    assert all_bytes(out) == whole


def test_killed_at_every_stage_it_goes_on(source, whole, tmp_path, monkeypatch):
    """Just before each rename in turn, while it lists, packs, indexes and writes the manifest."""
    import shards.prepare as module

    small = write_tree(tmp_path / "src", {f"{i}.jpg": noise(i, 900) for i in range(12)})
    arguments = ("folder", small, "--workers", 1, "--shard-mib", 0.008)
    assert prepare(*arguments, "--out", tmp_path / "whole")[0] == 0
    expected = all_bytes(tmp_path / "whole")
    replace, rmtree = os.replace, module.shutil.rmtree
    left = 0

    class Killed(BaseException):
        """No handler in the code may catch it, as none catches -9."""

    def stop_or(function):
        def run(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(os, "replace", stop_or(replace))
    monkeypatch.setattr(module.shutil, "rmtree", stop_or(rmtree))
    stops = 0
    for stop in range(200):
        out, left = tmp_path / f"{stop}", stop
        try:
            prepare(*arguments, "--out", out)
        except Killed:
            stops += 1
            left = 10**9
            assert prepare(*arguments, "--out", out)[0] == 0
            assert all_bytes(out) == expected, stop
            continue
        break
    assert stops > 20 and all_bytes(out) == expected


def test_going_on_does_not_write_again_what_is_there(source, tmp_path):
    """Shards keep their inode and time; those that lost their record are made again."""
    out = tmp_path / "out"
    running = start_prepare("folder", source, "--out", out, *SETTINGS)
    while len(list((out / WORK / "done").glob("*.json"))) < 3:
        assert running.poll() is None
        time.sleep(0.01)
    running.kill()
    running.communicate()
    time.sleep(0.5)
    records = sorted((out / WORK / "done").glob("*.json"))
    before = {file.stem: (out / file.stem).stat() for file in records}
    status, said = prepare("folder", source, "--out", out, *SETTINGS)
    assert status == 0 and f"going on: {len(before)} of" in said
    assert all((out / name).stat().st_mtime_ns == old.st_mtime_ns for name, old in before.items())
    assert len(read_shards(out)) == 1600


def test_other_settings_are_refused_once_shards_are_written(source, tmp_path):
    """Before that they simply hold."""
    out = tmp_path / "out"
    running = start_prepare("folder", source, "--out", out, *SETTINGS)
    while not list((out / WORK / "done").glob("*.json")):
        time.sleep(0.01)
    running.kill()
    running.communicate()
    status, said = prepare("folder", source, "--out", out, *SETTINGS, "--seed", 3)
    assert status == 2 and "was begun with other settings: seed 0, now 3" in said
    shutil.rmtree(out)
    (out / WORK).mkdir(parents=True)
    (out / WORK / "settings.json").write_text(json.dumps({"seed": 9}))
    assert prepare("folder", source, "--out", out, *SETTINGS)[0] == 0


def test_killed_while_it_begins_anew_it_does_not_take_the_listing_of_other_settings(tmp_path, monkeypatch):
    """What says of which settings a listing is goes last."""
    import shards.prepare as module

    source = write_tree(tmp_path / "src", {"1.jpg": b"1", "2.txt": "2"})
    with monkeypatch.context() as patch:
        patch.setattr(module, "plan_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare("folder", source, "--out", tmp_path / "out", "--modality", "text")
    work, unlink = tmp_path / "out" / WORK, Path.unlink
    gone = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **more: (gone.append(path.name), unlink(path, **more)))
        first = lambda path: path.name != "settings.json"  # noqa: E731
        patch.setattr(Path, "iterdir", lambda path: sorted(map(path.joinpath, os.listdir(path)), key=first))
        module.remove_listing(types.SimpleNamespace(work=work))
    assert gone[-1] == "settings.json" and "listing.json" in gone


def test_an_archive_that_changed_after_it_was_listed_is_not_read(tmp_path, monkeypatch):
    """Its bytes lie elsewhere now: texts of another archive came out, in silence."""
    source = write_tree(tmp_path / "src", {"a_data.tar": tar_of({f"{i}.txt": b"old" for i in range(3)})})
    with monkeypatch.context() as patch:
        patch.setattr("shards.prepare.plan_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare("openwebtext", source, "--out", tmp_path / "out")
    write_tree(source, {"a_data.tar": tar_of({f"{i}.txt": b"new" for i in range(3)})})
    status, said = prepare("openwebtext", source, "--out", tmp_path / "out")
    assert status == 2 and "changed since it was listed" in said and "remove the output folder" in said, said


@pytest.mark.parametrize("content", ["{x", "[1]", "null", '{"files": []}'])
def test_a_manifest_of_another_tool_is_one_line(source, tmp_path, content):
    write_tree(tmp_path, {"manifest.json": content})
    status, said = prepare("folder", source, "--out", tmp_path)
    assert status == 2 and f"{tmp_path}/manifest.json is damaged or of another tool" in said, said


def test_what_an_earlier_run_said_of_other_shards_goes(tmp_path):
    """Its shards and manifest were removed: classes and what was left out stayed, as if they were of the new ones."""
    source = write_tree(tmp_path / "src", {"a/1.jpg": b"x", "loose.jpg": b"in no class"})
    out = tmp_path / "out"
    assert prepare("folder", source, "--out", out, "--labels", "folder")[0] == 0
    (out / "class_names.json").write_text("[]")
    for path in (*out.glob("*.tar"), out / "manifest.json"):
        path.unlink()
    assert {"classes.json", "skipped.jsonl"} <= {path.name for path in out.iterdir()}
    assert prepare("folder", source, "--out", out)[0] == 0
    assert not {"classes.json", "class_names.json", "skipped.jsonl"} & {path.name for path in out.iterdir()}


def test_two_runs_in_one_folder_do_not_meet(source, tmp_path, monkeypatch):
    monkeypatch.setattr("shards.prepare.LOCK_SECONDS", 0.3)
    out = tmp_path / "out"
    running = start_prepare("folder", source, "--out", out, *SETTINGS)
    while not (out / WORK / "done").exists():
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGSTOP)
    status, said = prepare("folder", source, "--out", out, *SETTINGS)
    os.kill(running.pid, signal.SIGCONT)
    assert status == 2 and "another d2v prepare works in" in said
    assert running.wait() == 0


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path):
    """A limit on the size of files stands for the disk: the writer sees an error of the same family."""
    source = write_tree(tmp_path / "src", {f"{i}.jpg": noise(i, 30_000) for i in range(20)})
    command = "import resource, sys; from shards.command import main; "
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)); "
    arguments = ["folder", str(source), "--out", str(tmp_path / "out"), "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-c", f"{command}{limit}sys.exit(main({arguments!r}))"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "make room, and the same command goes on" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "out").glob("*.tar"))
    assert prepare(*arguments)[0] == 0 and len(read_shards(tmp_path / "out")) == 20


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full_is_one_line_too(tmp_path):
    """A file system of 1 MB in memory."""
    source = write_tree(tmp_path / "src", {f"{i}.jpg": noise(i, 30_000) for i in range(60)})
    out = tmp_path / "small"
    out.mkdir()
    script = (
        f"mount -t tmpfs -o size=1m none {out} || exit 77\n"
        f"{sys.executable} -m shards.command folder {source} --out {out}/out --workers 2 --shard-mib 0.2; echo $?\n"
        f"mount -o remount,size=20m {out}\n"
        f"{sys.executable} -m shards.command folder {source} --out {out}/out --workers 2 --shard-mib 0.2; echo $?\n"
    )
    if not shutil.which("unshare"):
        pytest.skip("this machine has no unshare (util-linux)")
    done = subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True)
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip("this machine does not let us mount")
    lines = done.stdout.splitlines()
    assert "2" in lines and lines[-1] == "0", done
    assert "warning: 1.8 GB" not in done.stdout and "warning: 0.0 GB" in done.stdout
    assert "is full (No space left on device)" in done.stderr and "Traceback" not in done.stderr
    assert any("going on: " in line for line in lines)


def test_an_error_of_a_job_ends_the_others():
    def job(item):
        if item == 3:
            raise ValueError("three")
        return item

    with pytest.raises(ValueError, match="three"):
        list(run_jobs(job, list(range(1000)), 3))
    assert sorted(run_jobs(lambda item: item * item, list(range(50)), 3)) == [i * i for i in range(50)]


def test_a_killed_worker_is_said():
    with pytest.raises(ValueError, match="a worker process was killed"):
        list(run_jobs(lambda item: os.kill(os.getpid(), signal.SIGKILL), list(range(5)), 2))


def test_workers_end_with_a_killed_parent(source, tmp_path):
    """Else they would hold the lock of the folder."""
    running = start_prepare("folder", source, "--out", tmp_path / "out", *SETTINGS)
    while not list((tmp_path / "out").glob("*.tar*")):
        time.sleep(0.01)
    children = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if parent_of(pid) == running.pid]
    running.kill()
    running.communicate()
    until = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") and parent_of(pid) for pid in children):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(children) >= 2


def parent_of(pid: str) -> int:
    """0 if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[1])

"""The project's own sbatch files on a real SLURM of two nodes: a signal, a requeue, a dead node, and the end."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, install
from ranks import ROOT
from runs import TINY, environment, read_rows, without_timings

pytestmark = pytest.mark.slow

STEPS = 24
SETTINGS = ["--deepspeed", "zero3", *TINY, f"train.steps={STEPS}", "train.save_every=1000"]
SMALL = ["--gpus-per-node=0", "--cpus-per-task=1", "--time=30"]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", *SMALL]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    problem = install()
    if problem:
        pytest.skip(problem)
    with tempfile.TemporaryDirectory(prefix="d2v") as folder:  # short, for the sockets
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def submit(
    cluster: Cluster, options: list[str], file: str, folder: Path, *arguments: object
) -> tuple[str, Path]:
    """The job, and where its ranks write."""
    more = {"D2V_LOGS": str(folder), "D2V_PYTHON": sys.executable, "PATH": cluster.env["PATH"]}
    job = cluster.submit(
        *options, f"--output={folder}.txt", ROOT / "scripts" / "slurm" / file, *arguments,
        cwd=ROOT, **(environment() | more),
    )  # fmt: skip
    return job, folder / job


def text_of(logs: Path) -> str:
    """What the batch script and rank 0 have said."""
    paths = [logs.parent.with_suffix(".txt"), *sorted(logs.glob("rank_*.txt"))]
    return "\n".join(f"---- {path.name}\n{path.read_text()}" for path in paths if path.exists())


def said(logs: Path, text: str, times: int = 1) -> bool:
    path = logs / "rank_0.txt"
    return path.exists() and path.read_text().count(text) >= times


def wait(cluster: Cluster, job: str, logs: Path, is_so, what: str) -> None:
    """Until it is so, or the job has ended otherwise."""
    ended = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    cluster.wait(lambda: is_so() or cluster.job(job)["JobState"] in ended, 300, f"{what}\n{text_of(logs)}")
    assert is_so(), f"{what}: {cluster.job(job)['JobState']}\n{text_of(logs)}"


def test_a_job_of_two_nodes_outlives_its_time_and_a_dead_node(cluster, tmp_path) -> None:
    """The time limit's signal: saved, requeued, resumed; then all of n2 killed: requeued, resumed from that. The
    losses are those of a job that nothing happened to, to the bit."""
    arguments = (cluster, TWO_NODES, "pretrain.sbatch")
    reference, whole = submit(*arguments, tmp_path / "first", *SETTINGS, f"out={tmp_path / 'whole'}")
    wait(cluster, reference, whole, lambda: cluster.job(reference)["JobState"] == "COMPLETED", "whole run")

    out = tmp_path / "run"
    job, logs = submit(*arguments, tmp_path / "second", *SETTINGS, f"out={out}")
    wait(cluster, job, logs, lambda: said(logs, "step 3/"), "first start")
    cluster.run("scancel", f"--signal={signal.SIGUSR1.name}", job)  # to the tasks, as --signal does
    wait(cluster, job, logs, lambda: int(cluster.job(job)["Restarts"]) >= 1, "requeue after the signal")
    latest = (out / "latest").read_text()
    assert said(logs, "stopped after step") and latest.startswith("step_000000")
    wait(cluster, job, logs, lambda: said(logs, f"resuming from {out / latest}"), "resuming")
    rows = len(read_rows(out))
    wait(cluster, job, logs, lambda: len(read_rows(out)) > rows, "a further step")

    cluster.fail("n2")
    wait(cluster, job, logs, lambda: int(cluster.job(job)["Restarts"]) >= 2, "requeue after the node's death")
    cluster.start_node("n2")
    cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    wait(cluster, job, logs, lambda: cluster.job(job)["JobState"] == "COMPLETED", "the end")
    assert said(logs, f"resuming from {out / latest}", times=2)
    assert len(read_rows(out)) == STEPS
    assert without_timings(read_rows(out)) == without_timings(read_rows(tmp_path / "whole"))


def test_other_sbatch_files_start_what_they_say(cluster, tmp_path) -> None:
    """A fine-tuning with its weights, and a sweep with a line of settings and a folder for each task."""
    arguments = [
        "--recipe",
        "finetune_image_tiny",
        "--print-recipe",
        f"out={tmp_path}/run",
        "init=weights.pt",
    ]
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("optim.lr=0.5\noptim.lr=0.25 seed=7\n", encoding="utf-8")
    tuning, tuned = submit(cluster, SMALL, "finetune.sbatch", tmp_path / "tuned", *arguments)
    sweeping, swept = submit(
        cluster, ["--array=2", *SMALL], "array_sweep.sbatch", tmp_path / "swept", sweep, *arguments
    )
    refused, _ = submit(cluster, SMALL, "finetune.sbatch", tmp_path / "refused", *arguments[:-1])
    for job, state in ((tuning, "COMPLETED"), (sweeping, "COMPLETED"), (refused, "FAILED")):
        cluster.wait(lambda job=job: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), 120, job)
        assert cluster.job(job)["JobState"] == state, text_of(tuned)
    assert "init: weights.pt" in (tuned / "rank_0.txt").read_text()
    text = (swept.with_name(f"{sweeping}_2") / "rank_0.txt").read_text()
    assert "lr: 0.25" in text and "seed: 7" in text and f"out: {tmp_path}/run/2" in text
    assert "give init=FILE" in (tmp_path / "refused.txt").read_text()


def test_the_slurm_launcher_of_deepspeed_starts_both_nodes(cluster, tmp_path) -> None:
    hostfile, out = tmp_path / "hostfile", tmp_path / "run"
    hostfile.write_text("n1 slots=1\nn2 slots=1\n", encoding="utf-8")
    script = tmp_path / "job.sh"
    script.write_text(
        f"#!/bin/bash\ncd {ROOT}\n{sys.executable} -m deepspeed.launcher.runner --hostfile {hostfile} --launcher slurm "
        "--no_ssh_check --master_addr n1 "
        f"train.py {' '.join(TINY)} train.steps=2 out={out}\n",
        encoding="utf-8",
    )
    job = cluster.submit(
        "--nodes=2", "--ntasks=2", "--time=30", f"--output={tmp_path}/job.txt", script, cwd=ROOT,
        **{**environment(), "PATH": cluster.env["PATH"]},
    )  # fmt: skip
    cluster.wait(lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), 200, job)
    text = (tmp_path / "job.txt").read_text()
    assert cluster.job(job)["JobState"] == "COMPLETED", text
    assert "2 ranks" in text and "finished 2 steps" in text

"""The best rate of a sweep is the one with the best median over seeds; runs without a result are named."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from ranks import ROOT

from d2v_ds.tasks.sweep import main, summarize


def write(folder: Path, task: str, scores: dict[tuple[str, int], float | None]) -> None:
    for (rate, seed), score in scores.items():
        run = folder / task / f"lr_{rate}_seed_{seed}"
        run.mkdir(parents=True)
        if score is not None:
            best = {"step": 10 * seed, "score": score, "accuracy": score + 0.1, "f1": score - 0.1}
            (run / "best.json").write_text(json.dumps(best))
            (run / "finished").touch()


def test_the_rate_with_the_best_median_is_chosen_and_its_median_given(tmp_path, capsys):
    """One lucky seed does not decide; of equal medians the lower rate does."""
    lucky = {
        ("1e-5", 1): 0.6,
        ("1e-5", 2): 0.62,
        ("1e-5", 3): 0.58,
        ("6e-5", 1): 0.2,
        ("6e-5", 2): 0.9,
        ("6e-5", 3): 0.5,
    }
    write(tmp_path, "mrpc", lucky)
    write(tmp_path, "rte", {("4e-5", 1): 0.7, ("2e-5", 1): 0.7, ("2e-5", 2): None})
    assert main([str(tmp_path)]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "glue.json").read_text())
    mrpc, rte = found["tasks"]["mrpc"], found["tasks"]["rte"]
    assert (mrpc["lr"], mrpc["median"], mrpc["lowest"], mrpc["highest"], mrpc["seeds"]) == (
        1e-5,
        0.6,
        0.58,
        0.62,
        3,
    )
    assert mrpc["metrics"] == {"accuracy": pytest.approx(0.7), "f1": pytest.approx(0.5)}
    assert rte["lr"] == 2e-5 and found["missing"] == ["rte/lr_2e-5_seed_2"]
    assert found["average"] == pytest.approx(0.65)
    assert (
        "60.0" in printed
        and "65.0  of 2 tasks" in printed
        and "1 runs have no result: rte/lr_2e-5_seed_2" in printed
    )


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no TASK/lr_RATE_seed_N/best.json"):
        summarize(tmp_path)


def test_a_run_counts_when_it_is_finished_and_scored_as_the_others(tmp_path):
    write(tmp_path, "rte", {("1e-5", 1): 0.6, ("1e-5", 2): 0.7, ("1e-5", 3): 0.9})
    runs = tmp_path / "rte"
    (runs / "lr_1e-5_seed_3" / "finished").unlink()
    found = summarize(tmp_path)
    assert found["tasks"]["rte"]["median"] == pytest.approx(0.65)
    assert found["missing"] == ["rte/lr_1e-5_seed_3"]
    (runs / "lr_1e-5_seed_2" / "best.json").write_text('{"score": 0.5, "matthews": 0.5}')
    with pytest.raises(ValueError, match="seed 1 by accuracy, f1; lr 1e-05, seed 2 by matthews; remove"):
        summarize(tmp_path)


STAND_IN = """#!/bin/bash
case "$*" in
    *prepare*) mkdir -p "${!#}" && touch "${!#}/manifest.json" ;;
    *train.py*) echo "begin $CUDA_VISIBLE_DEVICES $*" >> "$CALLS"; sleep 0.3; echo "end" >> "$CALLS" ;;
esac
"""


@pytest.fixture
def sweep(tmp_path):
    """Starts scripts/finetune_glue.sh in a folder of its own, with what only writes down how it was called."""
    for name in ("bin/python", "bin/d2v"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    for name in ("model", "files"):
        (tmp_path / name).mkdir()
    variables = {
        "D2V_VENV": "none",
        "INIT": "model",
        "GLUE": "files",
        "OUT": "out",
        "TASKS": "rte",
        "LRS": "1e-5",
    }
    variables |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}

    def start(**more: str) -> subprocess.Popen:
        command = ["bash", str(ROOT / "scripts" / "finetune_glue.sh")]
        return subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | variables | more, stderr=subprocess.PIPE
        )

    return start


def test_the_script_takes_paths_and_gpus_as_its_caller_sees_them(sweep, tmp_path):
    assert sweep(SEEDS="1 2", NUM_GPUS="2", CUDA_VISIBLE_DEVICES="3,5").wait() == 0
    calls = (tmp_path / "calls").read_text()
    assert calls.count(f" init={tmp_path}/model data={tmp_path}/out/shards/rte ") == 2
    assert {line.split()[1] for line in calls.splitlines() if line.startswith("begin")} == {"3", "5"}
    refused = sweep(NUM_GPUS="3", CUDA_VISIBLE_DEVICES="3,5")
    assert refused.wait() == 1 and b"CUDA_VISIBLE_DEVICES=3,5 names 2" in refused.stderr.read()


def test_runs_of_a_script_that_was_killed_end_before_the_next_begins(sweep, tmp_path):
    """No run folder is trained in twice at a time."""
    first = sweep(SEEDS="1 2 3", NUM_GPUS="0")
    while not (tmp_path / "calls").exists():
        time.sleep(0.01)
    first.kill()
    first.wait()
    assert sweep(SEEDS="1 2", NUM_GPUS="0").wait() == 0
    assert [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()] == ["begin", "end"] * 2

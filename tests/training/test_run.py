"""A run is the same however it was started, stopped and started again; what it writes is whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from ranks import ROOT
from runs import (
    HALF,
    MODALITIES,
    STEPS,
    TINY,
    Command,
    deepspeed,
    environment,
    interrupted,
    python,
    read_rows,
    start,
    start_all,
    two_rank_run,
    without_timings,
    zero3_config,
)
from safetensors.torch import load_file

from d2v_ds.engine.ds_config import PRESETS
from d2v_ds.recipe import parse_value

LAST = f"step_{STEPS:08d}"
MIDDLE = f"step_{HALF:08d}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_rank_run(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def on_two_ranks(run: Path, folder: Path) -> dict[str, dict]:
    """Two ranks under torchrun: from the middle of `run`, at its stage and another; and a bf16 run, twice."""
    bf16 = ["--deepspeed", "zero2", "precision=bf16"]
    return start_all(
        folder,
        {
            "resumed": Command(folder / "resumed", ["--deepspeed", zero3_config(folder)], after=run),
            "zero2": Command(folder / "zero2", ["--deepspeed", "zero2"], after=run),
            "bf16": Command(folder / "bf16", bf16),
            "bf16 resumed": Command(folder / "bf16_resumed", bf16, after=folder / "bf16"),
        },
        ranks=2,
    )


@pytest.fixture(scope="module")
def resumed(on_two_ranks: dict[str, dict], folder: Path) -> Path:
    result = on_two_ranks["resumed"]
    assert result["code"] == 0, result["err"]
    assert f"resuming from {folder / 'resumed' / MIDDLE}: {HALF} of {STEPS} steps are done" in result["out"]
    return folder / "resumed"


@pytest.fixture(scope="module")
def resumed_alone(run: Path, folder: Path) -> Path:
    """One rank, plain python, from the middle of `run`."""
    out = interrupted(run, folder / "alone")
    start(python("train.py", "--deepspeed", zero3_config(folder), f"out={out}", *TINY))
    return out


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The whole run on one rank by the function `d2v_ds.train`, logged at every fourth step."""
    settings = dict(setting.split("=") for setting in TINY if not setting.startswith("data="))
    settings |= {"train.log_every": "4"}
    keywords = ", ".join(f"{key.replace('.', '__')}={parse_value(text)!r}" for key, text in settings.items())
    data = TINY[0].removeprefix("data=")
    start(
        python(
            "-c",
            "import d2v_ds; from pathlib import Path; "
            f"out = d2v_ds.train(data={data!r}, out={str(folder / 'trained')!r}, deepspeed='zero3', "
            f"{keywords}); assert out == Path({str(folder / 'trained')!r})",
        )
    )
    return folder / "trained"


@pytest.fixture(scope="module")
def again(run: Path, folder: Path) -> dict[str, dict]:
    """What the command line says to runs that exist already."""
    damaged = copy_of(run, folder / "damaged")
    flip_a_byte(damaged / LAST / "rank_00001.safetensors")
    ruined = copy_of(run, folder / "ruined")
    flip_a_byte(ruined / MIDDLE / "rank_00000.safetensors")
    (ruined / LAST / "loop.json").unlink()
    other = other_shards(folder / "other_shards")
    finished = copy_of(run, folder / "finished")
    before = snapshot(finished)
    results = start_all(
        folder,
        {
            "finished": Command(finished, []),
            "other recipe": Command(finished, ["optim.lr=1e-2"]),
            "other data": Command(finished, [f"data={other}", "train.steps=8"]),
            "ruined": Command(ruined, []),
            "whole": Command(folder / "whole", []),
            "damaged": Command(damaged, ["--deepspeed", zero3_config(folder)]),
            "zero2_offload": Command(folder / "offload", ["train.steps=2", "--deepspeed", "zero2_offload"]),
            "zero3_autocast": Command(
                folder / "autocast", ["train.steps=2", "--deepspeed", "zero3_autocast"]
            ),
        },
    )
    results["finished"]["changed"] = changes(before, snapshot(finished))
    return results


def copy_of(run: Path, out: Path) -> Path:
    return Path(shutil.copytree(run, out))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_shards(folder: Path) -> Path:
    """The sample shards, but one multimodal tar fewer."""
    folder.mkdir()
    for path in (ROOT / "shards" / "sample").iterdir():
        if path.suffix in (".tar", ".model") and path.name != "multimodal-train-000002.tar":
            (folder / path.name).symlink_to(path)
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in folder.rglob("*")
        if p.is_file()
    }


def changes(before: dict, after: dict) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def assert_same_losses(ours: Path, theirs: Path, relative: float = 1e-5) -> None:
    """Every metric that is a loss, at every step that both logged."""
    expected = {row["step"]: row for row in read_rows(theirs)}
    compared = 0
    for row in read_rows(ours):
        for key, value in row.items():
            if "/" in key:
                assert value == pytest.approx(expected[row["step"]][key], rel=relative), (row["step"], key)
                compared += 1
    assert compared >= 7 * 3  # three modalities with loss and regression, and image/cls


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    files = sorted(p.name for p in theirs.glob("*.safetensors"))
    assert files and files == sorted(p.name for p in ours.glob("*.safetensors"))
    for name in files:
        a, b = load_file(ours / name), load_file(theirs / name)
        assert a.keys() == b.keys()
        different = [key for key in a if not torch.equal(a[key], b[key])]
        assert not different, f"{name}: {different[:5]}"


# ---- stopped and started again ----


def test_a_resumed_run_logs_what_the_uninterrupted_one_logs(run, resumed):
    """To the bit, at every step, and without the rows that the crash left behind."""
    assert [row["step"] for row in read_rows(resumed)] == list(range(1, STEPS + 1))
    assert without_timings(read_rows(resumed)) == without_timings(read_rows(run))
    assert read_rows(resumed, "health.jsonl") == read_rows(run, "health.jsonl")


def test_a_resumed_run_ends_in_the_same_checkpoint(run, resumed):
    """Weights, moments, teacher and counters, to the bit; and it had moved since the middle."""
    assert_same_checkpoint(resumed / LAST, run / LAST)
    ours, theirs = (json.loads((r / LAST / "loop.json").read_text()) for r in (resumed, run))
    assert ours | {"recipe": 0} == theirs | {"recipe": 0}
    middle, last = (load_file(run / step / "rank_00001.safetensors") for step in (MIDDLE, LAST))
    moved = {key.split("|")[0] for key in last if not torch.equal(middle[key], last[key])}
    assert moved == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    assert {key.split("|")[0] for key in last} == moved | {"frozen"}


def test_a_checkpoint_of_zero3_goes_on_at_zero2(on_two_ranks, run, folder):
    """On two ranks: losses to 1e-5, so the whole teacher was read on each of them."""
    assert on_two_ranks["zero2"]["code"] == 0, on_two_ranks["zero2"]["err"]
    assert "resuming from" in on_two_ranks["zero2"]["out"] and "ZeRO-2" in on_two_ranks["zero2"]["out"]
    assert_same_losses(folder / "zero2", run)


def test_a_resumed_bf16_run_is_the_uninterrupted_one(on_two_ranks, run, folder):
    """At ZeRO-2, to the bit, with fp32 masters and averages; and it is no fp32 run."""
    for name in ("bf16", "bf16 resumed"):
        assert on_two_ranks[name]["code"] == 0, on_two_ranks[name]["err"]
        assert "bfloat16" in on_two_ranks[name]["out"]
    rows = without_timings(read_rows(folder / "bf16_resumed"))
    assert rows == without_timings(read_rows(folder / "bf16")) != without_timings(read_rows(run))
    assert_same_checkpoint(folder / "bf16_resumed" / LAST, folder / "bf16" / LAST)


def test_both_ranks_hold_a_part_of_the_checkpoint(run):
    sizes = [
        sum(t.numel() for t in load_file(run / LAST / f"rank_0000{rank}.safetensors").values())
        for rank in (0, 1)
    ]
    assert min(sizes) > 0.4 * sum(sizes)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(run, folder):
    """SIGKILL to all its processes as soon as the first checkpoint is there, then the same command."""
    out = folder / "killed"
    command = ["--deepspeed", zero3_config(folder), f"out={out}", *TINY]
    process = subprocess.Popen(
        deepspeed(*command),
        env=environment(),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not (out / MIDDLE).exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    kill_tree(process.pid)
    process.wait()
    assert not (out / LAST).exists(), "it was faster than the test"
    done = start(deepspeed(*command))
    assert f"resuming from {out / MIDDLE}" in done.stdout
    assert without_timings(read_rows(out)) == without_timings(read_rows(run))
    assert_same_checkpoint(out / LAST, run / LAST)


def kill_tree(pid: int) -> None:
    """The process and its descendants: the launcher gives its ranks sessions of their own."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    for child in listed.split():
        kill_tree(int(child))
    os.kill(pid, signal.SIGKILL)


def test_two_ranks_go_on_as_one(run, resumed_alone):
    """Losses of the steps after the checkpoint, to 1e-5, under plain python."""
    assert [row["step"] for row in read_rows(resumed_alone)] == list(range(1, STEPS + 1))
    assert_same_losses(resumed_alone, run)
    assert json.loads((resumed_alone / LAST / "manifest.json").read_text())["world_size"] == 1


def test_one_rank_trains_what_two_do(run, trained):
    assert_same_losses(trained, run)


def test_the_function_trains_what_the_command_does(again, trained, folder):
    """`d2v_ds.train(...)` and `train.py` on one rank, to the bit."""
    assert again["whole"]["code"] == 0, again["whole"]["err"]
    ours = without_timings(read_rows(trained))
    theirs = {row["step"]: row for row in without_timings(read_rows(folder / "whole"))}
    assert ours == [theirs[row["step"]] for row in ours]
    assert_same_checkpoint(trained / LAST, folder / "whole" / LAST)


# ---- started again, otherwise ----


def test_a_finished_run_says_so_and_changes_nothing(again):
    result = again["finished"]
    assert result["code"] == 0
    assert f"is finished: {STEPS} of {STEPS} steps are done; set train.steps higher" in result["out"]
    assert result["changed"] == []


def test_another_recipe_is_an_error_that_names_the_change(again, folder):
    result = again["other recipe"]
    assert result["code"] == 2
    assert result["err"].startswith(f"error: {folder / 'finished' / LAST} is of another recipe")
    assert "optim.lr: 0.002 -> 0.01" in result["err"] and "out= to start anew" in result["err"]
    assert len(result["err"].splitlines()) == 1


def test_other_shards_are_an_error(again):
    """Of every modality, which one is named; fingerprints old and new."""
    result = again["other data"]
    assert result["code"] == 2
    assert result["err"].startswith("error: the shards of image are not those")
    assert "fingerprint" in result["err"] and "give the same data=" in result["err"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(again, run, folder):
    result = again["damaged"]
    assert result["code"] == 0, result["err"]
    assert f"{folder / 'damaged' / LAST}: rank_00001.safetensors is damaged" in result["err"]
    assert f"resuming from {folder / 'damaged' / MIDDLE}" in result["out"]
    assert_same_losses(folder / "damaged", run)


def test_the_damaged_checkpoint_is_written_anew(again, folder):
    assert again["damaged"]["code"] == 0
    manifest = json.loads((folder / "damaged" / LAST / "manifest.json").read_text())
    for entry in manifest["files"]:
        content = (folder / "damaged" / LAST / entry["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])


def test_a_run_without_a_whole_checkpoint_does_not_start_over(again):
    result = again["ruined"]
    assert result["code"] == 2
    assert "loop.json is missing" in result["err"] and "rank_00000.safetensors is damaged" in result["err"]
    assert "move the folder away" in result["err"]


# ---- what a run writes ----


def test_the_first_and_the_last_step_are_logged(trained):
    """Besides every fourth."""
    for name in ("metrics.jsonl", "health.jsonl"):
        assert [row["step"] for row in read_rows(trained, name)] == [1, 4, STEPS]


def test_health_is_told_for_each_modality(run):
    for row in read_rows(run, "health.jsonl"):
        for name in MODALITIES:
            assert 0 < row[f"{name}/content"] <= 1
            assert row[f"{name}/target_var"] > 0 and row[f"{name}/pred_var"] > 0


def test_metrics_hold_loss_rate_tau_and_norm(run):
    rows = read_rows(run)
    assert [row["applied_steps"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["lr"] == 0 and rows[0]["tau"] < rows[-1]["tau"] < 1
    assert all(row["grad_norm"] > 0 and row["skipped_steps"] == 0 for row in rows)
    assert all(row[f"{name}/loss"] > 0 for row in rows for name in MODALITIES)


def test_losses_fall(run):
    """Of images and sound; the vocabulary takes longer than six steps."""
    first, *_, last = read_rows(run)
    assert last["image/loss"] < first["image/loss"] and last["audio/loss"] < first["audio/loss"]


def test_a_run_folder_is_complete(run):
    """Everything that tells later what was run, and where its curves are."""
    for name in ("losses.png", "recipe.yaml", "ds_config.json", "environment.json", "sentencepiece.model"):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").glob("events.*"))
    assert (run / "latest").read_text() == LAST
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert json.loads((run / "ds_config.json").read_text())["zero_optimization"]["stage"] == 3


def test_tensorboard_holds_every_metric(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    rows = read_rows(run)[0] | read_rows(run, "health.jsonl")[0]
    expected = {key for key, value in rows.items() if not isinstance(value, str)} - {"step"}
    assert "image/content" in expected
    expected = {key for key in expected if not key.endswith("/verdict")}  # a word
    assert expected <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("image/loss")] == list(range(1, STEPS + 1))


# ---- presets and stages ----


@pytest.mark.parametrize("preset", ["zero2_offload", "zero3_autocast"])
def test_a_rare_preset_trains(preset, again):
    assert again[preset]["code"] == 0, again[preset]["err"]
    assert "step 2/2" in again[preset]["out"]


CASES = [(p.stem, "fp32") for p in sorted(PRESETS.glob("*.json"))]
CASES += [(name, "bf16") for name, _ in CASES if name != "zero3_autocast"]


@pytest.fixture(scope="module")
def presets(run: Path, again: dict[str, dict], folder: Path) -> dict[str, dict]:
    """Every preset on two ranks in both precisions, whole and interrupted; and what one rank began."""
    commands = {}
    for name, precision in CASES:
        out, settings = folder / "presets" / name / precision, ["--deepspeed", name, f"precision={precision}"]
        commands[f"{name} {precision}"] = Command(out / "whole", settings)
        commands[f"{name} {precision} resumed"] = Command(out / "resumed", settings, after=out / "whole")
    commands["wider"] = Command(folder / "wider", ["--deepspeed", "zero1"], after=folder / "whole")
    return start_all(folder, commands, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_every_preset_trains_on_two_ranks(name, precision, presets, run, folder):
    """And begins with the losses of ZeRO-3; autocast is bf16 inside."""
    result = presets[f"{name} {precision}"]
    assert result["code"] == 0, result["err"]
    assert f"ZeRO-{name[4]}, {'bfloat16' if precision == 'bf16' else 'float32'}, 2 ranks" in result["out"]
    first, expected = read_rows(folder / "presets" / name / precision / "whole")[0], read_rows(run)[0]
    relative = 1e-5 if precision == "fp32" and name != "zero3_autocast" else 0.03
    for modality in MODALITIES:
        assert first[f"{modality}/loss"] == pytest.approx(expected[f"{modality}/loss"], rel=relative)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_every_preset_resumes_to_the_bit(name, precision, presets, folder):
    """On two ranks: metrics, weights, moments and the teacher."""
    result = presets[f"{name} {precision} resumed"]
    assert result["code"] == 0, result["err"]
    whole, resumed = (folder / "presets" / name / precision / part for part in ("whole", "resumed"))
    assert without_timings(read_rows(resumed)) == without_timings(read_rows(whole))
    assert_same_checkpoint(resumed / LAST, whole / LAST)


@pytest.mark.slow
def test_one_rank_goes_on_as_two_at_another_stage(presets, run, folder):
    """From ZeRO-3 on one rank to ZeRO-1 on two: losses to 1e-5."""
    assert presets["wider"]["code"] == 0, presets["wider"]["err"]
    assert_same_losses(folder / "wider", run)

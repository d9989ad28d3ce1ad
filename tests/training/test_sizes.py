"""A run goes on at another number of ranks, another ZeRO stage, with or without offload, as if nothing had changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from runs import MODALITIES, Command, read_rows, start_all

SAVED, STEPS = 4, 24
TWELVE = [f"modalities.{name}.data.micro_batches=12" for name in MODALITIES]  # 1, 2, 3, 4 ranks divide it
SMALL = [f"modalities.{name}.{key}=1" for name in MODALITIES for key in ("data.batch", "clones")]
SMALL += [f"modalities.{name}.mask.noise_std=0.0" for name in MODALITIES]
SMALL += ["optim.eps=1e-4", "optim.warmup_steps=40", "train.save_every=100", f"train.steps={STEPS}"]
SOURCES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
PAIRS = [
    ("zero0", "zero3"), ("zero0", "zero1"), ("zero1", "zero2"), ("zero1", "zero3"), ("zero2", "zero0"),
    ("zero2", "zero1"), ("zero2", "zero3"), ("zero3", "zero0"), ("zero3", "zero1"), ("zero3", "zero2"),
    ("zero3", "zero3_offload"), ("zero3_offload", "zero3"), ("zero3_offload", "zero2_offload"),
]  # fmt: skip
RANKS = [(1, "zero3"), (3, "zero3"), (4, "zero3_offload")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole runs at ZeRO-3 on two ranks, and the first steps at every stage."""
    folder = tmp_path_factory.mktemp("sizes")
    short = [*SMALL, f"train.steps={SAVED}", "--deepspeed"]
    commands = {
        "whole": Command(folder / "whole", [*SMALL, "--deepspeed", "zero3"]),
        "whole of 12": Command(folder / "whole of 12", [*SMALL, *TWELVE, "--deepspeed", "zero3"]),
        "first of 12": Command(folder / "first of 12", [*short, "zero3", *TWELVE]),
    }
    commands |= {name: Command(folder / name, [*short, name]) for name in SOURCES}
    results = start_all(folder, commands, ranks=2)
    assert all(result["code"] == 0 for result in results.values()), results
    return folder


def go_on(folder: Path, cases: dict[str, tuple[str, list[str]]], ranks: int) -> None:
    """{name: (source, settings)}: each from a copy of its source."""
    commands = {}
    for name, (source, settings) in cases.items():
        shutil.copytree(folder / source, folder / name)
        commands[name] = Command(folder / name, [*SMALL, *settings])
    for name, result in start_all(folder, commands, ranks=ranks).items():
        assert result["code"] == 0, (name, result["err"][-2000:])
        assert f"{SAVED} of {STEPS} steps are done" in result["out"]


@pytest.fixture(scope="module")
def stages(folder: Path) -> Path:
    go_on(folder, {f"{a} to {b}": (a, ["--deepspeed", b]) for a, b in PAIRS}, 2)
    return folder


@pytest.fixture(scope="module")
def sizes(folder: Path) -> Path:
    for ranks, target in RANKS:
        go_on(folder, {f"on {ranks}": ("first of 12", [*TWELVE, "--deepspeed", target])}, ranks)
    return folder


def assert_as_whole(ours: Path, theirs: Path) -> None:
    """Every loss of 20 further steps to 1e-5, learning rate and tau to the bit, and something was learned."""
    expected = {row["step"]: row for row in read_rows(theirs)}
    rows = [row for row in read_rows(ours) if row["step"] > SAVED]
    assert [row["step"] for row in rows] == list(range(SAVED + 1, STEPS + 1))
    for row in rows:
        for key, value in row.items():
            if key.partition("/")[0] in MODALITIES:
                assert value == pytest.approx(expected[row["step"]][key], rel=1e-5), (row["step"], key)
            if key in ("lr", "tau", "applied_steps"):
                assert value == expected[row["step"]][key]
    assert rows[-1]["image/loss"] < expected[1]["image/loss"]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_run_goes_on_at_another_stage(source, target, stages):
    assert_as_whole(stages / f"{source} to {target}", stages / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [ranks for ranks, _ in RANKS])
def test_a_run_of_two_ranks_goes_on_with_another_number(ranks, sizes):
    assert_as_whole(sizes / f"on {ranks}", sizes / "whole of 12")
    manifest = sizes / f"on {ranks}" / f"step_{STEPS:08d}" / "manifest.json"
    assert json.loads(manifest.read_text())["world_size"] == ranks

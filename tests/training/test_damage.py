"""A run whose newest checkpoint is damaged names it, takes the one before, and ends as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runs import HALF, STEPS, Command, read_rows, start_all, two_rank_run, without_timings, zero3_config

NEWEST = f"step_{STEPS:08d}"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.slow
def test_two_ranks_go_on_from_the_checkpoint_before(tmp_path: Path, tmp_path_factory) -> None:
    """Truncated, one bit flipped, a file missing."""
    whole = two_rank_run(tmp_path_factory)
    damages = {"truncated": truncate, "flipped": flip, "missing": Path.unlink}
    commands = {}
    for name, damage in damages.items():
        shutil.copytree(whole, tmp_path / name)
        damage(tmp_path / name / NEWEST / "rank_00001.safetensors")
        commands[name] = Command(tmp_path / name, ["--deepspeed", zero3_config(tmp_path)])
    for name, result in start_all(tmp_path, commands, ranks=2).items():
        assert result["code"] == 0, result["err"]
        assert NEWEST in result["err"] and "rank_00001.safetensors" in result["err"], result["err"]
        assert "taking an older checkpoint" in result["err"] and f"step {HALF + 1}/{STEPS}" in result["out"]
        assert without_timings(read_rows(tmp_path / name)) == without_timings(read_rows(whole))

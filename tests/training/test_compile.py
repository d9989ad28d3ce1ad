"""A run through torch.compile learns what a plain one does, at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import Command, read_rows, start_all

COMPARED = ("grad_norm", "audio/loss", "image/loss", "text/loss")


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_a_plain_run(tmp_path: Path) -> None:
    """Two ranks; gradients of each modality, since at ZeRO-3 they can go missing without an error."""
    short = ["train.steps=3", "train.save_every=3", "--deepspeed"]
    stages = ("zero0", "zero1", "zero2", "zero3")
    commands = {"plain": Command(tmp_path / "plain", [*short, "zero3"])}
    commands |= {stage: Command(tmp_path / stage, ["train.compile=true", *short, stage]) for stage in stages}
    for name, result in start_all(tmp_path, commands, ranks=2).items():
        assert result["code"] == 0, (name, result["err"][-3000:])
    plain = read_rows(tmp_path / "plain")
    for stage in stages:
        for ours, theirs in zip(read_rows(tmp_path / stage), plain, strict=True):
            for key in COMPARED:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (stage, key, ours["step"])

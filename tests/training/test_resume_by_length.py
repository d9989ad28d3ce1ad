"""A run on micro-batches by length and mixed corpora goes on at two ranks as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import STEPS, Command, read_rows, start_all, without_timings

BY_LENGTH = [
    "modalities.audio.data.batch=4",
    "modalities.audio.data.batch_seconds=3",
    "modalities.audio.data.corpora.one=multimodal-train-000000.tar",
    "modalities.audio.data.corpora.two=multimodal-train-00000[12].tar",
    "modalities.audio.data.temperature=2",
    "modalities.text.data.mode=samples",
    "modalities.text.data.shards=multimodal-train-*.tar",
    "modalities.text.data.batch=30",
    "modalities.text.data.batch_tokens=128",
]


@pytest.mark.slow
def test_two_ranks_go_on_with_the_batches_of_one(tmp_path: Path) -> None:
    """Stopped in the middle of 6 steps; another number of ranks and workers; every loss to rounding."""
    run, again = tmp_path / "run", tmp_path / "again"
    (first,) = start_all(tmp_path, {"run": Command(run, ["--deepspeed", "zero2", *BY_LENGTH])}).values()
    assert first["code"] == 0 and "audio/two: " in first["out"] and "by length" in first["out"], first["err"]
    settings = ["--deepspeed", "zero2", *BY_LENGTH, "train.workers=1"]
    (second,) = start_all(tmp_path, {"again": Command(again, settings, after=run)}, ranks=2).values()
    assert second["code"] == 0, second["err"]
    rows, others = (without_timings(read_rows(folder)) for folder in (run, again))
    assert [row["step"] for row in others] == list(range(1, STEPS + 1))
    for row, other in zip(rows, others, strict=True):
        for key in ("audio/loss", "text/loss", "image/loss"):
            assert other[key] == pytest.approx(row[key], rel=1e-5), (row["step"], key)

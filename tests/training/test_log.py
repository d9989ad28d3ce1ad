"""What a run writes down can be read by any JSON reader, whatever its numbers are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from d2v_ds.training.log import Log, append
from d2v_ds.training.probing import plot


def strict(path: Path) -> list[dict]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the table and the curves at the end are drawn all the same."""
    log = Log(tmp_path, 0, 2)
    for step in (1, 2):
        metrics = {"audio/loss": math.inf, "lr": 1e-3, "grad_norm": math.nan, "slowest_rank_seconds": 1.0,
                   "median_rank_seconds": 1.0}  # fmt: skip
        health = {"audio/content": math.nan, "audio/target_var": 0.5}
        log.step(step, metrics, health, {"audio": "diverging"}, 1.0, 2.0)
    (row, _), (numbers, _) = strict(tmp_path / "metrics.jsonl"), strict(tmp_path / "health.jsonl")
    assert row["audio/loss"] is row["grad_norm"] is numbers["audio/content"] is None
    assert numbers["audio/target_var"] == 0.5 and numbers["audio/verdict"] == "diverging"
    assert "nan" in log.close() and (tmp_path / "losses.png").exists()


def test_probes_of_too_few_samples_are_drawn_too(tmp_path: Path) -> None:
    for step, weights in ((0, "random init"), (1, "student"), (2, "student")):
        row = {"step": step, "modality": "image", "weights": weights, "features": "layer 1", "ridge": 0.5}
        append(
            tmp_path / "probes.jsonl",
            row | {"knn": {"10": math.nan}, "rankme": 1.0, "lidar": [math.nan, 1.0][step > 1]},
        )
    assert strict(tmp_path / "probes.jsonl")[0]["knn"] == {"10": None}
    assert plot(tmp_path).exists()

"""`scripts/compare_methods.py`: who trains how long, at which rate, and what is written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT
from runs import environment

sys.path.insert(0, str(ROOT / "scripts"))
pytest.importorskip("transformers")

import compare_methods  # noqa: E402


def test_the_rate_rises_for_a_tenth_of_the_time_and_falls_to_nothing() -> None:
    shares = [compare_methods.schedule(done) for done in (0, 0.05, 0.1, 0.55, 1)]
    assert shares == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_a_run_stops_at_its_cpu_seconds_and_is_probed_on_the_way(monkeypatch) -> None:
    """The clock is one of our own: a step takes 0.25 s."""
    clock, rates = [0.0], []

    class Method:
        source = None

        def step(self, batch, rate, done):
            clock[0] += 0.25
            rates.append(rate)

    monkeypatch.setattr(compare_methods, "read_batches", lambda source, seed: iter(range(100)))
    monkeypatch.setattr(compare_methods.time, "process_time", lambda: clock[0])
    found = list(compare_methods.train(Method(), 2.0, 1.0, 0, (0.0, 0.5, 1.0)))
    assert found == [(0.0, 0), (1.0, 4), (2.0, 8)]
    assert len(rates) == 8 and rates[0] == 0 and max(rates) > 0.8


@pytest.mark.parametrize(
    ("top", "tried"), [(2e-3, [1, 2, 4]), (6e-4, [0.25, 0.5, 1, 2, 4]), (9e-3, [1, 2, 4, 8, 16])]
)
def test_rates_are_tried_until_the_best_has_worse_ones_on_both_sides(top, tried, monkeypatch) -> None:
    def remembered(kind, modality, data, out, seconds, rate, seed, points):
        return [{"accuracy": -abs(math.log(rate / top))}]

    monkeypatch.setattr(compare_methods, "remembered", remembered)
    best, accuracies = compare_methods.find_rate(None, "image", None, None, 1.0)
    assert [float(rate) for rate in accuracies] == pytest.approx([1e-3 * rate for rate in tried])
    assert best == min((float(rate) for rate in accuracies), key=lambda rate: abs(math.log(rate / top)))


def test_the_table_has_mean_and_spread_over_the_seeds() -> None:
    rows = {
        seed: [{"accuracy": 0.1 * seed, "steps": 10, "cpu_s": p} for p in compare_methods.POINTS]
        for seed in (1, 2, 3)
    }
    result = {"seconds": 8, "methods": {"MAE": {"rate": 1e-3, "tried": {}, "runs": rows}}}
    table = compare_methods.summarise(result)
    assert "| 0 s | 1 s | 2 s | 4 s | 6 s | 8 s |" in table
    assert "| MAE | 0.001 | 10 | 0.200 +- 0.100 |" in table


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_time_that_no_run_can_take_is_refused(seconds, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", "image", f"--seconds={seconds}"])
    with pytest.raises(SystemExit):
        compare_methods.main()
    assert f"--seconds {seconds} must be above 0, and finite" in capsys.readouterr().err


@pytest.mark.slow
def test_methods_are_trained_and_compared_on_the_same_shards(tmp_path: Path) -> None:
    """Real runs of half a second of each; a second start does nothing again."""
    data = tmp_path / "data/image"
    sample = ["-m", "shards.sample", "--out", str(data), "--images-only", "--images-train", "200"]
    subprocess.run([sys.executable, *sample, "--images-test", "100"], check=True, cwd=ROOT)
    (data / "done").touch()
    command = [sys.executable, "scripts/compare_methods.py", "image", "--seconds", "0.5", "--seeds", "1"]
    texts = []
    for _ in range(2):
        done = subprocess.run(
            [*command, "--out", tmp_path],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        texts.append(done.stdout)
    assert "seed 1" in texts[0] and "seed 1" not in texts[1]
    methods = json.loads((tmp_path / "image.json").read_text())["methods"]
    assert list(methods) == ["data2vec 2.0", "MAE"]
    for method in methods.values():
        (rows,) = method["runs"].values()
        assert 0.5 <= rows[-1]["cpu_s"] < 1.5 and rows[-1]["steps"] > 1
        assert all(0 <= row["accuracy"] <= 1 for row in rows)
        assert method["tried"][f"{method['rate']:g}"] == max(method["tried"].values())
    assert (tmp_path / "image.png").stat().st_size > 5000

"""The measuring script runs, on tiny shapes; what it says about speed only a GPU can tell."""

import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2v_ds.model import data2vec

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "bench_kernels.py"), *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.slow
def test_check_writes_every_row_of_the_aims(tmp_path: Path):
    """Four shapes of targets whole and masked, two sizes of the average with and without a copy, attention, loss."""
    done = bench("--check", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    kernels = ["targets", "targets, masked"] * 4 + ["ema"] * 4 + ["attention"] * 2 + ["regression"] * 2
    assert [row["kernel"] for row in rows] == kernels
    assert all(row["error"] < 3e-2 and row["ms"] > 0 and row["baselines"]["eager"]["ms"] > 0 for row in rows)
    assert (tmp_path / "kernels.md").read_text().count("\n| ") == len(rows) + 1


def load_script(name: str = "bench_kernels"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gpu_is_kept_busy_until_all_is_launched(monkeypatch: pytest.MonkeyPatch):
    """Else the host's time is measured, where a kernel takes 50 us."""
    script, calls = load_script(), []

    class Event:
        def __init__(self, enable_timing: bool):
            pass

        def record(self):
            calls.append("event")

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, end) -> float:
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("sleep"))
    timer = script.Timer(torch.device("cpu"), 1)
    timer.is_gpu = True
    assert timer.once(lambda: calls.append("work")) == 1.0
    assert calls == ["sleep", "event", "work", "event", "wait"]


def test_targets_are_measured_with_the_norms_of_the_recipes(monkeypatch: pytest.MonkeyPatch):
    """Images have a final one, which reads and writes the mean again."""
    script, rows = load_script(), []
    bench = script.Bench(script.Timer(torch.device("cpu"), 1), True, copy_rate=1.0, matmul_rate=1.0)
    monkeypatch.setattr(bench, "add", lambda row, *_, **__: rows.append(row))
    script.bench_targets(bench)
    elements = 2 * 7 * 8  # B T D of --check; K = 2 inputs of 2 bytes, M * J = 6 masked of 7 tokens
    final, whole, masked = 8 * elements, (4 + 4) * elements, 4 * elements + 4 * 2 * 6 * 8
    assert [row.bytes for row in rows] == [final + whole, final + masked] * 2 + [whole, masked] * 2


@pytest.mark.parametrize("name", ["bench_attention", "bench_regression"])
def test_no_gradient_of_a_run_before_counts_as_an_input(name: str, monkeypatch: pytest.MonkeyPatch):
    """Memory beyond the inputs holds the gradients too: none is left when a peak is taken."""
    script, left = load_script(), []
    bench = script.Bench(script.Timer(torch.device("cpu"), 1), True, copy_rate=1.0, matmul_rate=1.0)

    def peak(function) -> float:
        function()
        tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        left.append(sum(x.is_leaf and x.grad is not None for x in tensors))
        return 0.0

    monkeypatch.setattr(bench.timer, "peak", peak)
    getattr(script, name)(bench)
    assert left and not any(left)


def test_a_step_with_wrong_kernels_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    """Its loss and gradients are compared with plain torch first."""
    script = load_script("bench_step")
    recipe, cpu = script.load_recipe("image_tiny"), torch.device("cpu")
    case = script.Case("image_tiny", 2, None, torch.float32, 1.0)
    assert script.check(recipe, case, cpu) < 1e-6
    right = data2vec.regress
    monkeypatch.setattr(data2vec, "regress", lambda *args, **options: right(*args, **options) * 1.01)
    with pytest.raises(SystemExit, match=r"loss and gradients differ from plain torch by 9\.6e-03"):
        script.check(recipe, case, cpu)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=0", "--steps 0 must be 1 or more"),
        ("--threads=0", "--threads 0 must be 1 or more"),
        (
            "--only=foo",
            "--only foo is part of no case; give a part of image_base-float32, image_base-bfloat16",
        ),
    ],
)
def test_a_step_that_cannot_be_measured_is_refused_at_once(
    option: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Before anything is measured, and no table is replaced by an empty one."""
    script = load_script("bench_step")
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--cpu", option, "--out", str(tmp_path / "step.json")])
    with pytest.raises(SystemExit):
        script.main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / "step.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_what_was_measured_before_an_error_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A GPU may be at hand once; a shape that does not fit it must not cost the others."""
    script = load_script()
    row = script.Row("targets", "B=1", error=0.0, peak_mb=0.0)

    def fail(bench):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(script.Bench, "measure_ceilings", lambda bench: None)
    monkeypatch.setattr(script, "bench_targets", lambda bench: bench.rows.append(row))
    monkeypatch.setattr(script, "bench_ema", fail)
    monkeypatch.setattr(sys, "argv", ["bench_kernels", "--check", "--out", str(tmp_path)])
    with pytest.raises(RuntimeError, match="out of memory"):
        script.main()
    [row] = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert row["kernel"] == "targets"


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path):
    done = bench("--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr.strip().startswith("bench_kernels needs a CUDA GPU")
    assert not (tmp_path / "out").exists()

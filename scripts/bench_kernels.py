"""Measures the kernels on this GPU: right first, then fast, in one table.

    python scripts/bench_kernels.py [--out docs/benchmarks]      under 5 minutes, on a machine with a GPU
    python scripts/bench_kernels.py --check                      tiny shapes on the CPU: whether the script runs

Each row is compared with plain torch on its own inputs before it is timed (dropout: tests/kernels, which a GPU runs
too); a wrong row ends the run. Times are
medians of `RUNS` with the 10th and 90th percentile, each run with a cold L2 cache. Rates are by counted bytes (the
docstrings in d2v_ds/kernels) against the bandwidth of a device copy, and by counted operations against a bf16 matrix
product, both measured in the same run. FlexAttention is a row beside our attention, so which one should stand behind
`attend` is read off the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_ds.kernels.attention import Distance, attend, attend_reference, make_bias
from d2v_ds.kernels.ema import follow, follow_reference
from d2v_ds.kernels.regression import regress, regress_reference
from d2v_ds.kernels.targets import make_targets, make_targets_reference

RUNS = 20
HEAD_START = 2_000_000
"""GPU cycles, some 1 ms, that the host has to launch everything that is timed: 60 launches of 15 us."""
AIMS = {
    "targets": "90 % of copy, 4x eager, 1.5x compile",
    "ema": "90 % of copy",
    "attention": "3x eager, 10 % of its memory",
    "regression": "faster than compile, else use it",
}


@dataclass
class Row:
    kernel: str
    shape: str
    error: float
    """Against plain torch, relative to its largest value."""
    ms: float = 0.0
    spread_ms: tuple[float, float] = (0.0, 0.0)
    bytes: int = 0
    operations: int = 0
    copy_share: float | None = None
    """Of the bandwidth of a device copy."""
    matmul_share: float | None = None
    peak_mb: float | None = None
    """Memory allocated beyond the inputs."""
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: ms, peak_mb, or the error that stopped it."""


class Timer:
    def __init__(self, device: torch.device, runs: int):
        self.device, self.runs = device, runs
        self.is_gpu = device.type == "cuda"
        self.flush = torch.empty(2**26 if self.is_gpu else 1, dtype=torch.int32, device=device)

    def measure(self, function: Callable[[], Any]) -> tuple[list[float], float]:
        """Sorted milliseconds of each run, and the peak of memory beyond what was there, in MB."""
        for _ in range(3):
            function()
        return sorted(self.once(function) for _ in range(self.runs)), self.peak(function)

    def once(self, function: Callable[[], Any]) -> float:
        if not self.is_gpu:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        self.flush.zero_()  # a cold L2
        torch.cuda._sleep(HEAD_START)  # else the host's Python counts where the kernel is shorter
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak(self, function: Callable[[], Any]) -> float:
        if not self.is_gpu:
            return 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6


@dataclass
class Bench:
    timer: Timer
    is_check: bool
    copy_rate: float = 0.0
    """Bytes per second read and written."""
    matmul_rate: float = 0.0
    rows: list[Row] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.timer.device

    def measure_ceilings(self) -> None:
        size = 2**10 if self.is_check else 2**29
        source, target = (torch.zeros(size, device=self.device) for _ in range(2))
        times, _ = self.timer.measure(lambda: target.copy_(source))
        self.copy_rate = 2 * source.nbytes / statistics.median(times) * 1e3
        side = 64 if self.is_check else 8192
        a, b = (torch.randn(side, side, device=self.device).bfloat16() for _ in range(2))
        times, _ = self.timer.measure(lambda: a @ b)
        self.matmul_rate = 2 * side**3 / statistics.median(times) * 1e3

    def add(
        self,
        row: Row,
        ours: Callable[[], Any],
        baselines: dict[str, Callable[[], Any]],
        tolerance: float,
    ) -> None:
        if not row.error < tolerance:
            sys.exit(
                f"{row.kernel} {row.shape}: error {row.error:.1e} is not below {tolerance:.0e}; nothing was timed"
            )
        times, row.peak_mb = self.timer.measure(ours)
        row.ms, row.spread_ms = (
            statistics.median(times),
            (times[len(times) // 10], times[-1 - len(times) // 10]),
        )
        if row.bytes:
            row.copy_share = row.bytes / row.ms * 1e3 / self.copy_rate
        if row.operations:
            row.matmul_share = row.operations / row.ms * 1e3 / self.matmul_rate
        for name, function in baselines.items():
            if self.is_check and name in ("compile", "flex"):
                continue
            try:
                others, peak_mb = self.timer.measure(function)
            except Exception as error:  # a baseline that cannot run here is a result: it stands in the table
                row.baselines[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
                continue
            row.baselines[name] = {"ms": statistics.median(others), "peak_mb": peak_mb}
        self.rows.append(row)
        print(format_row(row), flush=True)


def relative(ours: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest value; NaN if there is one."""
    return float((ours.to(truth.dtype) - truth).abs().max() / truth.abs().max())


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def bench_targets(bench: Bench) -> None:
    """The recipes' shapes and norms, whole and at the masked positions of all views (M, masked tokens)."""
    shapes = {
        "image base": (64, 196, 768, 10, 16, 157, ("layer",)),
        "image large": (64, 196, 1024, 18, 16, 147, ("layer",)),
        "audio base": (16, 999, 768, 8, 8, 499, ()),
        "text base": (32, 512, 768, 12, 8, 246, ()),
    }
    for name, (B, T, D, K, M, J, final) in shapes.items():
        if bench.is_check:
            B, T, D, K, M, J = 2, 7, 8, 2, 2, 3
        layers = [torch.randn(B, T, D, device=bench.device).bfloat16() for _ in range(K)]
        masked_NJ = torch.rand(B * M, T, device=bench.device).argsort(dim=1)[:, :J].sort(dim=1).values
        for positions in (None, masked_NJ):
            count = B * T if positions is None else B * M * J
            row = Row(
                "targets" if positions is None else "targets, masked",
                f"{name}: B={B} T={T} D={D} K={K}"
                + (f" final {final[0]}" if final else "")
                + ("" if positions is None else f" M={M} J={J}"),
                relative(
                    make_targets(layers, final=final, masked_NJ=positions),
                    make_targets_reference(layers, final=final, masked_NJ=positions),
                ),
                bytes=2 * K * B * T * D + 8 * len(final) * B * T * D + 4 * count * D,
            )
            plain = compiled(make_targets_reference)
            bench.add(
                row,
                lambda p=positions, x=layers, n=final: make_targets(x, final=n, masked_NJ=p),
                {
                    "eager": lambda p=positions, x=layers, n=final: make_targets_reference(
                        x, final=n, masked_NJ=p
                    ),
                    "compile": lambda p=positions, x=layers, n=final, f=plain: f(x, final=n, masked_NJ=p),
                },
                tolerance=1e-5,
            )


def bench_ema(bench: Bench) -> None:
    for name, numel in {"88 M": 88_000_000, "1 B": 1_000_000_000}.items():
        if bench.is_check:
            numel = 1000
        average, master = (torch.randn(numel, device=bench.device) for _ in range(2))
        for low in (torch.empty(numel, dtype=torch.bfloat16, device=bench.device), None):
            part = slice(0, min(numel, 10_000_000))  # the comparison holds copies
            ours, theirs = average[part].clone(), average[part].clone()
            copies = [None if low is None else low[part].clone() for _ in range(2)]
            follow(ours, master[part], copies[0], 0.9)
            follow_reference(theirs, master[part], copies[1], 0.9)
            error = relative(ours, theirs)
            if low is not None:
                error = max(error, 0.0 if relative(copies[0], copies[1]) < 2**-7 else 1.0)
            bytes_each = 14 if low is not None else 12
            row = Row("ema", f"{name}, {bytes_each} bytes", error, bytes=bytes_each * numel)
            plain = compiled(follow_reference)
            bench.add(
                row,
                lambda c=low, a=average, m=master: follow(a, m, c, 0.9999),
                {
                    "eager": lambda c=low, a=average, m=master: follow_reference(a, m, c, 0.9999),
                    "compile": lambda c=low, a=average, m=master, f=plain: f(a, m, c, 0.9999),
                },
                tolerance=1e-6,
            )
        del average, master, low


def bench_attention(bench: Bench) -> None:
    """One layer of audio base on M = 8 views, forward and backward, 10 s of sound of which half is kept."""
    N, T, H, C = (2, 13, 2, 16) if bench.is_check else (64, 500, 12, 64)
    qkv = torch.randn(N, T, 3, H, C, device=bench.device).bfloat16().requires_grad_()
    scale_H = torch.ones(H, device=bench.device, requires_grad=True)
    slopes_H = 2.0 ** -torch.arange(1, H + 1, device=bench.device).float()
    positions_NK = torch.rand(N, 2 * T, device=bench.device).argsort(dim=1)[:, :T].sort(dim=1).values.int()
    d_out = torch.randn(N, T, H, C, device=bench.device).bfloat16()

    def train(function: Callable) -> None:
        function(qkv, Distance(scale_H.clamp(min=0) * slopes_H, positions_NK, 0)).backward(d_out)
        qkv.grad = scale_H.grad = None  # they are no input of the next run, whose memory is measured

    def some_rows(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        """Output and gradients of 4 rows."""
        part = qkv.detach()[:4].to(dtype).requires_grad_()
        scale = scale_H.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        out = function(part, Distance(scale.clamp(min=0) * slopes_H, positions_NK[:4], 0))
        out.backward(d_out[:4].to(dtype))
        return [out.detach(), part.grad, scale.grad]

    def gathered(qkv: Tensor, distance: Distance, dropout: float = 0.0) -> Tensor:
        return attend_reference(qkv, make_bias(distance), None, dropout)

    def flex(qkv: Tensor, distance: Distance) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        strength_H, positions, _ = distance

        def pull(score, n, h, i, j):
            return score - strength_H[h] * (positions[n, i] - positions[n, j]).abs()

        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return flex_attention(q, k, v, score_mod=pull).transpose(1, 2)

    for dropout in (0.0, 0.1):
        ours = some_rows(lambda x, d: attend(x, d, None, 0.0), torch.bfloat16)
        truth = some_rows(gathered, torch.float64)
        error = max(relative(a, b) for a, b in zip(ours, truth, strict=True))
        row = Row(
            "attention",
            f"audio base, forward + backward: N={N} T={T} H={H} C={C} dropout={dropout}",
            error,
            operations=18 * N * H * T * T * C,
        )
        fused, flexed = compiled(gathered), compiled(flex)
        baselines = {
            "eager": lambda p=dropout: train(lambda x, d: gathered(x, d, p)),
            "compile": lambda p=dropout, f=fused: train(lambda x, d: f(x, d, p)),
        }
        if dropout == 0:
            baselines["flex"] = lambda f=flexed: train(f)
        bench.add(row, lambda p=dropout: train(lambda x, d: attend(x, d, None, p)), baselines, tolerance=3e-2)


def bench_regression(bench: Bench) -> None:
    """Forward and backward of the loss at the masked positions, whose gathered targets plain torch copies."""
    shapes = {"image base": (64, 16, 196, 157, 768), "audio base": (16, 8, 999, 499, 768)}
    for name, (B, M, T, J, D) in shapes.items():
        if bench.is_check:
            B, M, T, J, D = 2, 2, 7, 3, 8
        pred_NJD = torch.randn(B * M, J, D, device=bench.device).bfloat16().requires_grad_()
        targets_BTD = torch.randn(B, T, D, device=bench.device)
        masked_NJ = torch.rand(B * M, T, device=bench.device).argsort(dim=1)[:, :J].sort(dim=1).values

        def train(
            function: Callable, inputs: tuple = (pred_NJD, targets_BTD, masked_NJ)
        ) -> tuple[Tensor, Tensor]:
            loss = function(*inputs)
            loss.backward()
            grad, inputs[0].grad = inputs[0].grad, None
            return loss.detach(), grad

        ours, ours_grad = train(regress)
        truth, truth_grad = train(regress_reference)
        row = Row(
            "regression",
            f"{name}, forward + backward: B={B} M={M} T={T} J={J} D={D}",
            max(relative(ours, truth), relative(ours_grad, truth_grad)),
            bytes=(2 * (2 + 4) + 2) * B * M * J * D,
        )
        plain = compiled(regress_reference)
        baselines = {
            "eager": lambda f=train: f(regress_reference),
            "compile": lambda f=train, g=plain: f(g),
        }
        bench.add(row, lambda f=train: f(regress), baselines, tolerance=1e-2)


def format_row(row: Row) -> str:
    cells = [row.kernel, row.shape, f"{row.error:.0e}"]
    cells.append(f"{row.ms:.3f} ({row.spread_ms[0]:.3f} to {row.spread_ms[1]:.3f})")
    share = [(row.copy_share, "of copy"), (row.matmul_share, "of matmul")]
    cells.append(", ".join(f"{value:.0%} {what}" for value, what in share if value is not None))
    cells.append(f"{row.peak_mb:.0f}")
    for name in ("eager", "compile", "flex"):
        other = row.baselines.get(name)
        if other is None:
            cells.append("")
        elif "failed" in other:
            cells.append("failed")
        else:
            cells.append(f"{other['ms'] / row.ms:.2f}x, {other['peak_mb']:.0f} MB")
    cells.append(AIMS[row.kernel.split(",")[0]])
    return "| " + " | ".join(cells) + " |"


HEAD = """| kernel | shape | error | ms (10 to 90 %) | rate | MB | eager | compile | flex | aim |
|---|---|---|---|---|---|---|---|---|---|"""


def describe(bench: Bench, seconds: float) -> dict[str, Any]:
    name = torch.cuda.get_device_name(bench.device) if bench.timer.is_gpu else "cpu"
    return {
        "command": "python scripts/bench_kernels.py",
        "device": name,
        "torch": torch.__version__,
        "runs": bench.timer.runs,
        "copy_gb_per_s": bench.copy_rate / 1e9,
        "matmul_bf16_tflop_per_s": bench.matmul_rate / 1e12,
        "seconds": seconds,
        "rows": [asdict(row) for row in bench.rows],
    }


def write(facts: dict[str, Any], rows: list[Row], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.json").write_text(json.dumps(facts, indent=1) + "\n")
    text = [
        "# Kernels",
        "",
        f"`{facts['command']}` on {facts['device']}, torch {facts['torch']}; medians of {facts['runs']} runs with a "
        f"cold cache. Device copy {facts['copy_gb_per_s']:.0f} GB/s, bf16 matrix product "
        f"{facts['matmul_bf16_tflop_per_s']:.0f} TFLOP/s. Baselines: their time over ours, and their memory.",
        "",
        HEAD,
        *map(format_row, rows),
        "",
    ]
    (out / "kernels.md").write_text("\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument(
        "--check", action="store_true", help="tiny shapes on the CPU; writes no file by default"
    )
    arguments = parser.parse_args()
    if not arguments.check and not torch.cuda.is_available():
        sys.exit(
            "bench_kernels needs a CUDA GPU, and torch sees none here; --check tries the script on the CPU"
        )
    device = torch.device("cpu" if arguments.check else "cuda")
    started = time.perf_counter()
    torch.manual_seed(0)
    bench = Bench(Timer(device, 3 if arguments.check else RUNS), arguments.check)
    bench.measure_ceilings()
    print(
        f"copy {bench.copy_rate / 1e9:.0f} GB/s, bf16 matmul {bench.matmul_rate / 1e12:.0f} TFLOP/s\n{HEAD}"
    )
    try:
        for part in (bench_targets, bench_ema, bench_attention, bench_regression):
            part(bench)
    finally:  # what was measured before an error, too
        facts = describe(bench, time.perf_counter() - started)
        if bench.rows and (not arguments.check or arguments.out != parser.get_default("out")):
            write(facts, bench.rows, arguments.out)


if __name__ == "__main__":
    main()

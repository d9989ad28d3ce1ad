"""How close is a training step to the arithmetic? Seconds of a step against FLOPs / the matrix rate of the same run.

    python scripts/bench_step.py --cpu            # image base (2 images, 4 views), audio base (1 x 5 s, 4 views)
    python scripts/bench_step.py                  # on a GPU: image base and large, audio base, text base, bf16
    python scripts/bench_step.py --cpu --profile  # the ten largest costs of one step of each, as a table

One process, the project's own engine and step (ZeRO-0 on a CPU, ZeRO-2 on a GPU): forward of student and teacher,
backward, clipping, AdamW, EMA. Random input. First the loss and gradients of a few samples are compared with plain
torch in fp32; a wrong case ends the run. FLOPs are counted by torch over one forward and backward pass; the
matrix rate is the median of square products of that dtype, one before each step. Prints one table, writes it as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from d2v_ds.data import Draw
from d2v_ds.engine.build import build_engine, build_optimizer
from d2v_ds.engine.ds_config import cpu_multiplies, find_config, read_config, resolve_config
from d2v_ds.engine.ema import TeacherEMA
from d2v_ds.engine.launch import prepare_environment, start_distributed
from d2v_ds.engine.step import apply_step, one_reduction
from d2v_ds.kernels.attention import attend_reference
from d2v_ds.kernels.regression import regress_reference
from d2v_ds.kernels.targets import make_targets_reference
from d2v_ds.modalities.audio.samples import num_frames
from d2v_ds.modalities.build import build_model
from d2v_ds.modalities.source import draw_views
from d2v_ds.model.batch import Batch
from d2v_ds.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
TOP = 10
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Of loss and gradients against plain torch in fp32: the length of the difference relative to the truth's."""


@dataclass(frozen=True)
class Case:
    """One row: a recipe at a batch of its own."""

    recipe: str
    batch: int
    clones: int | None
    """None = as the recipe says."""
    dtype: torch.dtype
    aim: float
    """Largest seconds / (FLOPs / matrix rate)."""
    seconds: float = 5.0
    """Of sound in a sample."""


CPU = [
    Case("image_base", 2, 4, torch.float32, 1.1),
    Case("image_base", 2, 4, torch.bfloat16, 1.4),
    Case("audio_base", 1, 4, torch.float32, 1.15),
    Case("audio_base", 1, 4, torch.bfloat16, 1.4),
]
GPU = [
    Case("image_base", 64, 16, torch.bfloat16, 1 / 0.45),
    Case("image_large", 32, 16, torch.bfloat16, 1 / 0.45),
    Case("audio_base", 4, None, torch.bfloat16, 1 / 0.35, seconds=15.6),
    Case("text_base", 16, None, torch.bfloat16, 1 / 0.35),
]


def make_batch(recipe: Recipe, case: Case) -> Batch:
    """Random whole samples with masks as the recipe draws them."""
    ((name, config),) = recipe.modalities.items()
    torch.manual_seed(0)
    if name == "image":
        source = torch.randn(case.batch, 3, config.size, config.size)
        tokens = (config.size // config.patch) ** 2
    elif name == "audio":
        source = torch.randn(case.batch, int(16_000 * case.seconds))
        tokens = num_frames(source.shape[1], config.conv_layers)
    else:
        tokens = config.max_tokens
        source = torch.randint(4, config.vocabulary, (case.batch, tokens))
    draws = [Draw(i, 0, i) for i in range(case.batch)]
    return Batch(name, source, **draw_views(draws, [tokens] * case.batch, config))


def time_product(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Seconds of a square product; its matrices are gone afterwards, so that they do not count as a step's memory."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    wait(device)
    began = time.perf_counter()
    a @ b
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def count_flops(recipe: Recipe, batch: Batch) -> int:
    """Of one forward and backward pass, teacher and decoder included; on storage-free tensors it takes no time.

    A backward pass is twice its forward pass: torch's own count of it takes grouped convolutions for full ones.
    """
    with torch.device("meta"):
        model = build_model(recipe.body, recipe.modalities).to("meta").train()
    batch = batch.to(torch.device("meta"), torch.float32)
    with FlopCounterMode(display=False) as everything:
        model(batch)
    encoder = model.encoders[batch.modality]
    with torch.no_grad():
        local_BTD = encoder.local(batch.source)
        with FlopCounterMode(display=False) as teacher:
            model.teach(batch, local_BTD)
    return 3 * everything.get_total_flops() - 2 * teacher.get_total_flops()


def check(recipe: Recipe, case: Case, device: torch.device) -> float:
    """The larger error of loss and gradients with the kernels, in the case's dtype, on up to two samples; without
    dropout, which kernels draw otherwise. Ends the run if it is too large."""
    batch = make_batch(recipe, replace(case, batch=min(2, case.batch)))
    noise_NJD = torch.randn(*batch.masked_NJ.shape, recipe.body.dim) * 0.01
    plain = {
        "d2v_ds.model.layers.attend": attend_reference,
        "d2v_ds.model.data2vec.make_targets": make_targets_reference,
        "d2v_ds.model.data2vec.regress": regress_reference,
    }

    def train(dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = build_model(recipe.body, recipe.modalities).to(device, dtype).eval()
        out = model(batch.to(device, dtype), noise_NJD.to(device, dtype))
        (out.loss / out.sample_size).backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return [(out.loss / out.sample_size).detach()[None], torch.cat(grads)]

    ours = train(case.dtype)
    patches = [mock.patch(name, function) for name, function in plain.items()]
    for patch in patches:
        patch.start()
    try:
        truth = train(torch.float32)
    finally:
        for patch in patches:
            patch.stop()
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(ours, truth, strict=True)]
    if not all(error < LARGEST_ERROR[case.dtype] for error in errors):  # NaN is wrong too
        raise SystemExit(
            f"error: {case.recipe} in {case.dtype}: loss and gradients differ from plain torch by {errors[0]:.1e} and "
            f"{errors[1]:.1e}, and must by less than {LARGEST_ERROR[case.dtype]:.0e}; nothing was timed"
        )
    return max(errors)


@torch.no_grad()
def time_teacher(engine: Any, ema: TeacherEMA, batch: Batch, device: torch.device) -> float:
    """Seconds that targets and EMA take of a step, by themselves."""
    model = engine.module
    layers = model.teacher_layers(batch, model.encoders[batch.modality].local(batch.source))
    seconds = []
    for _ in range(9):
        wait(device)
        began = time.perf_counter()
        model.normalise_targets(batch, layers)
        ema.update(0.999)
        wait(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def measure(case: Case, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    overrides = [f"precision={'fp32' if case.dtype == torch.float32 else 'bf16'}"]
    recipe = load_recipe(case.recipe, overrides)
    ((_, config),) = recipe.modalities.items()
    config.clones = case.clones or config.clones
    batch = make_batch(recipe, case)
    flops = count_flops(recipe, batch)
    error = check(recipe, case, device)
    reset_peak(device)
    engine, ema = build(recipe, device, options.compile)
    batch = batch.to(device, next(engine.module.parameters()).dtype)
    size = 8192 if device.type == "cuda" else 2048
    seconds, products = [], []
    for _ in range(options.steps + 2):  # by turns: a machine that others share is not always as fast
        products.append(time_product(case.dtype, device, size))
        began = time.perf_counter()
        take_step(engine, ema, batch)
        wait(device)
        seconds.append(time.perf_counter() - began)
    most = peak(device)
    costs = profile(engine, ema, batch, device) if options.profile else []
    clean = sorted(seconds[2:])
    rate = 2 * size**3 / statistics.median(products[2:])
    median = statistics.median(clean)
    return {
        "recipe": case.recipe,
        "batch": case.batch,
        "clones": config.clones,
        "dtype": str(case.dtype).removeprefix("torch."),
        "gflop": flops / 1e9,
        "matrix_gflops": rate / 1e9,
        "arithmetic_s": flops / rate,
        "compiled": options.compile,
        "step_s": median,
        "step_s_quartiles": [clean[len(clean) // 4], clean[-1 - len(clean) // 4]],
        "steps": len(clean),
        "ratio": median * rate / flops,
        "aim": case.aim,
        "error": error,
        "targets_ema_share": time_teacher(engine, ema, batch, device) / median,
        "peak_gib": most,
        "costs": costs,
    }


def take_step(engine: Any, ema: TeacherEMA, batch: Batch) -> None:
    with one_reduction(engine):
        out = engine(batch)
        engine.backward(out.loss / out.sample_size)
    apply_step(engine)
    ema.update(0.999)


def profile(engine: Any, ema: TeacherEMA, batch: Batch, device: torch.device) -> list[dict[str, Any]]:
    """The operators that take most of one step by themselves, largest first: milliseconds, share of all, calls."""
    is_cuda = device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda
    with torch.profiler.profile(activities=kinds) as profiled:
        take_step(engine, ema, batch)
        wait(device)
    rows = [
        (row.self_device_time_total if is_cuda else row.self_cpu_time_total, row.key, row.count)
        for row in profiled.key_averages()
    ]
    total = sum(spent for spent, _, _ in rows)
    return [
        {"operator": key, "ms": spent / 1e3, "share": spent / total, "calls": count}
        for spent, key, count in sorted(rows, reverse=True)[:TOP]
    ]


def write_costs(rows: list[dict[str, Any]], path: Path, hardware: str) -> None:
    lines = [f"# The ten largest costs of a step\n\n{hardware}, torch {torch.__version__}; one step each.\n"]
    for row in rows:
        lines += [f"\n## {row['recipe']}, {row['dtype']}, batch {row['batch']}, {row['clones']} views\n"]
        lines += ["| operator | ms | share | calls |", "|---|---|---|---|"]
        lines += [
            f"| `{cost['operator'][:90]}` | {cost['ms']:.1f} | {cost['share']:.1%} | {cost['calls']} |"
            for cost in row["costs"]
        ]
    path.write_text("\n".join(lines) + "\n")


def build(recipe: Recipe, device: torch.device, is_compiled: bool) -> tuple[Any, TeacherEMA]:
    optim = recipe.optim
    path = find_config("zero2" if device.type == "cuda" else "zero0")
    config = resolve_config(
        read_config(path),
        clip=optim.clip,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        precision=recipe.precision,
        dim=recipe.body.dim,
        path=str(path),
    )
    torch.manual_seed(0)
    model = build_model(recipe.body, recipe.modalities)
    optimizer = build_optimizer(
        model, lr=1e-4, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, decay=optim.decay
    )
    engine = build_engine(model, optimizer, config, is_compiled)
    engine.train()
    return engine, TeacherEMA(engine)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    return f"{name}, {torch.get_num_threads()} threads"


def reset_peak(device: torch.device) -> None:
    """What the case before needed does not count; its engine is in cycles of references."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> float:
    """GiB, since `reset_peak`; of the process where there is no way to reset it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kib = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    return (kib or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="the CPU's cases, even where there is a GPU")
    parser.add_argument("--steps", type=int, default=9, help="clean steps of each case, after two others")
    parser.add_argument("--profile", action="store_true", help="write the largest costs of a step, too")
    parser.add_argument("--compile", action="store_true", help="as train.compile=true")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--only", help="cases whose recipe and dtype contain this, e.g. image_base-float32")
    parser.add_argument(
        "--out", type=Path, help="JSON to write (default: docs/benchmarks/step_{cpu,gpu}.json)"
    )
    arguments = parser.parse_args()
    for option in ("steps", "threads"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option} {getattr(arguments, option)} must be 1 or more")
    cases = {f"{c.recipe}-{str(c.dtype).removeprefix('torch.')}": c for c in (CPU if arguments.cpu else GPU)}
    chosen = {name: case for name, case in cases.items() if (arguments.only or "") in name}
    if not chosen:
        parser.error(f"--only {arguments.only} is part of no case; give a part of {', '.join(cases)}")
    if not arguments.cpu and not torch.cuda.is_available():
        raise SystemExit("error: no GPU is visible; give --cpu for the CPU's cases")
    if arguments.cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
        torch.set_num_threads(arguments.threads)
    prepare_environment()
    device = start_distributed(1)
    out = arguments.out or ROOT / "docs" / "benchmarks" / f"step_{'cpu' if arguments.cpu else 'gpu'}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    rows = []
    for name, case in chosen.items():
        if device.type == "cpu" and not cpu_multiplies("bf16" if case.dtype == torch.bfloat16 else "fp32"):
            print(f"{name:22} left out: this CPU has no matrix products in bf16", flush=True)
            continue
        row = measure(case, device, arguments)
        rows.append(row)
        print(
            f"{name:22} B{row['batch']} M{row['clones']:<3} {row['gflop']:8.0f} GFLOP at {row['matrix_gflops']:8.0f}/s "
            f"= {row['arithmetic_s']:.3f} s; step {row['step_s']:.3f} s "
            f"[{row['step_s_quartiles'][0]:.3f}, {row['step_s_quartiles'][1]:.3f}] n={row['steps']}; "
            f"ratio {row['ratio']:.2f} (aim {row['aim']:.2f}); targets and EMA {row['targets_ema_share']:.1%}; "
            f"error {row['error']:.0e}; peak {row['peak_gib']:.1f} GiB",
            flush=True,
        )
        # after each case, as a later one may not fit the memory
        out.write_text(json.dumps({"hardware": hardware, "torch": torch.__version__, "rows": rows}, indent=1))
        if arguments.profile:
            write_costs(rows, out.with_name(f"profile_{'cpu' if arguments.cpu else 'gpu'}.md"), hardware)


if __name__ == "__main__":
    main()

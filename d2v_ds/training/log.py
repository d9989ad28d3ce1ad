"""What a run writes down: a progress line, metrics.jsonl, TensorBoard, and a plot of the losses at the end."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


class Log:
    """Rank 0's record of a run; a resumed run continues it, without what came after the checkpoint."""

    def __init__(self, folder: Path, first_step: int, total: int):
        self.folder, self.total = folder, total
        for name in ("metrics.jsonl", "health.jsonl", "probes.jsonl", "scores.jsonl"):
            forget_after(folder / name, first_step)
        self.writer = self.open_writer(first_step)
        self.started, self.first_step = time.perf_counter(), first_step

    def open_writer(self, step: int) -> Any:
        """For steps after `step`; one whose file could once not be written stays broken."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def step(
        self,
        step: int,
        metrics: dict[str, float],
        health: dict[str, float],
        verdicts: dict[str, str],
        samples_per_second: float,
        straggler_factor: float,
    ) -> None:
        """Everything about step number `step` (1-based); `verdicts`: of each modality, in a word."""
        words = {f"{name}/verdict": word for name, word in verdicts.items()}
        try:
            append(self.folder / "metrics.jsonl", {"step": step, **metrics})
            append(self.folder / "health.jsonl", {"step": step, **health, **words})
            self.writer = self.writer or self.open_writer(step - 1)
            for key, value in (metrics | health).items():
                self.writer.add_scalar(key, value, step)
            self.writer.flush()
        except OSError as error:  # a full disk: what is trained is worth more than what is logged
            self.writer = None
            warn(f"the log of step {step}", error)
        line = self.line(step, metrics, health, samples_per_second) + straggler(metrics, straggler_factor)
        with contextlib.suppress(BrokenPipeError):  # a launcher that is gone does not read
            print(line, flush=True)

    def probe(self, file: str, row: dict[str, Any], numbers: dict[str, float]) -> None:
        """A row of a probe, which has a `step`, and its numbers by the tag of their curve."""
        try:
            append(self.folder / file, row)
            self.writer = self.writer or self.open_writer(row["step"] - 1)
            for tag, value in numbers.items():
                self.writer.add_scalar(tag, value, row["step"])
            self.writer.flush()
        except OSError as error:
            self.writer = None
            warn(f"the probe of step {row['step']}", error)

    def line(self, step: int, metrics: dict[str, float], health: dict[str, float], rate: float) -> str:
        seconds = (time.perf_counter() - self.started) / max(1, step - self.first_step)
        left = timedelta(seconds=round(seconds * (self.total - step)))
        losses = "  ".join(
            f"{name} {metrics[f'{name}/loss']:.3f}"
            + (f" (content {health[f'{name}/content']:.2f})" if f"{name}/content" in health else "")
            for name in names_of(metrics)
        )
        return (
            f"step {step}/{self.total}  loss {losses}  lr {metrics['lr']:.1e}  "
            f"{rate:.0f} samples/s  {seconds:.2f} s/step  ETA {left}"
        )

    def close_writer(self) -> None:
        if self.writer:
            self.writer.close()

    def close(self) -> str:
        """What the run came to, and where its curves are."""
        plot = None
        try:
            self.close_writer()
            plot = plot_losses(self.folder)
        except OSError as error:
            warn("the loss curves", error)
        return "\n".join(
            [
                summary(self.folder),
                f"loss curves: {plot}" if plot else "",
                f"TensorBoard: tensorboard --logdir {self.folder / 'tensorboard'}",
            ]
        )


def straggler(metrics: dict[str, float], factor: float) -> str:
    """The slowest rank, if it is much slower than the others."""
    slowest, median = metrics["slowest_rank_seconds"], metrics["median_rank_seconds"]
    if slowest <= factor * median:
        return ""
    return f"  slow: rank {metrics['slowest_rank']:.0f} takes {slowest:.2f} s, others {median:.2f} s"


def warn(what: str, error: OSError) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(f"WARNING: {what} could NOT be written ({error})", file=sys.stderr, flush=True)


def summary(folder: Path) -> str:
    """Last values of each modality as a table."""
    rows, health = read_rows(folder / "metrics.jsonl"), read_rows(folder / "health.jsonl")
    if not rows or not health:
        return ""
    columns = [
        c
        for c in ("content", "explained", "target_var", "pred_var")
        if any(k.endswith(f"/{c}") for k in health[-1])
    ]
    lines = [" ".join([f"{'':8}", f"{'loss':>10}", *(f"{c:>10}" for c in columns)])]
    for name in names_of(rows[-1]):
        values = [rows[-1][f"{name}/loss"], *(health[-1][f"{name}/{c}"] for c in columns)]
        numbers = (math.nan if value is None else value for value in values)
        lines.append(" ".join([f"{name:8}", *(f"{number:10.3f}" for number in numbers)]))
    return "\n".join(lines)


def names_of(metrics: dict[str, float]) -> list[str]:
    """The modalities of a row."""
    return [key.removesuffix("/loss") for key in metrics if key.endswith("/loss")]


def append(path: Path, row: dict[str, Any]) -> None:
    """A whole row or, with OSError, none: the next one must not be glued to half of this."""
    line = (json.dumps(finite(row), allow_nan=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            written = file.write(line)
            if written < len(line):
                raise OSError(f"{path} took {written} of {len(line)} bytes; the disk is full")
        except OSError:
            file.truncate(size)
            raise


def finite(value: Any) -> Any:
    """With null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def forget_after(path: Path, step: int) -> None:
    """Drops the rows of steps that are done again after a resume, and a row that a crash cut short."""
    keep_rows(path, lambda row: row["step"] <= step)


def keep_rows(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if is_kept(row):
            kept.append(line)
    temporary = path.with_name(f".tmp-{path.name}")  # a signal may end the start at any moment
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def plot_losses(folder: Path) -> Path | None:
    """losses.png: loss of each modality over steps, and below it content, or a fine-tuned model's scores."""
    rows, health = read_rows(folder / "metrics.jsonl"), read_rows(folder / "health.jsonl")
    scores = read_rows(folder / "scores.jsonl")
    if len(rows) < 2:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = names_of(rows[0])
    figure, axes = plt.subplots(2, len(names), figsize=(4 * len(names), 6), squeeze=False, sharex=True)
    for column, name in enumerate(names):
        below, key, label = (
            (scores, "score", "score") if scores else (health, f"{name}/content", "content of targets")
        )
        axes[0][column].plot([r["step"] for r in rows], [r[f"{name}/loss"] for r in rows])
        axes[0][column].set(title=name, ylabel="loss" if column == 0 else "")
        seen = [r for r in below if key in r]
        axes[1][column].plot([r["step"] for r in seen], [r[key] for r in seen])
        axes[1][column].set(xlabel="step", ylabel=label if column == 0 else "", ylim=(0, 1.05))
        for row in (0, 1):
            axes[row][column].grid(alpha=0.3)
    figure.tight_layout()
    path = folder / "losses.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path

"""Checkpoints: committed whole or not at all, readable at any number of ranks and any ZeRO stage.

A checkpoint is a folder step_XXXXXXXX with one safetensors file a rank, loop.json and manifest.json. Each
tensor is a stretch of one flattened fp32 parameter, keyed KIND|NAME|START, where KIND is `weight` (the
optimizer's master), `exp_avg`, `exp_avg_sq`, `ema` (the teacher's average) or `frozen`. Who reads takes the
stretches that overlap its own: no conversion between world sizes or stages, no pickle, and the exporter
needs neither DeepSpeed nor a GPU.

Writing: a temporary folder, every rank's file verified, manifest with sizes and hashes, fsync, rename, then
`latest`. A crash at any moment leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from d2v_ds.engine.ema import TeacherEMA
from d2v_ds.engine.partition import (
    base_optimizer,
    fragments,
    full_shape,
    is_replicated,
    publish_weights,
    shard_range,
)
from d2v_ds.model.data2vec import TEACHER

STEP = re.compile(r"step_(\d{8})")
MOMENTS = ("exp_avg", "exp_avg_sq")


# ---- writing -------------------------------------------------------------------------------------------------


def save(
    engine: Any,
    ema: TeacherEMA,
    run: Path,
    step: int,
    loop: dict[str, Any],
    keep: int,
    spared: Path | None = None,
) -> Path:
    """Commits the state after `step` steps; all ranks call it. Returns the checkpoint's folder. Of older checkpoints
    it keeps `keep` with this one, and the one that is `spared`.

    Raises OSError on all ranks if any of them could not write; the previous checkpoint is untouched.
    """
    rank = dist.get_rank()
    temporary, final = run / f".tmp-step_{step:08d}", run / f"step_{step:08d}"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    record: dict[str, Any] = {}
    if rank == 0 or not is_replicated(engine):
        record = try_write(temporary / f"rank_{rank:05d}.safetensors", collect(engine, ema))
    records: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(records, record)
    failed = [r["error"] for r in records if "error" in r]
    if failed:
        raise OSError(
            f"checkpoint of step {step} was not written: {failed[0]}; the previous one is untouched"
        )
    if rank == 0:
        files = [r for r in records if r]
        files.append(write_json(temporary / "loop.json", {**loop, "step": step, **engine_counters(engine)}))
        write_json(
            temporary / "manifest.json",
            {
                "version": 1,
                "step": step,
                "world_size": dist.get_world_size(),
                "stage": engine.zero_optimization_stage(),
                "parameters": describe(engine),
                "files": files,
            },
        )
        commit(temporary, final)
        prune(run, keep, spared)
    dist.barrier()
    return final


def collect(engine: Any, ema: TeacherEMA) -> dict[str, Tensor]:
    """Every stretch that this rank owns."""
    state = base_optimizer(engine).state
    tensors: dict[str, Tensor] = {}
    for f in fragments(engine):
        tensors[f"weight|{f.name}|{f.start}"] = f.of(f.flat)
        for moment in MOMENTS:
            if moment in state.get(f.flat, {}):
                tensors[f"{moment}|{f.name}|{f.start}"] = f.of(state[f.flat][moment])
    for f, value in ema.values():
        tensors[f"ema|{f.name}|{f.start}"] = value
    for name, start, value in frozen_stretches(engine):
        if dist.get_rank() == 0 or engine.zero_optimization_stage() == 3:
            tensors[f"frozen|{name}|{start}"] = value
    return {key: value.detach().float().cpu().contiguous() for key, value in tensors.items()}


def frozen_stretches(engine: Any) -> Iterable[tuple[str, int, Tensor]]:
    """(name, start, values) on this rank of what neither the optimizer nor the EMA owns, such as an ALiBi scale
    that is not learned."""
    averaged = {TEACHER + name for name, student, _ in engine.module.followed() if student.requires_grad}
    for name, p in engine.module.named_parameters():
        if p.requires_grad or name in averaged:
            continue
        if engine.zero_optimization_stage() == 3:
            start, numel = shard_range(p, dist.get_rank())
            if numel:
                yield name, start, p.ds_tensor.data.view(-1)[:numel]
        else:
            yield name, 0, p.data.view(-1)


def describe(engine: Any) -> dict[str, Any]:
    """Shape of every parameter, by name; what the exporter puts together."""
    return {
        name: {"shape": list(full_shape(p)), "trainable": p.requires_grad}
        for name, p in engine.module.named_parameters()
    }


def engine_counters(engine: Any) -> dict[str, Any]:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    numbers = (
        {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float))} if scaler is not None else {}
    )
    return {"skipped_steps": engine.skipped_steps, "loss_scaler": numbers}


def try_write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes and verifies one file; its record, or {"error": ...} so that all ranks can agree to give up."""
    try:
        save_file(tensors, path)
        return finish(path)
    except (OSError, SafetensorError) as error:
        return {"error": f"{path}: {error}"}


def write_json(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return finish(path)


def finish(path: Path) -> dict[str, Any]:
    """Flushes a file to disk; its name, size and hash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _sha256(file)
        )


def _sha256(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def commit(temporary: Path, final: Path) -> None:
    fsync_folder(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    fsync_folder(final.parent)
    pointer = final.parent / ".tmp-latest"
    pointer.write_text(final.name, encoding="utf-8")
    os.replace(pointer, final.parent / "latest")


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def prune(run: Path, keep: int, spared: Path | None = None) -> None:
    for old in checkpoints(run)[max(keep, 1) :]:
        if old != spared:
            shutil.rmtree(old)


# ---- finding -------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """Committed checkpoints of a run folder, newest first."""
    found = [p for p in run.glob("step_*") if p.is_dir() and STEP.fullmatch(p.name)]
    return sorted(found, key=lambda p: p.name, reverse=True)


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with any newer one."""
    problems = []
    for checkpoint in checkpoints(run):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, problems
        problems.append(problem)
    return None, problems


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None if every file is as it was written."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        files = [(f["name"], f["bytes"], f["sha256"]) for f in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{checkpoint}: manifest.json is unreadable ({error})"
    for name, size, digest in files:
        path = checkpoint / name
        if not path.is_file():
            return f"{checkpoint}: {name} is missing"
        if path.stat().st_size != size:
            return f"{checkpoint}: {name} has {path.stat().st_size} bytes instead of {size}"
        if sha256(path) != digest:
            return f"{checkpoint}: {name} is damaged (its hash differs from the manifest)"
    return None


# ---- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    start: int
    numel: int
    file: Path
    key: str


class Checkpoint:
    """The tensors of a committed checkpoint, whatever number of ranks wrote it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.loop = json.loads((folder / "loop.json").read_text(encoding="utf-8"))
        self.stretches: dict[tuple[str, str], list[Stretch]] = {}
        self.files = {
            path: safe_open(path, framework="pt") for path in sorted(folder.glob("rank_*.safetensors"))
        }
        for path, file in self.files.items():
            for key in file.keys():  # noqa: SIM118  (safe_open is no dict)
                kind, name, start = key.split("|")
                numel = file.get_slice(key).get_shape()[0]
                self.stretches.setdefault((kind, name), []).append(Stretch(int(start), numel, path, key))

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """`numel` fp32 values of a flattened parameter from `start`; ValueError if the checkpoint lacks any."""
        result = torch.empty(numel)
        covered = 0
        for s in self.stretches.get((kind, name), []):
            first, last = max(start, s.start), min(start + numel, s.start + s.numel)
            if first < last:
                piece = self.files[s.file].get_slice(s.key)[first - s.start : last - s.start]
                result[first - start : last - start] = piece
                covered += last - first
        if covered != numel:
            raise ValueError(
                f"{self.folder} holds {covered} of {numel} values of {kind} {name}; "
                "it is of another model or incomplete"
            )
        return result

    def full(self, kind: str, name: str) -> Tensor:
        """A whole parameter in its shape."""
        shape = torch.Size(self.manifest["parameters"][name]["shape"])
        return self.read(kind, name.removeprefix(TEACHER) if kind == "ema" else name, 0, shape.numel()).view(
            shape
        )

    def names(self) -> list[str]:
        return list(self.manifest["parameters"])

    def tensor(self, name: str) -> Tensor:
        """Any parameter by the model's name: student, teacher or frozen."""
        if ("frozen", name) in self.stretches:
            return self.full("frozen", name)
        return self.full("ema" if name.startswith(TEACHER) else "weight", name)


@torch.no_grad()
def load(engine: Any, ema: TeacherEMA, checkpoint: Checkpoint, applied_steps: int) -> None:
    """Puts weights, moments, teacher and counters of a checkpoint into an engine, of any size and stage: a fresh one,
    or one that goes back."""
    check_same_model(engine, checkpoint)
    optimizer = base_optimizer(engine)
    for f in fragments(engine):
        f.of(f.flat).copy_(checkpoint.read("weight", f.name, f.start, f.numel))
        if applied_steps:
            state = optimizer.state[f.flat]
            if not state:
                state.update({moment: torch.zeros_like(f.flat) for moment in MOMENTS})
            state["step"] = torch.tensor(float(applied_steps), device=f.flat.device)
            for moment in MOMENTS:
                f.of(state[moment]).copy_(checkpoint.read(moment, f.name, f.start, f.numel))
    for name, start, value in ema.to_restore():
        value.copy_(checkpoint.read("ema", name, start, value.numel()))
    for name, start, value in frozen_stretches(engine):
        value.copy_(checkpoint.read("frozen", name, start, value.numel()))
    publish_weights(engine)
    ema.publish()
    engine.global_steps = checkpoint.loop["step"]
    engine.skipped_steps = checkpoint.loop["skipped_steps"]
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for name, value in checkpoint.loop["loss_scaler"].items():
        if scaler is not None and hasattr(scaler, name):
            setattr(scaler, name, value)


def check_same_model(engine: Any, checkpoint: Checkpoint) -> None:
    ours = {name: list(full_shape(p)) for name, p in engine.module.named_parameters()}
    theirs = {name: entry["shape"] for name, entry in checkpoint.manifest["parameters"].items()}
    if ours != theirs:
        odd = sorted(set(ours) ^ set(theirs)) or [n for n in ours if ours[n] != theirs[n]]
        raise ValueError(
            f"{checkpoint.folder} is of another model: {', '.join(odd[:8])} differ; "
            "use the recipe it was made with, or another out="
        )

"""Checkpoints: committed whole or not at all, readable at any number of ranks and any ZeRO stage.

A checkpoint is a folder step_XXXXXXXX with one safetensors file a rank, loop.json and manifest.json. Each
tensor is a stretch of one flattened fp32 parameter, keyed KIND|NAME|START, where KIND is `weight` (the
optimizer's master), `exp_avg`, `exp_avg_sq`, `ema` (the teacher's average) or `frozen`. Who reads takes the
stretches that overlap its own: no conversion between world sizes or stages, no pickle, and the exporter
needs neither DeepSpeed nor a GPU.

Writing (d2v_ds.engine.saver): a temporary folder, every rank's file read back and verified, manifest with sizes and
hashes, its own included, fsync, rename, then `latest`. A crash at any moment leaves the previous checkpoint as it
was. Nothing is written through a symbolic link.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds.engine.ema import TeacherEMA
from d2v_ds.engine.partition import (
    base_optimizer,
    fragments,
    full_shape,
    publish_weights,
    shard_range,
)
from d2v_ds.engine.step import loss_scaler
from d2v_ds.engine.tensor_file import TensorFile, sha256, write_bytes, write_tensors
from d2v_ds.model.data2vec import TEACHER

VERSION = 2
REPLACED = ".tmp-replaced-"
STEP = re.compile(r"step_(\d{8})")
MOMENTS = ("exp_avg", "exp_avg_sq")


# ---- writing -------------------------------------------------------------------------------------------------


def collect(engine: Any, ema: TeacherEMA) -> dict[str, Tensor]:
    """Every stretch that this rank owns, flat and in fp32; of fp32 ones the live values."""
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
    return {key: value.detach().float() for key, value in tensors.items()}


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
    scaler = loss_scaler(engine)
    numbers = (
        {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float))} if scaler is not None else {}
    )
    return {"skipped_steps": engine.skipped_steps, "loss_scaler": numbers}


def write_rank(folder: Path, rank: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """One rank's file; its name, size and hash."""
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    return write_tensors(
        folder / f"rank_{rank:05d}.safetensors", tensors.items(), shapes, dtype=torch.float32
    )


def write_json(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    return write_bytes(path, json.dumps(content, indent=1).encode())


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    content = {"version": VERSION, **content}
    write_json(folder / "manifest.json", {**content, "sha256": digest_of(content)})


def digest_of(manifest: dict[str, Any]) -> str:
    """Hash of all of a manifest but the hash itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def commit(temporary: Path, final: Path) -> None:
    """Gives a complete folder its name; one of that name, which was damaged, makes way."""
    run = final.parent
    fsync_folder(temporary)
    pointer = run / ".tmp-latest"
    pointer.unlink(missing_ok=True)
    write_bytes(pointer, final.name.encode())  # first, so that a full disk shows before the rename
    if final.exists():
        refuse_other(final)
        os.rename(final, run / f"{REPLACED}{final.name}")
    os.rename(temporary, final)
    fsync_folder(run)
    os.replace(pointer, run / "latest")
    fsync_folder(run)
    shutil.rmtree(run / f"{REPLACED}{final.name}", ignore_errors=True)


def recover(run: Path) -> None:
    """Gives a checkpoint its name back that made way for another one, if a kill came before that had it."""
    for replaced in run.glob(f"{REPLACED}*"):
        final = run / replaced.name.removeprefix(REPLACED)
        refuse_link(replaced)
        if not final.exists():
            os.rename(replaced, final)


def delete(folder: Path) -> None:
    """Takes a checkpoint's name away first: half of one is never seen. A link's target stays."""
    refuse_other(folder)
    grave = folder.with_name(f".tmp-old-{folder.name.removeprefix('.tmp-')}")
    shutil.rmtree(grave, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, grave)
        shutil.rmtree(grave)


def is_kept(checkpoint: Path, keep_every: int) -> bool:
    """Whether it is one of those that stay for good: at a multiple of `keep_every` steps."""
    step = STEP.fullmatch(checkpoint.name)
    return keep_every > 0 and step is not None and int(step[1]) % keep_every == 0


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def make_folder(folder: Path) -> None:
    """A folder that may be there already, made by another rank; not a link to one."""
    try:
        folder.mkdir()
    except FileExistsError:
        refuse_link(folder)


def refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise ValueError(
            f"{path} is a symbolic link (to {os.readlink(path)}): a run writes into its own folder alone; "
            "remove the link, or put what it points to in its place"
        )


def refuse_other(folder: Path) -> None:
    """What lies in the place of a checkpoint must be one."""
    refuse_link(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file in the place of a checkpoint; move it away")


def refuse_links(run: Path) -> None:
    """Raises ValueError if anything that a run could write or delete is a symbolic link; the run folder may be one."""
    if not run.is_dir():
        return
    for path in sorted(run.iterdir()):
        refuse_link(path)
        if path.is_dir() and path.name.startswith(("step_", ".tmp-", "tensorboard")):
            for inner in sorted(path.iterdir()):
                refuse_link(inner)


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
        manifest = read_manifest(checkpoint)
        files = {f["name"]: (f["bytes"], f["sha256"]) for f in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{checkpoint}: manifest.json is damaged ({error})"
    for name, (size, _) in files.items():
        path = checkpoint / name
        if Path(name).name != name:
            return f"{checkpoint}: manifest.json names {name}, which is not a file in the folder"
        if not path.is_file():
            return f"{checkpoint}: {name} is missing"
        if path.stat().st_size != size:
            return f"{checkpoint}: {name} has {path.stat().st_size} bytes instead of {size}"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            digests = list(pool.map(sha256, [checkpoint / name for name in files]))
        except OSError as error:
            return f"{checkpoint}: a file cannot be read ({error})"
    for (name, (_, expected)), digest in zip(files.items(), digests, strict=True):
        if digest != expected:
            return f"{checkpoint}: {name} is damaged (its hash differs from the manifest)"
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """ValueError if it is not as it was written; those of version 1 have no hash of their own."""
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    if manifest["version"] not in (1, VERSION):
        raise ValueError(f"it is of version {manifest['version']}, this is d2v_ds for 1 to {VERSION}")
    if manifest["version"] > 1 and manifest["sha256"] != digest_of(manifest):
        raise ValueError("its hash differs from its content")
    return manifest


def point_to(run: Path, checkpoint: Path) -> str | None:
    """Makes `latest` name this checkpoint; what it said instead, if that is no checkpoint at all."""
    latest = run / "latest"
    try:
        said = latest.read_bytes().decode("utf-8", "backslashreplace").strip()
    except FileNotFoundError:
        said = ""
    if said != checkpoint.name:
        pointer = run / ".tmp-latest"
        pointer.unlink(missing_ok=True)
        write_bytes(pointer, checkpoint.name.encode())
        os.replace(pointer, latest)
    return None if STEP.fullmatch(said) else said


# ---- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    start: int
    numel: int
    file: TensorFile
    key: str


class Checkpoint:
    """The tensors of a committed checkpoint, whatever number of ranks wrote it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.loop = json.loads((folder / "loop.json").read_text(encoding="utf-8"))
        self.stretches: dict[tuple[str, str], list[Stretch]] = {}
        names = sorted(f["name"] for f in self.manifest["files"])
        self.files = [TensorFile(folder / name) for name in names if name.endswith(".safetensors")]
        for file in self.files:
            for key in file.names():
                kind, name, start = key.split("|")
                (numel,) = file.shape(key)
                self.stretches.setdefault((kind, name), []).append(Stretch(int(start), numel, file, key))

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """`numel` fp32 values of a flattened parameter from `start`; ValueError if the checkpoint lacks any."""
        result = torch.empty(numel)
        covered = 0
        for s in self.stretches.get((kind, name), []):
            first, last = max(start, s.start), min(start + numel, s.start + s.numel)
            if first < last:
                result[first - start : last - start] = s.file.read(s.key, first - s.start, last - first)
                covered += last - first
        if covered != numel:
            raise ValueError(
                f"{self.folder} holds {covered} of {numel} values of {kind} {name}; "
                "it is of another model or incomplete"
            )
        return result

    def full(self, kind: str, name: str) -> Tensor:
        """A whole parameter in its shape."""
        shape = torch.Size(self.shape(name))
        return self.read(kind, name.removeprefix(TEACHER) if kind == "ema" else name, 0, shape.numel()).view(
            shape
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.manifest["parameters"][name]["shape"])

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
    scaler = loss_scaler(engine)
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

"""A ZeRO-3 checkpoint of any size and number of ranks, made on the disk: sparse files, some values in each stretch."""

from __future__ import annotations

from pathlib import Path

import torch

from d2v_ds.convert.fit import shapes
from d2v_ds.engine.checkpoint import commit, write_json, write_manifest
from d2v_ds.engine.tensor_file import header, sha256
from d2v_ds.model.data2vec import TEACHER
from d2v_ds.recipe import Recipe

FILLED = 97
"""Values at the beginning of a stretch that are not zero."""


def write_synthetic(run: Path, recipe: Recipe, ranks: int, teacher: bool = True) -> Path:
    """Without moments, which no export reads; the checkpoint's folder."""
    temporary, final = run / ".tmp-step_00000007", run / "step_00000007"
    temporary.mkdir(parents=True)
    parameters = {
        name: shape for name, shape in shapes(recipe).items() if teacher or not name.startswith(TEACHER)
    }
    files = [
        write_rank_file(temporary / f"rank_{rank:05d}.safetensors", parameters, rank, ranks)
        for rank in range(ranks)
    ]
    loop = {"step": 7, "applied_steps": 7, "recipe": recipe.model_dump(mode="json")}
    files.append(write_json(temporary / "loop.json", loop))
    described = {name: {"shape": list(shape), "trainable": True} for name, shape in parameters.items()}
    write_manifest(temporary, {"step": 7, "world_size": ranks, "parameters": described, "files": files})
    commit(temporary, final)
    return final


def write_rank_file(path: Path, parameters: dict[str, tuple[int, ...]], rank: int, ranks: int) -> dict:
    stretches = {}
    for name, shape in parameters.items():
        start, numel = stretch(shape, rank, ranks)
        kind = "ema" if name.startswith(TEACHER) else "weight"
        if numel:
            stretches[f"{kind}|{name.removeprefix(TEACHER)}|{start}"] = (numel,)
    with path.open("wb") as file:
        file.write(header(stretches, torch.float32))
        for key, (numel,) in stretches.items():
            begin = file.tell()
            file.write(values(key, min(numel, FILLED)).numpy().tobytes())
            file.seek(begin + 4 * numel)
        file.truncate()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def stretch(shape: tuple[int, ...], rank: int, ranks: int) -> tuple[int, int]:
    """As ZeRO-3 cuts a parameter: (start, numel)."""
    numel = torch.Size(shape).numel()
    part = -(-numel // ranks)
    return rank * part, max(0, min(part, numel - rank * part))


def values(key: str, count: int) -> torch.Tensor:
    seed = int.from_bytes(key.encode()[-8:], "little") % 2**31
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def expected(name: str, shape: tuple[int, ...], ranks: int) -> torch.Tensor:
    """What an export must hold under this name of the model."""
    whole = torch.zeros(torch.Size(shape).numel())
    kind = "ema" if name.startswith(TEACHER) else "weight"
    for rank in range(ranks):
        start, numel = stretch(shape, rank, ranks)
        if numel:
            count = min(numel, FILLED)
            whole[start : start + count] = values(f"{kind}|{name.removeprefix(TEACHER)}|{start}", count)
    return whole.view(shape)

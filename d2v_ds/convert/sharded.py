"""An export's weights on the disk: model.safetensors, or above 5 GB several files and the index that transformers uses.

Tensors come and go one by one, so the memory needed is that of the largest, whatever the size of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from d2v_ds.data.progress import ProgressLine
from d2v_ds.engine.tensor_file import TensorFile, write_bytes, write_tensors

SINGLE, INDEX, PATTERN = "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"
WEIGHT_FILES = (SINGLE, INDEX, PATTERN)
SHARD_BYTES = 5_000_000_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Shapes = dict[str, tuple[int, ...]]


def parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def write_weights(
    folder: Path,
    shapes: Shapes,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the tensors that `read` gives by name; what is on the disk is read back and compared.

    Raises ValueError for a value that the dtype cannot hold.
    """
    groups = split(shapes, dtype, shard_bytes)
    total = sum(size(shape, dtype) for shape in shapes.values())
    line, done, weight_map = ProgressLine(max(total // 1_000_000, 1), what="written", unit="MB"), 0, {}

    def each(group: Shapes) -> Iterator[tuple[str, Tensor]]:
        nonlocal done
        for name, shape in group.items():
            yield name, cast(name, read(name), dtype)
            done += size(shape, dtype)
            line.show(done // 1_000_000)

    for number, group in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_tensors(folder / file, each(group), group, dtype)
        weight_map |= dict.fromkeys(group, file)
    line.close()
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_bytes(folder / INDEX, json.dumps(index, indent=2).encode())


def size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def split(shapes: Shapes, dtype: torch.dtype, shard_bytes: int) -> list[Shapes]:
    """In order, as many as fit into each file; a tensor that is larger has one of its own."""
    groups: list[Shapes] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if groups[-1] and filled + size(shape, dtype) > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size(shape, dtype)
    return groups


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    result = tensor.to(dtype)
    if dtype == torch.float16 and not torch.equal(result.isfinite(), tensor.isfinite()):
        raise ValueError(
            f"{name} has values up to {tensor.abs().max():g}, which fp16 (at most 65504) cannot hold; use bf16"
        )
    return result


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of an export, in the dtype they have there. ValueError names the file that is absent or damaged."""
    if (folder / INDEX).is_file():
        names = read_index(folder / INDEX)
        tensors = {}
        for file in sorted(set(names.values())):
            tensors |= read_all(folder / file)
        missing = sorted(names.keys() - tensors.keys())
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing[:5])}, which {INDEX} names; export it again")
        return tensors
    if not (folder / SINGLE).is_file():
        raise ValueError(f"{folder} has a config.json but no {SINGLE}; export the run again")
    return read_all(folder / SINGLE)


def read_index(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in names.values()):
            raise ValueError("it names files outside its folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); export it again") from error
    return names


def read_all(path: Path) -> dict[str, Tensor]:
    try:
        file = TensorFile(path)
        return {name: file.read(name) for name in file.names()}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); export it again") from error

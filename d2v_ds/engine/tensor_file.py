"""safetensors files written and read piece by piece: memory holds one piece, and nothing is mapped into it.

The format is https://github.com/huggingface/safetensors: eight bytes with the length of a JSON header, the header,
the values. The library writes from tensors that are all in memory, and reads by mapping, which counts as memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK = 16 << 20
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TORCH = {name: dtype for dtype, name in DTYPES.items()}
MAX_HEADER = 100_000_000  # what the library accepts


def write_tensors(
    path: Path, tensors: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Any]:
    """Writes tensors, which come one by one in the order of `shapes`, into a new file; its name, size and sha256.

    What lies on the disk is read back, and must be what was given. Raises OSError if it cannot be written, is not
    what was given, or if something of that name exists, a symbolic link included.
    """
    digest, size = hashlib.sha256(), 0
    with open_new(path) as file:

        def put(piece: bytes | memoryview) -> None:
            nonlocal size
            digest.update(piece)
            write_all(file, piece)
            size += len(piece)

        put(header(shapes, dtype))
        names = iter(shapes)
        for name, tensor in tensors:
            assert name == next(names), f"{name} is out of order"
            assert tuple(tensor.shape) == tuple(shapes[name]), f"{name} is {tuple(tensor.shape)}"
            content = memoryview(
                tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
            )
            for start in range(0, len(content), CHUNK):
                put(content[start : start + CHUNK])
        assert next(names, None) is None, "a tensor is missing"
        os.fsync(file.fileno())
    if sha256(path) != digest.hexdigest():
        raise OSError(f"{path}: what was read back is not what was written; the disk or its cable fails")
    return {"name": path.name, "bytes": size, "sha256": digest.hexdigest()}


def header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Length and JSON, padded so that the values begin at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    """A small new file, on the disk when this returns; its name, size and sha256."""
    with open_new(path) as file:
        write_all(file, content)
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def open_new(path: Path) -> Any:
    """A file that did not exist: nothing is overwritten, and no link is followed."""
    return os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb", buffering=0
    )


def write_all(file: Any, piece: bytes | memoryview) -> None:
    """One system call may write less: a disk that is nearly full does."""
    piece = memoryview(piece)
    while piece:
        piece = piece[file.write(piece) :]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class TensorFile:
    """A safetensors file of which pieces are read; ValueError if it is none."""

    def __init__(self, path: Path):
        self.path = path
        self.file = path.open("rb", buffering=0)
        length = int.from_bytes(self.file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"{path} is no safetensors file")
        try:
            entries = json.loads(self.file.read(length))
            entries.pop("__metadata__", None)
            self.entries = {
                name: (TORCH[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                for name, entry in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no safetensors file of ours ({error})") from error

    def names(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name][1]

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """`numel` values of the flattened tensor from `start`; unsaid, the whole tensor in its shape."""
        dtype, shape, begin = self.entries[name]
        if numel is None:
            return self.read(name, 0, torch.Size(shape).numel()).view(shape)
        values = torch.empty(numel, dtype=dtype)
        target, offset = memoryview(values.view(torch.uint8).numpy()), begin + start * dtype.itemsize
        done = 0
        while done < len(target):
            count = os.preadv(self.file.fileno(), [target[done : done + CHUNK]], offset + done)
            if not count:
                raise ValueError(f"{self.path} ends inside {name}")
            done += count
        return values

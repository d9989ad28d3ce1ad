"""What the `inputs.py` of every modality shares: a user's own things -> rows that the model takes.

Each has `EXTENSIONS` of its files, `listed(x)`: one thing or several -> a list of single ones, and
`prepare(samples, item, rate)`: one of them -> its row. Whatever is wrong is a ValueError that says what was given.
"""

from __future__ import annotations

import numbers
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Prepared(NamedTuple):
    """One input as the model takes it."""

    row: Tensor
    notice: str | None = None
    """What was done to it that its owner should know: 'cut to 512 tokens'."""


def read_file(path: str | Path) -> bytes:
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; give the path of a file")
    return path.read_bytes()


def as_tensor(x: Any, what: str) -> Tensor:
    """A tensor of numbers, on the CPU; arrays and lists of numbers are copied."""
    try:
        if isinstance(x, np.ndarray):
            x = torch.from_numpy(
                np.array(x, native(x.dtype), order="C")
            )  # theirs may be read-only or reversed
        tensor = torch.as_tensor(x).detach().cpu()
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise TypeError("it is sparse or quantized; give it dense")
        if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):  # few operations know these
            tensor = tensor.long()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{describe(x)} is no {what}: {error}") from error
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise ValueError(f"{describe(x)} is no {what}: its numbers are {tensor.dtype}")
    return tensor


def native(dtype: np.dtype) -> np.dtype:
    """A type of numbers that torch has, in this machine's byte order."""
    if dtype.kind == "f" and dtype.itemsize > 8:
        return np.dtype(np.float64)
    return dtype.newbyteorder("=")


def as_bytes(x: Any) -> Any:
    """bytes for what holds bytes."""
    return bytes(x) if isinstance(x, (bytearray, memoryview)) else x


def refuse_not_finite(tensor: Tensor, what: str) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{what} of shape {tuple(tensor.shape)} has {bad} values that are not finite (NaN, inf)"
        )


def refuse_rate(rate: int | None, what: str) -> None:
    if rate is not None:
        raise ValueError(f"rate={rate} belongs to sound; leave it out for {what}")


def split_batch(x: Any, dims: int, what: str) -> list[Any]:
    """One array of `dims` dimensions as it is, or the items of one that has a dimension more."""
    if x.ndim == dims + 1:
        return refuse_none(list(x), what)
    return [x]  # of other dimensions: refused where it is prepared, with its shape


def refuse_none(items: list[Any], what: str) -> list[Any]:
    if not items:
        raise ValueError(f"nothing to extract: the list of {what} is empty")
    return items


def is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def describe(x: Any) -> str:
    """What something is, for a message."""
    if isinstance(x, (Tensor, np.ndarray)):
        return f"{type(x).__name__} of {x.dtype} and shape {tuple(x.shape)}"
    if isinstance(x, (list, tuple)):
        return f"{type(x).__name__} of {len(x)} {type(x[0]).__name__ if x else 'items'}"
    return f"{type(x).__name__} {str(x)[:80]!r}"

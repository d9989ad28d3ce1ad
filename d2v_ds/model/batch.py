"""What a model is given: one micro-batch of one modality, with the masked views drawn for it.

Shapes: B samples, M views of each, N = B * M (sample-major: row = sample * M + view), T tokens,
K kept and J masked tokens of every row (K + J = T).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes"""


@dataclass
class Batch:
    """One micro-batch. Where the student sees visible tokens only, every row of `mask_NT` has the same number of
    masked tokens."""

    modality: str
    source: Tensor
    """Image (B, 3, H, W), waveform (B, samples) or token ids (B, T)."""
    padding_BT: Tensor | None = None
    """Bool, True = no data here; None if no sample of the batch is padded."""
    mask_NT: Tensor | None = None
    """Bool, True = hidden from the student and predicted. None, like the lists below, for whole samples only."""
    keep_NK: Tensor | None = None
    """Positions the student sees, ascending."""
    masked_NJ: Tensor | None = None
    """Positions it predicts, ascending."""
    restore_NT: Tensor | None = None
    """Where each position lies in cat([kept, masked]): undoes the shuffle."""
    counted_NJ: Tensor | None = None
    """Bool, False = filler of a row with fewer masked tokens than another; None = all of `masked_NJ` count."""
    labels: Tensor | None = None
    """What a head should say: ids of classes (B), shares of them (B, C) numbers (B), or ids of symbols (B, L) with -1
    after the last; None in pre-training."""
    is_frozen: bool = False
    """Only the head learns from it."""
    layerdrop_seed: int = 0
    """What layer drop is drawn from: equal on all ranks and micro-batches of a step."""

    @property
    def clones(self) -> int:
        return self.mask_NT.shape[0] // self.source.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Those it holds, by field."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """The same batch on `device`; floating-point sources take `dtype`."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self.tensors().items()}
        if moved["source"].is_floating_point():
            moved["source"] = moved["source"].to(dtype)
        return replace(self, **moved)

    def __reduce__(self) -> tuple[Any, ...]:
        """Its tensors go from one process to another as one: each would open a file and ask for it over a socket, and
        five of those take as long as reading a small image."""
        tensors = self.tensors()
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values()]
        packed = torch.empty(sum(sizes), dtype=torch.uint8)
        for place, tensor in zip(packed.split(sizes), tensors.values(), strict=True):
            view_of(place, tensor.dtype, tensor.shape).copy_(tensor)
        kinds = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in tensors}
        return unpack, (packed, sizes, kinds, others)

    def pin_memory(self) -> Batch:
        return replace(self, **{name: value.pin_memory() for name, value in self.tensors().items()})


def unpack(
    packed: Tensor, sizes: list[int], kinds: list[tuple[str, torch.dtype, tuple[int, ...]]], others: dict
) -> Batch:
    """The batch that `Batch.__reduce__` packed; its tensors are views."""
    pieces = zip(packed.split(sizes), kinds, strict=True)
    return Batch(**others, **{name: view_of(place, dtype, shape) for place, (name, dtype, shape) in pieces})


def view_of(place: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The first bytes of a (bytes,) uint8 tensor as another."""
    return place[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def make_masked(mask_NT: Tensor) -> dict[str, Tensor | None]:
    """The list of masked positions for a student that sees all tokens (v1), as keyword arguments of `Batch`.

    Rows may differ in their number of masked tokens: shorter ones are filled up with positions that do not count.
    """
    counts_N = mask_NT.sum(dim=1)
    order_NT = mask_NT.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    longest = int(counts_N.max())
    counted_NJ = torch.arange(longest)[None] < counts_N[:, None]
    return {
        "mask_NT": mask_NT,
        "masked_NJ": order_NT[:, :longest].contiguous(),
        "counted_NJ": None if bool(counted_NJ.all()) else counted_NJ,
    }


def make_views(mask_NT: Tensor) -> dict[str, Tensor]:
    """The index lists of a mask for a student that sees visible tokens only, as keyword arguments of `Batch`.

    Raises ValueError if rows differ in their number of masked tokens.
    """
    counts = mask_NT.sum(dim=1)
    masked = int(counts[0])
    if not bool((counts == masked).all()):
        raise ValueError(
            f"rows of a mask have {counts.unique().tolist()} masked tokens; every row must have the "
            "same number: equalise the rows (d2v_ds.model.masking.exactly)"
        )
    order_NT = mask_NT.to(torch.uint8).argsort(
        dim=1, stable=True
    )  # visible positions first, each part ascending
    num_kept = mask_NT.shape[1] - masked
    restore_NT = torch.empty_like(order_NT)
    restore_NT.scatter_(1, order_NT, torch.arange(mask_NT.shape[1]).expand_as(order_NT))
    return {
        "mask_NT": mask_NT,
        "keep_NK": order_NT[:, :num_kept].contiguous(),
        "masked_NJ": order_NT[:, num_kept:].contiguous(),
        "restore_NT": restore_NT,
    }

"""How do batches reach a GPU while it computes? The next step's are copied on a stream of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch

from d2v_ds.data import MicroBatch


def uploaded(
    steps: Iterable[list[MicroBatch]], device: torch.device, dtype: torch.dtype
) -> Iterator[list[MicroBatch]]:
    """Each step's micro-batches on a GPU, with floating-point sources as `dtype`; on a CPU as they are.

    A step is taken from `steps` when the one before begins, and its copy, out of pinned memory, runs beside that.
    """
    if device.type != "cuda":
        yield from steps
        return
    stream = torch.cuda.Stream(device)
    present = None
    for micro_batches in steps:
        with torch.cuda.stream(stream):
            coming = [
                dataclasses.replace(micro, batch=micro.batch.to(device, dtype)) for micro in micro_batches
            ]
            copied = stream.record_event()
        if present:
            yield arrived(*present)
        present = coming, copied
    if present:
        yield arrived(*present)


def arrived(micro_batches: list[MicroBatch], copied: torch.cuda.Event) -> list[MicroBatch]:
    """What computes next waits for the copy, and memory that it reads is not given away before it has."""
    computing = torch.cuda.current_stream()
    computing.wait_event(copied)
    for micro in micro_batches:
        for tensor in micro.batch.tensors().values():
            tensor.record_stream(computing)
    return micro_batches

"""Puts weights of other origin into a fresh engine, in fp32 where the optimizer and the average keep theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from d2v_ds.engine.checkpoint import frozen_stretches
from d2v_ds.engine.ema import TeacherEMA
from d2v_ds.engine.partition import fragments, publish_weights
from d2v_ds.model.data2vec import TEACHER


@torch.no_grad()
def put_weights(engine: Any, ema: TeacherEMA, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
    """Whole fp32 tensors under the student's names, at any stage and number of ranks; what is absent stays.

    After `deepspeed.initialize`, not before: it makes its fp32 masters, and the average, of rounded weights.
    """

    def stretch(tensors: dict[str, Tensor], name: str, start: int, numel: int) -> Tensor:
        return tensors[name].reshape(-1)[start : start + numel]

    for f in fragments(engine):
        if f.name in student:
            f.of(f.flat).copy_(stretch(student, f.name, f.start, f.numel))
    for name, start, value in ema.to_restore():
        if name in teacher:
            value.copy_(stretch(teacher, name, start, value.numel()))
    for name, start, value in frozen_stretches(engine):
        tensors, plain = (
            (teacher, name.removeprefix(TEACHER)) if name.startswith(TEACHER) else (student, name)
        )
        if plain in tensors:
            value.copy_(stretch(tensors, plain, start, value.numel()))
    publish_weights(engine)
    ema.publish()

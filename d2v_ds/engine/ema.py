"""The teacher's moving average, on the partitions that the optimizer steps: no rank needs what another has.

teacher += (1 - tau) * (student - teacher) in fp32, from the optimizer's fp32 masters, after each applied step
(arXiv:2202.03555, section 3; bf16 does not move at tau = 0.9999: 99.9 % of its values stay where they are).

Where the teacher is stored in fp32 (fp32 and torch_autocast runs), its own storage is the average. Where it is
bf16 or fp16, one fp32 tensor stands beside each of the optimizer's flat tensors, and is published:
ZeRO-3 into the teacher's shards (no communication), ZeRO-1/2 into a flat buffer gathered once, stage 0 locally.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2v_ds.engine.partition import Fragment, drop_gathered, fragments
from d2v_ds.kernels.ema import follow


def anneal(start: float, end: float, steps: int, done: int) -> float:
    """tau after `done` applied steps: linear from `start` to `end` over `steps`, then `end`."""
    return end if done >= steps else start + (end - start) * done / steps


@dataclass
class Shadow:
    """The fp32 average of one of the optimizer's flat tensors."""

    master: Tensor
    average: Tensor
    teacher: Tensor
    """Low-precision tensor of the same layout, at ZeRO-1/2 of all ranks; its views are the teacher's weights."""


class TeacherEMA:
    """Owns the average; `update(tau)` after each applied step, `values()` for checkpoints."""

    def __init__(self, engine: Any):
        self.engine = engine
        self.stage = engine.zero_optimization_stage()
        self.teachers: dict[str, nn.Parameter] = {n: t for n, _, t in engine.module.followed()}
        self.trained = [n for n, student, _ in engine.module.followed() if student.requires_grad]
        self.fragments: list[Fragment] = [f for f in fragments(engine) if f.name in self.teachers]
        if self.stage == 3:
            optimizer = (
                engine.optimizer
            )  # gathered after the average is published, not after the student's step
            optimizer.persistent_parameters = [p for p in optimizer.persistent_parameters if p.requires_grad]
        self.is_teacher_fp32 = all(t.dtype == torch.float32 for t in self.teachers.values())
        self.shadows = [] if self.is_teacher_fp32 else self.build_shadows()
        if self.is_teacher_fp32:
            pairs = [(s, t) for _, s, t in engine.module.followed() if s.requires_grad]
            self.students = [self.storage(s) for s, _ in pairs]
            self.averages = [self.storage(t) for _, t in pairs]

    @torch.no_grad()
    def update(self, tau: float) -> None:
        """One step; at tau >= 1 the teacher stays, and where there is none, as in fine-tuning, nothing happens."""
        if tau >= 1 or not self.teachers:
            return
        if self.is_teacher_fp32:
            torch._foreach_lerp_(self.averages, self.students, 1 - tau)
        for shadow in self.shadows:
            follow(shadow.average.view(-1), shadow.master.view(-1), self.home(shadow), tau)
        self.share()

    @torch.no_grad()
    def publish(self) -> None:
        """Writes the averages into the weights that the teacher's forward pass uses."""
        for shadow in self.shadows:
            self.home(shadow).copy_(shadow.average.view(-1))
        self.share()

    def home(self, shadow: Shadow) -> Tensor:
        """Where this rank writes the low-precision copy of an average."""
        if self.stage in (1, 2):
            return partition_of(shadow.teacher, shadow.average.numel())
        return shadow.teacher

    def share(self) -> None:
        """After each rank has written its own part: the others' at ZeRO-1/2; nothing moves at ZeRO-3."""
        if self.stage in (1, 2):
            for shadow in self.shadows:
                torch.distributed.all_gather_into_tensor(shadow.teacher, self.home(shadow))
        if self.stage == 3:
            drop_gathered(iter(self.teachers.values()))

    def values(self) -> list[tuple[Fragment, Tensor]]:
        """The fp32 average of every stretch on this rank; views, to be read or written, then `publish`ed."""
        if not self.is_teacher_fp32:
            return [(fragment, fragment.of(shadow.average)) for fragment, shadow in self.by_fragment()]
        values = []
        for f in self.fragments:
            teacher = self.storage(self.teachers[f.name]).view(-1)
            start = 0 if self.stage == 3 else f.start  # a shard begins where the student's does
            values.append((f, teacher.narrow(0, start, f.numel)))
        return values

    def to_restore(self) -> list[tuple[str, int, Tensor]]:
        """(name, start, fp32 view) of all that a checkpoint must fill on this rank: what `values` gives, but whole
        teachers where each rank has them in fp32."""
        if self.is_teacher_fp32 and self.stage < 3:
            return [(n, 0, self.teachers[n].data.view(-1)) for n in self.trained]
        return [(f.name, f.start, value) for f, value in self.values()]

    def storage(self, parameter: nn.Parameter) -> Tensor:
        return (parameter.ds_tensor if self.stage == 3 else parameter).data

    def by_fragment(self) -> list[tuple[Fragment, Shadow]]:
        shadows = {id(s.master): s for s in self.shadows}
        return [(f, shadows[id(f.flat)]) for f in self.fragments]

    @torch.no_grad()
    def build_shadows(self) -> list[Shadow]:
        """One shadow for each of the optimizer's tensors that holds followed parameters, on every rank alike."""
        optimizer = self.engine.optimizer
        if self.stage == 3:
            groups = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
            return [
                Shadow(flat, flat.detach().clone(), self.home_shards(flat, group))
                for flat, group in groups
                if self.follows(group)
            ]
        if self.stage in (1, 2):
            groups = zip(
                optimizer.single_partition_of_fp32_groups,
                optimizer.bit16_groups_flat,
                optimizer.bit16_groups,
                strict=True,
            )
            return [
                Shadow(flat, flat.detach().clone(), self.home_group(whole, group))
                for flat, whole, group in groups
                if self.follows(group)
            ]
        return [
            Shadow(f.flat, f.flat.detach().clone(), self.teachers[f.name].data.view(-1))
            for f in self.fragments
        ]

    def follows(self, group: list[nn.Parameter]) -> bool:
        return self.engine.parameter_names[id(group[0])] in self.teachers  # groups are all or nothing

    def home_shards(self, student_flat: Tensor, group: list[nn.Parameter]) -> Tensor:
        """A low-precision tensor laid out like the student's fp32 one, with the teacher's shards as its views."""
        teachers = [self.teachers[self.engine.parameter_names[id(p)]] for p in group]
        shard = teachers[0].ds_tensor
        flat = torch.zeros(student_flat.numel(), dtype=shard.dtype, device=shard.device)
        offset = 0
        for teacher in teachers:
            view = flat.narrow(0, offset, teacher.ds_tensor.numel())
            view.copy_(teacher.ds_tensor.data)
            teacher.ds_tensor.data = view
            offset += view.numel()
        return flat

    def home_group(self, student_flat: Tensor, group: list[nn.Parameter]) -> Tensor:
        """A copy of the student's low-precision tensor with the teacher's whole parameters as its views."""
        flat = torch.zeros_like(student_flat)
        for student in group:
            teacher = self.teachers[self.engine.parameter_names[id(student)]]
            offset = (student.data.data_ptr() - student_flat.data_ptr()) // student_flat.element_size()
            view = flat.narrow(0, offset, student.numel()).view_as(student)
            view.copy_(teacher.data)
            teacher.data = view
        return flat


def partition_of(flat: Tensor, numel: int) -> Tensor:
    """This rank's part of a tensor that is split evenly over ranks."""
    return flat.narrow(0, torch.distributed.get_rank() * numel, numel)

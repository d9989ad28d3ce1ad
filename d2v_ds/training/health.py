"""Do targets and predictions carry anything? Statistics of one step, over all its samples and ranks.

T tokens, D dim.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from d2v_ds.model.batch import Batch
from d2v_ds.model.data2vec import Output


class Spread:
    """Mean over channels of the standard deviation over tokens (the original's pred_var and target_var)."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """x (tokens, D)."""
        x = x.double()
        count = x.new_full((1, x.shape[1]), len(x))
        sums = torch.cat([count, x.sum(0, keepdim=True), x.square().sum(0, keepdim=True)])
        self.sums = sums if self.sums is None else self.sums + sums

    def value(self) -> float:
        """Over all ranks; unbiased variance, + 1e-6 under the root."""
        sums = self.sums.clone()
        dist.all_reduce(sums)
        count, total, squares = sums
        variance = (squares - total.square() / count) / (count - 1).clamp(min=1)
        return (variance.clamp(min=0) + 1e-6).sqrt().mean().item()


class Content:
    """Share of the targets' variance that differs between samples at the same position.

    mean_c mean_t Var_b(y[b, t, c]) / mean_c Var_{b,t}(y[b, t, c]), over whole unmasked targets, real tokens
    only, biased variance; 0 = targets are a function of position alone.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # (3, T, D): count, sum, sum of squares

    def add(self, targets_BTD: Tensor, padding_BT: Tensor | None) -> None:
        y = targets_BTD.double()
        real = y.new_ones(y.shape[:2]) if padding_BT is None else (~padding_BT).double()
        y = y * real[:, :, None]
        sums = torch.stack([real.sum(0)[:, None].expand(y.shape[1:]), y.sum(0), y.square().sum(0)])
        tokens = max(sums.shape[1], 0 if self.sums is None else self.sums.shape[1])
        self.sums = grow(sums, tokens) if self.sums is None else grow(self.sums, tokens) + grow(sums, tokens)

    def value(self) -> float:
        tokens = torch.tensor(self.sums.shape[1], device=self.sums.device)
        dist.all_reduce(tokens, op=dist.ReduceOp.MAX)  # ranks may have seen different lengths
        sums = grow(self.sums, int(tokens)).contiguous()
        dist.all_reduce(sums)
        count, total, squares = sums[:, sums[0, :, 0] > 1]  # a position seen once has no spread
        if not count.numel():
            return float("nan")
        within = (squares / count - (total / count).square()).mean()
        mean = total.sum(0) / count.sum(0)
        overall = (squares.sum(0) / count.sum(0) - mean.square()).mean()
        return (within / overall.clamp(min=1e-12)).clamp(min=0).item()


def grow(sums: Tensor, tokens: int) -> Tensor:
    return F.pad(sums, (0, 0, 0, tokens - sums.shape[1]))


class Health:
    """The statistics of one step for each modality; ranks see the same modalities in the same order."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[Content, Spread, Spread]] = {}

    @torch.no_grad()
    def observe(self, batch: Batch, output: Output) -> None:
        content, target, pred = self.parts.setdefault(batch.modality, (Content(), Spread(), Spread()))
        content.add(output.targets_BTD, batch.padding_BT)
        counts = slice(None) if output.counts_NJ is None else output.counts_NJ.flatten()
        target.add(output.target_NJD.flatten(0, 1)[counts])
        pred.add(output.pred_NJD.flatten(0, 1)[counts])

    def values(self) -> dict[str, float]:
        """`NAME/content`, `NAME/target_var`, `NAME/pred_var`; all ranks call it."""
        return {f"{name}/{key}": statistic.value()
                for name, parts in sorted(self.parts.items())
                for key, statistic in zip(("content", "target_var", "pred_var"), parts, strict=True)}

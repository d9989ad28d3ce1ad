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
    """Of targets and predictions at masked positions, by channel."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # (6, D): count; sum, square of target; of prediction; squared error

    def add(self, target: Tensor, pred: Tensor) -> None:
        """Both (tokens, D)."""
        target, pred = target.double(), pred.double()
        rows = [
            torch.full_like(target[0], len(target)),
            target.sum(0),
            target.square().sum(0),
            pred.sum(0),
            pred.square().sum(0),
            (pred - target).square().sum(0),
        ]
        sums = torch.stack(rows)
        self.sums = sums if self.sums is None else self.sums + sums

    def values(self) -> dict[str, float]:
        """Over all ranks. `target_var`, `pred_var`: mean over channels of the standard deviation over tokens, as
        the original calls and computes them (unbiased, + 1e-6 under the root). `explained`: share of the targets'
        variance that the predictions explain, 0 for predicting the mean target."""
        sums = self.sums.clone()
        dist.all_reduce(sums)
        count, target, target_square, pred, pred_square, error = sums
        target_sum = target_square - target.square() / count  # of squared differences from the mean
        pred_sum = pred_square - pred.square() / count
        explained = 1 - error.sum() / target_sum.sum().clamp(min=1e-12)
        return {
            "target_var": standard_deviation(target_sum, count),
            "pred_var": standard_deviation(pred_sum, count),
            "explained": explained.item(),
        }


def standard_deviation(squares: Tensor, count: Tensor) -> float:
    return ((squares / (count - 1).clamp(min=1)).clamp(min=0) + 1e-6).sqrt().mean().item()


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
        self.parts: dict[str, tuple[Content, Spread]] = {}

    @torch.no_grad()
    def observe(self, batch: Batch, output: Output) -> None:
        content, spread = self.parts.setdefault(batch.modality, (Content(), Spread()))
        content.add(output.targets_BTD, batch.padding_BT)
        counts = slice(None) if output.counts_NJ is None else output.counts_NJ.flatten()
        spread.add(output.target_NJD.flatten(0, 1)[counts], output.pred_NJD.flatten(0, 1)[counts])

    def values(self) -> dict[str, float]:
        """`NAME/content`, `NAME/target_var`, `NAME/pred_var`, `NAME/explained`; all ranks call it."""
        return {
            f"{name}/{key}": value
            for name, (content, spread) in sorted(self.parts.items())
            for key, value in {"content": content.value(), **spread.values()}.items()
        }

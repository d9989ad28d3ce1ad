"""The regression loss of data2vec, elementwise and summed, always in fp32."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from d2v_ds.config import Config


class Loss(Config):
    beta: float = 0.0
    """0 = squared error; otherwise smooth L1 with this threshold."""
    scale: float | None = None
    """Factor on every element; None = 1 / sqrt(D)."""
    cls_weight: float = 0.0
    """Weight of the class token's loss, which is summed over the rows (samples x views) of a forward pass and
    multiplied by their number of masked tokens: in effect cls_weight x rows times its mean."""
    cls_rows: PositiveInt | None = None
    """Rows that `cls_weight` was chosen for: the effective weight stays cls_weight x cls_rows whatever the
    micro-batch. None = as in the original, where it grows with the rows."""
    weight: float = 1.0
    """Of this modality in a joint model."""

    def factor(self, dim: int) -> float:
        """On every element of vectors of `dim` channels."""
        return dim**-0.5 if self.scale is None else self.scale


def regression(pred: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """Elementwise loss (..., D) in fp32; of masked tokens its sum is wanted, d2v_ds.kernels.regression."""
    pred, target = pred.float(), target.float()
    if loss.beta == 0:
        value = F.mse_loss(pred, target, reduction="none")
    else:
        value = F.smooth_l1_loss(pred, target, reduction="none", beta=loss.beta)
    return value * loss.factor(pred.shape[-1])

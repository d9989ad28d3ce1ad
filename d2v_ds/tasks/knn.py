"""Nearest neighbours by cosine, as a judge of frozen features that has nothing to tune.

N training samples, M test samples, D features, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
"""Both as in the DINO papers' evaluations."""


def knn(
    train_ND: Tensor,
    labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    neighbours: tuple[int, ...] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    chunk: int = 1024,
) -> dict[int, float]:
    """Accuracy of each number k of neighbours that the training part has; votes weigh exp(cosine / temperature)."""
    ks = [k for k in neighbours if k <= len(train_ND)]
    if not ks:
        return {}
    labels_N, test_labels_M = count_classes(labels_N, test_labels_M)
    train_DN, classes = F.normalize(train_ND.float(), dim=1).T, int(labels_N.max()) + 1
    right = dict.fromkeys(ks, 0)
    for test_KD, truth_K in zip(test_MD.split(chunk), test_labels_M.split(chunk), strict=True):
        cosine, nearest = (F.normalize(test_KD.float(), dim=1) @ train_DN).topk(max(ks), dim=1)
        weights_Kk, labels_Kk = (cosine / temperature).exp(), labels_N[nearest]
        for k in ks:
            votes_KC = weights_Kk.new_zeros(len(test_KD), classes)
            votes_KC.scatter_add_(1, labels_Kk[:, :k], weights_Kk[:, :k])
            right[k] += int((votes_KC.argmax(1) == truth_K).sum())
    return {k: count / len(test_MD) for k, count in right.items()}


def count_classes(labels_N: Tensor, test_labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """The classes of the training part numbered without gaps, since an id may be of any size; -1: none of them."""
    classes, labels_N = labels_N.unique(return_inverse=True)
    nearest_M = torch.searchsorted(classes, test_labels_M).clamp(max=len(classes) - 1)
    return labels_N, torch.where(classes[nearest_M] == test_labels_M, nearest_M, -1)

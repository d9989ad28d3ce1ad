"""Nearest neighbours by cosine, as a judge of frozen features that has nothing to tune.

N training samples, M test samples, D features, C classes.
"""

from __future__ import annotations

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
    train_DN, votes_NC = F.normalize(train_ND.float(), dim=1).T, F.one_hot(labels_N).float()
    right = dict.fromkeys(ks, 0)
    for test_KD, truth_K in zip(test_MD.split(chunk), test_labels_M.split(chunk), strict=True):
        cosine, nearest = (F.normalize(test_KD.float(), dim=1) @ train_DN).topk(max(ks), dim=1)
        weights_Kk1 = (cosine / temperature).exp()[:, :, None]
        ballots_KkC = weights_Kk1 * votes_NC[nearest]
        for k in ks:
            right[k] += int((ballots_KkC[:, :k].sum(1).argmax(1) == truth_K).sum())
    return {k: count / len(test_MD) for k, count in right.items()}

"""How many directions an embedding uses, without any label: RankMe, LiDAR and alpha-ReQ.

N samples, Q views of each, D features. All from the eigenvalues of a D x D matrix, in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_rank(values: Tensor) -> float:
    """exp of the entropy of their shares: the number of values, if they are equal."""
    values = values.clamp(min=0)
    return torch.special.entr(values / values.sum().clamp(min=1e-300)).sum().exp().item()


def rankme(x_ND: Tensor) -> float:
    """Effective rank of embeddings, by their singular values (arXiv:2210.02885). Compares runs of one method."""
    x = x_ND.double()
    return entropy_rank(torch.linalg.eigvalsh(x.T @ x).clamp(min=0).sqrt())


def alpha_req(x_ND: Tensor) -> float:
    """Exponent alpha of the covariance's eigenvalues, which fall as i^-alpha (arXiv:2202.05808): a line through
    log eigenvalue over log i. Near 1 is best; much above, few directions hold all; nan for fewer than two."""
    if len(x_ND) < 3:
        return float("nan")
    x = x_ND.double() - x_ND.double().mean(0)
    values = torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0)
    values = values[: len(x) - 1]
    values = values[values > 1e-12 * values[0].clamp(min=1e-300)]
    if len(values) < 2:
        return float("nan")
    place = torch.arange(1, len(values) + 1, dtype=values.dtype).log()
    place = place - place.mean()
    return -(place @ values.log() / place.square().sum()).item()


def lidar(x_NQD: Tensor, delta: float = 1e-4) -> float:
    """Effective rank of what tells samples apart, in units of what differs between views of one sample
    (arXiv:2312.04000): of Sw^-1/2 Sb Sw^-1/2, Sb the covariance of the samples' means and Sw that of views around
    them, + delta on its diagonal. nan for fewer than two samples or views."""
    if min(x_NQD.shape[:2]) < 2:
        return float("nan")
    x = x_NQD.double()
    mean_ND = x.mean(1)
    between = mean_ND - mean_ND.mean(0)
    within = (x - mean_ND[:, None]).flatten(0, 1)
    s_between = between.T @ between / (len(x) - 1)
    s_within = within.T @ within / (len(x) * (x.shape[1] - 1))
    values, vectors = torch.linalg.eigh(s_within + delta * torch.eye(x.shape[2], dtype=x.dtype))
    whiten = vectors * values.rsqrt()
    return entropy_rank(torch.linalg.eigvalsh(whiten.T @ s_between @ whiten))

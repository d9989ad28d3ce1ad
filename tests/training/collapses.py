"""Micro-batches of teachers and students that fail in a known way, and of healthy ones, with real target maths."""

from __future__ import annotations

import torch
from torch import Tensor

from d2v_ds.kernels.targets import make_targets
from d2v_ds.model.batch import Batch, make_views
from d2v_ds.model.data2vec import Observed, Output

SAMPLES, TOKENS, DIM, LAYERS, VIEWS = 16, 100, 96, 4, 2
NORMS = {
    "audio": {"per_layer": "instance", "final": ()},
    "image": {"per_layer": "instance", "final": ("layer",)},
}
STATES = {
    "healthy": "healthy",
    "position-only": "position-only",
    "constant": "constant",
    "rank-4": "low-rank",
}
"""State of the teacher and the verdict that it deserves."""


def draw(state: str, samples: int, tokens: int, dim: int, seed: int = 0) -> Tensor:
    """Feed-forward outputs (B, T, D) of one layer of a teacher in this state."""
    g = torch.Generator().manual_seed(seed)
    mean_D = torch.randn(dim, generator=g)
    noise_BTD = torch.randn(samples, tokens, dim, generator=g)
    if state == "healthy":
        return mean_D + noise_BTD
    if state == "position-only":
        return mean_D + torch.randn(tokens, dim, generator=g) + 1e-4 * noise_BTD
    if state == "constant":
        return mean_D + 1e-4 * noise_BTD
    directions = torch.randn(4, dim, generator=torch.Generator().manual_seed(99))  # of all layers
    return mean_D + torch.randn(samples, tokens, 4, generator=g) @ directions


def micro_batch(
    state: str, norms: str = "audio", samples: int = SAMPLES, dim: int = DIM, seed: int = 0
) -> tuple[Batch, Output]:
    """What a forward pass shows of such a teacher, with a student that predicts its targets well."""
    g = torch.Generator().manual_seed(seed + 1)
    layers = [draw(state, samples, TOKENS, dim, 10 * seed + k) for k in range(LAYERS)]
    targets_BTD = make_targets(layers, **NORMS[norms])
    mask_NT = torch.rand(samples * VIEWS, TOKENS, generator=g).argsort(1) < TOKENS // 2
    batch = Batch(norms, torch.zeros(samples, 1), **make_views(mask_NT))
    rows = torch.arange(len(mask_NT))[:, None]
    target_NJD = targets_BTD[rows // VIEWS, batch.masked_NJ]
    pred_NJD = target_NJD + 0.5 * torch.randn(target_NJD.shape, generator=g)
    hidden_NKD = torch.randn(len(mask_NT), TOKENS // 2, dim, generator=g)
    local_BTD = torch.randn(samples, TOKENS, dim, generator=g)
    observed = Observed(sum(layers) / LAYERS, hidden_NKD, local_BTD)
    one = torch.ones(())
    return batch, Output(one, one, {}, pred_NJD, batch.masked_NJ, None, targets_BTD, observed)


def pad(batch: Batch, output: Output, lengths: list[int]) -> tuple[Batch, Output]:
    """The same with samples of these lengths, and rubbish where there is nothing."""
    batch.padding_BT = torch.arange(TOKENS)[None] >= torch.tensor(lengths)[:, None]
    padding_NT = batch.padding_BT.repeat_interleave(batch.clones, dim=0)
    counts_NJ = ~padding_NT.gather(1, batch.masked_NJ)
    for x_BTD in (output.targets_BTD, output.observed.layers_BTD, output.observed.local_BTD):
        x_BTD[batch.padding_BT] = 1e6
    output.observed.hidden_NKD[padding_NT.gather(1, batch.keep_NK)] = 1e6
    output.pred_NJD[~counts_NJ] = 1e6
    return batch, output._replace(counts_NJ=counts_NJ)

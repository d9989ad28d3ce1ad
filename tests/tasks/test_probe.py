"""Ridge probes: exact leave-one-out, one definition for train and test, no direction below the precision of 16 bits."""

from __future__ import annotations

import pytest
import torch

from d2v_ds.tasks.probe import PENALTIES, ridge


def draw(samples: int, dim: int, seed: int, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=g)
    centres = torch.randn(3, dim, generator=torch.Generator().manual_seed(0))
    return centres[labels] + noise * torch.randn(samples, dim, generator=g), labels


def fit(x: torch.Tensor, y: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    onehot = torch.nn.functional.one_hot(y, 3).double()
    mean = onehot.mean(0)
    weights = torch.linalg.solve(
        x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (onehot - mean)
    )
    return weights, mean


def test_the_penalty_is_the_one_that_leaving_each_sample_out_chooses():
    """Refitting without each sample in turn, features and mean as standardised on all, finds the same penalty."""
    x, y = draw(40, 15, 1, noise=3.0)
    test_x, test_y = draw(200, 15, 2, noise=3.0)
    accuracy, penalty = ridge(x, y, test_x, test_y)
    z = ((x - x.mean(0)) / x.std(0)).double()
    best = (-1.0, 0.0)
    for candidate in (p for p in PENALTIES if p >= 0.1):
        right = 0
        for i in range(len(z)):
            rest = torch.arange(len(z)) != i
            centred = torch.nn.functional.one_hot(y, 3).double()[rest]
            design = torch.cat([z[rest], torch.ones(len(z) - 1, 1, dtype=z.dtype)], dim=1)
            shrink = candidate * torch.eye(design.shape[1], dtype=z.dtype)
            shrink[-1, -1] = 0  # the intercept is not penalised
            weights = torch.linalg.solve(design.T @ design + shrink, design.T @ centred)
            right += int((torch.cat([z[i], torch.ones(1)]) @ weights).argmax() == y[i])
        best = max(best, (right / len(z), candidate))
    assert penalty == best[1]
    weights, mean = fit(z, y, penalty)
    test_z = ((test_x - x.mean(0)) / x.std(0)).double()
    assert accuracy == pytest.approx(((test_z @ weights + mean).argmax(1) == test_y).double().mean().item())


def test_a_direction_below_16_bits_is_read_only_if_asked_for():
    """Labels hidden in a difference of 1e-4 between two nearly equal features."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(2, (2000,), generator=g)
    base = torch.randn(2000, generator=g, dtype=torch.float64)
    x = torch.stack([base, base + 1e-4 * (2 * y - 1)], dim=1)
    hidden, _ = ridge(x[:1000], y[:1000], x[1000:], y[1000:])
    found, penalty = ridge(x[:1000], y[:1000], x[1000:], y[1000:], lowest_penalty=1e-8)
    rounded, _ = ridge(x[:1000].bfloat16().float(), y[:1000], x[1000:].bfloat16().float(), y[1000:], 1e-8)
    assert hidden < 0.6 < 0.95 < found and penalty < 0.1
    assert rounded < 0.6


def test_features_without_labels_in_them_score_chance():
    x, y = draw(600, 20, 3)
    accuracy, _ = ridge(torch.randn_like(x), y, *draw(600, 20, 4))
    assert accuracy < 0.42

"""RankMe, alpha-ReQ and LiDAR find the numbers that data were made with."""

from __future__ import annotations

import math

import pytest
import torch

from d2v_ds.tasks.spectrum import alpha_req, lidar, rankme


def orthonormal(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, dim, dtype=torch.float64, generator=g))[0]


@pytest.mark.parametrize("rank", [1, 5, 31])
def test_rankme_counts_equal_directions(rank: int) -> None:
    x = orthonormal(200, rank) @ orthonormal(31, 31)[:rank]
    assert rankme(x) == pytest.approx(rank, rel=1e-4)


def test_rankme_weighs_singular_values_not_their_squares() -> None:
    """Two directions of lengths 3 and 1: shares 3/4 and 1/4."""
    x = orthonormal(50, 2) * torch.tensor([3.0, 1.0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rankme(x) == pytest.approx(math.exp(entropy), rel=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_is_the_exponent_of_the_spectrum(alpha: float) -> None:
    places = torch.arange(1, 24, dtype=torch.float64)
    basis = orthonormal(301, 24, seed=1)
    columns = basis - basis.mean(0)  # no mean, nearly orthogonal
    columns = torch.linalg.qr(columns)[0][:, :23]
    columns = columns - columns.mean(0)
    assert alpha_req(columns * places ** (-alpha / 2) + 7) == pytest.approx(alpha, abs=0.02)


@pytest.mark.parametrize("samples", [1, 2])
def test_few_samples_have_no_exponent(samples: int) -> None:
    """They have no two eigenvalues; RankMe is at most their number."""
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(0))
    assert math.isnan(alpha_req(x)) and 1 <= rankme(x) <= samples + 1e-6


def test_lidar_counts_directions_that_tell_samples_apart() -> None:
    """Samples differ in 4 directions, views in all 16: RankMe sees more, LiDAR about 4."""
    g = torch.Generator().manual_seed(0)
    samples = torch.randn(400, 1, 4, generator=g, dtype=torch.float64) @ orthonormal(16, 16)[:4] * 50
    x = samples + torch.randn(400, 8, 16, generator=g, dtype=torch.float64)
    assert lidar(x) == pytest.approx(4, abs=0.3)
    assert rankme(x.mean(1)) > 4.2


def test_lidar_ignores_how_much_views_differ_everywhere() -> None:
    """Scaling one feature, in samples and views alike, changes nothing but delta's share."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(300, 1, 8, generator=g, dtype=torch.float64) + torch.randn(
        300, 6, 8, generator=g, dtype=torch.float64
    )
    scaled = x * torch.tensor([100.0, *[1.0] * 7])
    assert lidar(scaled) == pytest.approx(lidar(x), rel=1e-3)
    assert math.isnan(lidar(x[:1])) and math.isnan(lidar(x[:, :1]))

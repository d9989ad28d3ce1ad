"""Neighbours vote as a loop over them says."""

from __future__ import annotations

import math

import torch

from d2v_ds.tasks.knn import TEMPERATURE, knn


def test_votes_are_those_of_a_loop() -> None:
    """Cosine, weights exp(cosine / T), in chunks, for every k that there are neighbours for."""
    g = torch.Generator().manual_seed(0)
    train, test = torch.randn(53, 7, generator=g), torch.randn(29, 7, generator=g)
    labels, truth = torch.randint(4, (53,), generator=g), torch.randint(4, (29,), generator=g)
    found = knn(train, labels, test, truth, chunk=8)
    assert list(found) == [10, 20]  # 100 and 200 are more than there are
    for k in found:
        right = 0
        for x, y in zip(test, truth, strict=True):
            cosine = torch.nn.functional.cosine_similarity(x[None], train)
            votes = [0.0] * 4
            for i in sorted(range(53), key=lambda i: -float(cosine[i]))[:k]:
                votes[int(labels[i])] += math.exp(float(cosine[i]) / TEMPERATURE)
            right += max(range(4), key=lambda c: votes[c]) == int(y)
        assert found[k] == right / 29


def test_length_does_not_matter_and_near_ones_win() -> None:
    """Two near neighbours of one class against eight far ones of another."""
    train = torch.cat([torch.tensor([[1.0, 0.1], [1.0, -0.1]]), torch.tensor([[-1.0, 1.0]]).repeat(8, 1)])
    labels = torch.tensor([1, 1, *[0] * 8])
    test = torch.tensor([[5.0, 0.0], [0.01, 0.0]])
    assert knn(train, labels, test, torch.tensor([1, 1]), neighbours=(10,)) == {10: 1.0}
    assert knn(train[:5], labels[:5], test, torch.tensor([1, 1])) == {}

"""Neighbours vote as a loop over them says."""

from __future__ import annotations

import math

import pytest
import torch

from d2v_ds.tasks.knn import TEMPERATURE, knn
from d2v_ds.tasks.probe import ridge
from d2v_ds.tasks.readout import Training, Vectors, readout


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


@pytest.mark.parametrize("kind", ["knn", "ridge", "linear"])
def test_class_ids_may_be_of_any_size(kind: str) -> None:
    """Such as 1440764 of n01440764: a column for each number up to the largest does not fit into memory."""
    g = torch.Generator().manual_seed(0)
    labels, truth = (
        torch.randint(3, (40,), generator=g),
        torch.randint(4, (30,), generator=g),
    )  # 3 in the test alone
    centres = torch.randn(4, 8, generator=g)
    train, test = (centres[y] + torch.randn(len(y), 8, generator=g) for y in (labels, truth))

    def judge(labels: torch.Tensor, truth: torch.Tensor) -> object:
        if kind == "linear":
            x = Vectors(train), labels, Vectors(test), truth
            return readout(*x, Training(epochs=2), torch.device("cpu"))
        return (knn if kind == "knn" else ridge)(train, labels, test, truth)

    assert judge(labels * 10**12 + 5, truth * 10**12 + 5) == judge(labels, truth)

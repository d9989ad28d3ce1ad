"""Metrics of GLUE against numbers worked out by hand."""

import pytest
import torch

from d2v_ds.tasks.metrics import check_metrics, measure


def logits(*classes: int, number: int = 2) -> torch.Tensor:
    return 3 * torch.nn.functional.one_hot(torch.tensor(classes), number).float()


def test_classes_are_measured_as_the_formulas_say():
    """3 true positives, 1 false positive, 2 false negatives, 4 true negatives."""
    said, truth = logits(1, 1, 1, 1, 0, 0, 0, 0, 0, 0), torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    found = measure(("accuracy", "f1", "matthews", "macro_f1"), said, truth)
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert found["matthews"] == pytest.approx((3 * 4 - 1 * 2) / (4 * 5 * 5 * 6) ** 0.5)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 * 4 / (2 * 4 + 3)) / 2)
    assert found["score"] == pytest.approx(sum(v for k, v in found.items() if k != "score") / 4)


def test_numbers_are_measured_by_value_and_by_rank():
    """Anscombe-like: ranks agree but for one swap, values do not."""
    said, truth = torch.tensor([[1.0], [2.0], [3.0], [10.0]]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    found = measure(("pearson", "spearman"), said, truth)
    x, y = said[:, 0] - 4, truth - 2.5
    assert found["pearson"] == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())))
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))


@pytest.mark.filterwarnings("error")
def test_what_is_undefined_is_zero_without_a_warning():
    assert measure(("f1", "matthews"), logits(0, 0, 0), torch.tensor([0, 0, 0]))["score"] == 0
    assert measure(("matthews",), logits(1, 1, 1), torch.tensor([0, 1, 1]))["score"] == 0
    assert measure(("pearson", "spearman"), torch.ones(3, 1), torch.tensor([1.0, 2.0, 3.0]))["score"] == 0


def test_no_metric_at_all_is_an_error():
    with pytest.raises(ValueError, match=r"^task.metrics= names no metric; there are accuracy, f1"):
        check_metrics((), 2, "task.metrics=")

"""Linear layers on a CPU: each product against float64, whoever computes it."""

import pytest
import torch
import torch.nn.functional as F

from d2v_ds.kernels.linear import WIDE, linear

SHAPES = [(7, 13, 5), (40, 96, WIDE), (40, WIDE, 96), (3, WIDE + 1, WIDE + 3), (1, 1, 1)]


@pytest.mark.parametrize("rows, inputs, outputs", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_value_and_gradients_equal_float64(rows: int, inputs: int, outputs: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    shapes = [(2, rows, inputs), (outputs, inputs), (outputs,)][: 2 + has_bias]
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in given]
    d_y = torch.randn(2, rows, outputs)
    y = linear(*given, *[None] * (not has_bias))
    expected = F.linear(*exact)
    y.backward(d_y)
    expected.backward(d_y.double())
    for got, truth in [(y, expected), *((a.grad, b.grad) for a, b in zip(given, exact, strict=True))]:
        assert got.shape == truth.shape and got.dtype == torch.float32
        assert (got - truth).abs().max() <= 2e-6 * truth.abs().max() + 1e-7


def test_what_it_is_not_for_is_left_to_torch() -> None:
    x, weight = torch.randn(4, 8), torch.randn(WIDE, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, None).dtype == torch.bfloat16
    assert linear(x.double(), weight.double(), None).dtype == torch.float64
    assert linear(x[:0], weight, None).shape == (0, WIDE)
    assert linear(x.t()[:, :1].t(), weight, None).shape == (1, WIDE)  # rows that do not follow one another


def test_inputs_without_gradients_get_none() -> None:
    x, weight = torch.randn(4, 8), torch.randn(WIDE, 8, requires_grad=True)
    linear(x, weight, None).sum().backward()
    assert x.grad is None and weight.grad is not None

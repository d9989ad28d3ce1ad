"""A linear layer in fp32 on a CPU, by oneDNN where that is faster than the BLAS which torch's own layer calls.

Operations: 2 R I O forward and 4 R I O backward for R rows, I inputs and O outputs; each of the three products reads
two matrices and writes one. torch takes oneDNN for bf16 alone, so this calls the operator that torch.compile uses.
Of some products BLAS is the faster one: `by_onednn` has the rule, measured (docs/benchmarks/step.md), and always the
same for a shape, since both round differently and a run that is repeated is to be the same to the bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDE = 2048
"""Columns of a result from which on oneDNN is faster, of outputs and of the gradient of inputs"""


def product(a_RI: Tensor, b_OI: Tensor, bias_O: Tensor | None, by_onednn: bool) -> Tensor:
    """a b^T + bias, (R, O)."""
    if by_onednn:
        return torch.ops.mkldnn._linear_pointwise(a_RI, b_OI, bias_O, "none", [], "")
    return F.linear(a_RI, b_OI, bias_O)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_RI, weight_OI)
        ctx.has_bias = bias_O is not None
        return product(x_RI, weight_OI, bias_O, len(weight_OI) >= WIDE)

    @staticmethod
    def backward(ctx, d_RO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_RI, weight_OI = ctx.saved_tensors
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = product(d_RO, weight_OI.t(), None, weight_OI.shape[1] >= WIDE)
        if ctx.needs_input_grad[1]:
            d_weight = product(d_RO.t(), x_RI.t(), None, True)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            d_bias = d_RO.sum(0)
        return d_x, d_weight, d_bias


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b: (..., I) -> (..., O), as torch.nn.functional.linear."""
    if not is_faster(x, weight_OI):
        return F.linear(x, weight_OI, bias_O)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight_OI, bias_O).view(*x.shape[:-1], -1)


def is_faster(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether x and W are what this is for: fp32 on a CPU, in eager mode."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight_OI.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )

"""The loss at the masked positions of all views: gather, difference and sum in one pass, and one more backward.

Bytes per prediction element: forward reads the prediction (2 in bf16) and its target (4), backward both again and
writes the gradient (2); the M views of a sample share its targets, so most of the 4 come from the L2 cache. Plain torch
writes gathered targets, fp32 predictions, elements and their multiples (4 each), and keeps three of them for the
backward pass. Operations: about 4 per element, so memory alone sets the time.
Traded: the sum is over channels of groups of rows first, so it differs from torch's in the last bits.

Shapes: B samples, M views, N = B * M, T tokens, J masked tokens, D channels.
"""

from __future__ import annotations  # the kernels' annotations name tl, which is absent without triton

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this machine: the reference serves alone
    triton = None

ROWS, BLOCK_D = 8, 256  # 16 values a thread: 16-byte loads of both inputs
NUM_WARPS = 4
MAX_PROGRAMS = 1024  # of rows: each writes one partial sum of D channels


def regress_reference(
    pred_NJD: Tensor,
    targets_BTD: Tensor,
    masked_NJ: Tensor,
    counted_NJ: Tensor | None = None,
    *,
    beta: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """The sum in plain torch: the slow truth, and the path of the CPU."""
    _check(pred_NJD, targets_BTD, masked_NJ, counted_NJ, beta)
    pred, target = pred_NJD.float(), gather_targets(targets_BTD, masked_NJ).float()
    if counted_NJ is not None:  # where, not a product: what does not count may be inf or NaN
        pred, target = (x.where(counted_NJ[:, :, None], 0.0) for x in (pred, target))
    if beta == 0:
        elements_NJD = F.mse_loss(pred, target, reduction="none")
    else:
        elements_NJD = F.smooth_l1_loss(pred, target, reduction="none", beta=beta)
    return (elements_NJD * scale).sum()


def gather_targets(targets_BTD: Tensor, masked_NJ: Tensor) -> Tensor:
    """Every view's targets at its masked positions; (N, J, D)."""
    samples, tokens, dim = targets_BTD.shape
    first_N = (
        torch.arange(samples, device=masked_NJ.device).repeat_interleave(len(masked_NJ) // samples) * tokens
    )
    rows = (masked_NJ + first_N[:, None]).flatten()  # a third of the time of two indices
    return targets_BTD.reshape(-1, dim).index_select(0, rows).view(*masked_NJ.shape, dim)


def _check(
    pred_NJD: Tensor, targets_BTD: Tensor, masked_NJ: Tensor, counted_NJ: Tensor | None, beta: float
) -> None:
    rows, dim = masked_NJ.shape, targets_BTD.shape[2]
    if pred_NJD.shape != (*rows, dim):
        raise ValueError(
            f"predictions have shape {tuple(pred_NJD.shape)}, and must have {(*rows, dim)} like masked_NJ and the "
            "targets' channels; predict at the masked positions alone"
        )
    if len(targets_BTD) == 0 or rows[0] % len(targets_BTD):
        raise ValueError(
            f"{rows[0]} views are no multiple of {len(targets_BTD)} samples; give every sample as many views"
        )
    if counted_NJ is not None and counted_NJ.shape != rows:
        raise ValueError(
            f"counted_NJ has shape {tuple(counted_NJ.shape)}, must have masked_NJ's {tuple(rows)}"
        )
    if not beta >= 0:
        raise ValueError(f"beta is {beta}, and must be 0 (squared error) or more (smooth L1); set loss.beta")


def _jit(kernel: Callable) -> Callable:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _difference(pred, targets, masked, counted, row, column, rows, J_views, T, D):
    """prediction - target of some rows and columns, 0 where it does not count; and which lie inside."""
    is_row = row < rows
    inside = is_row[:, None] & (column < D)[None, :]
    place = (row // J_views) * T + tl.load(masked + row, mask=is_row, other=0)
    counts = inside
    if counted is not None:
        counts = inside & (tl.load(counted + row, mask=is_row, other=0) != 0)[:, None]
    value = tl.load(pred + row[:, None] * D + column[None, :], mask=counts, other=0).to(tl.float32)
    target = tl.load(targets + place[:, None] * D + column[None, :], mask=counts, other=0).to(tl.float32)
    return value - target, inside


@_jit
def _sum_kernel(
    pred,  # (rows, D), rows = N * J
    targets,  # (B * T, D)
    masked,  # (rows) int64
    counted,  # (rows) bytes, or None
    partial,  # (programs, D) fp32, written
    rows,
    J_views,  # J * M: rows of a sample
    T,
    D,
    beta,
    SQUARED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of every tl.num_programs(0)-th group of ROWS rows, for BLOCK_D channels."""
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for group in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.full([ROWS], group, tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: rows * D can pass 2**31
        d, _ = _difference(pred, targets, masked, counted, row, column, rows, J_views, T, D)
        if SQUARED:
            total += d * d
        else:
            size = tl.abs(d)
            total += tl.where(size < beta, 0.5 * d * d / beta, size - 0.5 * beta)
    tl.store(partial + tl.program_id(0) * D + column, tl.sum(total, axis=0), mask=column < D)


@_jit
def _gradient_kernel(
    pred,
    targets,
    masked,
    counted,
    factor,  # (1) fp32: the loss' gradient times scale
    d_pred,  # (rows, D), written
    rows,
    J_views,
    T,
    D,
    beta,
    SQUARED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One group of ROWS rows and BLOCK_D channels."""
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d, inside = _difference(pred, targets, masked, counted, row, column, rows, J_views, T, D)
    slope = 2 * d if SQUARED else tl.where(tl.abs(d) < beta, d / beta, tl.where(d > 0, 1.0, -1.0))
    slope = slope * tl.load(factor)
    tl.store(d_pred + row[:, None] * D + column[None, :], slope.to(d_pred.dtype.element_ty), mask=inside)


class _Regress(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pred_NJD: Tensor,
        targets_BTD: Tensor,
        masked_NJ: Tensor,
        counted_NJ: Tensor | None,
        beta: float,
        scale: float,
    ) -> Tensor:
        pred, targets, masked = (x.contiguous() for x in (pred_NJD, targets_BTD, masked_NJ))
        counted = None if counted_NJ is None else counted_NJ.contiguous().view(torch.uint8)
        ctx.save_for_backward(pred, targets, masked, counted)
        ctx.beta, ctx.scale = beta, scale
        dim = pred.shape[2]
        programs = min(MAX_PROGRAMS, triton.cdiv(masked.numel(), ROWS))
        partial = _allocate((programs, dim), torch.float32, pred.device)
        grid = (programs, triton.cdiv(dim, BLOCK_D))
        with torch.cuda.device_of(pred):
            _sum_kernel[grid](
                pred, targets, masked, counted, partial, *_sizes(masked, targets), float(beta),
                SQUARED=beta == 0, ROWS=ROWS, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
            )  # fmt: skip
        return partial.sum() * scale

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        pred, targets, masked, counted = ctx.saved_tensors
        d_pred = _allocate(pred.shape, pred.dtype, pred.device)
        grid = (triton.cdiv(masked.numel(), ROWS), triton.cdiv(pred.shape[2], BLOCK_D))
        factor = (d_loss.float() * ctx.scale).reshape(1)
        with torch.cuda.device_of(pred):
            _gradient_kernel[grid](
                pred, targets, masked, counted, factor, d_pred, *_sizes(masked, targets), float(ctx.beta),
                SQUARED=ctx.beta == 0, ROWS=ROWS, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
            )  # fmt: skip
        return d_pred, None, None, None, None, None


def _sizes(masked_NJ: Tensor, targets_BTD: Tensor) -> tuple[int, int, int, int]:
    """rows, rows of a sample, T, D."""
    samples, tokens, dim = targets_BTD.shape
    return masked_NJ.numel(), masked_NJ.numel() // samples, tokens, dim


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def regress_triton(
    pred_NJD: Tensor,
    targets_BTD: Tensor,
    masked_NJ: Tensor,
    counted_NJ: Tensor | None = None,
    *,
    beta: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """The sum in one launch, its gradient in another."""
    _check(pred_NJD, targets_BTD, masked_NJ, counted_NJ, beta)
    if pred_NJD.numel() == 0:
        return pred_NJD.float().sum()
    return _Regress.apply(pred_NJD, targets_BTD, masked_NJ, counted_NJ, beta, scale)


def regress(
    pred_NJD: Tensor,
    targets_BTD: Tensor,
    masked_NJ: Tensor,
    counted_NJ: Tensor | None = None,
    *,
    beta: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """scale x the sum of squared errors (beta = 0) or smooth L1 losses of predictions at masked positions; fp32.

    pred_NJD: any float dtype; the only input that gets a gradient.
    targets_BTD: of whole samples; views are sample-major (row = sample * M + view).
    masked_NJ: int64, positions in 0..T-1.
    counted_NJ: bool, False = this position counts for nothing (filler, padding); None = all count.

    Raises ValueError for shapes that do not fit each other and a negative beta.
    """
    make = regress_triton if pred_NJD.is_cuda and triton is not None else regress_reference
    return make(pred_NJD, targets_BTD, masked_NJ, counted_NJ, beta=beta, scale=scale)

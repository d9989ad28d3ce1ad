"""The teacher's step: average += (1 - tau) * (master - average) in fp32, and its low-precision copy.

Bytes per parameter: reads the master (4) and the average (4), writes the average (4) and a bf16 or fp16 copy
(2): 14, or 12 without a copy. Operations: 3, so memory alone sets the time. lerp_ and then copy_ move 18.
Traded: where a view begins off a 16-byte boundary the loads are narrower, and no launch is added to align it.
"""

from __future__ import annotations  # the kernel's annotations name tl, which is absent without triton

from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this machine: the CPU's path serves alone
    triton = None

BLOCK = 2048  # 8 consecutive values a thread: two 16-byte loads of each input, one 16-byte store of the copy
NUM_WARPS = 8
CHUNK = 2**18  # values a CPU thread takes at once: 1 MB, which the cast finds in a cache; less costs calls


def follow_reference(average: Tensor, master: Tensor, copy: Tensor | None, tau: float) -> None:
    """The step in plain torch, whole tensors at a time: the slow truth."""
    _check(average, master, copy, tau)
    average.lerp_(master, 1 - tau)
    if copy is not None:
        copy.copy_(average)


def follow_chunked(average: Tensor, master: Tensor, copy: Tensor | None, tau: float) -> None:
    """What the reference does, to the bit, in one sweep over memory: each chunk is cast while it is in cache."""
    _check(average, master, copy, tau)
    if copy is None:
        average.lerp_(master, 1 - tau)
        return
    size = CHUNK * torch.get_num_threads()
    for parts in zip(average.split(size), master.split(size), copy.split(size), strict=True):
        part, master_part, copy_part = parts
        copy_part.copy_(part.lerp_(master_part, 1 - tau))


def _check(average: Tensor, master: Tensor, copy: Tensor | None, tau: float) -> None:
    if not 0 <= tau <= 1:
        raise ValueError(
            f"tau is {tau}, and a share of the old average lies in 0..1; set ema.start and ema.end"
        )
    for name, tensor in (("average", average), ("master", master)):
        if tensor.dtype != torch.float32:
            raise ValueError(
                f"{name} is {tensor.dtype}, and must be torch.float32: bf16 does not move at tau 0.9999; "
                "pass the optimizer's fp32 values"
            )
    if copy is not None and copy.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"copy is {copy.dtype}, and must be bfloat16 or float16; pass None for no copy")
    for name, tensor in (("average", average), ("master", master), ("copy", copy)):
        if tensor is None:
            continue
        if tensor.shape != average.shape or tensor.ndim != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, average "
                f"{tuple(average.shape)}, and all must be flat, contiguous and of one length; pass flat views"
            )


def _jit(kernel: Callable) -> Callable:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _follow_values(average, master, copy, index, weight, mask):
    old = tl.load(average + index, mask=mask)
    new = old + weight * (tl.load(master + index, mask=mask) - old)
    tl.store(average + index, new, mask=mask)
    if copy is not None:
        tl.store(copy + index, new.to(copy.dtype.element_ty), mask=mask)


@_jit
def _follow_kernel(
    average,  # (numel) fp32, read and written
    master,  # (numel) fp32, read
    copy,  # (numel) bf16 or fp16, written; or None
    numel,
    weight,  # 1 - tau
    BLOCK: tl.constexpr,
):
    """One stretch of BLOCK values."""
    start = tl.program_id(0).to(tl.int64) * BLOCK  # int64: a flat can pass 2**31
    index = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:  # a mask that may end anywhere would split every load into words
        _follow_values(average, master, copy, index, weight, None)
    else:
        _follow_values(average, master, copy, index, weight, index < numel)


def follow_triton(average: Tensor, master: Tensor, copy: Tensor | None, tau: float) -> None:
    """The step in one launch."""
    _check(average, master, copy, tau)
    if average.numel() == 0:
        return
    with torch.cuda.device_of(average):  # Triton launches on the current device, not on the tensors'
        grid = (triton.cdiv(average.numel(), BLOCK),)
        _follow_kernel[grid](
            average, master, copy, average.numel(), float(1 - tau), BLOCK=BLOCK, num_warps=NUM_WARPS
        )


@torch.no_grad()
def follow(average: Tensor, master: Tensor, copy: Tensor | None, tau: float) -> None:
    """Moves `average` towards `master` in place, by 1 - tau of the way, and writes it to `copy` if there is one.

    All flat and of one length; average and master fp32 on one device, copy bf16 or fp16, also on another device
    (optimizer offload).
    """
    if copy is not None and copy.device != average.device:
        follow(average, master, None, tau)
        copy.copy_(average)
        return
    make = follow_triton if average.is_cuda and triton is not None else follow_chunked
    make(average, master, copy, tau)

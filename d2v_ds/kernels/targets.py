"""The teacher's targets: normalise each of K layer outputs, average them, normalise the average.

Bytes per target element: the kernel reads K inputs once (2 K in bf16) and writes one fp32 mean (4); a final
norm reads and writes that mean (8). Plain torch moves every input several times, in fp32. Beyond 1,024 tokens
the axis of an instance norm no longer fits in one tile, and the inputs are read twice. At the masked positions
of M views only, each of the M * J vectors is written once (4 a channel) instead of T, and no gather follows.
Operations: about 6 K per target element, so memory alone sets the time.
Traded: a compiled variant per K and tile shape (0.3 s each) for no stacking copy of the K inputs; batch norm,
which no released recipe uses, stays in plain torch.

Shapes: B samples, E extra tokens (skip), T tokens, D channels, K layers, M views, N = B * M, J masked tokens.
"""

from __future__ import annotations  # the kernels' annotations name tl, which is absent without triton

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this machine: the reference serves alone
    triton = None

PER_LAYER_NORMS = ("instance", "layer", "batch", "none")
FINAL_NORMS = ("layer", "instance")
MAX_TOKENS_IN_TILE = 1024  # x 16 channels; 2048 x 16 spills registers on sm_80 and sm_90
MAX_CHANNELS_IN_TILE = 4096
MAX_SAMPLES = 65535  # of a launch: they are the second axis of its grid, where every GPU ends


def make_targets_reference(
    layers: Sequence[Tensor],
    *,
    per_layer: str = "instance",
    final: tuple[str, ...] = (),
    skip: int = 0,
    padding_BT: Tensor | None = None,
    masked_NJ: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Targets (B, T, D), or (N, J, D), in plain torch: the slow truth, and the path of the CPU."""
    _check(layers, per_layer, final, skip, padding_BT, masked_NJ)
    total_BTD = None
    for layer in layers:  # one layer at a time: fp32 copies of all K would be K times the memory
        x_BTD = _normalize(layer[:, skip:].float(), per_layer, padding_BT, eps)
        total_BTD = x_BTD if total_BTD is None else total_BTD + x_BTD
    mean_BTD = total_BTD / len(layers)
    for norm in final:
        mean_BTD = _normalize(mean_BTD, norm, padding_BT, eps)
    if masked_NJ is None:
        return mean_BTD.to(dtype)
    rows = torch.arange(len(masked_NJ), device=masked_NJ.device)[:, None]
    return mean_BTD[rows // (len(masked_NJ) // len(mean_BTD)), masked_NJ].to(dtype)


def _normalize(x_BTD: Tensor, norm: str, padding_BT: Tensor | None, eps: float) -> Tensor:
    """One norm without affine; biased variance over the real positions; padded rows become zero."""
    real_BT1 = None if padding_BT is None else ~padding_BT.unsqueeze(-1)
    if real_BT1 is not None:
        x_BTD = x_BTD.where(real_BT1, 0.0)  # where, not a product: a padded row may hold inf or NaN
    if norm == "none":
        return x_BTD
    dims = {"instance": (1,), "layer": (2,), "batch": (0, 1)}[norm]
    if real_BT1 is None or norm == "layer":
        deviation_BTD = x_BTD - x_BTD.mean(dims, keepdim=True)
        variance = deviation_BTD.square().mean(dims, keepdim=True)
    else:
        count = real_BT1.sum(dims, keepdim=True).clamp(min=1)
        deviation_BTD = (x_BTD - x_BTD.sum(dims, keepdim=True) / count).where(real_BT1, 0.0)
        variance = deviation_BTD.square().sum(dims, keepdim=True) / count
    return deviation_BTD * (variance + eps).rsqrt()


def _check(
    layers: Sequence[Tensor],
    per_layer: str,
    final: tuple[str, ...],
    skip: int,
    padding_BT: Tensor | None,
    masked_NJ: Tensor | None,
) -> None:
    if per_layer not in PER_LAYER_NORMS:
        raise ValueError(f"per_layer is {per_layer!r}, not one of {PER_LAYER_NORMS}; use one of these")
    if any(norm not in FINAL_NORMS for norm in final):
        raise ValueError(f"final is {final!r}, and each must be one of {FINAL_NORMS}; use only these")
    if len(layers) == 0:
        raise ValueError("layers has 0 tensors, and a mean needs at least 1; average at least one layer")
    shape = layers[0].shape
    for index, layer in enumerate(layers):
        if layer.ndim != 3 or layer.shape != shape:
            raise ValueError(
                f"layer {index} has shape {tuple(layer.shape)}, layer 0 {tuple(shape)}, and all must be the "
                "same (B, E + T, D); pass only outputs of blocks of one width for one batch"
            )
    if not 0 <= skip < shape[1]:
        raise ValueError(
            f"skip is {skip} of {shape[1]} tokens, and at least 1 must remain; set skip to 0..{shape[1] - 1}"
        )
    expected = (shape[0], shape[1] - skip)
    if padding_BT is not None and (padding_BT.dtype != torch.bool or tuple(padding_BT.shape) != expected):
        raise ValueError(
            f"padding_BT is {padding_BT.dtype} {tuple(padding_BT.shape)}, and must be torch.bool {expected}; "
            "pass it without the extra tokens"
        )
    if masked_NJ is not None and (
        masked_NJ.ndim != 2 or 0 in (shape[0], len(masked_NJ)) or len(masked_NJ) % shape[0]
    ):
        raise ValueError(
            f"masked_NJ has shape {tuple(masked_NJ.shape)}, and its rows must be a multiple of the {shape[0]} "
            "samples; pass the positions of all views, sample by sample"
        )


def _jit(kernel: Callable) -> Callable:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _pick(layers, k):
    """layers[k] in a loop over k: a tuple of pointers takes only constant indices.

    NOTE: tl.static_range over k would need no choice, but the compiler then keeps the tiles of all layers
    alive to the end and adds them up there: at K = 10 it spills 1.3 kB per thread on sm_80.
    """
    layer = layers[0]
    for index in tl.static_range(1, len(layers)):
        if k == index:
            layer = layers[index]
    return layer


@_jit
def _store_mean(out, ranks, mean, b, t, d, T, D, J, num_views):
    """A tile of targets, whole or where each view has it in its list of masked positions."""
    is_inside = (t < T)[:, None] & (d < D)[None, :]
    if ranks is None:
        tl.store(out + b * T * D + (t[:, None] * D + d[None, :]), mean, mask=is_inside)
    else:
        ranks += b * num_views * T
        out += b * num_views * J * D
        for _ in range(num_views):
            rank = tl.load(ranks + t, mask=t < T, other=-1).to(tl.int32)
            tl.store(out + (rank[:, None] * D + d[None, :]), mean, mask=is_inside & (rank >= 0)[:, None])
            ranks += T
            out += J * D


@_jit
def _norm_mean_kernel(
    layers,  # K pointers to (B, T, D), behind the extra tokens; of equal strides, channels contiguous
    padding,  # (B, T) uint8, 1 = padded; or None
    out,  # (B, T, D) contiguous; may be the one layer itself: a program reads its tile, then writes it
    ranks,  # (N, T) integers, where each position stands in masked_NJ, -1 = nowhere; out is (N, J, D) then. Or None
    stride_b,  # of a layer
    stride_t,  # of a layer
    T,
    D,
    J,
    num_views,
    eps,
    NUM_LAYERS: tl.constexpr,
    AXIS: tl.constexpr,  # reduced axis of the tile: 0 time (instance), 1 channels (layer), None (no norm)
    BLOCK_T: tl.constexpr,  # >= T if AXIS is 0
    BLOCK_D: tl.constexpr,  # >= D if AXIS is 1
    NUM_STAGES: tl.constexpr,  # tiles on their way or in work: while one is summed up, the next layers' are read
):
    """One (T, D) tile of one sample: it holds the whole reduced axis, so each input is read once."""
    b = tl.program_id(1).to(tl.int64)  # int64: B * T * D can pass 2**31
    if AXIS == 0:
        t = tl.arange(0, BLOCK_T)
        d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    else:
        t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        d = tl.arange(0, BLOCK_D)
    is_channel = d < D
    is_token = t < T
    if padding is not None:
        is_token = is_token & (tl.load(padding + b * T + t, mask=is_token, other=1) == 0)
    is_real = is_token[:, None] & is_channel[None, :]
    share = 1.0 / D
    inside = is_channel.to(tl.float32)[None, :]
    if AXIS == 0:
        inside = is_token.to(tl.float32)[:, None]
        share = 1.0 / tl.maximum(tl.sum(is_token.to(tl.float32), axis=0), 1.0)  # a sample may be all padding

    offset = t[:, None] * stride_t + d[None, :]
    total = tl.full([BLOCK_T, BLOCK_D], 0.0, tl.float32)
    for k in tl.range(NUM_LAYERS, num_stages=NUM_STAGES):
        x = tl.load(_pick(layers, k) + b * stride_b + offset, mask=is_real, other=0.0).to(tl.float32)
        if AXIS is not None:
            mean = tl.sum(x, axis=AXIS, keep_dims=True) * share
            x -= inside * mean
            x = x * tl.rsqrt(tl.sum(x * x, axis=AXIS, keep_dims=True) * share + eps)
        total += x
    if padding is not None:
        total = tl.where(is_real, total, 0.0)  # where a mean is inf, 0 * mean is none
    _store_mean(out, ranks, total * (1.0 / NUM_LAYERS), b, t, d, T, D, J, num_views)


@_jit
def _long_instance_mean_kernel(
    layers,  # as above
    padding,  # as above
    out,  # as above
    ranks,  # as above
    statistics,  # (B, K, 2, D) fp32 scratch: mean and 1 / deviation; K of them do not fit in registers
    stride_b,
    stride_t,
    T,
    D,
    J,
    num_views,
    eps,
    NUM_LAYERS: tl.constexpr,
    NUM_TILES: tl.constexpr,  # cdiv(T, BLOCK_T); a constant, as the interpreter cannot loop to an argument
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """BLOCK_D channels of one sample, any T: a pass for the statistics, then a pass for the mean."""
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_channel = d < D
    statistics += b * NUM_LAYERS * 2 * D + d
    for k in range(NUM_LAYERS):
        count = 0.0
        mean = tl.full([BLOCK_D], 0.0, tl.float32)
        square = tl.full([BLOCK_D], 0.0, tl.float32)  # sum of squared deviations from the mean
        for tile in tl.range(NUM_TILES, num_stages=NUM_STAGES):
            t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
            is_token = t < T
            if padding is not None:
                is_token = is_token & (tl.load(padding + b * T + t, mask=is_token, other=1) == 0)
            is_real = is_token[:, None] & is_channel[None, :]
            inside = is_token.to(tl.float32)
            offset = t[:, None] * stride_t + d[None, :]
            x = tl.load(_pick(layers, k) + b * stride_b + offset, mask=is_real, other=0.0).to(tl.float32)
            # Merge of two means and two sums of squares (Chan et al. 1979): no E[x^2] - E[x]^2 cancellation.
            tile_count = tl.sum(inside, axis=0)
            tile_mean = tl.sum(x, axis=0) * (1.0 / tl.maximum(tile_count, 1.0))
            x -= inside[:, None] * tile_mean[None, :]
            share = tile_count / tl.maximum(count + tile_count, 1.0)
            delta = tile_mean - mean
            mean += delta * share
            square += tl.sum(x * x, axis=0) + delta * delta * count * share
            count += tile_count
        scale = tl.rsqrt(square / tl.maximum(count, 1.0) + eps)
        tl.store(statistics + 2 * k * D, mean, mask=is_channel)
        tl.store(statistics + (2 * k + 1) * D, scale, mask=is_channel)

    tl.debug_barrier()  # a thread may read statistics that another thread of this program wrote
    for tile in range(NUM_TILES):
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        is_token = t < T
        if padding is not None:
            is_token = is_token & (tl.load(padding + b * T + t, mask=is_token, other=1) == 0)
        is_real = is_token[:, None] & is_channel[None, :]
        offset = t[:, None] * stride_t + d[None, :]
        inside = is_token.to(tl.float32)
        total = tl.full([BLOCK_T, BLOCK_D], 0.0, tl.float32)
        for k in tl.range(NUM_LAYERS, num_stages=NUM_STAGES):
            x = tl.load(_pick(layers, k) + b * stride_b + offset, mask=is_real, other=0.0).to(tl.float32)
            mean = tl.load(statistics + 2 * k * D, mask=is_channel, other=0.0)
            scale = tl.load(statistics + (2 * k + 1) * D, mask=is_channel, other=0.0)
            total += (x - inside[:, None] * mean[None, :]) * scale[None, :]
        if padding is not None:
            total = tl.where(is_real, total, 0.0)
        _store_mean(out, ranks, total * (1.0 / NUM_LAYERS), b, t, d, T, D, J, num_views)


def make_targets_triton(
    layers: Sequence[Tensor],
    *,
    per_layer: str = "instance",
    final: tuple[str, ...] = (),
    skip: int = 0,
    padding_BT: Tensor | None = None,
    masked_NJ: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Targets (B, T, D), or (N, J, D): one launch for the mean, one per final norm; takes what has_kernel says."""
    _check(layers, per_layer, final, skip, padding_BT, masked_NJ)
    assert has_kernel(layers, per_layer), "make_targets_triton called on layers that it does not take"
    padding = None if padding_BT is None else padding_BT.contiguous().view(torch.uint8)
    inputs = tuple(layer[:, skip:] for layer in layers)
    norms = (per_layer, *final)
    with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device, not on the tensors'
        for index, norm in enumerate(norms):
            is_last = index == len(norms) - 1
            stage_dtype = dtype if is_last else torch.float32
            masked = masked_NJ if is_last else None  # a norm over tokens needs them all
            shape = inputs[0].shape if masked is None else (*masked.shape, inputs[0].shape[2])
            is_reused = index > 0 and stage_dtype == torch.float32 and masked is None
            # the mean is ours: normalise it in place
            out = inputs[0] if is_reused else _allocate(shape, stage_dtype, inputs[0].device)
            _launch(inputs, norm, padding, out, masked, eps)
            inputs = (out,)
    return out


@_jit
def _rank_kernel(masked, ranks, T, J, BLOCK: tl.constexpr):
    """One row: -1 everywhere, then where each position stands in the list."""
    row = tl.program_id(0).to(tl.int64)
    ranks += row * T
    masked += row * J
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        tl.store(ranks + t, -1, mask=t < T)
    tl.debug_barrier()  # a thread may write where another thread of this program wrote
    for start in range(0, J, BLOCK):
        j = start + tl.arange(0, BLOCK)
        tl.store(ranks + tl.load(masked + j, mask=j < J, other=0), j, mask=j < J)


def _rank(masked_NJ: Tensor, T: int) -> Tensor:
    """Where each position stands in its row's list, -1 = nowhere; (N, T), int16 where that is enough. One launch:
    three small ones would take a tenth of the time of the mean that they serve, by estimate."""
    dtype = torch.int16 if T < 2**15 else torch.int32
    ranks_NT = _allocate((len(masked_NJ), T), dtype, masked_NJ.device)
    _rank_kernel[(len(masked_NJ),)](
        masked_NJ.contiguous(), ranks_NT, T, masked_NJ.shape[1], BLOCK=256, num_warps=4
    )
    return ranks_NT


def has_kernel(layers: Sequence[Tensor], per_layer: str) -> bool:
    """Whether the kernel takes these layers: equal strides and dtypes, channels contiguous, no batch norm, less than
    2**31 values from a sample's first token to its last."""
    return (
        triton is not None
        and per_layer != "batch"
        and layers[0].shape[-1] <= MAX_CHANNELS_IN_TILE
        and layers[0].stride(-1) == 1
        and layers[0].shape[1] * layers[0].stride(1) < 2**31  # offsets inside a sample are int32
        and all(x.stride() == layers[0].stride() and x.dtype == layers[0].dtype for x in layers)
    )


def _launch(
    layers: tuple[Tensor, ...],
    norm: str,
    padding: Tensor | None,
    out: Tensor,
    masked_NJ: Tensor | None,
    eps: float,
) -> None:
    """out = mean over layers of norm(layer), whole or at the masked positions."""
    B, T, D = layers[0].shape
    if B > MAX_SAMPLES:
        views = len(out) // B
        for first in range(0, B, MAX_SAMPLES):
            part = slice(first, first + MAX_SAMPLES)
            rows = slice(first * views, (first + MAX_SAMPLES) * views)
            some_padding = None if padding is None else padding[part]
            some_masked = None if masked_NJ is None else masked_NJ[rows]
            _launch(tuple(x[part] for x in layers), norm, some_padding, out[rows], some_masked, eps)
        return
    ranks = None if masked_NJ is None else _rank(masked_NJ, T)
    J, num_views = (0, 0) if masked_NJ is None else (masked_NJ.shape[1], len(masked_NJ) // B)
    block_t, block_d, num_warps = tile_shape(norm, T, D, is_wide(layers))
    sizes = (*layers[0].stride()[:2], T, D, J, num_views)
    num_stages = count_stages(block_t * block_d * layers[0].element_size())
    meta = dict(
        NUM_LAYERS=len(layers), BLOCK_T=block_t, BLOCK_D=block_d, NUM_STAGES=num_stages, num_warps=num_warps
    )
    if norm == "instance" and T > MAX_TOKENS_IN_TILE:
        statistics = _allocate((B, len(layers), 2, D), torch.float32, out.device)
        grid = (triton.cdiv(D, block_d), B)
        num_tiles = triton.cdiv(T, block_t)
        _long_instance_mean_kernel[grid](
            layers, padding, out, ranks, statistics, *sizes, eps, NUM_TILES=num_tiles, **meta
        )
    else:
        axis = {"instance": 0, "layer": 1, "none": None}[norm]
        grid = (triton.cdiv(D, block_d) if axis == 0 else triton.cdiv(T, block_t), B)
        _norm_mean_kernel[grid](layers, padding, out, ranks, *sizes, eps, AXIS=axis, **meta)


def is_wide(layers: Sequence[Tensor]) -> bool:
    """Whether 16 bytes can be read at once everywhere, as far as the compiler is told."""
    sizes = (*layers[0].stride()[:2], layers[0].shape[2])
    return not any(size % 16 for size in sizes) and not any(x.data_ptr() % 16 for x in layers)


def tile_shape(norm: str, T: int, D: int, is_wide: bool = True) -> tuple[int, int, int]:
    """(BLOCK_T, BLOCK_D, num_warps): the reduced axis whole if it fits, rows of 16 channels or more, or 8.

    A norm over time takes some 6 instructions an element and 250 a thread, for 8 channels' sums: counted in the
    code for sm_90, not measured, 64 elements a thread take 7 tenths of the time of an H200's memory, 32 as much as it.
    Where elements are read one by one (not `is_wide`), an address for each takes registers too: 16 a thread.
    """
    if norm == "instance":
        block_t = triton.next_power_of_2(T) if T <= MAX_TOKENS_IN_TILE else 256
        block_d = max(16, min(32, 16384 // block_t)) if is_wide else max(8, min(16, 8192 // block_t))
        per_warp = 2048 if is_wide else 512
    else:
        block_d = triton.next_power_of_2(D)
        block_t = min(triton.next_power_of_2(T), max(1, 4096 // block_d))
        per_warp = 512  # more spill on one GPU or another
    num_warps = max(1, min(16, block_t * block_d // per_warp))
    return block_t, block_d, num_warps


def count_stages(tile_bytes: int) -> int:
    """Tiles on their way or in work: two, of at most 32 kB, wait for none; 48 kB a multiprocessor hide the latency."""
    return 1 + max(1, min(2, 65536 // tile_bytes))


def _allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every buffer that the kernels fill comes from here, so that a test can poison it."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


@torch.no_grad()
def make_targets(
    layers: Sequence[Tensor],
    *,
    per_layer: str = "instance",
    final: tuple[str, ...] = (),
    skip: int = 0,
    padding_BT: Tensor | None = None,
    masked_NJ: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Targets (B, T, D) from K teacher outputs (B, E + T, D), without a gradient.

    Each layer is normalised (`per_layer`), the K are averaged in fp32, the average is normalised (`final`, in
    order); all without affine, with biased variance. "instance" is over time, "layer" over channels, "batch"
    over batch and time. `skip` leading extra tokens are left out. Tokens that are True in `padding_BT` are
    left out of the statistics and zero in the result; None takes all T, as fairseq does even with padding.
    With `masked_NJ`, only these positions of each view are given, (N, J, D); a row lists none twice.
    """
    is_fast = len(layers) > 0 and layers[0].is_cuda and has_kernel(layers, per_layer)
    make = make_targets_triton if is_fast else make_targets_reference
    return make(
        layers,
        per_layer=per_layer,
        final=final,
        skip=skip,
        padding_BT=padding_BT,
        masked_NJ=masked_NJ,
        eps=eps,
        dtype=dtype,
    )

"""Attention whose bias falls with the distance of the tokens' original positions, without ever making that bias.

softmax(q k / sqrt(C) - strength_h * |pos_i - pos_j|) v, with its gradient for q, k, v and the learned strength.
Bytes, in bf16: forward reads q, k, v and writes the output, 8 N T D, and two fp32 statistics a row and head,
8 N T H; backward reads q, k, v, the output and its gradient, writes three gradients: 16 N T D. Keys and values
are read again by each tile of queries (and queries by each tile of keys), from the L2 cache. The eager way moves
and keeps N H T T biases, logits, weights and masks in fp32. Operations: 4 N H T T C forward; 14 N H T T C
backward, since each of its two kernels makes the logits again.
Traded: two backward kernels instead of one with atomic sums, so that a step is the same to the bit each time.
FlexAttention makes the same function but has no dropout; scripts/bench_kernels.py measures both.
Idea: online softmax (Milakov and Gimelshein 2018), tiles and recomputation (arXiv:2205.14135, arXiv:2307.08691).

Shapes: N rows, T = E + K tokens (E extra ones, at distance 0 from all), H heads, C channels of a head, D = H * C.
"""

from __future__ import annotations  # the kernels' annotations name tl, which is absent without triton

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this machine: the reference serves alone
    triton = None

MAX_HEAD_DIM = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Distance(NamedTuple):
    """The bias -strength * |pos_i - pos_j|, not made; 0 where one of the two is an extra token."""

    strength_H: Tensor
    """fp32, not negative; may want a gradient."""
    positions_NK: Tensor
    """Original positions, integers; (1, K) if all rows have the same."""
    extra_tokens: int


def make_bias(distance: Distance) -> Tensor:
    """The bias of `distance` (N, H, E + K, E + K) in fp32."""
    positions_NK = distance.positions_NK
    distance_NKK = (positions_NK[:, :, None] - positions_NK[:, None, :]).abs().float()
    bias = -distance.strength_H[None, :, None, None] * distance_NKK[:, None]
    extra = distance.extra_tokens
    return F.pad(bias, (extra, 0, extra, 0)) if extra else bias


def attend_reference(
    qkv: Tensor, bias: Tensor | Distance | None, padding_NT: Tensor | None, dropout: float
) -> Tensor:
    """The same in plain torch: the slow truth, the path of the CPU and of biases that are no function of distance.

    Logits with an fp32 bias are fp32, since bf16 cannot tell far frames apart.
    """
    _check(qkv, bias, padding_NT, dropout)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, H, T, C)
    return _attend(q, k, v, bias, padding_NT, dropout).transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | Distance | None, padding_NT: Tensor | None, dropout: float
) -> Tensor:
    if isinstance(bias, Distance):
        bias = make_bias(bias)
    if padding_NT is not None:
        blocked = padding_NT[:, None, None, :]
        if bias is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=~blocked, dropout_p=dropout)
        # not -inf: a row whose keys are all padding would be NaN, and its gradient too
        bias = bias.masked_fill(blocked, torch.finfo(bias.dtype).min)
    if bias is None or bias.dtype == q.dtype:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = torch.softmax(logits.float() + bias, dim=-1).to(q.dtype)
    return F.dropout(weights, dropout) @ v


def _check(qkv: Tensor, bias: Tensor | Distance | None, padding_NT: Tensor | None, dropout: float) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}, and must be (N, T, 3, H, C); "
            "view the output of one projection so"
        )
    if not 0 <= dropout < 1:
        raise ValueError(
            f"dropout is {dropout}, and must lie in 0..1 without 1; set body.attention_dropout so"
        )
    N, T, _, H, _ = qkv.shape
    if padding_NT is not None and (padding_NT.dtype != torch.bool or tuple(padding_NT.shape) != (N, T)):
        raise ValueError(
            f"padding_NT is {padding_NT.dtype} {tuple(padding_NT.shape)}, and must be torch.bool {(N, T)}; "
            "pass it with the extra tokens"
        )
    if isinstance(bias, Distance):
        rows, kept = bias.positions_NK.shape
        if rows not in (1, N) or kept + bias.extra_tokens != T or tuple(bias.strength_H.shape) != (H,):
            raise ValueError(
                f"strengths {tuple(bias.strength_H.shape)}, positions {(rows, kept)} and {bias.extra_tokens} "
                f"extra tokens do not fit qkv of N={N}, T={T}, H={H}; pass (H), (N or 1, T - extra tokens)"
            )


def _jit(kernel: Callable) -> Callable:
    return kernel if triton is None else triton.jit(kernel)


# A logit of a padded key, which weighs nothing beside any real key and 1 / T in a row of padded keys alone.
_PADDED = -1.0e30 if triton is None else tl.constexpr(-1.0e30)


@_jit
def _load_tokens(base, t, T, stride_t, HEAD_DIM: tl.constexpr, BLOCK_C: tl.constexpr):
    """(tokens, BLOCK_C) of one head; zero beyond T and HEAD_DIM."""
    c = tl.arange(0, BLOCK_C)
    pointers = base + t[:, None] * stride_t + c[None, :]
    return tl.load(pointers, mask=(t < T)[:, None] & (c < HEAD_DIM)[None, :], other=0.0)


@_jit
def _store_tokens(base, t, T, stride_t, x, HEAD_DIM: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.arange(0, BLOCK_C)
    mask = (t < T)[:, None] & (c < HEAD_DIM)[None, :]
    tl.store(base + t[:, None] * stride_t + c[None, :], x.to(base.dtype.element_ty), mask=mask)


@_jit
def _load_places(positions, t, T, EXTRA: tl.constexpr):
    """Original positions of tokens; those of extra tokens and beyond T do not count."""
    return tl.load(positions + t - EXTRA, mask=(t >= EXTRA) & (t < T), other=0).to(tl.int32)


@_jit
def _load_padded(padding, j, T):
    """Which keys are padding; without a padding, none."""
    return j < 0 if padding is None else tl.load(padding + j, mask=j < T, other=0) != 0


@_jit
def _measure(place_i, place_j, i, j, is_padded_j, EXTRA: tl.constexpr):
    """Distances that count in the bias, of queries i and keys j, each with an axis of length 1 for the other."""
    distance = tl.abs(place_i - place_j).to(tl.float32)
    if EXTRA > 0:
        distance = tl.where((i < EXTRA) | (j < EXTRA), 0.0, distance)
    return tl.where(is_padded_j, 0.0, distance)


@_jit
def _finish_logits(product, distance, scale, strength, j, T, is_padded_j):
    """Logits in units of log 2 from q k: scaled, biased, padding at _PADDED, keys beyond T at -inf."""
    logits = product * scale - strength * distance
    logits = tl.where(is_padded_j, _PADDED, logits)
    return tl.where(j < T, logits, float("-inf"))


@_jit
def _draw_kept(seed, row, i, start, drop_below, BLOCK: tl.constexpr):
    """Which weights of queries i and BLOCK keys from `start` survive dropout, (queries, BLOCK).

    A function of (seed, row and head, i, j) alone (Philox, Salmon et al. 2011), so backward draws the same.
    One draw gives four words, for four neighbouring keys.
    """
    quad = start // 4 + tl.arange(0, BLOCK // 4)
    zero = i[:, None] * 0 + quad[None, :] * 0
    a, b, c, d = tl.philox(seed, zero + quad[None, :], zero + i[:, None], zero + row, zero)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [i.shape[0], BLOCK])
    return (words >> 8).to(tl.int32) >= drop_below


@_jit
def _locate(T, BLOCK: tl.constexpr):
    """This program's tile of tokens, its row and head, and how many of those there are.

    One axis of the grid, tiles of a head side by side: a second axis ends at 65,535, which rows x heads can pass.
    """
    tiles = tl.cdiv(T, BLOCK)
    return tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.num_programs(0) // tiles


@_jit
def _forward_kernel(
    qkv,  # (N, T, 3, H, C) contiguous
    out,  # (N, T, H, C) contiguous
    statistics,  # (2, N, H, T) fp32: largest logit of a row, 1 / sum of exp2(logit - largest)
    strength,  # (H) fp32
    positions,  # (N or 1, K) integers
    padding,  # (N, T) uint8, 1 = padded; or None
    seed,  # (1) int64; or None: no dropout
    stride_positions,  # K, or 0 if all rows have the same
    T,
    H,
    scale,  # 1 / sqrt(C)
    drop_below,  # of 2**24
    rescale,  # 1 / share of weights that survive
    EXTRA: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,  # >= HEAD_DIM
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of fp32
):
    """One tile of queries of one head against all keys, the softmax rescaled as larger logits are met."""
    tile, row, rows = _locate(T, BLOCK_Q)
    n = (row // H).to(tl.int64)  # int64: N * T * 3 * D can pass 2**31
    h = row % H
    stride_t = 3 * H * HEAD_DIM
    q_base = qkv + n * T * stride_t + h * HEAD_DIM
    k_base = q_base + H * HEAD_DIM
    v_base = k_base + H * HEAD_DIM
    positions += n * stride_positions
    if padding is not None:
        padding += n * T
    log2e: tl.constexpr = 1.4426950408889634
    strength2 = tl.load(strength + h) * log2e

    i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _load_tokens(q_base, i, T, stride_t, HEAD_DIM, BLOCK_C)
    place_i = _load_places(positions, i, T, EXTRA)
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
    y = tl.full([BLOCK_Q, BLOCK_C], 0.0, tl.float32)
    for start in range(0, T, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        k = _load_tokens(k_base, j, T, stride_t, HEAD_DIM, BLOCK_C)
        v = _load_tokens(v_base, j, T, stride_t, HEAD_DIM, BLOCK_C)
        is_padded = _load_padded(padding, j, T)[None, :]
        place_j = _load_places(positions, j, T, EXTRA)
        distance = _measure(place_i[:, None], place_j[None, :], i[:, None], j[None, :], is_padded, EXTRA)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = _finish_logits(product, distance, scale * log2e, strength2, j[None, :], T, is_padded)
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        weights = tl.exp2(logits - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, axis=1)
        if seed is not None:
            kept = _draw_kept(tl.load(seed), row, i, start, drop_below, BLOCK_K)
            weights = tl.where(kept, weights * rescale, 0.0)
        y = y * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        largest = larger
    inverse = 1.0 / total
    out_base = out + n * T * H * HEAD_DIM + h * HEAD_DIM
    _store_tokens(out_base, i, T, H * HEAD_DIM, y * inverse[:, None], HEAD_DIM, BLOCK_C)
    statistics += row.to(tl.int64) * T
    tl.store(statistics + i, largest, mask=i < T)
    statistics += rows.to(tl.int64) * T
    tl.store(statistics + i, inverse, mask=i < T)


@_jit
def _query_gradient_kernel(
    qkv,  # as above
    out,  # as above
    d_out,  # (N, T, H, C) contiguous
    d_qkv,  # (N, T, 3, H, C) contiguous; its queries are written
    statistics,  # as above
    delta,  # (N, H, T) fp32, written: sum of output * its gradient
    d_strength,  # (N, H, tiles of queries) fp32, written: each program's own sum
    strength,
    positions,
    padding,
    seed,
    stride_positions,
    T,
    H,
    scale,
    drop_below,
    rescale,
    EXTRA: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries of one head against all keys: gradient of the queries, of the strength, and delta."""
    tile, row, rows = _locate(T, BLOCK_Q)
    n = (row // H).to(tl.int64)
    h = row % H
    stride_t = 3 * H * HEAD_DIM
    q_offset = n * T * stride_t + h * HEAD_DIM
    k_base = qkv + q_offset + H * HEAD_DIM
    v_base = k_base + H * HEAD_DIM
    positions += n * stride_positions
    if padding is not None:
        padding += n * T
    log2e: tl.constexpr = 1.4426950408889634
    strength2 = tl.load(strength + h) * log2e

    i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _load_tokens(qkv + q_offset, i, T, stride_t, HEAD_DIM, BLOCK_C)
    out_offset = n * T * H * HEAD_DIM + h * HEAD_DIM
    y = _load_tokens(out + out_offset, i, T, H * HEAD_DIM, HEAD_DIM, BLOCK_C)
    dy = _load_tokens(d_out + out_offset, i, T, H * HEAD_DIM, HEAD_DIM, BLOCK_C)
    delta_i = tl.sum(y.to(tl.float32) * dy.to(tl.float32), axis=1)
    row_start = row.to(tl.int64) * T
    tl.store(delta + row_start + i, delta_i, mask=i < T)
    largest = tl.load(statistics + row_start + i, mask=i < T, other=float("inf"))  # a weight of 0 beyond T
    statistics += rows.to(tl.int64) * T
    inverse = tl.load(statistics + row_start + i, mask=i < T, other=0.0)
    place_i = _load_places(positions, i, T, EXTRA)
    dq = tl.full([BLOCK_Q, BLOCK_C], 0.0, tl.float32)
    pull = tl.full([BLOCK_Q], 0.0, tl.float32)
    for start in range(0, T, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        k = _load_tokens(k_base, j, T, stride_t, HEAD_DIM, BLOCK_C)
        v = _load_tokens(v_base, j, T, stride_t, HEAD_DIM, BLOCK_C)
        is_padded = _load_padded(padding, j, T)[None, :]
        place_j = _load_places(positions, j, T, EXTRA)
        distance = _measure(place_i[:, None], place_j[None, :], i[:, None], j[None, :], is_padded, EXTRA)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = _finish_logits(product, distance, scale * log2e, strength2, j[None, :], T, is_padded)
        weights = tl.exp2(logits - largest[:, None]) * inverse[:, None]
        d_weights = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        if seed is not None:
            kept = _draw_kept(tl.load(seed), row, i, start, drop_below, BLOCK_K)
            d_weights = tl.where(kept, d_weights * rescale, 0.0)
        d_logits = weights * (d_weights - delta_i[:, None])
        pull += tl.sum(d_logits * distance, axis=1)
        dq += tl.dot(d_logits.to(k.dtype), k, input_precision=PRECISION)
    _store_tokens(d_qkv + q_offset, i, T, stride_t, dq * scale, HEAD_DIM, BLOCK_C)
    tl.store(d_strength + tl.program_id(0), -tl.sum(pull, axis=0))


@_jit
def _key_gradient_kernel(
    qkv,  # as above
    d_out,
    d_qkv,  # its keys and values are written
    statistics,
    delta,  # read
    strength,
    positions,
    padding,
    seed,
    stride_positions,
    T,
    H,
    scale,
    drop_below,
    rescale,
    EXTRA: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys of one head against all queries; the logits' tile is (keys, queries)."""
    tile, row, rows = _locate(T, BLOCK_K)
    n = (row // H).to(tl.int64)
    h = row % H
    stride_t = 3 * H * HEAD_DIM
    q_offset = n * T * stride_t + h * HEAD_DIM
    k_offset = q_offset + H * HEAD_DIM
    v_offset = k_offset + H * HEAD_DIM
    dy_base = d_out + n * T * H * HEAD_DIM + h * HEAD_DIM
    positions += n * stride_positions
    if padding is not None:
        padding += n * T
    row_start = row.to(tl.int64) * T
    largest_base = statistics + row_start
    inverse_base = largest_base + rows.to(tl.int64) * T
    delta += row_start
    log2e: tl.constexpr = 1.4426950408889634
    strength2 = tl.load(strength + h) * log2e

    j = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k = _load_tokens(qkv + k_offset, j, T, stride_t, HEAD_DIM, BLOCK_C)
    v = _load_tokens(qkv + v_offset, j, T, stride_t, HEAD_DIM, BLOCK_C)
    is_padded = _load_padded(padding, j, T)[:, None]
    place_j = _load_places(positions, j, T, EXTRA)
    dk = tl.full([BLOCK_K, BLOCK_C], 0.0, tl.float32)
    dv = tl.full([BLOCK_K, BLOCK_C], 0.0, tl.float32)
    for start in range(0, T, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        q = _load_tokens(qkv + q_offset, i, T, stride_t, HEAD_DIM, BLOCK_C)
        dy = _load_tokens(dy_base, i, T, H * HEAD_DIM, HEAD_DIM, BLOCK_C)
        largest = tl.load(largest_base + i, mask=i < T, other=float("inf"))
        inverse = tl.load(inverse_base + i, mask=i < T, other=0.0)
        delta_i = tl.load(delta + i, mask=i < T, other=0.0)
        place_i = _load_places(positions, i, T, EXTRA)
        distance = _measure(place_i[None, :], place_j[:, None], i[None, :], j[:, None], is_padded, EXTRA)
        product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        logits = _finish_logits(product, distance, scale * log2e, strength2, j[:, None], T, is_padded)
        weights = tl.exp2(logits - largest[None, :]) * inverse[None, :]
        d_weights = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
        survivors = weights
        if seed is not None:
            first = tile * BLOCK_K
            kept = tl.trans(_draw_kept(tl.load(seed), row, i, first, drop_below, BLOCK_K))
            survivors = tl.where(kept, weights * rescale, 0.0)
            d_weights = tl.where(kept, d_weights * rescale, 0.0)
        dv += tl.dot(survivors.to(dy.dtype), dy, input_precision=PRECISION)
        d_logits = weights * (d_weights - delta_i[None, :])
        dk += tl.dot(d_logits.to(q.dtype), q, input_precision=PRECISION)
    _store_tokens(d_qkv + k_offset, j, T, stride_t, dk * scale, HEAD_DIM, BLOCK_C)
    _store_tokens(d_qkv + v_offset, j, T, stride_t, dv, HEAD_DIM, BLOCK_C)


class Tile(NamedTuple):
    """What a program works on at a time."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def tile_shapes(head_dim: int, dtype: torch.dtype) -> tuple[Tile, Tile, Tile]:
    """Of the forward, the query-gradient and the key-gradient kernel: the largest that spill no register.

    fp32, three products of tf32 each, is for checks; what trains is bf16 or fp16.
    """
    if dtype == torch.float32 and head_dim <= 64:
        return Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)
    if dtype == torch.float32:
        return Tile(16, 32, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)
    if head_dim <= 64:
        return Tile(64, 64, 4, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)
    return Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)


def _meta(tile: Tile, head_dim: int, extra_tokens: int, dtype: torch.dtype) -> dict[str, int | str]:
    """The kernels' constants for a tile."""
    is_tf32 = dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32
    return dict(
        EXTRA=extra_tokens,
        HEAD_DIM=head_dim,
        BLOCK_C=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_Q=tile.queries,
        BLOCK_K=tile.keys,
        PRECISION="tf32" if is_tf32 else "tf32x3",  # of fp32 alone; "ieee" would spill
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every buffer that the kernels fill comes from here, so that a test can poison it."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


class _Attend(torch.autograd.Function):
    """(N, T, 3, H, C) -> (N, T, H, C); keeps its inputs, its output and two numbers a row and head."""

    @staticmethod
    def forward(ctx, qkv, strength_H, positions_NK, padding, extra_tokens, dropout, seed):
        N, T, _, H, C = qkv.shape
        drop_below = round(dropout * 2**24)
        rescale = 2**24 / (2**24 - drop_below)
        stride = 0 if len(positions_NK) == 1 else positions_NK.shape[1]
        sizes = (stride, T, H, C**-0.5, drop_below, rescale)
        given = (strength_H, positions_NK, padding, seed)
        out = _allocate((N, T, H, C), qkv.dtype, qkv.device)
        statistics = _allocate((2, N, H, T), torch.float32, qkv.device)
        tile = tile_shapes(C, qkv.dtype)[0]
        with torch.cuda.device_of(qkv):  # Triton launches on the current device, not on the tensors'
            _forward_kernel[(triton.cdiv(T, tile.queries) * N * H,)](
                qkv, out, statistics, *given, *sizes, **_meta(tile, C, extra_tokens, qkv.dtype)
            )
        ctx.save_for_backward(qkv, out, statistics, *given)
        ctx.sizes, ctx.extra_tokens = sizes, extra_tokens
        return out

    @staticmethod
    def backward(ctx, d_out):
        qkv, out, statistics, *given = ctx.saved_tensors
        N, T, _, H, C = qkv.shape
        d_out = d_out.contiguous()
        d_qkv = _allocate(qkv.shape, qkv.dtype, qkv.device)
        delta = _allocate((N, H, T), torch.float32, qkv.device)
        _, for_queries, for_keys = tile_shapes(C, qkv.dtype)
        num_tiles = triton.cdiv(T, for_queries.queries)
        d_strength = _allocate((N, H, num_tiles), torch.float32, qkv.device)
        with torch.cuda.device_of(qkv):
            _query_gradient_kernel[(num_tiles * N * H,)](
                qkv, out, d_out, d_qkv, statistics, delta, d_strength, *given, *ctx.sizes,
                **_meta(for_queries, C, ctx.extra_tokens, qkv.dtype),
            )  # fmt: skip
            _key_gradient_kernel[(triton.cdiv(T, for_keys.keys) * N * H,)](
                qkv, d_out, d_qkv, statistics, delta, *given, *ctx.sizes,
                **_meta(for_keys, C, ctx.extra_tokens, qkv.dtype),
            )  # fmt: skip
        return d_qkv, d_strength.sum(dim=(0, 2)), None, None, None, None, None


@torch.compiler.disable  # a graph ends before the kernels and begins after them
def attend_triton(
    qkv: Tensor, distance: Distance, padding_NT: Tensor | None, dropout: float, seed: Tensor | None = None
) -> Tensor:
    """One kernel forward, two backward. `seed` (1) int64 decides what is dropped; None draws one."""
    _check(qkv, distance, padding_NT, dropout)
    if dropout == 0:
        seed = None
    elif seed is None:  # on the device: no value waits for the host
        seed = torch.randint(2**62, (1,), device=qkv.device)
    padding = None if padding_NT is None else padding_NT.contiguous().view(torch.uint8)
    return _Attend.apply(
        qkv.contiguous(),
        distance.strength_H.contiguous(),
        distance.positions_NK.contiguous(),
        padding,
        distance.extra_tokens,
        dropout,
        seed,
    )


def has_kernel(qkv: Tensor) -> bool:
    """Whether the kernels take these heads and dtype."""
    return triton is not None and qkv.shape[-1] <= MAX_HEAD_DIM and qkv.dtype in DTYPES


def attend(qkv: Tensor, bias: Tensor | Distance | None, padding_NT: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k / sqrt(C) + bias) v for self-attention; (N, T, 3, H, C) -> (N, T, H, C).

    Keys that are True in `padding_NT` are left out; rows whose keys are all padding have finite values. Without
    a bias this is torch's own attention.
    """
    if isinstance(bias, Distance) and qkv.is_cuda and has_kernel(qkv):
        return attend_triton(qkv, bias, padding_NT, dropout)
    return attend_reference(qkv, bias, padding_NT, dropout)


def distance_bias(distance: Distance) -> Tensor | Distance:
    """What `attend` takes as the bias of many layers: on a GPU the distance as it is; elsewhere the bias, made once."""
    if triton is None or not distance.positions_NK.is_cuda:
        return make_bias(distance)
    return distance._replace(positions_NK=distance.positions_NK.to(torch.int32))

"""The transformer block of data2vec 2.0, and the small pieces that several parts share.

N rows, T tokens, D dim, H heads.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_ds.config import Config
from d2v_ds.kernels.attention import Distance, attend


class Body(Config):
    """The transformer that all modalities share."""

    dim: int = 768
    depth: int = 12
    """Shared blocks; a modality may add prenet blocks of its own before them."""
    heads: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-5
    encoder_dropout: float = 0.0
    """After the attention's output projection."""
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    """Inside the MLP, after both layers."""
    post_mlp_dropout: float = 0.0
    """On the MLP's output, before the residual."""
    input_dropout: float = 0.0
    layerdrop: float = 0.0
    drop_path: tuple[float, float] = (0.0, 0.0)
    """Of the first and of the last block; linear between."""
    norm_first: bool = False
    """Norms stand before attention and MLP, and one more after the last block (v1 images only)."""
    layer_scale: float | None = None
    """Start of a learned factor on each residual branch's channels (arXiv:2103.17239); None = no such factor."""
    qkv_bias: Literal["all", "qv"] = "all"
    """Which projections of the attention have a bias; BEiT's have none on the keys."""


class LayerNormFp32(nn.LayerNorm):
    """Layer norm computed in fp32 whatever the dtype of its input, as the audio feature extractor needs."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


class DropPath(nn.Module):
    """Drops the residual branch of whole samples, rescaled (arXiv:1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with an optional bias: (N or 1, H, T, T), or the distance it falls with."""

    def __init__(self, body: Body):
        super().__init__()
        if body.dim % body.heads:
            raise ValueError(
                f"body.dim={body.dim} is not a multiple of body.heads={body.heads}; "
                "choose heads that divide dim"
            )
        self.heads = body.heads
        self.qkv = nn.Linear(body.dim, 3 * body.dim, bias=body.qkv_bias == "all")
        self.q_bias = self.v_bias = None
        if body.qkv_bias == "qv":
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(body.dim)) for _ in range(2))
        self.proj = nn.Linear(body.dim, body.dim)
        self.dropout = body.attention_dropout
        self.proj_dropout = nn.Dropout(body.encoder_dropout)

    def forward(self, x_NTD: Tensor, bias: Tensor | Distance | None, padding_NT: Tensor | None) -> Tensor:
        rows, tokens, dim = x_NTD.shape
        qkv = self.qkv(x_NTD)
        if self.q_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = qkv.view(rows, tokens, 3, self.heads, dim // self.heads)
        y = attend(qkv, bias, padding_NT, self.dropout if self.training else 0.0)
        return self.proj_dropout(self.proj(y.reshape(rows, tokens, dim)))


class MLP(nn.Module):
    def __init__(self, body: Body):
        super().__init__()
        hidden = int(body.dim * body.mlp_ratio)
        self.fc1 = nn.Linear(body.dim, hidden)
        self.fc2 = nn.Linear(hidden, body.dim)
        self.dropout = nn.Dropout(body.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Transformer block, post-norm unless `norm_first`; also returns its feed-forward output, what targets are
    made of."""

    def __init__(self, body: Body, drop_path: float = 0.0):
        super().__init__()
        self.attn = Attention(body)
        self.norm1 = nn.LayerNorm(body.dim, eps=body.norm_eps)
        self.mlp = MLP(body)
        self.norm2 = nn.LayerNorm(body.dim, eps=body.norm_eps)
        self.dropout = nn.Dropout(body.post_mlp_dropout)
        self.drop_path = DropPath(drop_path)
        self.norm_first = body.norm_first
        self.scale1 = self.scale2 = None
        if body.layer_scale is not None:
            self.scale1, self.scale2 = (
                nn.Parameter(torch.full((body.dim,), body.layer_scale)) for _ in range(2)
            )

    def forward(
        self, x_NTD: Tensor, bias: Tensor | Distance | None = None, padding_NT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The block's output and its feed-forward output (before dropout, residual and norm), both (N, T, D)."""
        if self.norm_first:
            x = x_NTD + self.branch(self.attn(self.norm1(x_NTD), bias, padding_NT), self.scale1)
            ffn = self.mlp(self.norm2(x))
            return x + self.branch(self.dropout(ffn), self.scale2), ffn
        x = self.norm1(x_NTD + self.branch(self.attn(x_NTD, bias, padding_NT), self.scale1))
        ffn = self.mlp(x)
        return self.norm2(x + self.branch(self.dropout(ffn), self.scale2)), ffn

    def branch(self, x_NTD: Tensor, scale_D: Tensor | None) -> Tensor:
        return self.drop_path(x_NTD if scale_D is None else x_NTD * scale_D)


def build_blocks(body: Body, depth: int, drop_path: tuple[float, float] = (0.0, 0.0)) -> nn.ModuleList:
    rates = torch.linspace(*drop_path, depth, device="cpu").tolist() if depth else []
    return nn.ModuleList(Block(body, rate) for rate in rates)


class ConvBlock(nn.Module):
    """Convolution of 'same' length over time or a grid, channel layer norm without affine, GELU.

    An even kernel yields one position too many; the last one is cut off.
    """

    def __init__(self, dims: int, channels_in: int, channels: int, kernel: int, groups: int):
        super().__init__()
        if channels_in % groups or channels % groups:
            raise ValueError(
                f"{groups} groups do not divide {channels_in} -> {channels} channels; "
                "set groups to a divisor of both"
            )
        conv = nn.Conv1d if dims == 1 else nn.Conv2d
        self.conv = conv(channels_in, channels, kernel, padding=kernel // 2, groups=groups)
        self.trim = 1 - kernel % 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, *space) -> (N, C, *space)."""
        x = self.conv(x)
        if self.trim:
            x = x[(..., *[slice(None, -1)] * (x.dim() - 2))]
        x = F.layer_norm(x.movedim(1, -1), (x.shape[1],))  # over channels, eps 1e-5
        return F.gelu(x).movedim(-1, 1)


@lru_cache
def alibi_slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """Slope of each head (H,) in fp32 (arXiv:2108.12409).

    For H no power of two: those of the next smaller one, then every second slope of the next larger one.
    No buffer, since an engine would round buffers to bf16.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    more = [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return torch.tensor(slopes + more[: heads - power], device=device)


def draw_layerdrop(layers: int, rate: float, seed: int, stack: str) -> list[bool]:
    """Which layers are left out: a function of the seed, so that all ranks leave out the same ones."""
    draw = random.Random(f"{seed}-{stack}")
    return [rate > 0 and draw.random() < rate for _ in range(layers)]


def walk_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    biases: tuple[Tensor | Distance, ...],
    padding: Tensor | None,
    drops: list[bool],
    first_layer: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each block's output and feed-forward output, one block at a time."""
    for i, block in enumerate(blocks):
        if drops[i]:
            continue
        bias = biases[min(first_layer + i, len(biases) - 1)] if biases else None
        x, ffn = block(x, bias, padding)
        yield x, ffn


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    biases: tuple[Tensor | Distance, ...],
    padding: Tensor | None,
    drops: list[bool],
    first_layer: int = 0,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The last output, every block's output, and every block's feed-forward output."""
    outputs, ffns = [], []
    for x, ffn in walk_blocks(blocks, x, biases, padding, drops, first_layer):  # noqa: B020  (each block's input)
        outputs.append(x)
        ffns.append(ffn)
    return x, outputs, ffns


def shrink_residuals(blocks: nn.ModuleList) -> None:
    """Block i's last layers, divided by sqrt(2 (i + 1)): keeps a deep pre-norm stack's output in scale (BEiT)."""
    with torch.no_grad():
        for i, block in enumerate(blocks):
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight.div_(math.sqrt(2 * (i + 1)))


def bert_init(module: nn.Module) -> None:
    """Linear and embedding weights N(0, 0.02), biases 0, padding row 0 (arXiv:1810.04805)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=0.02)
            if child.padding_idx is not None:
                nn.init.zeros_(child.weight[child.padding_idx])

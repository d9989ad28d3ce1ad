"""The small convolutional decoder: student output put back in place, noise where it saw nothing, to predictions.

N rows, T tokens, J masked, D dim, C decoder channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from d2v_ds.config import Config
from d2v_ds.model.layers import ConvBlock


class DecoderConfig(Config):
    dim: int = 384
    """Channels C of the convolutions."""
    kernel: int = 7
    layers: int = 4
    groups: int = 16
    residual: bool = True
    """Adds a convolution's input to its output, where their channels agree."""
    projection_layers: int = 1
    projection_ratio: float = 2.0
    """Width of the first hidden projection, times C."""
    input_dropout: float = 0.0


class Decoder(nn.Module):
    """Convolutions over time (dims=1) or over a square grid (dims=2), then a projection to the model's width."""

    def __init__(self, config: DecoderConfig, dim: int, dims: int):
        super().__init__()
        self.dims = dims
        self.residual = config.residual
        self.input_dropout = nn.Dropout(config.input_dropout)
        widths = [dim] + [config.dim] * config.layers
        self.blocks = nn.ModuleList(
            ConvBlock(dims, widths[i], widths[i + 1], config.kernel, config.groups)
            for i in range(config.layers)
        )
        self.proj = build_projection(config, widths[-1], dim)

    def forward(
        self, x_NTD: Tensor, masked_NJ: Tensor | None = None, padding_NT: Tensor | None = None
    ) -> Tensor:
        """Predictions (N, J, D) at the masked positions, or (N, T, D) without them.

        `padding_NT` is zeroed before every convolution, so what lies there changes no prediction.
        """
        rows, tokens, dim = x_NTD.shape
        side = math.isqrt(tokens)
        space = (tokens,) if self.dims == 1 else (side, side)
        x = x_NTD.transpose(1, 2).reshape(rows, dim, *space)  # (N, T, D) -> (N, D, *space)
        outside = None if padding_NT is None else padding_NT.view(rows, 1, *space)
        for block in self.blocks:
            x = x if outside is None else x.masked_fill(outside, 0)
            y = block(x)
            x = x + y if self.residual and x.shape == y.shape else y
        x = x.flatten(2).transpose(1, 2)  # (N, C, *space) -> (N, T, C)
        if masked_NJ is not None:  # the projection is pointwise: only what the loss reads
            x = x[torch.arange(rows, device=x.device)[:, None], masked_NJ]
        return self.proj(x)


def build_projection(config: DecoderConfig, width: int, dim: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(config.projection_layers - 1):
        hidden = int(config.dim * config.projection_ratio) if i == 0 else width
        layers += [nn.Linear(width, hidden), nn.GELU()]
        width = hidden
    layers.append(nn.Linear(width, dim))
    return nn.Sequential(*layers) if len(layers) > 1 else layers[0]


def fill_in(kept_NKD: Tensor, restore_NT: Tensor, noise_NJD: Tensor) -> Tensor:
    """Un-shuffles kept tokens to their places, with noise at the masked ones; (N, T, D)."""
    x_NTD = torch.cat([kept_NKD, noise_NJD], dim=1)
    return x_NTD.gather(1, restore_NT[:, :, None].expand_as(x_NTD))

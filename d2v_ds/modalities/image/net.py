"""Images: patches by one convolution, fixed 2-D sine positions added before masking, a class token.

B samples, T = (size / patch)^2 patches, D dim.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from d2v_ds.modalities.image.samples import ImageData
from d2v_ds.model.decoder import Decoder
from d2v_ds.model.encoder import Context, ModalityConfig, ModalityEncoder
from d2v_ds.model.layers import Body


class ImageConfig(ModalityConfig):
    kind: Literal["image"] = "image"
    size: int = 224
    """Side of the square input, in pixels."""
    patch: int = 16
    channels: int = 3
    positions: Literal["sincos", "relative", "relative_per_block"] = "sincos"
    """Fixed positions added to the patches; or (v1) learned attention biases by distance, one table for all blocks
    or one for each (arXiv:2106.08254)."""
    data: ImageData = ImageData()


class PatchEmbed(nn.Module):
    def __init__(self, config: ImageConfig, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(config.channels, dim, config.patch, stride=config.patch)

    def forward(self, source: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, T, D), patches row by row."""
        return self.proj(source).flatten(2).transpose(1, 2)


def sincos_positions(dim: int, side: int) -> Tensor:
    """Fixed positions (side * side, D): the first half of the channels encodes the column, the second the row."""
    frequencies = 10000 ** -(np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    angles = np.arange(side, dtype=np.float64)[:, None] * frequencies
    code = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (side, D / 2)
    columns, rows = np.tile(code, (side, 1)), np.repeat(code, side, axis=0)
    return torch.from_numpy(np.concatenate([columns, rows], axis=1)).float()


def build_encoder(config: ImageConfig, body: Body, fairseq_compat: bool) -> ModalityEncoder:
    if config.size % config.patch or body.dim % 4:
        raise ValueError(
            f"image size {config.size} must be a multiple of patch {config.patch}, "
            f"and body.dim {body.dim} of 4: change one of them"
        )
    side, is_relative = config.size // config.patch, config.positions != "sincos"
    context = Context(
        config,
        body,
        None if is_relative else sincos_positions(body.dim, side),
        has_norm=not body.norm_first,
        has_mask_token=config.view == "masked",
        relative=relative_rows(side, config.extra_tokens) if is_relative else None,
        relative_tables=body.depth if config.positions == "relative_per_block" else 1,
        fairseq_compat=fairseq_compat,
    )
    return ModalityEncoder(PatchEmbed(config, body.dim), context)


def relative_rows(side: int, extra_tokens: int) -> Tensor:
    """Which row of a table of (2 * side - 1)^2 + 3 biases each pair of tokens reads, (E + T, E + T).

    Pairs of patches by their distance in rows and columns; the last three rows are for (extra, patch),
    (patch, extra) and (extra, extra), as in BEiT.
    """
    steps = torch.arange(side, device="cpu")  # also while a model is built without storage
    rows, columns = steps.repeat_interleave(side), steps.repeat(side)
    down, right = rows[:, None] - rows + side - 1, columns[:, None] - columns + side - 1
    num_distances = (2 * side - 1) ** 2
    index = torch.full((extra_tokens + side * side,) * 2, num_distances + 2, device="cpu")
    index[extra_tokens:, extra_tokens:] = down * (2 * side - 1) + right
    index[:extra_tokens, extra_tokens:] = num_distances
    index[extra_tokens:, :extra_tokens] = num_distances + 1
    return index


def init_encoder(encoder: ModalityEncoder) -> None:
    """Patches: Xavier-uniform on the flattened weight, the convolution's own default for the bias (2.0); all N(0, 0.02)
    with relative positions (BEiT)."""
    proj = encoder.local.proj
    if encoder.context.mask_token is not None:
        nn.init.normal_(encoder.context.mask_token, std=0.02)
    if encoder.context.relative is not None:
        nn.init.normal_(proj.weight, std=0.02)
        nn.init.zeros_(proj.bias)
        return
    nn.init.xavier_uniform_(proj.weight.view(proj.weight.shape[0], -1))
    bound = 1 / math.sqrt(proj.weight[0].numel())
    nn.init.uniform_(proj.bias, -bound, bound)


def build_decoder(config: ImageConfig, dim: int) -> Decoder:
    return Decoder(config.decoder, dim, dims=2)


def init_decoder(decoder: Decoder) -> None:
    for layer in decoder.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()

"""Speech: a stack of strided convolutions over the waveform, convolutional positions after masking, ALiBi.

B samples, S waveform samples, T frames of 20 ms, D dim.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from d2v_ds.modalities.audio.samples import RATE, AudioData, num_samples
from d2v_ds.model.decoder import Decoder
from d2v_ds.model.encoder import Context, ModalityConfig, ModalityEncoder
from d2v_ds.model.layers import Body, ConvBlock, LayerNormFp32

CONV_LAYERS = ((512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2)


class AudioConfig(ModalityConfig):
    kind: Literal["audio"] = "audio"
    conv_layers: tuple[tuple[int, int, int], ...] = CONV_LAYERS
    """(channels, kernel, stride) of the feature extractor."""
    position_width: int = 95
    """Receptive field of the positional convolutions together; each has a kernel of max(3, width // depth)."""
    position_depth: int = 5
    position_groups: int = 16
    position_pre_norm: bool = False
    data: AudioData = AudioData()

    @model_validator(mode="after")
    def hears_two_frames(self) -> AudioConfig:
        fewest = num_samples(2, self.conv_layers) / RATE
        if self.data.max_seconds < fewest:
            raise ValueError(
                f"data.max_seconds={self.data.max_seconds:g} crops sounds to less than two frames, one to hide and one "
                f"to show; set {fewest:g} or more"
            )
        return self


class StridedConv(nn.Conv1d):
    """A convolution without padding or bias; (B, C_in, S) -> (B, C, T).

    NOTE: with gradients as one matrix product over windows, channels last, since the backward pass of `nn.Conv1d`
    takes twice the time on a CPU; without, by `nn.Conv1d`, so that features are other libraries' to the last bits.
    """

    def forward(self, x_BCS: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x_BCS)
        (kernel,), (stride,) = self.kernel_size, self.stride
        windows_BTCK = x_BCS.transpose(1, 2).unfold(1, kernel, stride)
        return F.linear(windows_BTCK.flatten(2), self.weight.flatten(1)).transpose(1, 2)


class WaveformEncoder(nn.Module):
    """Waveform -> frames: convolution, fp32 layer norm over channels, GELU; then norm and projection to D."""

    def __init__(self, config: AudioConfig, dim: int):
        super().__init__()
        channels = [1] + [c for c, _, _ in config.conv_layers]
        self.convs = nn.ModuleList(
            StridedConv(channels[i], c, kernel, stride, bias=False)
            for i, (c, kernel, stride) in enumerate(config.conv_layers)
        )
        self.norms = nn.ModuleList(LayerNormFp32(c) for c, _, _ in config.conv_layers)
        self.norm = nn.LayerNorm(channels[-1])
        self.proj = nn.Linear(channels[-1], dim)

    def forward(self, source: Tensor) -> Tensor:
        """(B, S) -> (B, T, D)."""
        x = source[:, None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x).transpose(1, 2)).transpose(1, 2))
        return self.proj(self.norm(x.transpose(1, 2)))


class ConvPositions(nn.Module):
    """A series of grouped convolutions whose output stands for positions; (N, T, D) -> (N, T, D).

    Padded frames are zeroed before every convolution, so a padded batch gives what each sample alone gives.
    """

    def __init__(self, config: AudioConfig, dim: int):
        super().__init__()
        kernel = max(3, config.position_width // config.position_depth)
        self.pre_norm = nn.LayerNorm(dim) if config.position_pre_norm else None
        self.convs = nn.ModuleList(
            ConvBlock(1, dim, dim, kernel, config.position_groups) for _ in range(config.position_depth)
        )

    def forward(self, x_NTD: Tensor, padding_NT: Tensor | None) -> Tensor:
        x = x_NTD if self.pre_norm is None else self.pre_norm(x_NTD)
        x = x.transpose(1, 2)
        for conv in self.convs:
            x = x if padding_NT is None else x.masked_fill(padding_NT[:, None], 0)
            x = conv(x)
        return x.transpose(1, 2)


def build_encoder(config: AudioConfig, body: Body, fairseq_compat: bool) -> ModalityEncoder:
    positions, has_mask_token = ConvPositions(config, body.dim), config.view == "masked"
    context = Context(config, body, positions, has_mask_token=has_mask_token, fairseq_compat=fairseq_compat)
    return ModalityEncoder(WaveformEncoder(config, body.dim), context)


def init_encoder(encoder: ModalityEncoder) -> None:
    for conv in encoder.local.convs:
        nn.init.kaiming_normal_(conv.weight)
    encoder.local.proj.reset_parameters()
    if encoder.context.mask_token is not None:
        nn.init.uniform_(encoder.context.mask_token)


def build_decoder(config: AudioConfig, dim: int) -> Decoder:
    return Decoder(config.decoder, dim, dims=1)


def init_decoder(decoder: Decoder) -> None:
    for layer in decoder.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()

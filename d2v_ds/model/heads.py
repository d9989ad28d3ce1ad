"""Heads that fine-tuning puts on an encoder: image classes, by mean or attention; CTC letters; sentence classes.

A head reads the encoder's last block output without extra tokens. B samples, T tokens, D dim.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from d2v_ds.config import Config

HEAD = "head."
HEAD_DIM = 64
"""Of each head of attention pooling, or more."""


class HeadConfig(Config):
    """Which head stands on the encoder, and how wide it is."""

    kind: Literal[
        "image_classification",
        "attentive_classification",
        "ctc",
        "sentence_classification",
        "utterance_classification",
    ]
    outputs: PositiveInt
    """Classes, or letters with the blank."""
    labels: tuple[str, ...] | None = None
    """What each output means, where it is known."""
    updates: NonNegativeInt | None = None
    """Of fine-tuning, where the file says so."""
    factor: float = 1.0
    """Of one output: it is the number times this."""
    norm_eps: PositiveFloat = 1e-6
    """Of the norm of an image classification; v1 weights in transformers' folders have another."""


class ImageHead(nn.Module):
    """Mean over patches, layer norm, linear."""

    def __init__(self, outputs: int, dim: int, norm_eps: float = 1e-6):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.proj = nn.Linear(dim, outputs)

    def forward(self, x_BTD: Tensor, padding_BT: Tensor | None = None) -> Tensor:
        """Logits (B, classes)."""
        return self.proj(self.norm(x_BTD.mean(dim=1)))


class AttentiveHead(nn.Module):
    """One query, which is learned, attends to all tokens; layer norm, linear (after arXiv:2404.08471, section 4.3)."""

    def __init__(self, outputs: int, dim: int):
        super().__init__()
        self.num_heads = max(h for h in range(1, max(1, dim // HEAD_DIM) + 1) if dim % h == 0)
        self.query = nn.Parameter(torch.zeros(dim))  # at first the mean over tokens
        self.norm_in, self.norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.key, self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, outputs)

    def forward(self, x_BTD: Tensor, padding_BT: Tensor | None = None) -> Tensor:
        """Logits (B, classes)."""
        x_BTD = self.norm_in(x_BTD)
        query_B1D = self.query.expand(len(x_BTD), 1, -1)
        q, k, v = (
            y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for y in (query_B1D, self.key(x_BTD), self.value(x_BTD))
        )  # (B, H, 1 or T, D / H)
        is_real = None if padding_BT is None else ~padding_BT[:, None, None]
        pooled_BD = F.scaled_dot_product_attention(q, k, v, attn_mask=is_real).flatten(1)
        return self.proj(self.norm(pooled_BD))


class CTCHead(nn.Module):
    """A linear layer on every frame; output 0 is the blank."""

    def __init__(self, outputs: int, dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, outputs)

    def forward(self, x_BTD: Tensor, padding_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, letters); padded frames say blank and nothing else."""
        logits = self.proj(x_BTD)
        if padding_BT is None:
            return logits
        blank = torch.full_like(logits[0, 0], -3e4)  # probability 0, and finite in fp16 too
        blank[0] = 0
        return torch.where(padding_BT[:, :, None], blank, logits)


class SentenceHead(nn.Module):
    """The first token through a linear layer, tanh, and another one."""

    def __init__(self, outputs: int, dim: int):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, outputs)

    def forward(self, x_BTD: Tensor, padding_BT: Tensor | None = None) -> Tensor:
        """Logits (B, classes), or one number for regression."""
        return self.proj(torch.tanh(self.dense(x_BTD[:, 0])))


class UtteranceHead(nn.Module):
    """Mean over real frames, linear."""

    def __init__(self, outputs: int, dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, outputs)

    def forward(self, x_BTD: Tensor, padding_BT: Tensor | None = None) -> Tensor:
        """Logits (B, classes)."""
        if padding_BT is None:
            return self.proj(x_BTD.mean(dim=1))
        real_BTD = (~padding_BT)[:, :, None].to(x_BTD.dtype)
        return self.proj((x_BTD * real_BTD).sum(dim=1) / real_BTD.sum(dim=1))


def build_head(config: HeadConfig, dim: int) -> nn.Module:
    """The head of this kind on an encoder of width `dim`; its `forward(x_BTD, padding_BT)` gives logits."""
    if config.kind == "image_classification":
        return ImageHead(config.outputs, dim, config.norm_eps)
    kinds = {
        "attentive_classification": AttentiveHead,
        "ctc": CTCHead,
        "sentence_classification": SentenceHead,
        "utterance_classification": UtteranceHead,
    }
    return kinds[config.kind](config.outputs, dim)


def init_head(head: nn.Module) -> None:
    """Fresh values: CTC's weights Xavier uniform, others normal with standard deviation 0.02, biases 0 (as fairseq)."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            if isinstance(head, CTCHead):
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

"""Text: token and learned position embeddings with a layer norm. The teacher reads these same embeddings.

B samples, T tokens, D dim, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from d2v_ds.modalities.text.samples import PAD, TextData
from d2v_ds.model.decoder import Decoder
from d2v_ds.model.encoder import Context, ModalityConfig, ModalityEncoder
from d2v_ds.model.layers import Body


class TextConfig(ModalityConfig):
    kind: Literal["text"] = "text"
    vocabulary: int = 50265
    """Ids 0..3 are <s>, <pad>, </s>, <unk>; with view=masked (v1) the last one is <mask>."""
    max_tokens: int = Field(512, ge=2)
    """Longest sequence, with <s>."""
    embed_dropout: float = 0.1
    embed_norm: bool = True
    embed_norm_eps: float = 1e-5
    """Of the embeddings alone; the released models', and others in files of transformers."""
    data: TextData = TextData()

    @model_validator(mode="after")
    def batch_holds_one(self) -> TextConfig:
        if self.data.batch_tokens is not None and self.data.batch_tokens < self.max_tokens:
            raise ValueError(
                f"data.batch_tokens={self.data.batch_tokens} holds no text of max_tokens={self.max_tokens}; raise it, "
                "or lower max_tokens"
            )
        return self


class TokenEmbed(nn.Module):
    """Token + position embedding, layer norm, dropout. Positions count non-pad tokens, from PAD + 1."""

    def __init__(self, config: TextConfig, dim: int):
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, dim, padding_idx=PAD)
        self.positions = nn.Embedding(config.max_tokens + PAD + 1, dim, padding_idx=PAD)
        self.norm = nn.LayerNorm(dim, eps=config.embed_norm_eps) if config.embed_norm else nn.Identity()
        self.dropout = nn.Dropout(config.embed_dropout)
        self.zeroes_padding = config.view == "masked"  # as v1 does

    def forward(self, source: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, D)."""
        is_token = source != PAD
        positions = is_token.long().cumsum(dim=1) * is_token + PAD
        x = self.dropout(self.norm(self.tokens(source) + self.positions(positions)))
        return x.masked_fill(~is_token[:, :, None], 0) if self.zeroes_padding else x


def build_encoder(config: TextConfig, body: Body, fairseq_compat: bool) -> ModalityEncoder:
    context = Context(config, body, has_norm=False, fairseq_compat=fairseq_compat)
    mask_id = config.vocabulary - 1 if config.view == "masked" else None
    return ModalityEncoder(TokenEmbed(config, body.dim), context, mask_id, PAD)


def init_encoder(encoder: ModalityEncoder) -> None:
    """The BERT initialisation of the whole model is text's own."""


def build_decoder(config: TextConfig, dim: int) -> Decoder:
    return Decoder(config.decoder, dim, dims=1)


def init_decoder(decoder: Decoder) -> None:
    """As `init_encoder`: projections keep N(0, 0.02)."""

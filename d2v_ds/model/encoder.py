"""One modality's own part of the model: raw input to tokens (`local`), tokens to the shared body (`context`).

The two are separate modules because the teacher may own both, only the context, or neither.
B samples, M views, N = B * M, T tokens, K kept, E extra tokens, D dim, H heads.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from d2v_ds.config import Config
from d2v_ds.kernels.attention import Distance, distance_bias
from d2v_ds.model.batch import Batch
from d2v_ds.model.decoder import DecoderConfig
from d2v_ds.model.layers import Body, alibi_slopes, build_blocks, draw_layerdrop, run_blocks
from d2v_ds.model.loss import Loss
from d2v_ds.model.masking import Mask
from d2v_ds.model.targets import Target


class Alibi(Config):
    """Attention bias that falls linearly with distance (arXiv:2108.12409), times a scale clamped at 0."""

    scale: float = 1.0
    learned: bool = True
    per_head: bool = True
    per_layer: bool = False


class ModalityConfig(Config):
    """What every modality sets; each adds its own keys."""

    kind: str
    view: Literal["visible", "masked"] = "visible"
    """What the student sees: the visible tokens only (2.0), or all, with a learned embedding at masked ones (v1)."""
    clones: PositiveInt = 8
    """M, masked views of a sample that share one teacher pass."""
    mask: Mask = Mask()
    target: Target = Target()
    loss: Loss = Loss()
    decoder: DecoderConfig = DecoderConfig()
    teacher: Literal["full", "context", "norm", "blocks"] = "full"
    """What the teacher owns besides the shared blocks: the whole encoder; all but its local part; all but that
    and the positional convolutions; or nothing. What it does not own it reads from the student as it is."""
    prenet_depth: int = 0
    prenet_dropout: float = 0.0
    prenet_layerdrop: float = 0.0
    prenet_drop_path: tuple[float, float] = (0.0, 0.0)
    extra_tokens: int = 0
    extra_tokens_init: Literal["zero", "normal", "first_zero", "small"] = "zero"
    """normal: N(0, 1); first_zero: the first 0, the others N(0, 1); small: N(0, 0.02)."""
    alibi: Alibi | None = None


class ModalityEncoder(nn.Module):
    """`local`: source -> (B, T, D). `context`: those tokens, whole or masked -> the shared body's input.

    `mask_id`, `pad_id`: ids that hide a token, or stand for none, in a source that is masked itself (v1 text).
    """

    def __init__(
        self, local: nn.Module, context: Context, mask_id: int | None = None, pad_id: int | None = None
    ):
        super().__init__()
        self.local = local
        self.context = context
        self.mask_id, self.pad_id = mask_id, pad_id


class Context(nn.Module):
    """Positions, masking, extra tokens, norm and prenet blocks of one modality.

    `positions`: a tensor (T, D) added before masking, or a module (N, T, D) -> (N, T, D) applied after it to
    tokens whose masked positions are zero, so it leaks where something is masked, not what.
    `relative`: which row of a bias table each pair of tokens, extra ones included, reads; (E + T, E + T).
    """

    def __init__(
        self,
        config: ModalityConfig,
        body: Body,
        positions: Tensor | nn.Module | None = None,
        has_norm: bool = True,
        has_mask_token: bool = False,
        relative: Tensor | None = None,
        relative_tables: int = 1,
        fairseq_compat: bool = False,
    ):
        super().__init__()
        is_fixed = isinstance(positions, Tensor)
        self.view = config.view
        self.mask_token = nn.Parameter(torch.zeros(body.dim)) if has_mask_token else None
        self.register_buffer("relative", relative, persistent=False)
        if relative is not None:
            rows = int(relative.max()) + 1
            self.relative_bias = nn.Parameter(torch.zeros(relative_tables, rows, body.heads))
        self.register_buffer("positions", positions if is_fixed else None, persistent=False)
        self.conv_positions = None if is_fixed else positions
        self.pads_positions = not fairseq_compat
        self.num_extra = config.extra_tokens
        if self.num_extra:
            self.extra_tokens = nn.Parameter(init_extra_tokens(config, body.dim))
        self.heads = body.heads
        self.alibi = config.alibi
        if self.alibi:
            layers = config.prenet_depth + body.depth if self.alibi.per_layer else 1
            shape = (layers, body.heads if self.alibi.per_head else 1)
            self.alibi_scale = nn.Parameter(
                torch.full(shape, self.alibi.scale), requires_grad=self.alibi.learned
            )
        self.norm = nn.LayerNorm(body.dim, eps=body.norm_eps) if has_norm or config.prenet_depth else None
        self.dropout = nn.Dropout(config.prenet_dropout)
        self.blocks = build_blocks(body, config.prenet_depth, config.prenet_drop_path)
        self.layerdrop = config.prenet_layerdrop

    def forward(
        self, local_BTD: Tensor, batch: Batch, is_masked: bool
    ) -> tuple[Tensor, tuple[Tensor | Distance, ...], Tensor | None]:
        """The body's input for the masked views (N, E + K, D), K = T if they hold all tokens, or for the whole
        samples (B, E + T, D).

        Also the attention biases (none, one for all layers, or one a layer) and the padding of these tokens.
        """
        x, padding = local_BTD, batch.padding_BT
        if is_masked and self.view == "masked":
            x, padding = self.hide_masked(x, batch)
        x = x if self.positions is None else x + self.positions.to(x.dtype)
        if is_masked and self.view == "visible":
            x, positions_NK, padding = self.keep_visible(x, batch)
        else:
            x = self.add_conv_positions(x, padding)
            positions_NK = torch.arange(x.shape[1], device=x.device)[None]
        if self.num_extra:
            x = torch.cat([self.extra_tokens.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
            padding = None if padding is None else F.pad(padding, (self.num_extra, 0), value=False)
        biases = self.make_biases(positions_NK, x.dtype)
        if self.norm is not None:
            x = self.dropout(self.norm(x))
        drops = draw_layerdrop(
            len(self.blocks), self.layerdrop * self.training, batch.layerdrop_seed, "prenet"
        )
        x, _, _ = run_blocks(self.blocks, x, biases, padding, drops)
        return x, biases, padding

    def hide_masked(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Every view with the mask embedding at its masked positions (N, T, D), and its padding (N, T)."""
        padding = batch.padding_BT
        padding_NT = None if padding is None else padding.repeat_interleave(batch.clones, dim=0)
        if self.mask_token is None:  # hidden in the source already
            return x, padding_NT
        x_NTD = x.repeat_interleave(batch.clones, dim=0)
        return torch.where(batch.mask_NT[:, :, None], self.mask_token.to(x.dtype), x_NTD), padding_NT

    def keep_visible(self, x_BTD: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """What each view may see (N, K, D), the original positions of it and its padding, both (N, K)."""
        rows = torch.arange(batch.keep_NK.shape[0], device=x_BTD.device)[:, None]
        padding_NT = None
        if batch.padding_BT is not None:
            padding_NT = batch.padding_BT.repeat_interleave(batch.clones, dim=0)
        if self.conv_positions is None:
            x_NKD = x_BTD[rows // batch.clones, batch.keep_NK]
        else:
            x_NTD = x_BTD.repeat_interleave(batch.clones, dim=0)
            hidden = (
                batch.mask_NT if padding_NT is None or not self.pads_positions else batch.mask_NT | padding_NT
            )
            positions_NTD = self.conv_positions(
                x_NTD.masked_fill(hidden[:, :, None], 0), padding_NT if self.pads_positions else None
            )
            x_NKD = (x_NTD + positions_NTD)[rows, batch.keep_NK]
        return x_NKD, batch.keep_NK, None if padding_NT is None else padding_NT.gather(1, batch.keep_NK)

    def add_conv_positions(self, x_BTD: Tensor, padding_BT: Tensor | None) -> Tensor:
        if self.conv_positions is None:
            return x_BTD
        if (
            self.view == "masked" and padding_BT is not None
        ):  # v1 zeroes padding once, before all convolutions
            x_BTD = x_BTD.masked_fill(padding_BT[:, :, None], 0)
        return x_BTD + self.conv_positions(x_BTD, padding_BT if self.pads_positions else None)

    def make_biases(
        self, positions_NK: Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor | Distance, ...]:
        if self.relative is not None:
            extra_NE = torch.arange(self.num_extra, device=positions_NK.device).expand(len(positions_NK), -1)
            tokens_NK = torch.cat([extra_NE, positions_NK + self.num_extra], dim=1)
            rows_NKK = self.relative[tokens_NK[:, :, None], tokens_NK[:, None, :]]
            return tuple(table[rows_NKK].permute(0, 3, 1, 2).to(dtype) for table in self.relative_bias)
        if not self.alibi:
            return ()
        strength_LH = self.alibi_scale.clamp(min=0).float() * alibi_slopes(self.heads, positions_NK.device)
        return tuple(
            distance_bias(Distance(strength_H, positions_NK, self.num_extra)) for strength_H in strength_LH
        )


def init_extra_tokens(config: ModalityConfig, dim: int) -> Tensor:
    tokens = torch.zeros(1, config.extra_tokens, dim)
    if config.extra_tokens_init == "normal":
        nn.init.normal_(tokens)
    elif config.extra_tokens_init == "small":
        nn.init.normal_(tokens, std=0.02)
    elif config.extra_tokens_init == "first_zero":
        nn.init.normal_(tokens[:, 1:])
    return tokens

"""A trained encoder of one modality: raw input in, features out; and what a fine-tuned head makes of them.

B inputs, T tokens, E extra tokens, D dim, V outputs of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_ds.modalities import inputs
from d2v_ds.modalities.audio.vocabulary import join_symbols
from d2v_ds.modalities.prepared import Prepared
from d2v_ds.model.data2vec import Data2Vec
from d2v_ds.model.heads import HeadConfig
from d2v_ds.recipe import Recipe

log = logging.getLogger(__name__)


class Features(NamedTuple):
    x: Tensor
    """The encoder's output without extra tokens, (B, T, D); zero where there is padding."""
    layers: list[Tensor]
    """Every shared block's output without extra tokens, each (B, T, D). The last one is `x`, but for a body with
    norms first (v1 images), where `x` is its norm."""
    pooled: Tensor
    """Mean of `x` over real tokens, (B, D)."""
    mask: Tensor
    """Bool (B, T), True = padding."""


class Output(NamedTuple):
    """What one layer gives for a batch of rows; padding is zero."""

    x: Tensor
    """(B, T, D)."""
    extra: Tensor
    """The extra (class) tokens, (B, E, D)."""


class Hidden(NamedTuple):
    """What the encoder gives for a batch of rows."""

    last: Output
    """After the last block and, with norms first, its norm."""
    kept: list[Output]
    """The shared blocks that were asked for."""
    mask: Tensor
    """Bool (B, T), True = padding."""

    @property
    def x(self) -> Tensor:
        return self.last.x

    @property
    def layers(self) -> list[Tensor]:
        return [output.x for output in self.kept]


class Encoder(nn.Module):
    """A trained encoder of one modality; `extract(x)` takes raw input.

    `origin`: what it was loaded from, in words. `head`: of a fine-tuned model, else None.
    """

    def __init__(
        self,
        model: Data2Vec,
        modality: str,
        samples: Any,
        recipe: Recipe,
        origin: str = "",
        head: nn.Module | None = None,
        head_config: HeadConfig | None = None,
    ):
        super().__init__()
        self.model, self.modality, self.samples, self.recipe = model, modality, samples, recipe
        self.origin, self.head, self.head_config = origin, head, head_config

    @property
    def inputs(self) -> ModuleType:
        """The modality's module that takes what users give; no attribute, so that an encoder can be pickled."""
        return inputs(self.modality)

    def __repr__(self) -> str:
        body, first = self.recipe.body, next(self.model.parameters())
        parameters = sum(p.numel() for p in self.parameters()) / 1e6
        return (
            f"Encoder({self.modality} from {self.origin or 'memory'}: {body.depth} x {body.dim}, "
            f"{parameters:.1f} M parameters, {str(first.dtype).removeprefix('torch.')} on {first.device})"
        )

    @torch.no_grad()
    def extract(self, x: Any, all: bool = False, rate: int | None = None) -> Tensor | Features:  # noqa: A002
        """Features (B, T, D) of raw input, or with `all` every layer, pooled features and the padding mask.

        `x`: one item or a list. Sound: paths, 16 kHz mono waveforms (other rates with `rate`); images: paths, PIL,
        pixels of 8 bits, normalised tensors (3, H, W); text: str, a Path, ids. Arrays with one dimension more are
        batches. Unequal lengths are padded; padding changes nothing, and features there are zero.

        Raises ValueError for input that is empty, of a wrong kind or shape, or not finite.
        """
        hidden = self.run(self.prepare(x, rate), keep=all)
        if not all:
            return hidden.x
        return Features(hidden.x, hidden.layers, mean_pool(hidden.x, hidden.mask), hidden.mask)

    @torch.no_grad()
    def logits(self, x: Any, rate: int | None = None) -> Tensor:
        """The fine-tuned head's output: (B, V) of a class, (B, T, V) of CTC (padding says blank).

        Raises ValueError if these weights have no head.
        """
        if self.head is None:
            raise ValueError(
                f"{self.origin or 'this encoder'} has no fine-tuned head; use extract(x) for features"
            )
        hidden = self.run(self.prepare(x, rate))
        return self.head.eval()(hidden.x, hidden.mask)

    def predict(self, x: Any, rate: int | None = None) -> list[Any]:
        """For each input the most likely class, or what CTC's best path says: labels where they are known, else
        their numbers. A head with one output gives its number."""
        return self.decide(self.logits(x, rate).float())

    def decide(self, logits: Tensor) -> list[Any]:
        """What `predict` gives, of logits."""
        labels = self.head_config.labels or range(self.head_config.outputs)
        if self.head_config.kind == "ctc":
            paths = [spell(row.tolist()) for row in logits.argmax(dim=-1)]
            if self.head_config.labels is None:
                return paths
            return [join_symbols(labels[i] for i in path) for path in paths]
        if self.head_config.outputs == 1:
            return (logits[:, 0] / self.head_config.factor).tolist()
        return [labels[i] for i in logits.argmax(dim=-1).tolist()]

    def prepare(self, x: Any, rate: int | None = None) -> list[Tensor]:
        """Rows as the model takes them; what was done to them besides is logged as a warning."""
        items = self.inputs.listed(x)
        prepared: list[Prepared] = []
        for i, item in enumerate(items):
            try:
                prepared.append(self.inputs.prepare(self.samples, item, rate))
            except ValueError as error:
                raise ValueError(
                    f"input {i} of {len(items)}: {error}" if len(items) > 1 else str(error)
                ) from error
        notices = [p.notice for p in prepared if p.notice]
        if notices:
            log.warning(
                "%d of %d inputs: %s", len(notices), len(items), "; ".join(dict.fromkeys(notices[:3]))
            )
        return [p.row for p in prepared]

    @torch.no_grad()
    def run(self, rows: list[Tensor], keep: bool | Collection[int] = False) -> Hidden:
        """What the rows give as one padded batch, with the outputs of all blocks or of some, by number. Rows too
        long for one pass (sound of minutes) go window by window."""
        keep = range(len(self.model.blocks)) if keep is True else keep or ()
        windows = [self.inputs.pieces(self.samples, row) for row in rows]
        if max(map(len, windows)) == 1:
            return self.run_batch(rows, keep)
        return stack([join([self.run_batch([piece], keep) for piece in pieces]) for pieces in windows])

    def run_batch(self, rows: list[Tensor], keep: Collection[int]) -> Hidden:
        parameter = next(self.model.parameters())
        batch = self.samples.pad(rows).to(parameter.device, parameter.dtype)
        kept = []
        for i, (output, _) in enumerate(self.model.eval().walk(batch)):
            if i in keep:
                kept.append(self.split(output, batch.padding_BT))
        last = self.split(self.model.norm(output), batch.padding_BT)
        mask = batch.padding_BT
        if mask is None:
            mask = torch.zeros(last.x.shape[:2], dtype=torch.bool, device=last.x.device)
        return Hidden(last, kept, mask)

    def split(self, output_BTD: Tensor, padding_BT: Tensor | None) -> Output:
        """(B, E + T, D) -> tokens and extra tokens."""
        extra = self.model.configs[self.modality].extra_tokens
        x = output_BTD[:, extra:]
        return Output(
            x if padding_BT is None else x.masked_fill(padding_BT[:, :, None], 0), output_BTD[:, :extra]
        )


def join(windows: list[Hidden]) -> Hidden:
    """One sample's windows, one after the other."""

    def joined(outputs: list[Output]) -> Output:
        return Output(torch.cat([output.x for output in outputs], dim=1), outputs[0].extra)

    return Hidden(
        joined([window.last for window in windows]),
        [joined(list(layer)) for layer in zip(*(window.kept for window in windows), strict=True)],
        torch.cat([window.mask for window in windows], dim=1),
    )


def stack(rows: list[Hidden]) -> Hidden:
    """Single samples as one batch, padded."""
    longest = max(row.mask.shape[1] for row in rows)

    def stacked(outputs: list[Output]) -> Output:
        x = [F.pad(output.x, (0, 0, 0, longest - output.x.shape[1])) for output in outputs]
        return Output(torch.cat(x), torch.cat([output.extra for output in outputs]))

    return Hidden(
        stacked([row.last for row in rows]),
        [stacked(list(layer)) for layer in zip(*(row.kept for row in rows), strict=True)],
        torch.cat([F.pad(row.mask, (0, longest - row.mask.shape[1]), value=True) for row in rows]),
    )


def mean_pool(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over real tokens, (B, D)."""
    real = (~mask_BT)[:, :, None]
    return ((x_BTD.float() * real).sum(dim=1) / real.sum(dim=1)).to(x_BTD.dtype)


def spell(path: list[int], blank: int = 0) -> list[int]:
    """CTC's best path without repeats and blanks."""
    return [k for k, before in zip(path, [blank, *path], strict=False) if k != before and k != blank]

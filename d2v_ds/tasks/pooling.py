"""What of an encoder's output stands for an item: which layer, and how its tokens become one vector.

B items of a batch, T tokens, L layers, D dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from d2v_ds.convert.features import Encoder, Hidden, mean_pool


@dataclass(frozen=True)
class What:
    """What is taken from the encoder for each item."""

    layer: str
    """last, all, or the number of a shared block, from 0 or (negative) from the end."""
    pool: str
    """mean over tokens; cls, the class token (images) or <s> (text); none, every token."""

    def check(self, encoder: Encoder) -> None:
        depth = len(encoder.model.blocks)
        if self.layer not in ("last", "all"):
            try:
                number = int(self.layer)
            except ValueError as error:
                raise ValueError(f"layer {self.layer!r} must be last, all or a number") from error
            if not -depth <= number < depth:
                raise ValueError(
                    f"layer {number} must lie in {-depth}..{depth - 1}: the model has {depth} blocks"
                )
        if self.pool not in ("mean", "cls", "none"):
            raise ValueError(f"pool {self.pool!r} must be mean, cls or none")
        if self.pool == "none" and self.layer == "all":
            raise ValueError(
                "pool none with layer all would be as large as the data many times; take one layer"
            )
        if self.pool == "cls" and not self.has_class(encoder):
            raise ValueError(f"this {encoder.modality} model has no class token; use pool mean")

    @staticmethod
    def has_class(encoder: Encoder) -> bool:
        return encoder.modality == "text" or encoder.model.configs[encoder.modality].extra_tokens > 0

    def blocks(self, encoder: Encoder) -> list[int]:
        """The blocks whose outputs are needed besides the last output."""
        depth = len(encoder.model.blocks)
        return (
            []
            if self.layer == "last"
            else list(range(depth))
            if self.layer == "all"
            else [int(self.layer) % depth]
        )

    def take(self, hidden: Hidden, encoder: Encoder) -> list[np.ndarray]:
        """For each row (D,), (L, D) or (T, D)."""
        outputs = [hidden.last] if self.layer == "last" else hidden.kept
        if self.pool == "none":
            return [x[~mask].float().cpu().numpy() for x, mask in zip(outputs[0].x, hidden.mask, strict=True)]
        if self.pool == "mean":
            pooled = [mean_pool(output.x, hidden.mask) for output in outputs]
        elif encoder.model.configs[encoder.modality].extra_tokens:
            pooled = [output.extra[:, 0] for output in outputs]
        else:
            pooled = [output.x[:, 0] for output in outputs]
        pooled_BLD = torch.stack(pooled, dim=1).float().cpu().numpy()
        return list(pooled_BLD if self.layer == "all" else pooled_BLD[:, 0])

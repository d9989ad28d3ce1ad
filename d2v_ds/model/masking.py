"""Which tokens are hidden: the mask routines of data2vec 2.0 (arXiv:2212.07525, section 3), drawn on the CPU.

All return bool arrays (M views, T tokens), True = masked, with exactly the same count in every row, and
draw from a numpy Generator alone, so a mask is a function of the generator's seed.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from d2v_ds.config import Config


class Mask(Config):
    """How tokens are hidden from the student."""

    kind: Literal["inverse_block", "block", "random"] = "block"
    """inverse_block keeps square blocks of a grid (images); block hides spans (audio); random is per token."""
    ratio: float = Field(0.5, gt=0, lt=1)
    """Share of the tokens that is masked."""
    adjust: float = 0.0
    """Added to the drawn share, since blocks overlap; the final count is exact all the same."""
    length: int = 1
    """Side of a block, in tokens."""
    noise_std: float = 0.01
    """Standard deviation of the vectors that stand at masked positions in the decoder's input."""


def exactly(on: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Switches random positions off (or on) until `count` of each row are on."""
    priority = rng.random(on.shape) + ~on  # positions that are on come first, in random order
    chosen = np.argpartition(priority, count - 1, axis=1)[:, :count] if count else np.empty((len(on), 0), int)
    result = np.zeros_like(on)
    np.put_along_axis(result, chosen, True, axis=1)
    return result


def inverse_block_mask(rng: np.random.Generator, views: int, side: int, mask: Mask) -> np.ndarray:
    """Keeps square blocks of a (side, side) grid and masks the rest; (M, side * side).

    Blocks at the border are cut off, not shifted, as in the original: a corner is seen half as often.
    """
    tokens = side * side
    keep_ratio = 1 - mask.ratio
    centres = rng.integers(0, tokens, (views, int(tokens * (keep_ratio + mask.adjust) / mask.length**2)))
    offsets = np.arange(mask.length) - mask.length // 2
    rows = np.clip((centres // side)[..., None, None] + offsets[:, None], 0, side - 1)
    columns = np.clip((centres % side)[..., None, None] + offsets[None, :], 0, side - 1)
    keep = np.zeros((views, tokens), bool)
    np.put_along_axis(keep, (rows * side + columns).reshape(views, -1), True, axis=1)
    return ~exactly(keep, int(tokens * keep_ratio), rng)


def block_mask(rng: np.random.Generator, views: int, tokens: int, mask: Mask) -> np.ndarray:
    """Masks spans of `length` tokens around random centres, then equalises to int(T * ratio); (M, T)."""
    centres = rng.integers(0, tokens, (views, int(tokens * (mask.ratio + mask.adjust) / mask.length)))
    offsets = np.arange(mask.length) - mask.length // 2
    positions = np.clip(centres[..., None] + offsets, 0, tokens - 1).reshape(views, -1)
    masked = np.zeros((views, tokens), bool)
    np.put_along_axis(masked, positions, True, axis=1)
    return exactly(masked, int(tokens * mask.ratio), rng)


def random_mask(rng: np.random.Generator, views: int, tokens: int, mask: Mask) -> np.ndarray:
    """Keeps int(T * (1 - ratio)) tokens chosen uniformly; (M, T)."""
    return ~exactly(np.zeros((views, tokens), bool), int(tokens * (1 - mask.ratio)), rng)


def draw_mask(rng: np.random.Generator, views: int, tokens: int, mask: Mask) -> np.ndarray:
    """The mask of one sample of `tokens` tokens, by its kind; (M, T)."""
    if mask.kind == "inverse_block":
        side = int(round(tokens**0.5))
        if side * side != tokens:
            raise ValueError(
                f"{tokens} tokens are no square grid: an inverse_block mask needs one; "
                "use mask.kind=block or a square input"
            )
        return inverse_block_mask(rng, views, side, mask)
    return (block_mask if mask.kind == "block" else random_mask)(rng, views, tokens, mask)


def pad_masks(masks: list[np.ndarray]) -> np.ndarray:
    """Stacks masks (M, T_i) of samples of unequal length into (B * M, T), the same count in every row.

    Padded positions are split between kept and masked so that rows agree; who reads the mask leaves them
    out by the padding mask. Since a longer sample has at least as many masked and as many kept tokens,
    a row always has enough padding for it.
    """
    tokens = max(m.shape[1] for m in masks)
    count = max(int(m[0].sum()) for m in masks)
    padded = []
    for m in masks:
        row = np.zeros((m.shape[0], tokens), bool)
        row[:, : m.shape[1]] = m
        row[:, m.shape[1] : m.shape[1] + count - int(m[0].sum())] = True
        padded.append(row)
    return np.concatenate(padded)

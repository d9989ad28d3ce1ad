"""Which tokens are hidden: the mask routines of data2vec 2.0 (arXiv:2212.07525, section 3) and 1.0, on the CPU.

All return bool arrays (M views, T tokens), True = masked, and draw from a numpy Generator alone, so a mask is a
function of the generator's seed. Those of 2.0 and `rectangle` mask exactly the same count in every row; the spans
of 1.0 do not.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from d2v_ds.config import Config


class Mask(Config):
    """How tokens are hidden from the student."""

    kind: Literal["inverse_block", "block", "random", "span", "token_span", "rectangle"] = "block"
    """inverse_block keeps square blocks of a grid (images); block hides spans (audio); random is per token. Of v1:
    span (audio), token_span (text), rectangle (images, BEiT's)."""
    ratio: float = Field(0.5, gt=0, lt=1)
    """Share of the tokens that is masked; spans of v1 overlap, so theirs is smaller."""
    adjust: float = 0.0
    """Added to the drawn share, since blocks overlap; the final count is exact all the same."""
    length: int = Field(1, ge=1)
    """Side of a block or length of a span, in tokens; of rectangles the smallest area."""
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


def span_mask(rng: np.random.Generator, views: int, tokens: int, mask: Mask, least: int = 1) -> np.ndarray:
    """Spans of `length` at distinct starts, T * ratio / length of them (rounded up or down at random), or `least`, that
    overlap freely; (M, T). Inside the sequence ("span", wav2vec 2.0's), or cut off at its end ("token_span")."""
    masked = np.zeros((views, tokens), bool)
    if tokens < 2:
        raise ValueError(
            f"a sequence of {tokens} tokens is too short for masked spans; leave it out of the data"
        )
    for row in masked:
        spans = min(max(least, int(tokens * mask.ratio / mask.length + rng.random())), tokens - 1)
        starts = tokens
        if mask.kind == "span":  # too many spans for starts that leave room: any that are left
            starts = tokens - mask.length if tokens - mask.length > spans else spans + 1
        chosen = rng.choice(starts, spans, replace=False)
        positions = (chosen[:, None] + np.arange(mask.length)).ravel()
        row[positions[positions < tokens]] = True
        if row.all():
            row[rng.integers(tokens)] = False
    return masked


def rectangle_mask(rng: np.random.Generator, views: int, side: int, mask: Mask) -> np.ndarray:
    """Rectangles of at least `length` tokens and aspect 0.3 to 3.3 until int(T * ratio) are masked; (M, T).

    As in BEiT (arXiv:2106.08254, algorithm 1); where ten tries place none, single tokens fill the rest.
    """
    tokens = side * side
    count = int(tokens * mask.ratio)
    masked = np.zeros((views, side, side), bool)
    for grid in masked:
        while (left := count - int(grid.sum())) > 0 and place_rectangle(rng, grid, left, mask.length):
            pass
    return exactly(masked.reshape(views, tokens), count, rng)


def place_rectangle(rng: np.random.Generator, grid: np.ndarray, most: int, least: int) -> bool:
    """Masks one more rectangle that adds 1 to `most` tokens; False if ten tries found none."""
    side = len(grid)
    for _ in range(10):
        area = rng.uniform(least, most) if most > least else rng.uniform(most, least)
        aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if not (0 < height < side and 0 < width < side):
            continue
        top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
        window = grid[top : top + height, left : left + width]
        added = window.size - int(window.sum())
        if 0 < added <= most:
            window[:] = True
            return True
    return False


def fewest(masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows with as few masked tokens as the smallest has, by unmasking at random (v1 audio's batches); (N, T)."""
    return exactly(masks, int(masks.sum(axis=1).min()), rng)


def draw_mask(rng: np.random.Generator, views: int, tokens: int, mask: Mask) -> np.ndarray:
    """The mask of one sample of `tokens` tokens, by its kind; (M, T)."""
    if mask.kind in GRID:
        side = int(round(tokens**0.5))
        if side * side != tokens:
            raise ValueError(
                f"{tokens} tokens are no square grid: a mask of kind {mask.kind} needs one; "
                "use mask.kind=block or a square input"
            )
        return GRID[mask.kind](rng, views, side, mask)
    return LINE[mask.kind](rng, views, tokens, mask)


GRID = {"inverse_block": inverse_block_mask, "rectangle": rectangle_mask}
LINE = {"block": block_mask, "random": random_mask, "span": span_mask, "token_span": span_mask}


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

"""Masks are distributed as the reference implementation's, and have exact counts.

Compared are 2,000 draws with 2,000 recorded ones, each difference against its own standard error. The seed is
fixed, so a limit of 4 standard errors never fails by chance, only by a change of the routine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2v_ds.model.masking import (
    Mask,
    block_mask,
    draw_mask,
    exactly,
    inverse_block_mask,
    pad_masks,
    random_mask,
)

DRAWS = 2000
STATS = json.loads((Path(__file__).resolve().parents[1] / "golden" / "masking_stats.json").read_text())
IMAGE = Mask(kind="inverse_block", ratio=0.8, adjust=0.07, length=3)
AUDIO = Mask(kind="block", ratio=0.5, adjust=0.05, length=5)
TEXT = Mask(kind="random", ratio=0.48)
RELEASED = {"image_base": (IMAGE, 196), "audio_base_block1d": (AUDIO, 500), "text_base": (TEXT, 512)}
SEQUENCES = ("audio_base_block1d", "text_base")


@pytest.fixture(scope="module")
def masks() -> dict[str, np.ndarray]:
    """(2000, T) for every released base setting."""
    return {
        name: draw_mask(np.random.default_rng(0), DRAWS, tokens, mask)
        for name, (mask, tokens) in RELEASED.items()
    }


@pytest.fixture(scope="module")
def kept_grid(masks: dict[str, np.ndarray]) -> np.ndarray:
    return ~masks["image_base"].reshape(DRAWS, 14, 14)


def run_lengths(on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of all runs of True along the last axis, and the number of runs in every row."""
    rows = np.pad(on.reshape(-1, on.shape[-1]), ((0, 0), (1, 1))).astype(np.int8)
    steps = np.diff(rows, axis=1)
    row, start = np.nonzero(steps == 1)
    _, end = np.nonzero(steps == -1)
    return end - start, np.bincount(row, minlength=len(rows))


def assert_same_distribution(ours: np.ndarray, recorded: dict[str, Any]) -> None:
    """Mean within 4 standard errors, spread within 5 %."""
    number = recorded.get("total_runs", DRAWS)
    error = np.hypot(ours.std() / len(ours) ** 0.5, recorded["std"] / number**0.5)
    assert abs(ours.mean() - recorded["mean"]) < 4 * error
    assert ours.std() == pytest.approx(recorded["std"], rel=0.05)


def assert_same_histogram(lengths: np.ndarray, recorded: dict[str, Any]) -> None:
    """Share of every run length that occurs, within 4 standard errors of two multinomials, and 2 % in all."""
    ours = np.bincount(lengths, minlength=64) / len(lengths)
    theirs = np.array([recorded["counts"].get(str(k), 0) for k in range(len(ours))]) / recorded["total_runs"]
    share = (ours * len(lengths) + theirs * recorded["total_runs"]) / (len(lengths) + recorded["total_runs"])
    error = np.sqrt(share * (1 - share) * (1 / len(lengths) + 1 / recorded["total_runs"]))
    common = share * len(lengths) > 20
    assert (np.abs(ours - theirs)[common] < 4 * error[common]).all()
    assert np.abs(ours - theirs).sum() / 2 < 0.02


def assert_same_shares(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Shares by position, each within 4 standard errors, and all no farther apart than chance makes them."""
    share = (ours + theirs) / 2
    deviation = (ours - theirs) / np.sqrt(share * (1 - share) * 2 / DRAWS)
    assert np.abs(deviation).max() < 4
    assert (deviation**2).mean() < 1 + 4 * (2 / deviation.size) ** 0.5


@pytest.mark.parametrize(
    ("mask", "tokens", "count"),
    [
        (IMAGE, 196, 157),
        (Mask(kind="inverse_block", ratio=0.75, adjust=0.1, length=3), 196, 147),
        (Mask(kind="inverse_block", ratio=0.75, adjust=0.1, length=3), 256, 192),
        (AUDIO, 500, 250),
        (AUDIO, 799, 399),
        (TEXT, 512, 246),
        (Mask(kind="random", ratio=0.5), 512, 256),
    ],
)
def test_every_row_of_a_released_setting_has_the_published_count(mask: Mask, tokens: int, count: int) -> None:
    """Base, large and huge images; audio; base and large text."""
    drawn = draw_mask(np.random.default_rng(1), 500, tokens, mask)
    assert drawn.shape == (500, tokens) and drawn.dtype == bool
    assert (drawn.sum(axis=1) == count).all()


@pytest.mark.parametrize("name", RELEASED)
def test_counts_of_masked_tokens_are_the_recorded_ones(masks: dict[str, np.ndarray], name: str) -> None:
    """The record has one count, without any spread."""
    assert STATS[name]["n_masked"]["std"] == 0
    assert (masks[name].sum(axis=1) == STATS[name]["n_masked"]["mean"]).all()


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("part", ["masked_runs", "unmasked_runs"])
def test_run_lengths_of_sequences_are_distributed_as_recorded(
    masks: dict[str, np.ndarray], name: str, part: str
) -> None:
    """Mean, spread, every length's share, and runs a draw."""
    on = masks[name] if part == "masked_runs" else ~masks[name]
    lengths, runs = run_lengths(on)
    assert_same_distribution(lengths, STATS[name][part])
    assert_same_histogram(lengths, STATS[name][part])
    if part == "masked_runs":
        assert_same_distribution(runs, STATS[name]["runs_per_draw"])


@pytest.mark.parametrize("name", SEQUENCES)
def test_joint_probability_of_two_masked_tokens_at_a_lag_is_as_recorded(
    masks: dict[str, np.ndarray], name: str
) -> None:
    """Lags 1 to 12, within 4 standard errors of two samples of 2,000 draws."""
    mask = masks[name]
    for lag, recorded in ((int(lag), p) for lag, p in STATS[name]["joint_prob_masked_at_lag"].items()):
        joint = (mask[:, lag:] & mask[:, :-lag]).mean(axis=1)
        assert abs(joint.mean() - recorded) < 4 * joint.std() * (2 / DRAWS) ** 0.5, lag


@pytest.mark.parametrize("name", SEQUENCES)
def test_edges_of_a_sequence_are_masked_as_often_as_recorded(masks: dict[str, np.ndarray], name: str) -> None:
    """The first and the last 12 tokens: blocks are cut off at the border, not shifted."""
    assert_same_shares(masks[name][:, :12].mean(axis=0), np.array(STATS[name]["p_masked_first12"]))
    assert_same_shares(masks[name][:, -12:].mean(axis=0), np.array(STATS[name]["p_masked_last12"]))


@pytest.mark.parametrize("part", ["kept_horizontal_runs", "masked_horizontal_runs"])
def test_run_lengths_in_rows_of_the_grid_are_distributed_as_recorded(
    kept_grid: np.ndarray, part: str
) -> None:
    """Mean, spread, and every length's share."""
    lengths, _ = run_lengths(kept_grid if part == "kept_horizontal_runs" else ~kept_grid)
    assert_same_distribution(lengths, STATS["image_base"][part])
    assert_same_histogram(lengths, STATS["image_base"][part])


def test_kept_patches_lie_together_as_recorded(kept_grid: np.ndarray) -> None:
    """Adjacent pairs, patches without a kept neighbour, whole 3 x 3 windows."""
    across = (kept_grid[:, :, 1:] & kept_grid[:, :, :-1]).sum(axis=(1, 2))
    down = (kept_grid[:, 1:] & kept_grid[:, :-1]).sum(axis=(1, 2))
    framed = np.pad(kept_grid, ((0, 0), (1, 1), (1, 1)))
    beside = framed[:, :-2, 1:-1] | framed[:, 2:, 1:-1] | framed[:, 1:-1, :-2] | framed[:, 1:-1, 2:]
    windows = np.lib.stride_tricks.sliding_window_view(kept_grid, (3, 3), axis=(1, 2)).all(axis=(3, 4))
    assert_same_distribution(across + down, STATS["image_base"]["kept_adjacent_pairs"])
    assert_same_distribution(
        (kept_grid & ~beside).sum(axis=(1, 2)), STATS["image_base"]["isolated_kept_tokens"]
    )
    assert_same_distribution(windows.sum(axis=(1, 2)), STATS["image_base"]["fully_kept_3x3_windows"])


def test_each_patch_is_kept_as_often_as_recorded(kept_grid: np.ndarray) -> None:
    """All 196 positions; a corner about half as often as the middle."""
    assert_same_shares(kept_grid.mean(axis=0), np.array(STATS["image_base"]["p_kept_map"]))


def test_views_of_one_sample_differ() -> None:
    """Every clone draws its own mask."""
    for mask, tokens in RELEASED.values():
        assert len(np.unique(draw_mask(np.random.default_rng(2), 16, tokens, mask), axis=0)) == 16


@pytest.mark.parametrize(("mask", "tokens"), list(RELEASED.values()))
def test_a_mask_is_a_function_of_the_generators_seed(mask: Mask, tokens: int) -> None:
    """And draws from nothing else: the global generator is left alone."""
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first, again, other = (draw_mask(np.random.default_rng(seed), 4, tokens, mask) for seed in (3, 3, 4))
    assert (first == again).all() and (first != other).any()
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize("tokens", [2, 15, 195, 197])
def test_a_block_mask_of_no_square_grid_is_an_error(tokens: int) -> None:
    """The message has the number and what to do."""
    with pytest.raises(ValueError, match=f"{tokens} tokens are no square grid.*use mask.kind=block"):
        draw_mask(np.random.default_rng(0), 1, tokens, IMAGE)


@pytest.mark.parametrize("routine", [block_mask, random_mask])
def test_sequences_of_every_length_have_exact_counts(routine: Any) -> None:
    """From one token on, where there may be no block at all."""
    mask = AUDIO if routine is block_mask else TEXT
    for tokens in range(1, 41):
        expected = (
            int(tokens * mask.ratio) if routine is block_mask else tokens - int(tokens * (1 - mask.ratio))
        )
        assert (routine(np.random.default_rng(tokens), 3, tokens, mask).sum(axis=1) == expected).all()


def test_grids_of_every_side_have_exact_counts() -> None:
    """From one patch on, where there may be no block at all."""
    for side in range(1, 12):
        kept = ~inverse_block_mask(np.random.default_rng(side), 3, side, IMAGE)
        assert (kept.sum(axis=1) == int(side * side * (1 - 0.8))).all()


def test_exactly_gives_the_count_from_any_start_and_moves_no_more_than_it_must() -> None:
    """What is on stays on if there is too little, and nothing comes on if there is too much."""
    rng = np.random.default_rng(6)
    for tokens in (1, 7, 13):
        for count in range(tokens + 1):
            start = rng.random((50, tokens)) < rng.random((50, 1))
            result = exactly(start, count, rng)
            assert (result.sum(axis=1) == count).all()
            is_full = start.sum(axis=1) >= count
            assert (result <= start)[is_full].all() and (result >= start)[~is_full].all()


def test_exactly_chooses_uniformly() -> None:
    """Of 5 that are on 2 are kept, each with probability 2 / 5; of 6 that are off 3 come on."""
    rng = np.random.default_rng(7)
    on = np.tile(np.arange(11) < 5, (4000, 1))
    error = 4 * (0.25 / 4000) ** 0.5
    assert np.abs(exactly(on, 2, rng).mean(axis=0) - np.where(on[0], 0.4, 0)).max() < error
    assert np.abs(exactly(on, 8, rng).mean(axis=0) - np.where(on[0], 1, 0.5)).max() < error


@pytest.mark.parametrize("mask", [AUDIO, TEXT, Mask(kind="block", ratio=0.6, adjust=0.05, length=5)])
def test_padded_masks_have_one_count_and_leave_real_tokens_as_they_were(mask: Mask) -> None:
    """For 200 batches of random lengths: nothing real is masked or unmasked to make rows agree."""
    rng = np.random.default_rng(8)
    for _ in range(200):
        lengths = rng.integers(1, 60, rng.integers(1, 6))
        drawn = [draw_mask(rng, 2, int(tokens), mask) for tokens in lengths]
        padded = pad_masks(drawn)
        assert padded.shape == (2 * len(lengths), lengths.max())
        assert len(np.unique(padded.sum(axis=1))) == 1
        for i, one in enumerate(drawn):
            assert (padded[2 * i : 2 * i + 2, : one.shape[1]] == one).all()


def test_masks_of_equal_length_are_only_stacked() -> None:
    """Without padding there is nothing to split."""
    drawn = [draw_mask(np.random.default_rng(seed), 3, 29, AUDIO) for seed in range(4)]
    assert (pad_masks(drawn) == np.concatenate(drawn)).all()

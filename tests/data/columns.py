"""Columns of lengths as tests have them: in memory, where a corpus maps files."""

import numpy as np

from d2v_ds.data.lengths import Lengths


def lengths_of(columns: list[np.ndarray], shortest: int = 1) -> Lengths:
    columns = [np.asarray(column, dtype=np.uint32) for column in columns]
    out = [np.flatnonzero(column < shortest).astype(np.uint32) for column in columns]
    rows = np.array([len(column) for column in columns])
    return Lengths(columns.__getitem__, rows, [r if len(r) else None for r in out], shortest)


def librispeech(number: int, seed: int = 0) -> np.ndarray:
    """Lengths at 16 kHz like those of LibriSpeech's 960 h: mean 12.3 s, most between 12 and 16, none above 25."""
    rng = np.random.default_rng(seed)
    is_long = rng.random(number) < 0.68
    seconds = np.where(is_long, rng.normal(14.6, 1.3, number), rng.uniform(1.4, 14.0, number))
    return (np.clip(seconds, 1.3, 25) * 16_000).astype(np.uint32)

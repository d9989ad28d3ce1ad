"""Sounds as users have them: files, arrays of any rate, batches -> normalised waveforms at 16 kHz."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from d2v_ds.modalities.audio.samples import (
    RATE,
    AudioSamples,
    check_loudness,
    decode_sound,
    num_frames,
    resample,
)
from d2v_ds.modalities.prepared import (
    Prepared,
    as_bytes,
    as_tensor,
    describe,
    is_number,
    read_file,
    refuse_none,
    refuse_not_finite,
    split_batch,
)

EXTENSIONS = ("flac", "wav", "ogg", "opus", "mp3", "aiff", "aif", "au")
RATES = (1000, 1_000_000)
WINDOW_SECONDS = 60.0
"""Longer sounds are encoded in windows: attention over an hour would need terabytes, and no recipe trains on
more than 20 s at once."""


def listed(x: Any) -> list[Any]:
    """A waveform (S,), a list of numbers, a path or a file's bytes is one sound; (B, S) and other lists are several."""
    if isinstance(x, (Tensor, np.ndarray)):
        if x.ndim == 2 and x.shape[1] <= 16 < x.shape[0]:
            raise ValueError(
                f"{describe(x)} looks like a sound with its {x.shape[1]} channels last; give one channel, or "
                "their mean: x.mean(1)"
            )
        return split_batch(x, 1, "sounds")
    if isinstance(x, (list, tuple)):
        return [x] if x and is_number(x[0]) else refuse_none(list(x), "sounds")
    return [x]


def prepare(samples: AudioSamples, item: Any, rate: int | None = None) -> Prepared:
    """One waveform at `rate` (16 kHz where nothing is said) or file (its own rate, channels averaged); (S,).

    Whole numbers are PCM: loudness does not matter, since a sound is normalised to zero mean and unit variance.
    """
    item = as_bytes(item)
    if isinstance(item, (str, Path, bytes)):
        if rate is not None:
            raise ValueError(f"rate={rate} was given with a file, which says its own rate; leave it out")
        try:
            waveform = decode_sound(item if isinstance(item, bytes) else read_file(item))
        except ValueError as error:
            raise ValueError(str(error) if isinstance(item, bytes) else f"{item}: {error}") from error
    else:
        waveform = at_16_khz(as_tensor(item, "waveform"), rate)
    return noticed(samples, samples.prepare(waveform))


def at_16_khz(waveform: Tensor, rate: int | None) -> Tensor:
    if waveform.ndim != 1:
        raise ValueError(
            f"waveform of shape {tuple(waveform.shape)} must be one-dimensional: one channel, (samples,), "
            "or a batch of sounds of one channel, (sounds, samples)"
        )
    refuse_not_finite(waveform, "waveform")
    check_loudness(waveform)  # before fp32, which would make it infinite
    if rate is not None and not (is_number(rate) and rate % 1 == 0 and RATES[0] <= rate <= RATES[1]):
        raise ValueError(
            f"rate={rate!r} must be a whole number of samples per second, {RATES[0]} to {RATES[1]}, such as 44100"
        )
    return resample(waveform.float(), RATE if rate is None else int(rate))


def noticed(samples: AudioSamples, row: Tensor) -> Prepared:
    windows = len(pieces(samples, row))
    if windows == 1:
        return Prepared(row)
    return Prepared(row, f"{len(row) / RATE:.0f} s, encoded in {windows} windows")


def pieces(samples: AudioSamples, row: Tensor) -> list[Tensor]:
    """Stretches of at most a window, equal to a frame, whose frames together are those of the whole."""
    layers = samples.config.conv_layers
    frames, longest = num_frames(len(row), layers), num_frames(int(WINDOW_SECONDS * RATE), layers)
    count = math.ceil(frames / longest)
    if count <= 1:
        return [row]
    stride = math.prod(stride for _, _, stride in layers)
    reach = 1  # samples that one frame sees
    for _, kernel, step in reversed(layers):
        reach = (reach - 1) * step + kernel
    edges = [frames * i // count for i in range(count + 1)]
    return [row[a * stride : (b - 1) * stride + reach] for a, b in zip(edges[:-1], edges[1:], strict=True)]


def num_tokens(samples: AudioSamples, row: Tensor) -> int:
    return num_frames(len(row), samples.config.conv_layers)

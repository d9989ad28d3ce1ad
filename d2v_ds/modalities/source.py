"""What every modality's samples share: which shards, how many samples a step, and seeded masks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from d2v_ds.config import Config
from d2v_ds.data import Corpus, Draw, Source, expand_shards
from d2v_ds.modalities import samples_class
from d2v_ds.model.batch import make_masked, make_views
from d2v_ds.model.masking import draw_mask, fewest, pad_masks


class StreamConfig(Config):
    """Which shards feed a modality, and how many samples make a step; all numbers are global, over all ranks."""

    shards: str = "*.tar"
    """File pattern inside the data folder; a `data=` that is a pattern itself replaces it."""
    batch: PositiveInt = 16
    """Samples in a micro-batch: what one forward pass sees."""
    micro_batches: PositiveInt = 16
    """Micro-batches in a step, over all ranks: ranks must divide it."""


def shard_pattern(data: str, shards: str) -> str | list[str]:
    """`data` may be a folder (then `shards` names files in it) or a shard pattern of its own."""
    parts = data.split("::")
    if any(part.endswith(".tar") or set(part) & set("*{?") for part in parts):
        return data
    return [str(Path(part) / name) for part in parts for name in shards.split("::")]


def open_source(name: str, config: Any, data: str) -> Source:
    """The samples of one modality, with their index; builds what is missing of it."""
    samples = samples_class(name)(config, Path(data.split("::")[0]))
    paths = expand_shards(shard_pattern(data, config.data.shards))
    corpus = Corpus.open(paths, samples.fields, samples.measure, samples.measure_name, samples.min_length)
    samples.attach(corpus)
    return Source(name, corpus, samples, config.data.batch, config.data.micro_batches)


def generator(draw: Draw, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose of one draw: crops and masks do not disturb each other."""
    return np.random.Generator(np.random.Philox(key=[draw.seed, sum(purpose.encode())]))


def draw_views(draws: list[Draw], lengths: list[int], config: Any) -> dict[str, Tensor | None]:
    """The masks and index lists of a batch as `Batch` takes them: M masks of every sample, each from its own draw,
    for samples of T_i tokens, padded to the longest."""
    masks = [
        draw_mask(generator(draw, "mask"), config.clones, tokens, config.mask)
        for draw, tokens in zip(draws, lengths, strict=True)
    ]
    if config.view == "visible":
        return make_views(torch.from_numpy(pad_masks(masks)))
    longest = max(lengths)
    stacked = np.concatenate([np.pad(mask, ((0, 0), (0, longest - mask.shape[1]))) for mask in masks])
    if config.mask.kind == "span":
        stacked = fewest(stacked, generator(draws[0], "fewest"))
    return make_masked(torch.from_numpy(stacked))


def pad_stack(rows: list[Tensor], value: float) -> tuple[Tensor, Tensor | None]:
    """Stacks 1-D tensors, padded at the end; the mask (B, S), None if all are equally long."""
    longest = max(len(row) for row in rows)
    stacked = torch.stack([F.pad(row, (0, longest - len(row)), value=value) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    padding = torch.arange(longest)[None] >= lengths[:, None]
    return stacked, padding if bool(padding.any()) else None


def reason(error: Exception) -> str:
    """An error's message without the address of the buffer that was read, so that equal faults read alike."""
    return re.sub(r"\s*<_io[^>]*>:?", "", str(error))

"""What every modality's samples share: which shards, how many samples a step, and seeded masks."""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator, model_validator
from torch import Tensor

from d2v_ds.config import Config
from d2v_ds.data import Corpus, Draw, ShardIndex, Share, Source, deal, expand_shards
from d2v_ds.data.energon import train_shards
from d2v_ds.data.folders import as_folder, is_pattern
from d2v_ds.data.reader import parse_fields
from d2v_ds.modalities import samples_class
from d2v_ds.modalities.labelled import Labelled, check_labels
from d2v_ds.model.batch import make_masked, make_views
from d2v_ds.model.masking import draw_mask, fewest, pad_masks
from d2v_ds.model.tuned import Task


class StreamConfig(Config):
    """Which shards feed a modality, and how many samples make a step; all numbers are global, over all ranks."""

    shards: str = "*.tar"
    """File pattern inside the data folder; a `data=` that is a pattern itself replaces it."""
    batch: PositiveInt = 16
    """Samples in a micro-batch: what one forward pass sees."""
    micro_batches: PositiveInt = 16
    """Micro-batches in a step, over all ranks: ranks must divide it."""
    corpora: dict[str, str] | None = None
    """Several corpora in place of `shards`: name -> file pattern. Each micro-batch is of one of them."""
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """Share of each corpus in the micro-batches, in any unit. None: by size, or as `temperature` says."""
    temperature: PositiveFloat | None = None
    """Corpora have shares of n^(1/temperature), n = micro-batches of an epoch: 1 is by size, more is more equal."""
    mix_steps: PositiveInt = 100
    """Every so many steps hold the same number of micro-batches of each corpus, less than one off its share."""
    window_gib: PositiveFloat | Literal["auto", "whole"] = "auto"
    """Shards that are shuffled together before the next come. auto: all, or what half of `remote.cache_gib` holds
    where remote ones do not fit it; whole: all. A run stays with what it began with."""

    @field_validator("corpora", "weights", mode="before")
    @classmethod
    def named(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            raise ValueError(
                f"is no {{name: value}}; put patterns in quotes and each name once, or give each its own key: "
                f"{info.field_name}.NAME=..."
            )
        return value

    @model_validator(mode="after")
    def mixes(self) -> StreamConfig:
        if self.corpora is None:
            for key, value in (("weights", self.weights), ("temperature", self.temperature)):
                if value is not None:
                    raise ValueError(
                        f"data.{key}={value} has no meaning without data.corpora; name the corpora"
                    )
            return self
        if not self.corpora:
            raise ValueError("data.corpora is empty; name one or more, {name: pattern}, or leave it out")
        if self.weights is not None and self.temperature is not None:
            raise ValueError(
                f"data.weights={self.weights} and data.temperature={self.temperature:g} contradict each other; give one"
            )
        if self.weights is not None and self.weights.keys() != self.corpora.keys():
            raise ValueError(
                f"data.weights are of {', '.join(sorted(self.weights))}, data.corpora of "
                f"{', '.join(sorted(self.corpora))}; give each corpus a weight"
            )
        return self


def shard_pattern(data: str, shards: str) -> str | list[str]:
    """`data` may be a folder (then `shards` names files in it) or a shard pattern of its own."""
    parts = data.split("::")
    if any(map(is_pattern, parts)):
        return data
    return [pattern for part in parts for pattern in _folder_patterns(part, shards)]


def train_patterns(data: str, shards: str) -> list[str]:
    """As `shard_pattern`; where folders and patterns are joined, `shards` names files in each of the folders."""
    parts = [part for part in data.split("::") if part] or [data]
    return [p for part in parts for p in ([part] if is_pattern(part) else _folder_patterns(part, shards))]


def _folder_patterns(folder: str, shards: str) -> list[str]:
    """`shards` in a folder; of an Energon folder, what is to train on."""
    name, place = as_folder(folder)
    names_none = shards == StreamConfig.model_fields["shards"].default
    train = train_shards(place) if place and names_none else None
    return [os.path.join(name, shard) for shard in train or shards.split("::")]


def open_source(name: str, config: Any, data: str, task: Task | None = None) -> Source:
    """The samples of one modality, with their index; builds what is missing of it. With a task, each has a label."""
    samples = samples_class(name)(config, Path(data.split("::")[0]))
    if task:
        samples = Labelled(samples, task)
    shards = find_corpora(name, data, config.data)
    paths = [path for own in shards.values() for path in own]
    corpus = Corpus.open(paths, samples.fields, samples.measure, samples.measure_name, samples.min_length)
    samples.attach(corpus)
    if task:
        check_labels(name, corpus, samples.parse)
    shares = build_shares(shards, corpus, samples, config.data)
    return Source(
        name, corpus, samples, config.data.batch, config.data.micro_batches, shares, config.data.window_gib
    )


def measure_ahead(name: str, config: Any, shards: list[ShardIndex], workers: int | None = None) -> bool:
    """Measures the lengths that a run with these fields wants, of the shards that have any; whether there are some."""
    samples = samples_class(name)(config, Path())
    extensions = {part.extension for parts in parse_fields(samples.fields).values() for part in parts}
    paths = [shard.remote or shard.path for shard in shards if extensions & shard.extension_counts.keys()]
    if paths:
        Corpus.open(paths, samples.fields, samples.measure, samples.measure_name, workers=workers)
    return bool(paths)


def column_name(base: str, config: StreamConfig) -> str:
    """Under which lengths are stored beside a shard: other members of it have other lengths."""
    fields = config.fields
    if fields == type(config).model_fields["fields"].default:
        return base
    return f"{base}-{hashlib.sha256(fields.encode()).hexdigest()[:8]}"


def find_corpora(name: str, data: str, config: StreamConfig) -> dict[str, list[Path]]:
    """The shards of each corpus of a modality, under what its order is drawn from."""
    if config.corpora is None:
        return {name: expand_shards(train_patterns(data, config.shards))}
    patterns = {corpus: shard_pattern(data, pattern) for corpus, pattern in sorted(config.corpora.items())}
    if data in patterns.values():
        raise ValueError(
            f"data={data} is a pattern, but modalities.{name}.data.corpora names the shards; give their folder"
        )
    shards = {f"{name}/{corpus}": expand_shards(pattern) for corpus, pattern in patterns.items()}
    owners: dict[Path, str] = {}
    for corpus, paths in shards.items():
        for path in paths:
            if path in owners:
                raise ValueError(
                    f"{owners[path]} and {corpus} both name the shard {path}; name each shard once"
                )
            owners[path] = corpus
    return shards


def build_shares(
    shards: dict[str, list[Path]], corpus: Corpus, samples: Any, config: StreamConfig
) -> tuple[Share, ...]:
    """What each corpus is in the units of the samples, and how many micro-batches of a block are its own."""
    shares, start = [], 0
    for name, paths in shards.items():
        own = range(start, start + len(paths))
        first, end = int(samples.unit_starts[own.start]), int(samples.unit_starts[own.stop])
        if first == end:
            raise ValueError(
                f"corpus {name} has no usable sample in {paths[0]} ..; leave it out of data.corpora"
            )
        shares.append(Share(name, first, end - first, buckets=samples.buckets(corpus, own)))
        start = own.stop
    if len(shares) == 1:
        return tuple(shares)
    counts = count_mix({share.name: share.batches(config.batch) for share in shares}, config)
    return tuple(replace(share, count=counts[share.name]) for share in shares)


def count_mix(sizes: dict[str, float], config: StreamConfig) -> dict[str, int]:
    """Micro-batches of each corpus in `mix_steps` steps."""
    largest = max(sizes.values())  # else a low temperature would overflow
    weights = {name: (size / largest) ** (1 / (config.temperature or 1)) for name, size in sizes.items()}
    if config.weights is not None:
        _, power = math.frexp(max(config.weights.values()))  # else the sum of huge ones would overflow
        weights = {name: math.ldexp(config.weights[name.partition("/")[2]], -power) for name in sizes}
    total = config.mix_steps * config.micro_batches
    counts = deal(weights, total)
    for name, count in counts.items():
        if not count:
            raise ValueError(
                f"corpus {name} has a share of {weights[name] / sum(weights.values()):.2g}, none of the {total} "
                f"micro-batches of data.mix_steps={config.mix_steps} steps; raise its weight or data.mix_steps"
            )
    return counts


def generator(draw: Draw, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose of one draw: crops and masks do not disturb each other."""
    return np.random.Generator(np.random.Philox(key=[draw.seed, sum(purpose.encode())]))


def draw_views(draws: list[Draw], lengths: list[int], config: Any) -> dict[str, Tensor | None]:
    """The masks and index lists of a batch as `Batch` takes them: M masks of every sample, each from its own draw,
    for samples of T_i tokens, padded to the longest. ValueError if none of them hides or shows a token."""
    masks = [
        draw_mask(generator(draw, "mask"), config.clones, tokens, config.mask)
        for draw, tokens in zip(draws, lengths, strict=True)
    ]
    longest = max(lengths)
    hidden = max(int(mask.sum(axis=1).max()) for mask in masks)
    shown = max(int((~mask).sum(axis=1).max()) for mask in masks)
    if not hidden or not shown:
        raise ValueError(
            f"modalities.{config.kind}.mask.ratio={config.mask.ratio:g} hides {hidden} of {longest} tokens; one or "
            f"more must be hidden, and one or more seen: {'lower' if hidden else 'raise'} it, or give longer samples"
        )
    if config.view == "visible":
        return make_views(torch.from_numpy(pad_masks(masks)))
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

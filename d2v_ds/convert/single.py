"""One modality's encoder of a stored model, as exports to other libraries hold it; and random input to compare on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from d2v_ds.convert.features import Encoder
from d2v_ds.convert.load import choose_weights
from d2v_ds.convert.stored import Stored
from d2v_ds.modalities.text.tokenizer import BOS, UNK
from d2v_ds.model.data2vec import TEACHER
from d2v_ds.model.encoder import ModalityConfig
from d2v_ds.model.heads import HEAD


def single(stored: Stored, modality: str | None = None, weights: str | None = None) -> Stored:
    """The encoder of one modality with one set of weights, and its head: no teacher, no decoder, no others.

    `modality` is needed if there are several. `weights`: student or teacher; unsaid, what there is, and of both
    the student's. Raises ValueError, with what there is, if the choice is open or not there.
    """
    names = list(stored.recipe.modalities)
    if modality is None and len(names) > 1:
        raise ValueError(
            f"the model has {', '.join(names)}, and other libraries take one modality a folder: say which, "
            f"modality={names[0]!r} (--modality {names[0]})"
        )
    if modality is not None and modality not in names:
        raise ValueError(f"the model has {', '.join(names)}, not {modality!r}; say modality={names[0]!r}")
    if weights not in (None, "student", "teacher"):
        raise ValueError(f"weights={weights!r} must be student or teacher: such a folder holds one of them")
    name = modality or names[0]
    chosen = choose_weights(
        stored, weights or ("student" if stored.weights == "both" else stored.weights), stored.origin
    )
    kept = ("blocks.", "norm.", f"encoders.{name}.", HEAD)
    tensors = {k: t for k, t in chosen.tensors.items() if k.startswith(kept) and not k.startswith(TEACHER)}
    recipe = chosen.recipe.model_copy(update={"modalities": {name: chosen.recipe.modalities[name]}})
    return replace(chosen, recipe=recipe.model_copy(deep=True), tensors=tensors)


def modality_of(stored: Stored) -> tuple[str, ModalityConfig]:
    """Name and configuration of a single encoder's modality."""
    ((name, config),) = stored.recipe.modalities.items()
    return name, config


def draw_rows(stored: Stored, tokens: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Random input of a single encoder, a row for each number of tokens (images: all of one size), as
    `Encoder.run` takes it."""
    name, config = modality_of(stored)
    generator = torch.Generator().manual_seed(seed)
    if name == "image":
        shape = (config.channels, config.size, config.size)
        return [torch.randn(shape, generator=generator) for _ in tokens]
    if name == "audio":
        return [torch.randn(num_samples(count, config.conv_layers), generator=generator) for count in tokens]
    rows = []
    for count in tokens:
        count = min(count, config.max_tokens)
        ids = torch.randint(
            min(UNK + 1, config.vocabulary - 1), config.vocabulary, (count,), generator=generator
        )
        ids[0] = BOS
        rows.append(ids)
    return rows


def num_samples(frames: int, conv_layers: tuple[tuple[int, int, int], ...]) -> int:
    """The shortest waveform that gives so many frames."""
    reach = 1
    for _, kernel, stride in reversed(conv_layers):
        reach = (reach - 1) * stride + kernel
    return reach + (frames - 1) * math.prod(stride for _, _, stride in conv_layers)


class Outputs(NamedTuple):
    """What a single encoder makes of a batch."""

    layers: list[Tensor]
    """Every shared block's, without extra tokens, each (B, T, D)."""
    x: Tensor
    """The last one's, after the norm of a body with norms first."""
    real: Tensor
    """Bool (B, T), False = padding."""
    logits: Tensor | None
    """The head's."""


@torch.no_grad()
def run(encoder: Encoder, rows: list[Tensor]) -> Outputs:
    batch = encoder.samples.pad(rows)
    extra = encoder.model.configs[encoder.modality].extra_tokens
    outputs, _ = encoder.model.eval().encode(batch)
    layers, x = [output[:, extra:] for output in outputs], encoder.model.norm(outputs[-1])[:, extra:]
    padding = batch.padding_BT
    real = torch.ones(x.shape[:2], dtype=torch.bool) if padding is None else ~padding
    logits = None if encoder.head is None else encoder.head.eval()(x, padding)
    return Outputs(layers, x, real, logits)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference, as a share of our largest value where that is above 1."""
    if ours.shape != theirs.shape:
        return math.inf
    difference = (ours - theirs).abs().max() / ours.abs().max().clamp(min=1)
    return math.inf if bool(difference.isnan()) else float(difference)

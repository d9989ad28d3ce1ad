"""What fine-tuning on images adds to crops and flips: RandAugment, random erasing, mixup and CutMix, by timm.

timm draws from Python's, NumPy's and torch's own generators: all are seeded from the draw of the sample or batch, and
left as they were.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2v_ds.data import Draw
from d2v_ds.modalities.source import generator

REMEDY = "pip install 'd2v_ds[finetune]'"


def import_timm() -> ModuleType:
    try:
        import timm.data.auto_augment
        import timm.data.mixup
        import timm.data.random_erasing
    except ImportError as error:
        raise ValueError(f"RandAugment, random erasing, mixup and CutMix need timm: {REMEDY}") from error
    return timm.data


def needs_timm(data: Any) -> bool:
    return bool(data.rand_augment or data.erase or data.mixup or data.cutmix)


def check_policy(policy: str) -> None:
    """Raises ValueError for what is no RandAugment in timm's notation."""
    try:
        if policy:
            augmenter(policy, 224, (0.5, 0.5, 0.5))
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"modalities.image.data.rand_augment={policy} is none in timm's notation, such as rand-m9-mstd0.5-inc1"
        ) from error


def recolour(image: Image.Image, policy: str, mean: tuple[float, ...], draw: Draw) -> Image.Image:
    """RandAugment, in timm's notation."""
    with seeded(draw, "rand_augment"):
        return augmenter(policy, image.size[0], mean)(image)


def erase(pixels: Tensor, probability: float, draw: Draw) -> Tensor:
    """(3, H, W): one box of noise, with this probability; pixels are normalised already."""
    with seeded(draw, "erase"):
        return eraser(probability)(pixels.clone())


def mix(
    source: Tensor, labels: Tensor, draws: list[Draw], data: Any, smoothing: float, outputs: int
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) mixed in pairs, first with last, and shares of classes (B, C)."""
    with seeded(draws[0], "mix"):
        return mixer(data.mixup, data.cutmix, data.mix_share, data.mix_switch, smoothing, outputs)(
            source, labels
        )


@lru_cache
def augmenter(policy: str, size: int, mean: tuple[float, ...]) -> Any:
    colour = tuple(round(255 * value) for value in mean)
    options = {
        "translate_const": int(0.45 * size),
        "img_mean": colour,
        "interpolation": Image.Resampling.BICUBIC,
    }
    return import_timm().auto_augment.rand_augment_transform(policy, options)


@lru_cache
def eraser(probability: float) -> Any:
    return import_timm().random_erasing.RandomErasing(probability, mode="pixel", max_count=1, device="cpu")


@lru_cache
def mixer(mixup: float, cutmix: float, share: float, switch: float, smoothing: float, outputs: int) -> Any:
    return import_timm().mixup.Mixup(
        mixup_alpha=mixup, cutmix_alpha=cutmix, prob=share, switch_prob=switch, label_smoothing=smoothing,
        num_classes=outputs,
    )  # fmt: skip


@contextmanager
def seeded(draw: Draw, purpose: str) -> Iterator[None]:
    seed = int(generator(draw, purpose).integers(2**32))
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

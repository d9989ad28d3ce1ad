"""Image files in shards -> normalised crops with their masks."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, UnidentifiedImageError
from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from d2v_ds.data import Corpus, Draw, Share, Volume
from d2v_ds.modalities.image import tuning
from d2v_ds.modalities.source import StreamConfig, draw_views, generator, reason
from d2v_ds.model.batch import Batch
from d2v_ds.model.tuned import Task, as_labels

MAX_PIXELS = 100_000_000  # a bomb is refused by its header, before it is decoded


UNDECODABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    EOFError,
    LookupError,
    ArithmeticError,
    AttributeError,
    MemoryError,
    RuntimeError,
    TypeError,
    struct.error,
    zlib.error,
)
"""What Pillow raises for headers that lie."""


class ImageData(StreamConfig):
    fields: str = "jpg;jpeg;png;webp"
    """Extensions that hold the image, best first."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the picture's area that a crop covers; (1, 1) takes all of it."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = Field(0.0, ge=0, le=1)
    """Brightness, contrast and saturation are each changed by a factor from 1 - jitter to 1 + jitter (v1: 0.4)."""
    rand_augment: str = ""
    """Of fine-tuning, in timm's notation: rand-m9-mstd0.5-inc1; "" = none."""
    erase: float = Field(0.0, ge=0, le=1)
    """Of fine-tuning: share of the crops in which a box is filled with noise (arXiv:1708.04896)."""
    mixup: NonNegativeFloat = 0.0
    """Of fine-tuning: alpha of mixup (arXiv:1710.09412); 0 = none."""
    cutmix: NonNegativeFloat = 0.0
    """Of fine-tuning: alpha of CutMix (arXiv:1905.04899); 0 = none."""
    mix_share: float = Field(1.0, ge=0, le=1)
    """Share of the micro-batches that are mixed."""
    mix_switch: float = Field(0.5, ge=0, le=1)
    """Share of CutMix among them, where there are both."""
    test_crop: float = Field(1.0, gt=0, le=1)
    """Of a trained model's input: the side of the middle square that is seen, of the shorter side; ImageNet: 0.875."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def ascend(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] < math.inf:
            raise ValueError("must be two numbers above 0, the lower one first")
        return value

    @model_validator(mode="after")
    def can_mix(self) -> ImageData:
        if (self.mixup or self.cutmix) and self.batch % 2:
            raise ValueError(
                f"data.batch={self.batch} must be even with data.mixup={self.mixup:g}, data.cutmix={self.cutmix:g}: "
                "images are mixed in pairs"
            )
        return self


class ImageSamples:
    """Reads, crops, flips, normalises; all M views and the teacher share one crop."""

    measure = None
    measure_name = ""
    min_length = 0

    def __init__(self, config: Any, folder: Path):
        self.config = config
        self.fields = {"image": config.data.fields}

    def check_tools(self) -> None:
        """Before a run that fine-tunes."""
        if tuning.needs_timm(self.config.data):
            tuning.import_timm()
        tuning.check_policy(self.config.data.rand_augment)

    def attach(self, corpus: Corpus) -> None:
        self.unit_starts = corpus.shard_starts

    def buckets(self, corpus: Corpus, shards: range) -> None:
        """All are of one size."""

    def volume(self, corpus: Corpus, share: Share, batch: int) -> Volume:
        return Volume("images", share.size, batch)

    def label(self, corpus: Corpus, unit: int) -> str:
        return corpus.key(unit)

    def decode(self, corpus: Corpus, unit: int) -> Image.Image:
        """One whole sample as `prepare` takes it."""
        return decode_image(corpus.read(unit)["image"])

    def raw(self, images: list[Image.Image]) -> torch.Tensor:
        """The grey-scale pixels themselves, for a baseline; (N, size * size)."""
        return torch.stack([self.prepare(image).mean(dim=0).flatten() for image in images])

    def read(self, corpus: Corpus, unit: int) -> Image.Image:
        """Of a large JPEG as many pixels as any crop may need."""
        data = self.config.data
        needed = Needed(self.config.size, data.crop_scale, data.crop_ratio)
        return decode_image(corpus.read(unit)["image"], needed)

    def collate(self, images: list[Image.Image], draws: list[Draw]) -> Batch:
        tokens = (self.config.size // self.config.patch) ** 2
        views = draw_views(draws, [tokens] * len(draws), self.config)
        return Batch("image", self.pixels(images, draws), **views)

    def pixels(self, images: list[Image.Image], draws: list[Draw]) -> torch.Tensor:
        """Random crops, (B, 3, size, size)."""
        data, crops = self.config.data, []
        for image, draw in zip(images, draws, strict=True):
            full, factor = getattr(image, "reduced", (image.size, 1))
            crop = self.augment(self.recolour(image, draw), full, factor, generator(draw, "crop"))
            if data.rand_augment:
                crop = tuning.recolour(crop, data.rand_augment, data.mean, draw)
            crop = self.normalise(crop)
            crops.append(tuning.erase(crop, data.erase, draw) if data.erase else crop)
        return torch.stack(crops)

    def collate_whole(
        self, images: list[Image.Image], draws: list[Draw], labels: list[int], task: Task
    ) -> Batch:
        """Random crops and their classes, mixed if the recipe says so."""
        data, source, classes = self.config.data, self.pixels(images, draws), as_labels(labels, task.outputs)
        if data.mixup or data.cutmix:
            source, classes = tuning.mix(source, classes, draws, data, task.smoothing, task.outputs)
        return Batch("image", source, labels=classes)

    def recolour(self, image: Image.Image, draw: Draw) -> Image.Image:
        """The whole picture, before any crop, with its changes in random order."""
        if not self.config.data.jitter:
            return image
        rng = generator(draw, "jitter")
        for change in rng.permutation([ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]):
            image = change(image).enhance(1 + rng.uniform(-1, 1) * self.config.data.jitter)
        return image

    def augment(
        self, image: Image.Image, full: tuple[int, int], factor: int, rng: np.random.Generator
    ) -> Image.Image:
        """A random crop of a picture that was `full` and was reduced by a factor."""
        data, size = self.config.data, self.config.size
        box = [edge / factor for edge in crop_box(full, data.crop_scale, data.crop_ratio, rng)]
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < data.flip else image

    def normalise(self, image: Image.Image) -> torch.Tensor:
        """PIL RGB -> (3, H, W), zero mean and unit variance by the data's statistics."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor(self.config.data.mean), torch.tensor(self.config.data.std)
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def prepare(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """One image as a trained model sees it: resized whole, normalised; (3, H, W). A tensor is taken as it is."""
        size = self.config.size
        if isinstance(image, torch.Tensor):
            if tuple(image.shape) != (3, size, size):
                raise ValueError(
                    f"image tensor of shape {tuple(image.shape)} must be (3, {size}, {size}), normalised; "
                    "or give a PIL image of any size"
                )
            return image
        image = to_rgb(image)
        box = None if self.config.data.test_crop == 1 else middle(image.size, self.config.data.test_crop)
        return self.normalise(image.resize((size, size), Image.Resampling.BICUBIC, box=box))

    def pad(self, images: list[torch.Tensor]) -> Batch:
        return Batch("image", torch.stack(images))


class Needed(NamedTuple):
    """What crops will be drawn, as `crop_box` takes it, each resized to a square."""

    side: int
    scale: tuple[float, float]
    ratio: tuple[float, float]


def decode_image(data: bytes, needed: Needed | None = None) -> Image.Image:
    """RGB; ValueError if the bytes are no image, or one above MAX_PIXELS.

    With `needed` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where no crop falls below `side` by that; `reduced`
    is then (its whole size, the factor).
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.format == "EPS":  # Pillow hands it to Ghostscript, which may never end
            raise ValueError("PostScript is a program, not an image, and is never run; store its picture")
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"image of {image.width}x{image.height} pixels is above the limit of {MAX_PIXELS}"
            )
        full, factor = image.size, reduce(image, needed) if needed else 1
        image = to_rgb(image)
        image.reduced = full if factor > 1 else image.size, factor  # of an ICNS its header may lie
        return image
    except UNDECODABLE as error:
        raise ValueError(f"undecodable image: {reason(error)}") from error


def reduce(image: Image.Image, needed: Needed) -> int:
    """Has a picture that is not decoded yet decoded smaller, if its format can; by which factor."""
    least = least_side(image.size, needed.scale, needed.ratio)
    factor = next((k for k in (8, 4, 2) if k * needed.side <= least), 1)
    drafted = image.draft(None, (image.width // factor, image.height // factor)) if factor > 1 else None
    return factor if drafted else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; 16-bit grey is scaled, which Pillow's own conversion would clip to white."""
    if not image.width or not image.height:
        raise ValueError(f"image of {image.width}x{image.height} pixels is empty")
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.float64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(
                f"image of whole numbers {pixels.min():.0f}..{pixels.max():.0f} must lie in 0..65535; store it with "
                "8 or 16 bits"
            )
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("image of 32-bit floats has no defined range; store it as 8 or 16 bits")
    return image.convert("RGB")


def middle(size: tuple[int, int], share: float) -> tuple[float, float, float, float]:
    """The square in the middle whose side is this share of the shorter side: what resizing the shorter side to
    `size / share` and cutting out the middle leaves."""
    side = share * min(size)
    left, upper = (size[0] - side) / 2, (size[1] - side) / 2
    return left, upper, left + side, upper + side


def crop_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random box (left, upper, right, lower) by area and aspect, as RandomResizedCrop draws it."""
    width, height = size
    if scale[0] >= 1:
        return (0, 0, width, height)
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return (left, upper, left + w, upper + h)
    w, h = (
        min(width, max(1, round(height * ratio[1]))),
        min(height, max(1, round(width / ratio[0]))),
    )  # centre, nearest aspect
    return ((width - w) // 2, (height - h) // 2, (width - w) // 2 + w, (height - h) // 2 + h)


def least_side(size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]) -> float:
    """No side of a box of `crop_box` is shorter, but for rounding."""
    width, height = size
    if scale[0] >= 1:
        return min(size)
    drawn = math.sqrt(width * height * scale[0] * min(ratio[0], 1 / ratio[1]))
    return min(drawn, width, height, height * ratio[1], width / ratio[0])

"""Images as users have them: files, PIL images, arrays of pixels, normalised tensors -> normalised squares."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2v_ds.modalities.image.samples import ImageSamples, decode_image
from d2v_ds.modalities.prepared import (
    Prepared,
    as_bytes,
    as_tensor,
    describe,
    read_file,
    refuse_none,
    refuse_not_finite,
    refuse_rate,
    split_batch,
)

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")

LARGEST = 20

log = logging.getLogger(__name__)


def listed(x: Any) -> list[Any]:
    """A picture, a path or a file's bytes is one; lists and arrays of four dimensions are several."""
    if isinstance(x, np.ndarray) and x.ndim == 2:
        return [x]  # grey
    if isinstance(x, (Tensor, np.ndarray)):
        return split_batch(x, 3, "images")
    return refuse_none(list(x), "images") if isinstance(x, (list, tuple)) else [x]


def prepare(samples: ImageSamples, item: Any, rate: int | None = None) -> Prepared:
    """One picture of any size, resized whole and normalised; (3, H, W).

    Of 8 bits: PIL images, arrays (H, W) or (H, W, 3), tensors (3, H, W). Tensors and arrays of floats are
    (3, size, size) and taken as already normalised.
    """
    refuse_rate(rate, "images")
    item = as_bytes(item)
    if isinstance(item, (str, Path, bytes)):
        try:
            item = decode_image(item if isinstance(item, bytes) else read_file(item))
        except ValueError as error:
            raise ValueError(str(error) if isinstance(item, bytes) else f"{item}: {error}") from error
    if isinstance(item, Image.Image):
        return Prepared(samples.prepare(item))
    if not isinstance(item, (Tensor, np.ndarray)):
        raise ValueError(f"{describe(item)} is no image; give a PIL image, a path, or an array of pixels")
    pixels = as_tensor(item, "image")
    if pixels.is_floating_point():
        refuse_not_finite(pixels, "image")
        check_range(pixels)
        row = samples.prepare(pixels.float())
        if bool((row >= 0).all()) and bool((row <= 1).all()):
            log.warning(
                "an image of floats lies within 0..1, but is taken as normalised: give uint8 for pixels"
            )
        return Prepared(row)
    is_array = isinstance(item, np.ndarray)
    if pixels.dtype != torch.uint8:
        raise ValueError(
            f"{describe(item)} is no image: pixels are uint8 (0..255), or floats that are already normalised"
        )
    if not is_array and pixels.ndim == 3:
        pixels = pixels.permute(1, 2, 0)  # (C, H, W) -> (H, W, C)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if not (pixels.ndim == 2 or pixels.ndim == 3 and pixels.shape[2] in (3, 4)) or not pixels.numel():
        layout = "(H, W) or (H, W, 3)" if is_array else "(3, H, W) or (1, H, W)"
        raise ValueError(f"image of shape {tuple(item.shape)} must be {layout}")
    return Prepared(samples.prepare(Image.fromarray(pixels.contiguous().numpy())))


def check_range(pixels: Tensor) -> None:
    """ValueError for floats that are no normalised pixels, which lie within some deviations of their mean."""
    largest = float(pixels.abs().max()) if pixels.numel() else 0.0
    if largest > LARGEST:
        raise ValueError(
            f"image of floats with values up to {largest:.3g} is not normalised (-{LARGEST}..{LARGEST}; ImageNet's "
            "pixels lie within -3..3); give pixels of 0..255 as uint8, which are normalised here"
        )


def pieces(samples: ImageSamples, row: Tensor) -> list[Tensor]:
    return [row]


def num_tokens(samples: ImageSamples, row: Tensor) -> int:
    return (samples.config.size // samples.config.patch) ** 2

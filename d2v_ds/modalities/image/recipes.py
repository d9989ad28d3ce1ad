"""Recipes for images."""

from __future__ import annotations

from d2v_ds.modalities.image.net import ImageConfig
from d2v_ds.modalities.image.samples import ImageData
from d2v_ds.model.decoder import DecoderConfig
from d2v_ds.model.layers import Body
from d2v_ds.model.loss import Loss
from d2v_ds.model.masking import Mask
from d2v_ds.model.targets import Target
from d2v_ds.recipe import EMA, Optim, Recipe, Train


def image_tiny() -> Recipe:
    """Handwritten digits of varying size and place, 32x32: what two CPU cores learn in under 90 s.

    python train.py --deepspeed zero0 --recipe image_tiny data=DIR  (DIR: `python -m shards.sample --images-only`)

    Probe gains over random initialisation: docs/experiments.md. fp32, since a run must be the same everywhere.
    """
    return Recipe(
        name="image_tiny",
        body=tiny_body(),
        modalities={"image": tiny_digits()},
        ema=EMA(start=0.98, end=0.999, anneal_steps=700),
        optim=Optim(lr=4e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, warmup_steps=100, clip=4.0),
        train=Train(steps=1150, log_every=50, save_every=500, workers=1),
        precision="fp32",
    )


def tiny_body() -> Body:
    return Body(dim=96, depth=4, heads=4, norm_eps=1e-6)


def tiny_digits() -> ImageConfig:
    """16 patches, 4 views: the class token's weight keeps 0.01 * rows of a pass at the original's order."""
    return ImageConfig(
        size=32,
        patch=8,
        clones=4,
        mask=Mask(kind="inverse_block", ratio=0.75, adjust=0.1, length=2),
        target=Target(top_k=4, per_layer="instance", final=("layer",)),
        loss=Loss(cls_weight=0.01),
        decoder=DecoderConfig(dim=64, kernel=3, layers=3, groups=16),
        teacher="full",
        extra_tokens=1,
        extra_tokens_init="normal",
        data=ImageData(
            shards="images-train-*.tar",
            fields="png;jpg;jpeg;webp",
            batch=32,
            micro_batches=1,
            crop_scale=(1.0, 1.0),
            flip=0.0,
            mean=(0.3, 0.3, 0.3),
            std=(0.35, 0.35, 0.35),
        ),
    )

"""Recipes of data2vec 1.0 for images: a BEiT whose masked patches regress the teacher's blocks."""

from __future__ import annotations

from d2v_ds.modalities.image.net import ImageConfig
from d2v_ds.modalities.image.recipes import tiny_digits
from d2v_ds.modalities.image.samples import ImageData
from d2v_ds.model.decoder import DecoderConfig
from d2v_ds.model.layers import Body
from d2v_ds.model.loss import Loss
from d2v_ds.model.masking import Mask
from d2v_ds.model.targets import Target
from d2v_ds.recipe import EMA, Health, Optim, Recipe, Train, Variant, check_variant

IMAGENET = 1_281_167
"""Pictures of ImageNet-1k's training part."""


def image_v1_base(variant: Variant = "released") -> Recipe:
    """data2vec 1.0 with a ViT-B/16 on ImageNet-1k, 800 epochs.

    deepspeed train.py --deepspeed zero2 --recipe image_v1_base data=DIR

    GPUs: 16 in the released command. Cost: 322 A100 hours (estimate, docs/recipes.md); none are published.
    Expected: unknown to us.

    120 of 196 patches are masked by rectangles of at least 16. The original drops an epoch's last, incomplete
    batch (625 steps an epoch), and warms up from 0 instead of the lowest rate, 1e-5.
    """
    check_variant("image_v1_base", variant, "released")
    batch = 16 * 128
    return Recipe(
        name="image_v1_base",
        body=Body(
            dim=768,
            depth=12,
            heads=12,
            norm_eps=1e-6,
            attention_dropout=0.05,
            drop_path=(0.0, 0.25),
            norm_first=True,
            layer_scale=1e-4,
            qkv_bias="qv",
        ),
        modalities={
            "image": ImageConfig(
                view="masked",
                clones=1,
                mask=Mask(kind="rectangle", ratio=0.6125, length=16),
                target=Target(top_k=6, per_layer="layer", final=("layer",), source="block"),
                loss=Loss(beta=2.0, scale=1 / 768),
                decoder=DecoderConfig(dim=768, layers=0),
                teacher="full",
                extra_tokens=1,
                extra_tokens_init="small",
                positions="relative",
                data=ImageData(
                    shards="*train*.tar", batch=128, micro_batches=16, crop_scale=(0.08, 1.0), jitter=0.4
                ),
            )
        },
        ema=EMA(start=0.9998, end=0.9998, anneal_steps=0),
        optim=Optim(
            lr=2e-3,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.05,
            decay="matrices",
            warmup_steps=10 * (IMAGENET // batch),
            min_lr=1e-5,
            clip=3.0,
        ),
        train=Train(steps=800 * (IMAGENET // batch), log_every=200, workers=10),
        health=Health(min_target_var=0.0, min_pred_var=0.0),  # as released: off for images
        data="shards/imagenet",
    )


def image_v1_large(variant: Variant = "released") -> Recipe:
    """data2vec 1.0 with a ViT-L/16 on ImageNet-1k, the first 800 epochs.

    deepspeed train.py --deepspeed zero2 --recipe image_v1_large data=DIR

    GPUs: 64 in the released command. Cost: 1,123 A100 hours (estimate, docs/recipes.md); none are published.
    Expected: unknown for these; image_v1_large_2 says what comes after.
    """
    check_variant("image_v1_large", variant, "released")
    recipe = image_v1_base()
    recipe.name = "image_v1_large"
    recipe.body.dim, recipe.body.depth, recipe.body.heads = 1024, 24, 16
    recipe.body.layer_scale, recipe.body.attention_dropout, recipe.body.drop_path = 1e-5, 0.15, (0.0, 0.2)
    image = recipe.modalities["image"]
    image.loss.scale = 1 / 1024
    image.decoder.dim = 1024
    image.data.batch, image.data.micro_batches = 64, 64
    epoch = IMAGENET // (64 * 64)
    recipe.optim.lr, recipe.optim.warmup_steps = 1e-3, 80 * epoch
    recipe.train.steps = 800 * epoch
    return recipe


def image_v1_large_2(variant: Variant = "released") -> Recipe:
    """data2vec 1.0 with a ViT-L/16 on ImageNet-1k, 800 more epochs from the weights of image_v1_large.

    deepspeed train.py --deepspeed zero2 --recipe image_v1_large_2 data=DIR init=checkpoints/image_v1_large

    GPUs: 64 in the released command. Cost: 1,123 A100 hours (estimate, docs/recipes.md); none are published.
    Expected: 86.6 % top-1 on ImageNet after fine-tuning (Papers with Code).

    A teacher twice as slow, and half the warm-up. In the original it starts as a copy of the student; `init` takes
    the teacher of the first 800 epochs with it.
    """
    check_variant("image_v1_large_2", variant, "released")
    recipe = image_v1_large()
    recipe.name = "image_v1_large_2"
    recipe.ema = EMA(start=0.9999, end=0.9999, anneal_steps=0)
    recipe.optim.warmup_steps //= 2
    return recipe


def image_v1_tiny() -> Recipe:
    """image_tiny as data2vec 1.0: shows in a minute that it runs, not that it learns.

    python train.py --deepspeed zero0 --recipe image_v1_tiny
    """
    digits = tiny_digits()
    digits.view, digits.clones, digits.positions = "masked", 1, "relative"
    digits.extra_tokens_init = "small"
    digits.mask = Mask(kind="rectangle", ratio=0.6, length=2)
    digits.target = Target(top_k=3, per_layer="layer", final=("layer",), source="block")
    digits.loss = Loss(beta=2.0, scale=1 / 96)
    digits.decoder = DecoderConfig(dim=96, layers=0)
    digits.data.shards = "multimodal-train-*.tar"
    return Recipe(
        name="image_v1_tiny",
        body=Body(
            dim=96,
            depth=4,
            heads=4,
            norm_eps=1e-6,
            drop_path=(0.0, 0.1),
            norm_first=True,
            layer_scale=0.1,
            qkv_bias="qv",
        ),
        modalities={"image": digits},
        ema=EMA(start=0.998, end=0.998, anneal_steps=0),
        optim=Optim(lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, warmup_steps=20, clip=3.0),
        train=Train(steps=200, log_every=20, save_every=100, workers=1),
        precision="fp32",
    )

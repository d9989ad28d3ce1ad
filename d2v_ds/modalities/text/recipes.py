"""Recipes for text."""

from __future__ import annotations

from d2v_ds.modalities.text.net import TextConfig
from d2v_ds.modalities.text.samples import TextData
from d2v_ds.model.decoder import DecoderConfig
from d2v_ds.model.layers import Body
from d2v_ds.model.loss import Loss
from d2v_ds.model.masking import Mask
from d2v_ds.model.targets import Target
from d2v_ds.recipe import EMA, Optim, Recipe, Train


def text_tiny() -> Recipe:
    """English prose in blocks of 64 tokens on two CPU cores.

    python train.py --deepspeed zero0 --recipe text_tiny
    """
    return Recipe(
        name="text_tiny",
        body=Body(dim=96, depth=4, heads=4),
        modalities={"text": tiny_prose()},
        ema=EMA(start=0.99, end=0.9998, anneal_steps=300),
        optim=Optim(lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, warmup_steps=40, clip=4.0),
        train=Train(steps=400, log_every=20, save_every=200, workers=1),
        precision="fp32",
    )


def tiny_prose() -> TextConfig:
    return TextConfig(
        vocabulary=1000,
        max_tokens=64,
        clones=4,
        embed_dropout=0.0,
        mask=Mask(kind="random", ratio=0.48),
        target=Target(top_k=4, per_layer="instance"),
        loss=Loss(scale=1.0),
        decoder=DecoderConfig(dim=96, kernel=9, layers=3, groups=1, residual=False, projection_layers=2),
        teacher="blocks",
        data=TextData(shards="text-train-*.tar", batch=16, micro_batches=1),
    )

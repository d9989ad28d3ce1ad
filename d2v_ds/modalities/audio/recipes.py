"""Recipes for speech."""

from __future__ import annotations

from d2v_ds.modalities.audio.net import AudioConfig
from d2v_ds.modalities.audio.samples import AudioData
from d2v_ds.model.decoder import DecoderConfig
from d2v_ds.model.encoder import Alibi
from d2v_ds.model.layers import Body
from d2v_ds.model.masking import Mask
from d2v_ds.model.targets import Target
from d2v_ds.recipe import EMA, Optim, Recipe, Train


def audio_tiny() -> Recipe:
    """Spoken digits in crops of 0.7 s on two CPU cores.

    python train.py --deepspeed zero0 --recipe audio_tiny

    A slow teacher with a feature extractor of its own: with the released recipe's live extractor, targets of
    runs this small become functions of position alone (docs/experiments.md).
    """
    return Recipe(
        name="audio_tiny",
        body=Body(dim=96, depth=4, heads=4),
        modalities={"audio": tiny_speech()},
        ema=EMA(start=0.998, end=0.9998, anneal_steps=240),
        optim=Optim(lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, warmup_steps=40, clip=4.0),
        train=Train(steps=400, log_every=20, save_every=100, workers=1),
        precision="fp32",
    )


def tiny_speech() -> AudioConfig:
    return AudioConfig(
        clones=4,
        conv_layers=((64, 10, 5), *[(64, 3, 2)] * 4, *[(64, 2, 2)] * 2),
        position_width=38,
        position_depth=2,
        mask=Mask(kind="block", ratio=0.6, adjust=0.05, length=5),
        target=Target(top_k=4, per_layer="instance"),
        decoder=DecoderConfig(dim=64, kernel=7, layers=3, groups=16),
        teacher="full",
        alibi=Alibi(),
        data=AudioData(
            shards="multimodal-train-*.tar",
            fields="ogg;flac;wav;opus;mp3",
            batch=16,
            micro_batches=1,
            max_seconds=0.7,
            min_seconds=0.5,
        ),
    )

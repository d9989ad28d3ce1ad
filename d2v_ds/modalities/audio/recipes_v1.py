"""Recipes of data2vec 1.0 for speech: all frames are encoded, masked ones as a learned vector."""

from __future__ import annotations

from d2v_ds.modalities.audio.net import AudioConfig
from d2v_ds.modalities.audio.recipes import tiny_speech
from d2v_ds.modalities.audio.samples import AudioData
from d2v_ds.model.decoder import DecoderConfig
from d2v_ds.model.layers import Body
from d2v_ds.model.masking import Mask
from d2v_ds.model.targets import Target
from d2v_ds.recipe import EMA, Optim, Recipe, Train, Variant, check_variant


def audio_v1_base(variant: Variant = "released") -> Recipe:
    """data2vec 1.0 on LibriSpeech 960 h, as released.

    deepspeed train.py --deepspeed zero2 --recipe audio_v1_base data=DIR

    GPUs: 16 in the released file. Cost: 183 A100 hours (estimate, docs/recipes.md); none are published.
    Expected: 2.77 / 7.08 % WER on test-clean / test-other after fine-tuning on 960 h, without a language model
    (model card of facebook/data2vec-audio-base-960h).

    Batch: as in the original, 16 micro-batches of up to 237.5 s of sounds of like length (audio_base says more): at
    most 3,800 s a step.

    The teacher averages the blocks and the norm before them, and reads the student's positional convolutions as
    they are, as the released file says and the paper describes; the configuration inside the released weights
    is said to average these too: modalities.audio.teacher=context. The original averages once a micro-batch
    where gradients are accumulated, by mistake; here it is once a step.
    """
    check_variant("audio_v1_base", variant, "released")
    return Recipe(
        name="audio_v1_base",
        body=Body(
            dim=768,
            depth=12,
            heads=12,
            encoder_dropout=0.1,
            attention_dropout=0.1,
            post_mlp_dropout=0.1,
            layerdrop=0.05,
        ),
        modalities={
            "audio": AudioConfig(
                view="masked",
                clones=1,
                mask=Mask(kind="span", ratio=0.65, length=10),
                target=Target(top_k=8, per_layer="instance"),
                decoder=DecoderConfig(dim=768, layers=0),
                teacher="norm",
                prenet_dropout=0.1,
                data=AudioData(
                    shards="*train*.tar",
                    batch=118,
                    micro_batches=16,
                    batch_seconds=237.5,
                    max_seconds=20.0,
                    min_seconds=2.0,
                ),
            )
        },
        ema=EMA(start=0.999, end=0.9999, anneal_steps=30_000),
        optim=Optim(
            lr=5e-4,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=0.01,
            decay="all",
            schedule="tri_stage",
            warmup_steps=0,
            phases=(0.03, 0.9, 0.07),
            phase_scales=(0.01, 0.01),
            clip=0.0,
        ),
        train=Train(steps=400_000, log_every=200, workers=6),
        data="shards/librispeech",
    )


def audio_v1_tiny() -> Recipe:
    """audio_tiny as data2vec 1.0: shows in a minute that it runs, not that it learns.

    python train.py --deepspeed zero0 --recipe audio_v1_tiny
    """
    speech = tiny_speech()
    speech.view, speech.clones, speech.alibi, speech.teacher = "masked", 1, None, "norm"
    speech.mask = Mask(kind="span", ratio=0.65, length=5)
    speech.decoder = DecoderConfig(dim=96, layers=0)
    return Recipe(
        name="audio_v1_tiny",
        body=Body(dim=96, depth=4, heads=4),
        modalities={"audio": speech},
        ema=EMA(start=0.998, end=0.9998, anneal_steps=120),
        optim=Optim(
            lr=1e-3,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=0.01,
            schedule="tri_stage",
            warmup_steps=0,
            phases=(0.1, 0.8, 0.1),
            clip=4.0,
        ),
        train=Train(steps=200, log_every=20, save_every=100, workers=1),
        precision="fp32",
    )

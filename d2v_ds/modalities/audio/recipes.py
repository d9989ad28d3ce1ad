"""Recipes for speech."""

from __future__ import annotations

from d2v_ds.modalities.audio.net import AudioConfig
from d2v_ds.modalities.audio.samples import AudioData
from d2v_ds.model.decoder import DecoderConfig
from d2v_ds.model.encoder import Alibi
from d2v_ds.model.layers import Body
from d2v_ds.model.masking import Mask
from d2v_ds.model.targets import Target
from d2v_ds.recipe import EMA, Optim, Recipe, Train, Variant, check_variant


def audio_base(variant: Variant = "released") -> Recipe:
    """The base speech model on LibriSpeech 960 h, as released.

    deepspeed train.py --deepspeed zero2 --recipe audio_base data=DIR

    GPUs: 8 in the released file. Cost: 63 A100 hours (estimate, docs/recipes.md); none are published.
    Expected: 6.4 % WER on test-other after fine-tuning on 100 h, with a 4-gram (paper, quoted in fairseq issue
    5380; 6.8 from the released weights there, 9.0 for a run with smaller batches).

    Batch: as in the original, 8 micro-batches of up to 62.5 s: sounds of like length, up to 20 s each, cropped to
    the shortest of them. So a step is 500 s at most, a run 55.6 k h or 58 epochs of 960 h; on lengths like those of
    LibriSpeech 86 % of that, of which cropping took 3 %. `d2v plan` says it of your own.

    No variant `paper`: its table for speech is unknown to us, and what is quoted of it agrees.
    """
    check_variant("audio_base", variant, "released")
    return Recipe(
        name="audio_base",
        body=Body(
            dim=768,
            depth=12,
            heads=12,
            encoder_dropout=0.1,
            attention_dropout=0.1,
            post_mlp_dropout=0.1,
            layerdrop=0.05,
        ),
        modalities={"audio": librispeech()},
        ema=EMA(start=0.999, end=0.99999, anneal_steps=75_000),
        optim=Optim(
            lr=7.5e-4,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=0.01,
            decay="all",
            warmup_steps=8_000,
            clip=0.0,
        ),
        train=Train(steps=400_000, log_every=200, workers=6),
        data="shards/librispeech",
    )


def librispeech() -> AudioConfig:
    """What the released speech models share, with the values of the base model."""
    return AudioConfig(
        clones=8,
        mask=Mask(kind="block", ratio=0.5, adjust=0.05, length=5),
        target=Target(top_k=8, per_layer="instance"),
        decoder=DecoderConfig(dim=384, kernel=7, layers=4, groups=16, input_dropout=0.1),
        teacher="context",
        prenet_dropout=0.1,
        prenet_layerdrop=0.05,
        alibi=Alibi(),
        data=AudioData(
            shards="*train*.tar",
            batch=31,
            micro_batches=8,
            batch_seconds=62.5,
            max_seconds=20.0,
            min_seconds=2.0,
        ),
    )


def audio_large(variant: Variant = "released") -> Recipe:
    """The large speech model on Libri-light (60 k h without its silence), as released.

    deepspeed train.py --deepspeed zero2 --recipe audio_large data=DIR

    GPUs: 48 in the released file. Cost: 775 A100 hours (estimate, docs/recipes.md); none are published.
    Expected: unknown to us. tau reaches 1.0 at step 300,000 of 600,000: from there on the teacher stands still.

    Batch: as in the original, 48 micro-batches of one sound of 20 s or of several shorter ones: 960 s a step and
    160 k h at most, about 3 epochs.

    No variant `paper`, as for audio_base.
    """
    check_variant("audio_large", variant, "released")
    recipe = audio_base()
    recipe.name = "audio_large"
    recipe.body.dim, recipe.body.depth, recipe.body.heads = 1024, 16, 16
    recipe.body.layerdrop = 0.0
    audio = recipe.modalities["audio"]
    audio.clones = 12
    audio.prenet_depth, audio.prenet_layerdrop = 8, 0.0
    audio.mask.ratio, audio.mask.adjust = 0.55, 0.1
    audio.target.top_k = 16
    audio.decoder.dim = 768
    audio.data.batch, audio.data.micro_batches, audio.data.batch_seconds = 10, 48, 20.0
    recipe.ema = EMA(start=0.9997, end=1.0, anneal_steps=300_000)
    recipe.optim.lr, recipe.optim.warmup_steps, recipe.optim.clip = 4e-4, 10_000, 1.0
    recipe.train.steps = 600_000
    recipe.data = "shards/librilight"
    return recipe


def audio_small() -> Recipe:
    """Half the base's width for one GPU: 7,100 h of crops of 8 s, 7.4 times LibriSpeech 960 h.

    python train.py --deepspeed zero2 --recipe audio_small data=DIR

    Cost: 3 A100 hours or more (estimate, docs/recipes.md). Expected: unknown, never run in full; watch
    `content` in the progress line: small speech models are those whose targets lose it (docs/experiments.md).

    Why: sounds of less than 8 s are left out and all others cropped to it, so a micro-batch is 8 x 8 s without
    waste and every pass has one shape: 4 x 64 s = 256 s a step, half the base's, with 2/3 of its learning rate.
    tau ends at 0.9999, whose memory of 10,000 steps suits 100,000. Clipped, since smaller batches are noisier.
    For shorter sounds lower min_seconds and max_seconds together.
    """
    recipe = audio_base()
    recipe.name = "audio_small"
    recipe.body.dim, recipe.body.heads, recipe.body.layerdrop = 384, 6, 0.0
    audio = recipe.modalities["audio"]
    audio.decoder.dim = 192
    audio.data.batch, audio.data.micro_batches, audio.data.batch_seconds = 8, 4, None
    audio.data.min_seconds = audio.data.max_seconds = 8.0
    recipe.ema = EMA(start=0.999, end=0.9999, anneal_steps=30_000)
    recipe.optim.lr, recipe.optim.decay, recipe.optim.clip = 5e-4, "matrices", 1.0
    recipe.train.steps = 100_000
    return recipe


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

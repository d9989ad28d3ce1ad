"""Recipes that train one body on several modalities at once."""

from __future__ import annotations

from d2v_ds.modalities.audio.recipes import librispeech, tiny_speech
from d2v_ds.modalities.image.recipes import imagenet, tiny_digits
from d2v_ds.modalities.text.recipes import books, tiny_prose
from d2v_ds.model.layers import Body
from d2v_ds.recipe import EMA, Optim, Recipe, Train


def multimodal_base() -> Recipe:
    """Images, speech and text in one base body: ours, since no joint recipe was ever released.

    deepspeed train.py --deepspeed zero2 --recipe multimodal_base data=DIR modalities.text.data.tokenizer=FILE

    DIR holds imagenet/, librispeech/ and openwebtext/. GPUs: 1, 2, 4, 8 or 16. Cost: 258 A100 hours (estimate,
    docs/recipes.md). Expected: unknown, never run in full; watch `content` of each modality.

    Why these values. Each modality keeps its released masks, views, decoder, target norms and K, but text: 10
    of 10 for 12 of 12. Two blocks of each modality's own stand before ten shared ones, as image_base has it;
    a trial of the authors (fairseq f835b2c, config/multi/base_audio_images_text.yaml) shares 8 of 12, and has
    neither dropout nor layer drop. Nor have these: what is shared has one rate, and images were released with
    none. Text's teacher averages text's own two blocks too, and
    reads the student's embeddings. Text's loss takes the scale of the others, 1 / sqrt(D), or it would own the
    clipped gradient. tau is that of images, between speech's and text's; the learning rate 5e-4 lies between
    1e-3 (images) and 2e-4 (text). A step is 256 images, up to 500 s of speech and 64 blocks of text, the released
    batches: 80 epochs of ImageNet and about 45 of LibriSpeech in 400,000 steps.
    """
    image, audio, text = imagenet(), librispeech(), books()
    image.data.shards = "imagenet/*train*.tar"
    audio.prenet_depth, audio.prenet_layerdrop = 2, 0.0
    audio.data.shards = "librispeech/*train*.tar"
    audio.data.batch, audio.data.micro_batches, audio.data.batch_seconds = 15, 16, 31.25
    text.prenet_depth, text.teacher, text.target.top_k, text.loss.scale = 2, "context", 10, None
    text.data.shards = "openwebtext/*train*.tar"
    return Recipe(
        name="multimodal_base",
        body=Body(dim=768, depth=10, heads=12),
        modalities={"image": image, "audio": audio, "text": text},
        ema=EMA(start=0.9998, end=0.99999, anneal_steps=100_000),
        optim=Optim(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05, warmup_steps=20_000, clip=4.0),
        train=Train(steps=400_000, log_every=200, workers=8),
        data="shards",
    )


def multimodal_tiny() -> Recipe:
    """Digits seen, digits spoken and prose in one body: the main job, on the committed sample shards.

    deepspeed --num_accelerators 2 train.py --deepspeed ds_configs/zero3.json

    A step has 12 micro-batches of each modality, so 1, 2, 3, 4, 6 or 12 ranks divide it. K, masks, targets and
    decoder are each modality's own; width, depth, norm eps, tau and clip are the body's.
    """
    modalities = {"image": tiny_digits(), "audio": tiny_speech(), "text": tiny_prose()}
    for config, batch in ((modalities["image"], 4), (modalities["audio"], 2), (modalities["text"], 2)):
        config.data.batch, config.data.micro_batches = batch, 12
    modalities["image"].data.shards = "multimodal-train-*.tar"
    modalities[
        "text"
    ].loss.weight = 0.1  # its loss is sqrt(D) times the others' and would own the clipped gradient
    return Recipe(
        name="multimodal_tiny",
        body=Body(dim=96, depth=4, heads=4),
        modalities=modalities,
        ema=EMA(start=0.998, end=0.9998, anneal_steps=120),
        optim=Optim(lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, warmup_steps=20, clip=4.0),
        train=Train(steps=120, log_every=10, save_every=40, workers=1),
        precision="fp32",
    )

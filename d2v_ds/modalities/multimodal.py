"""Recipes that train one body on several modalities at once."""

from __future__ import annotations

from d2v_ds.modalities.audio.recipes import tiny_speech
from d2v_ds.modalities.image.recipes import tiny_digits
from d2v_ds.modalities.text.recipes import tiny_prose
from d2v_ds.model.layers import Body
from d2v_ds.recipe import EMA, Optim, Recipe, Train


def multimodal_tiny() -> Recipe:
    """Digits seen, digits spoken and prose in one body: the main job, on the committed sample shards.

    deepspeed --num_accelerators 2 train.py --deepspeed ds_configs/zero3.json

    A step has 12 micro-batches of each modality, so 1, 2, 3, 4, 6 or 12 ranks divide it. K, masks, targets
    and decoder are each modality's own; width, depth, norm eps, tau and clip are the body's.
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

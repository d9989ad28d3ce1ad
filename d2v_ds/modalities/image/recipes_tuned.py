"""Recipes that fine-tune on images: classes of whole pictures, after data2vec 2.0 (arXiv:2212.07525, and its files).

What the network is comes from `init`; here stands how it learns.
"""

from __future__ import annotations

from d2v_ds.modalities.image.net import ImageConfig
from d2v_ds.modalities.image.recipes import image_base, image_huge, image_large, image_tiny
from d2v_ds.modalities.image.samples import ImageData
from d2v_ds.model.tuned import Task
from d2v_ds.recipe import Optim, Recipe, Train


def finetune_image_base() -> Recipe:
    """ViT-B/16 on ImageNet-1k: 100 epochs, layer decay 0.65.

    deepspeed train.py --deepspeed zero2 --recipe finetune_image_base init=RUN data=DIR task.test='*val*.tar'

    Own classes: task.outputs=N. Cost: 16 GPUs in the released file; no hours are published. Expected: unknown to us.
    """
    return imagenet(image_base(), Optim(lr=1e-3, min_lr=1e-6, warmup_steps=16_000), 250_200, 0.65, 0.1)


def finetune_image_large() -> Recipe:
    """ViT-L/16 on ImageNet-1k: 50 epochs, layer decay 0.75.

    deepspeed train.py --deepspeed zero2 --recipe finetune_image_large init=RUN data=DIR task.test='*val*.tar'

    Expected: 86.8 % top-1 after 150 epochs of pre-training (abstract of arXiv:2212.07525).
    """
    return imagenet(
        image_large(), Optim(lr=5e-4, min_lr=1e-7, warmup_steps=16_000, clip=4.0), 125_200, 0.75, 0.2
    )


def finetune_image_huge() -> Recipe:
    """ViT-H/16 on ImageNet-1k: 50 epochs, layer decay 0.75.

    deepspeed train.py --deepspeed zero3 --recipe finetune_image_huge init=RUN data=DIR task.test='*val*.tar'

    Expected: 87.4 % top-1, which a list of results has for the paper's best model, without its size.
    """
    return imagenet(
        image_huge(), Optim(lr=5e-4, min_lr=1e-20, warmup_steps=16_000, clip=4.0), 125_200, 0.75, 0.2
    )


def linear_image_base() -> Recipe:
    """A linear layer on the frozen ViT-B/16, 90 epochs of ImageNet-1k: crops and flips alone, no weight decay.

    deepspeed train.py --deepspeed zero0 --recipe linear_image_base init=RUN data=DIR task.test='*val*.tar'

    Expected: unknown to us; the values are ours, none are published.
    """
    recipe = imagenet(image_base(), Optim(lr=1e-3, warmup_steps=12_500), 112_500, 1.0, 0.0)
    recipe.name = "linear_image_base"
    recipe.task.trained, recipe.task.smoothing, recipe.optim.weight_decay = "head", 0.0, 0.0
    data = recipe.modalities["image"].data
    data.rand_augment, data.erase, data.mixup, data.cutmix = "", 0.0, 0.0, 0.0
    data.batch, data.micro_batches = 64, 16
    return recipe


def imagenet(network: Recipe, optim: Optim, steps: int, layer_decay: float, drop_path: float) -> Recipe:
    """What the released files share: 512 images a step, mixup and CutMix, RandAugment, erasing, smooth labels."""
    image: ImageConfig = network.modalities["image"]
    image.data = ImageData(
        shards="*train*.tar",
        batch=32,
        micro_batches=16,
        crop_scale=(0.08, 1.0),
        rand_augment="rand-m9-mstd0.5-inc1",
        erase=0.25,
        mixup=0.7,
        cutmix=1.0,
        mix_share=0.9,
        test_crop=0.875,
    )
    optim.betas, optim.eps, optim.weight_decay = (0.9, 0.95), 1e-8, 0.05
    return Recipe(
        name=f"finetune_{network.name}",
        body=network.body,
        modalities={"image": image},
        task=Task(
            head="image_classification",
            outputs=1000,
            encoder=network.name,
            layer_decay=layer_decay,
            drop_path=drop_path,
            smoothing=0.1,
        ),
        optim=optim,
        train=Train(steps=steps, log_every=200, workers=8),
        data=network.data,
    )


def finetune_image_tiny() -> Recipe:
    """Which handwritten digit it is, on two CPU cores, in some seconds.

    python train.py --deepspeed zero0 --recipe finetune_image_tiny init=RUN data=DIR
    """
    network = image_tiny()
    image = network.modalities["image"]
    image.data.batch = 64
    return Recipe(
        name="finetune_image_tiny",
        body=network.body,
        modalities={"image": image},
        task=Task(
            head="image_classification",
            outputs=10,
            label="json.label;cls",
            encoder="image_tiny",
            layer_decay=0.75,
            test="images-test-*.tar",
            test_every=100,
        ),
        optim=Optim(lr=2e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, warmup_steps=30, clip=4.0),
        train=Train(steps=300, log_every=20, save_every=100, workers=1),
        precision="fp32",
    )

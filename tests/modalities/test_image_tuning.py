"""What fine-tuning adds to images: what is mixed how, and what a trained model sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2v_ds.data import Draw
from d2v_ds.modalities.image import tuning
from d2v_ds.modalities.image.net import ImageConfig
from d2v_ds.modalities.image.samples import ImageData, ImageSamples
from d2v_ds.model.tuned import Task

TASK = Task(head="image_classification", outputs=10, smoothing=0.1)


@pytest.fixture(autouse=True)
def timm() -> None:
    pytest.importorskip("timm")


def samples(**data: object) -> ImageSamples:
    return ImageSamples(ImageConfig(size=32, patch=8, data=ImageData(**{"batch": 4} | data)), Path())


def pictures(count: int = 4) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(count)]


def draws(first: int = 0) -> list[Draw]:
    return [Draw(unit, 0, 7_000 + first + unit) for unit in range(4)]


def collate(own: ImageSamples, first: int = 0, task: Task = TASK) -> tuple[torch.Tensor, torch.Tensor]:
    batch = own.collate_whole(pictures(), draws(first), [3, 1, 4, 1], task)
    return batch.source, batch.labels


@pytest.mark.parametrize("setting", [{"rand_augment": "rand-m9-mstd0.5-inc1"}, {"erase": 1.0}])
def test_what_is_done_to_a_picture_does_not_depend_on_its_batch(setting):
    own = samples(**setting)
    together = own.pixels(pictures(), draws())
    alone = own.pixels(pictures()[2:3], draws()[2:3])
    assert torch.equal(together[2], alone[0])
    assert not torch.equal(samples().pixels(pictures(), draws()), together)


def test_mixed_labels_are_shares_of_both_pictures_and_smooth():
    """First with last: label 3 with 1, and 1 with 4; off value 0.1 / 10, on value 0.9 + 0.1 / 10."""
    _, labels = collate(samples(mixup=0.7, cutmix=1.0))
    assert labels.shape == (4, 10)
    assert torch.allclose(labels.sum(dim=1), torch.ones(4))
    assert torch.allclose(labels[0, [0, 2, 4, 5, 6, 7, 8, 9]], torch.tensor(0.01))
    assert labels[0, 3] + labels[0, 1] == pytest.approx(0.92)
    assert labels[1, 1] == pytest.approx(float(labels[0, 3])) == pytest.approx(float(labels[2, 4]))


def test_the_share_of_mixed_batches_is_what_the_recipe_says():
    own = samples(mixup=0.7, cutmix=1.0, mix_share=0.9)
    plain = [bool((collate(own, first)[1].max(dim=1).values > 0.909).all()) for first in range(0, 800, 4)]
    assert 0.04 < np.mean(plain) < 0.2  # 0.1, and a few with a share near 1; 200 batches
    never = samples(mixup=0.7, mix_share=0.0)
    assert torch.equal(collate(never)[0], collate(samples())[0])


def test_without_mixing_labels_are_ids():
    _, labels = collate(samples(rand_augment="rand-m9-mstd0.5-inc1"))
    assert labels.tolist() == [3, 1, 4, 1]


def test_a_trained_model_sees_what_resizing_to_256_and_cutting_out_224_leaves():
    """test_crop=0.875: of a picture of 256 x 320 the middle 224 x 224, pixel by pixel."""
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (256, 320, 3), dtype=np.uint8))
    own = ImageSamples(ImageConfig(size=224, data=ImageData(test_crop=0.875)), Path())
    expected = own.normalise(picture.crop((48, 16, 272, 240)))
    assert torch.equal(own.prepare(picture), expected)


def test_a_picture_of_another_size_is_close_to_both_steps():
    """Smooth content, since one bicubic resize stands for a resize and a crop."""
    grid = np.linspace(0, 255, 500)[:, None] + np.zeros((1, 375))
    picture = Image.fromarray(np.stack([grid] * 3, axis=2).astype(np.uint8))
    own = ImageSamples(ImageConfig(size=224, data=ImageData(test_crop=0.875)), Path())
    resized = picture.resize((256, round(256 * 500 / 375)), Image.Resampling.BICUBIC)
    top = (resized.height - 224) // 2
    expected = own.normalise(resized.crop((16, top, 240, top + 224)))
    assert (own.prepare(picture) - expected).abs().max() < 3 / 255 / 0.224


def test_a_policy_that_timm_does_not_know_is_an_error_before_training():
    tuning.check_policy("rand-m9-mstd0.5-inc1")
    for policy in ("foo", "rand-m9-k1", "rand-mx9"):
        with pytest.raises(
            ValueError, match=f"rand_augment={policy} is none in timm's notation, such as rand-m9"
        ):
            tuning.check_policy(policy)

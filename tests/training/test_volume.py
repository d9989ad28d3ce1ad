"""The first lines of a run say how much a step holds, in the recipe's unit, and the epochs that follow."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from ranks import SAMPLE

from d2v_ds.data import Plan
from d2v_ds.data.buckets import expected_extremes
from d2v_ds.modalities.source import open_source
from d2v_ds.recipe import load_recipe
from d2v_ds.training.plan import describe_plan
from d2v_ds.training.volume import describe_volume


def describe(name: str, modality: str, steps: int, *overrides: str) -> str:
    recipe = load_recipe(name, [f"modalities.{modality}.{o}" for o in overrides])
    source = open_source(modality, recipe.modalities[modality], str(SAMPLE))
    return describe_volume(source, Plan(recipe.seed, [source.stream]), steps)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_expected_extremes_are_those_of_all_draws(number):
    values, counts = np.array([2, 3, 5, 7, 11]), np.array([1, 2, 0, 1, 3])
    draws = list(itertools.product(np.repeat(values, counts).tolist(), repeat=number))
    low, high = expected_extremes(values, counts, number)
    assert low == pytest.approx(sum(map(min, draws)) / len(draws))
    assert high == pytest.approx(sum(map(max, draws)) / len(draws))


def test_images_are_counted():
    """450 of the committed shards."""
    text = describe("multimodal_tiny", "image", 75, "data.batch=3", "data.micro_batches=4")
    assert text == "image: 12 images a step (4 micro-batches of 3), 2.00 epochs of 450 images in 75 steps"


def test_text_is_counted_in_tokens():
    text = describe("text_tiny", "text", 1000, "data.batch=2", "data.micro_batches=8")
    found = re.fullmatch(
        r"text: 1,024 tokens a step \(8 micro-batches of 2\), (.+) epochs of ([\d,]+) tokens in 1000 steps",
        text,
    )
    tokens = int(found[2].replace(",", ""))
    assert tokens % 64 == 0 and float(found[1]) == pytest.approx(1_024_000 / tokens, abs=0.006)


def test_samples_of_text_are_counted_by_their_mean():
    """Never more than max_tokens, and <s> counts."""
    text = describe("multimodal_tiny", "text", 10, "data.mode=samples", "data.shards=multimodal-train-*.tar")
    a_step, total = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tokens", text))
    assert total < 450 * 64 and a_step == pytest.approx(24 * total / 450, abs=1)


def test_sound_is_counted_in_seconds_whole_or_cropped():
    """A sound alone is whole; of two the shorter decides; what is longer than max_seconds is cropped."""

    def seconds(batch: int, most: float) -> tuple[float, str]:
        settings = (
            f"data.batch={batch}",
            "data.micro_batches=1000",
            f"data.max_seconds={most}",
            "data.min_seconds=0.1",
        )
        text = describe("audio_tiny", "audio", 450, *settings)
        return int(re.match(r"audio: ([\d,]+) seconds", text)[1].replace(",", "")), text

    (whole, text), (pairs, lossy), (short, _) = seconds(1, 20), seconds(2, 20), seconds(1, 0.5)
    total = int(re.search(r"epochs of ([\d,]+) seconds = 0.1 h", text)[1])
    assert (
        whole == pytest.approx(1000 * total / 450, abs=2)
        and "1000.00 epochs" in text
        and "cropping" not in text
    )
    assert short == 500
    assert whole < pairs < 2 * whole
    assert f"cropping loses {1 - pairs / (2 * whole):.0%}" in lossy and "2000.00 epochs" in lossy


def test_small_speech_takes_crops_of_one_length():
    """8 s of every sound that has them, so a step is as long as its docstring says: 256 s."""
    data = load_recipe("audio_small").modalities["audio"].data
    lengths = np.bincount(np.minimum(np.arange(8, 31), data.max_seconds).astype(int))
    shortest, _ = expected_extremes(np.arange(len(lengths)), lengths, data.batch)
    assert shortest * data.batch * data.micro_batches == pytest.approx(256)


@pytest.mark.parametrize("budget", [None, 20.0])
def test_sounds_that_are_fine_tuned_on_are_padded_not_cropped(budget):
    """As many seconds as are stored; the share of padding is that of the batches of an epoch."""
    settings = [] if budget is None else [f"modalities.audio.data.batch_seconds={budget}"]
    recipe = load_recipe("finetune_audio_tiny", settings)
    source = open_source("audio", recipe.modalities["audio"], str(SAMPLE), recipe.task)
    plan = Plan(recipe.seed, [source.stream])
    steps = int(source.stream.shares[0].batches(source.batch))
    text = describe_volume(source, plan, steps)
    assert "cropping" not in text
    told = float(re.search(r"padding is ([\d.]+)% of what is computed", text)[1]) / 100
    real = computed = 0
    for step in range(steps):
        lengths = [source.corpus.lengths.of_unit(d.unit) for d in plan.draws(step, "audio", 0)]
        real, computed = real + sum(lengths), computed + len(lengths) * max(lengths)
    assert told == pytest.approx(1 - real / computed, abs=0.03)
    seconds = float(re.search(r"epochs of ([\d,]+) seconds", text)[1].replace(",", ""))
    lengths = source.corpus.lengths
    assert seconds == pytest.approx(lengths.total(lengths.shards_of(0, source.size)) / 16_000, abs=1)
    assert f"{told:.1%} padding" in describe_plan(recipe, [source], plan)

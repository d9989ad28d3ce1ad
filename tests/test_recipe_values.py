"""The shipped recipes have the published values: batches, epochs, schedules, variants."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
from ranks import ROOT

import d2v_ds
from d2v_ds.config import dotted_keys
from d2v_ds.data import Plan
from d2v_ds.data.plan import Stream
from d2v_ds.engine.ema import anneal
from d2v_ds.model.masking import draw_mask
from d2v_ds.recipe import Optim, Recipe, load_recipe, recipes, write_yaml
from d2v_ds.training.schedule import learning_rate

IMAGENET = 1_281_167
RELEASED = [
    "image_base", "image_large", "image_huge", "image_huge14", "audio_base", "audio_large", "text_base", "text_large",
    "text_large_1m", "audio_v1_base", "text_v1_base", "image_v1_base", "image_v1_large", "image_v1_large_2",
]  # fmt: skip
WITH_PAPER = ["image_base", "image_large", "image_huge", "image_huge14", "text_base", "text_large"]


def epochs(recipe: Recipe, modality: str, size: int) -> float:
    """What a run of this recipe on a corpus of `size` samples says of itself."""
    data = recipe.modalities[modality].data
    plan = Plan(recipe.seed, [Stream(modality, size, data.batch, data.micro_batches)])
    return plan.epochs(recipe.train.steps)[modality]


def a_step(recipe: Recipe, modality: str) -> int:
    data = recipe.modalities[modality].data
    return data.batch * data.micro_batches


# ---- batches and epochs ----


@pytest.mark.parametrize(
    ("name", "variant", "images", "number"),
    [
        ("image_base", "released", 256, 75.0),
        ("image_large", "released", 128, 37.5),
        ("image_huge", "released", 128, 37.5),
        ("image_huge14", "released", 256, 99.9),
        ("image_base", "paper", 512, 150.0),
        ("image_large", "paper", 512, 150.0),
        ("image_huge", "paper", 256, 99.9),
        ("image_huge14", "paper", 256, 99.9),
        ("image_v1_base", "released", 2048, 799.3),  # of 800, each without its last, incomplete batch
        ("image_v1_large", "released", 4096, 798.0),
        ("image_v1_large_2", "released", 4096, 798.0),
    ],
)
def test_image_recipes_imply_the_published_epochs(name, variant, images, number):
    recipe = load_recipe(name, [f"variant={variant}"])
    assert a_step(recipe, "image") == images
    assert round(epochs(recipe, "image", IMAGENET), 1) == number


@pytest.mark.parametrize(("micro_batches", "number"), [(16, 75.0), (32, 150.0), (8, 37.5)])
def test_375_300_steps_are_150_epochs_only_at_512_images(micro_batches, number):
    recipe = load_recipe("image_base", [f"modalities.image.data.micro_batches={micro_batches}"])
    assert recipe.train.steps == 375_300
    assert round(epochs(recipe, "image", IMAGENET), 1) == number


@pytest.mark.parametrize(
    ("name", "gpus", "samples"),
    [("audio_base", 8, 1_000_000), ("audio_large", 48, 320_000), ("audio_v1_base", 16, 3_800_000)],
)
def test_speech_recipes_have_the_published_batches(name, gpus, samples):
    """GPUs x sound samples of each, in sounds of 2 s to 20 s; `batch` limits none of them."""
    data = load_recipe(name).modalities["audio"].data
    assert (data.micro_batches, data.batch_seconds * 16_000) == (gpus, samples)
    assert (data.min_seconds, data.max_seconds) == (2, 20) and data.batch == data.batch_seconds // 2


def test_speech_hears_at_most_as_much_as_the_original():
    """55.6 k h, 58 epochs of LibriSpeech; 160 k h."""
    hours = {}
    for name in ("audio_base", "audio_large"):
        recipe = load_recipe(name)
        data = recipe.modalities["audio"].data
        hours[name] = recipe.train.steps * data.micro_batches * data.batch_seconds / 3600
    assert round(hours["audio_base"]) == 55_556 and round(hours["audio_base"] / 960.9) == 58
    assert hours["audio_large"] == 160_000


@pytest.mark.parametrize(
    ("name", "blocks"), [("text_base", 64), ("text_large", 64), ("text_large_1m", 64), ("text_v1_base", 256)]
)
def test_text_recipes_have_the_published_blocks_a_step(name, blocks):
    recipe = load_recipe(name)
    assert a_step(recipe, "text") == blocks and recipe.modalities["text"].max_tokens == 512


@pytest.mark.parametrize(
    ("name", "masked", "tokens"),
    [
        ("image_base", 157, 196),
        ("image_large", 147, 196),
        ("image_huge", 147, 196),
        ("image_huge14", 192, 256),
        ("image_v1_base", 120, 196),
        ("text_base", 246, 512),
        ("text_large", 256, 512),
        ("audio_base", 399, 799),
        ("audio_large", 439, 799),
    ],
)
def test_recipes_mask_the_published_number_of_tokens(name, masked, tokens):
    (config,) = load_recipe(name).modalities.values()
    mask = draw_mask(np.random.default_rng(0), config.clones, tokens, config.mask)
    assert mask.shape == (config.clones, tokens) and (mask.sum(axis=1) == masked).all()


# ---- schedules ----


@pytest.mark.parametrize(
    ("name", "done", "tau"),
    [
        ("image_base", 1, 0.9998000019),
        ("image_base", 50_000, 0.999895),
        ("image_base", 100_000, 0.99999),
        ("audio_base", 37_500, 0.999495),
        ("audio_large", 299_999, 0.999999999),
        ("audio_large", 300_000, 1.0),
        ("image_huge14", 300_000, 1.0),
        ("image_v1_base", 0, 0.9998),
        ("image_v1_base", 400_000, 0.9998),
        ("image_v1_large_2", 1, 0.9999),
        ("text_v1_base", 300_000, 0.9999),
        ("audio_v1_base", 15_000, 0.99945),
    ],
)
def test_tau_has_the_published_values(name, done, tau):
    ema = load_recipe(name).ema
    assert anneal(ema.start, ema.end, ema.anneal_steps, done) == pytest.approx(tau, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("image_base", {0: 0.0, 1: 2.0e-8, 50_040: 1e-3, 212_670: 5e-4, 375_300: 0.0}),
        ("audio_base", {0: 0.0, 8_000: 7.5e-4, 400_000: 0.0}),
        ("text_base", {4_000: 2e-4, 502_000: 1e-4}),
        (
            "audio_v1_base",
            {
                0: 5e-6, 6_000: 2.525e-4, 12_000: 5e-4, 200_000: 5e-4, 372_000: 5e-4, 386_000: 5e-5, 400_000: 5e-6,
                400_001: 5e-6,
            },
        ),
        ("image_v1_base", {6_250: 2e-3, 500_000: 1e-5}),
    ],
)  # fmt: skip
def test_the_learning_rate_has_the_published_values(name, rates):
    recipe = load_recipe(name)
    for done, rate in rates.items():
        found = learning_rate(recipe.optim, done, recipe.train.steps)
        assert found == pytest.approx(rate, rel=3e-3 if done == 1 else 1e-9, abs=1e-15), done


def test_phases_are_shares_of_the_steps_whatever_their_number():
    optim = Optim(
        lr=1.0, warmup_steps=0, schedule="tri_stage", phases=(0.2, 0.5, 0.3), phase_scales=(0.1, 0.05)
    )
    rates = [learning_rate(optim, done, 10) for done in (0, 1, 2, 7, 10)]
    assert rates == pytest.approx([0.1, 0.55, 1.0, 1.0, 0.05])


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["optim.phases=[0.1, 0.5, 0.5]"], "must add up to 1"),
        (["optim.warmup_steps=100"], "no meaning with optim.schedule=tri_stage"),
        (["optim.schedule=linar"], "'tri_stage'"),
        (["optim.phases=[-0.1, 1.0, 0.1]"], "greater than or equal to 0"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_an_error(overrides, hint):
    with pytest.raises(ValueError, match="optim") as caught:
        load_recipe("audio_v1_base", overrides)
    assert hint in str(caught.value) and "\n" not in str(caught.value)


def test_a_schedule_can_be_changed_from_the_command_line():
    recipe = load_recipe("text_base", ["optim.schedule=tri_stage", "optim.warmup_steps=0"])
    assert learning_rate(recipe.optim, 500_000, 1_000_000) == 2e-4


# ---- values that differ between recipes ----


def test_optimizers_have_the_published_values():
    """(lr, betas, eps, decay, what is decayed, clip)."""
    found = {}
    for name in RELEASED:
        o = load_recipe(name).optim
        found[name] = (o.lr, o.betas, o.eps, o.weight_decay, o.decay, o.clip)
    image, text, audio = ((0.9, 0.95), 1e-8, 0.05, "all", 4.0), ((0.9, 0.98), 1e-6, 0.01, "all"), (0.9, 0.98)
    v1_image = ((0.9, 0.999), 1e-8, 0.05, "matrices", 3.0)
    assert found == {
        "image_base": (1e-3, *image),
        "image_large": (4e-4, *image),
        "image_huge": (4e-4, *image),
        "image_huge14": (4e-4, *image),
        "audio_base": (7.5e-4, audio, 1e-6, 0.01, "all", 0.0),
        "audio_large": (4e-4, audio, 1e-6, 0.01, "all", 1.0),
        "text_base": (2e-4, *text, 1.0),
        "text_large": (1e-4, *text, 1.0),
        "text_large_1m": (1e-4, *text, 1.0),
        "audio_v1_base": (5e-4, audio, 1e-6, 0.01, "all", 0.0),
        "text_v1_base": (2e-4, *text, 5.0),
        "image_v1_base": (2e-3, *v1_image),
        "image_v1_large": (1e-3, *v1_image),
        "image_v1_large_2": (1e-3, *v1_image),
    }


def test_targets_have_the_published_values():
    """(K, shared blocks, blocks of the modality, norm of each layer, norms of the mean, source, teacher)."""
    found = {}
    for name in RELEASED:
        recipe = load_recipe(name)
        (c,) = recipe.modalities.values()
        t = c.target
        found[name] = (t.top_k, recipe.body.depth, c.prenet_depth, t.per_layer, t.final, t.source, c.teacher)
    v1_image = ("layer", ("layer",), "block", "full")
    assert found == {
        "image_base": (10, 10, 2, "instance", ("layer",), "ffn", "full"),
        "image_large": (18, 24, 0, "instance", ("layer",), "ffn", "full"),
        "image_huge": (24, 32, 0, "instance", ("layer",), "ffn", "full"),
        "image_huge14": (24, 32, 0, "instance", ("layer",), "ffn", "full"),
        "audio_base": (8, 12, 0, "instance", (), "ffn", "context"),
        "audio_large": (16, 16, 8, "instance", (), "ffn", "context"),
        "text_base": (12, 12, 0, "instance", (), "ffn", "blocks"),
        "text_large": (24, 24, 0, "layer", ("instance",), "ffn", "blocks"),
        "text_large_1m": (24, 24, 0, "layer", ("instance",), "ffn", "blocks"),
        "audio_v1_base": (8, 12, 0, "instance", (), "ffn", "norm"),
        "text_v1_base": (10, 12, 0, "layer", (), "ffn", "blocks"),
        "image_v1_base": (6, 12, 0, *v1_image),
        "image_v1_large": (6, 24, 0, *v1_image),
        "image_v1_large_2": (6, 24, 0, *v1_image),
    }


def test_losses_have_the_published_values():
    """(beta, scale, views)."""
    found = {}
    for name in RELEASED:
        (c,) = load_recipe(name).modalities.values()
        found[name] = (c.loss.beta, c.loss.scale, c.clones)
    assert found == {
        **dict.fromkeys(("image_base", "image_large", "image_huge", "image_huge14"), (0.0, None, 16)),
        "audio_base": (0.0, None, 8),
        "audio_large": (0.0, None, 12),
        "text_base": (0.0, 1.0, 8),
        "text_large": (0.0, 1.0, 8),
        "text_large_1m": (4.0, 1.0, 8),
        "audio_v1_base": (0.0, None, 1),
        "text_v1_base": (4.0, 1.0, 1),
        "image_v1_base": (2.0, 1 / 768, 1),
        "image_v1_large": (2.0, 1 / 1024, 1),
        "image_v1_large_2": (2.0, 1 / 1024, 1),
    }


@pytest.mark.parametrize(
    ("name", "weight"),
    [("image_base", 2.56), ("image_large", 1.28), ("image_huge", 1.28), ("image_huge14", 1.28)],
)
def test_the_class_token_has_the_published_weight(name, weight):
    """0.01 summed over the rows of a pass of the original; the recipe's own micro-batch has as many."""
    (config,) = load_recipe(name).modalities.values()
    assert config.loss.cls_weight * config.loss.cls_rows == pytest.approx(weight)
    assert config.loss.cls_rows == config.data.batch * config.clones


# ---- variants ----


@pytest.mark.parametrize("name", RELEASED)
def test_released_is_the_default_variant(name):
    assert recipes()[name]() == recipes()[name]("released") == load_recipe(name, ["variant=released"])


PAPER = {
    "image_base": {"modalities.image.data.micro_batches": 32},
    "image_large": {"modalities.image.data.micro_batches": 64, "ema.end": 1.0, "ema.anneal_steps": 500_000},
    "image_huge": {
        "modalities.image.data.micro_batches": 32,
        "modalities.image.target.top_k": 32,
        "ema.end": 1.0,
        "ema.anneal_steps": 300_000,
        "train.steps": 500_000,
    },
    "image_huge14": {"modalities.image.target.top_k": 32},
    "text_base": {"modalities.text.mask.ratio": 0.42},
    "text_large": {"modalities.text.mask.ratio": 0.42},
}


@pytest.mark.parametrize("name", WITH_PAPER)
def test_the_papers_variant_differs_in_what_the_paper_says(name):
    """And in its name, so both have a run folder of their own."""
    released, paper = dotted_keys(load_recipe(name)), dotted_keys(load_recipe(name, ["variant=paper"]))
    changed = {key: value for key, value in paper.items() if released[key] != value}
    assert changed == {"name": f"{name}_paper", **PAPER[name]}


@pytest.mark.parametrize("name", sorted(set(RELEASED) - set(WITH_PAPER)))
def test_a_variant_that_a_recipe_does_not_have_is_an_error(name):
    for build in (recipes()[name], lambda variant: load_recipe(name, [f"variant={variant}"])):
        with pytest.raises(ValueError, match=f"recipe {name} has no variant 'paper'; known: released"):
            build("paper")


@pytest.mark.parametrize("name", WITH_PAPER)
def test_an_unknown_variant_names_the_nearest(name):
    with pytest.raises(ValueError, match=f"recipe {name} has no variant 'papr'; did you mean 'paper'"):
        load_recipe(name, ["variant=papr"])


@pytest.mark.parametrize(
    "name", sorted(n for n, f in recipes().items() if "variant" not in inspect.signature(f).parameters)
)
def test_our_own_recipes_have_no_variants(name):
    with pytest.raises(ValueError, match=f"recipe {name} has no variants; leave variant=paper out"):
        load_recipe(name, ["variant=paper"])


def test_a_variant_stands_among_other_overrides_in_any_order():
    recipe = load_recipe("image_large", ["train.steps=5", "variant=paper", "ema.anneal_steps=7"])
    assert (recipe.name, recipe.train.steps, recipe.ema.anneal_steps) == ("image_large_paper", 5, 7)


def test_a_yaml_file_has_no_variants(tmp_path):
    write_yaml(load_recipe("image_base", ["variant=paper"]), tmp_path / "mine.yaml")
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe("image_base", ["variant=paper"])
    with pytest.raises(ValueError, match="variant=paper goes with the name of a shipped recipe"):
        load_recipe(str(tmp_path / "mine.yaml"), ["variant=paper"])


def test_the_function_takes_a_variant_too():
    """Its error shows that it came to the recipe; a Recipe is what it is."""
    with pytest.raises(ValueError, match="recipe audio_base has no variant 'paper'"):
        d2v_ds.train(recipe="audio_base", variant="paper")
    with pytest.raises(ValueError, match="variant=paper goes with the name of a shipped recipe"):
        d2v_ds.train(recipe=load_recipe("audio_base"), variant="paper")


# ---- listed and documented ----


def test_all_recipes_are_listed_by_a_line():
    done = subprocess.run(
        [sys.executable, "-m", "d2v_ds.cli", "recipes"], capture_output=True, text=True, check=True
    )
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines.keys() == recipes().keys() and all(len(line.split()) > 4 for line in lines.values())


PRETRAINING = {name for name in recipes() if load_recipe(name).task is None}


@pytest.mark.parametrize("name", sorted(n for n in set(recipes()) - PRETRAINING if not n.endswith("_tiny")))
def test_a_docstring_of_fine_tuning_says_command_and_what_to_expect(name):
    text = " ".join(recipes()[name].__doc__.split())
    assert f"--recipe {name} init=RUN data=DIR" in text and "Expected:" in text


@pytest.mark.parametrize("name", sorted(n for n in PRETRAINING if not n.endswith("_tiny")))
def test_a_docstring_says_command_cost_and_what_to_expect(name):
    text = " ".join(recipes()[name].__doc__.split())
    assert f"--recipe {name} data=DIR" in text
    assert "A100 hours" in text and "estimate" in text and "Expected:" in text
    assert ("GPUs:" in text) or "one GPU" in text


def test_the_documented_table_has_every_recipe_with_its_values():
    """Width, blocks, K, learning rate, decay, clip, batch and steps of all but the tiny ones."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in PRETRAINING if name.endswith("_tiny"))
    lines = [line.strip("| ") for line in text.splitlines() if line.count("|") == 11]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    seen = set()
    for cells in rows[2:]:
        name, *rest = cells[0].replace("`", "").split()
        seen.add((name, "paper" in rest))
        recipe = load_recipe(name, ["variant=paper"] if "paper" in rest else [])
        modality = rest[0] if len(recipe.modalities) > 1 else next(iter(recipe.modalities))
        config, optim = recipe.modalities[modality], recipe.optim
        width, *blocks = map(int, re.findall(r"\d+", cells[1]))
        assert (width, sum(blocks)) == (recipe.body.dim, recipe.body.depth + config.prenet_depth)
        assert cells[2] == f"{config.clones} x {config.mask.ratio:g}"
        assert cells[3].split(":")[0] == str(config.target.top_k)
        assert cells[4].split()[0] == f"{recipe.ema.start:g}" and f"{recipe.ema.end:g}" in cells[4].split()
        assert cells[5].split(",")[0] == f"{optim.lr:g}"
        assert cells[6] == f"{optim.weight_decay:g} {optim.decay}, {optim.clip:g}"
        seconds = getattr(config.data, "batch_seconds", None)
        each = f"{seconds:g} s" if seconds else config.data.batch
        assert cells[7].startswith(f"{config.data.micro_batches} x {each} = ")
        assert cells[8].split(":")[0] == f"{recipe.train.steps:,}"
        cost = " ".join(recipes()[name].__doc__.split())
        assert f"(paper {cells[9]})" in cost or f"{cells[9]} A100 hours" in cost
    real = {name for name in PRETRAINING if not name.endswith("_tiny")}
    assert seen == {(name, False) for name in real} | {(name, True) for name in WITH_PAPER}

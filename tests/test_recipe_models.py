"""Every shipped recipe builds its model, of the published size, and runs: large ones without storage."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from ranks import SAMPLE
from runs import python, read_rows, start

from d2v_ds.data import Draw
from d2v_ds.modalities.audio.samples import num_frames
from d2v_ds.modalities.build import build_model
from d2v_ds.modalities.source import draw_views
from d2v_ds.model.batch import Batch
from d2v_ds.model.data2vec import Data2Vec
from d2v_ds.model.encoder import ModalityConfig
from d2v_ds.recipe import load_recipe, recipes

V1_TINY = ["audio_v1_tiny", "image_v1_tiny", "text_v1_tiny"]


@functools.cache
def build(name: str) -> Data2Vec:
    """On the meta device: shapes without storage."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        return build_model(recipe.body, recipe.modalities, recipe.fairseq_compat).to("meta")


def make_batch(name: str, config: ModalityConfig) -> Batch:
    """Two samples, of sound one second each."""
    if name == "image":
        tokens = (config.size // config.patch) ** 2
        source = torch.zeros(2, 3, config.size, config.size)
    elif name == "text":
        tokens = config.max_tokens
        source = torch.zeros(2, tokens, dtype=torch.long)
    else:
        tokens = num_frames(16_000, config.conv_layers)
        source = torch.zeros(2, 16_000)
    draws = [Draw(unit=i, epoch=0, seed=i) for i in range(2)]
    return Batch(name, source, **draw_views(draws, [tokens] * 2, config)).to("meta", torch.float32)


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_recipe_builds_a_model_that_runs(name):
    """Student, teacher and decoder fit each other in every modality; predictions and targets have the body's width."""
    recipe = load_recipe(name)
    model = build(name).train()
    for modality, config in recipe.modalities.items():
        batch = make_batch(modality, config)
        output = model(batch)
        assert output.pred_NJD.shape == output.target_NJD.shape == (*batch.masked_NJ.shape, recipe.body.dim)
        assert ("cls" in output.losses) == (config.loss.cls_weight > 0)


@pytest.mark.parametrize(
    ("name", "parameters", "decoder"),
    [
        ("image_base", 88_383_744 - 196 * 768, 2.6),
        ("image_large", 309_268_480 - 196 * 1024, 6.0),
        ("image_huge14", 637_403_392 - 256 * 1280, 6.6),
        ("audio_base", 93_783_308, 0.6),
        ("audio_large", 315_184_144, 1.9),
        ("text_base", 152_961_792, 28.9),
        ("text_large", 385_379_584, 31.1),
        ("text_large_1m", 385_379_584, 31.1),
    ],
)
def test_released_models_have_the_published_number_of_parameters(name, parameters, decoder):
    """Trainable ones; the fixed image positions are parameters in the original and a buffer here."""
    model = build(name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    (part,) = model.decoders.values()
    assert round(sum(p.numel() for p in part.parameters()) / 1e6, 1) == decoder


@pytest.mark.parametrize(
    ("name", "tensors", "numbers"),
    [
        ("image_base", 150 - 1, 85_797_888 - 196 * 768),
        ("audio_base", 157, 88_561_932),
        ("text_base", 144, 85_054_464),
        ("text_v1_base", 144, 85_054_464),
        ("audio_v1_base", 146, 85_056_000),  # as text's blocks, and a norm
    ],
)
def test_teachers_of_base_models_have_the_published_size(name, tensors, numbers):
    """Without the fixed image positions, which are no part of the average."""
    followed = [teacher for _, _, teacher in build(name).followed()]
    assert (len(followed), sum(p.numel() for p in followed)) == (tensors, numbers)


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_the_joint_model_keeps_what_each_modality_was_released_with(modality):
    """Masks, views, decoder, norms of targets; text's K is what there is of shared blocks."""
    joint = load_recipe("multimodal_base").modalities[modality]
    alone = load_recipe(f"{modality}_base").modalities[modality]
    for part in ("mask", "clones", "decoder", "alibi", "extra_tokens", "view"):
        assert getattr(joint, part) == getattr(alone, part), part
    assert joint.target == alone.target.model_copy(update={"top_k": joint.target.top_k})
    assert joint.target.top_k == min(alone.target.top_k, 10)


def test_a_step_of_the_joint_recipe_divides_among_up_to_16_ranks():
    for config in load_recipe("multimodal_base").modalities.values():
        assert config.data.micro_batches % 16 == 0


@pytest.fixture(scope="module")
def v1_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipes of version 1, a few steps each on the committed shards, in one process."""
    folder = tmp_path_factory.mktemp("v1")
    settings = [
        f"data={SAMPLE}",
        "train.steps=4",
        "train.log_every=1",
        "train.save_every=4",
        "train.workers=0",
    ]
    commands = [
        ["--deepspeed", "zero0", "--recipe", name, f"out={folder / name}", *settings] for name in V1_TINY
    ]
    script = "for command in json.loads(sys.argv[1]): assert main(command) == 0"
    imports = "import json, sys\nfrom d2v_ds.training.run import main\n"
    start(python("-c", imports + script, json.dumps(commands)))
    return folder


@pytest.mark.parametrize("name", V1_TINY)
def test_version_1_trains_on_the_sample_shards(name, v1_runs):
    """Finite losses, no step skipped, and a checkpoint at the end."""
    rows, (modality,) = read_rows(v1_runs / name), load_recipe(name).modalities
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(0 < row[f"{modality}/loss"] < 1e4 and row["applied_steps"] == row["step"] for row in rows)
    assert rows[0]["lr"] < rows[-1]["lr"] or name.startswith("audio")
    assert (v1_runs / name / "latest").read_text(encoding="utf-8") == "step_00000004"

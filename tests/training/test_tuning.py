"""Fine-tuning: what learns how fast, from which weights, on which labels; and runs on real ranks."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import SAMPLE
from runs import python, read_rows, start, torchrun, two_rank_run, without_timings

from d2v_ds.data import Draw
from d2v_ds.engine.build import parameter_groups
from d2v_ds.modalities.build import build_tuned
from d2v_ds.modalities.image.samples import ImageSamples
from d2v_ds.modalities.source import open_source
from d2v_ds.model.tuned import Task
from d2v_ds.recipe import load_recipe
from d2v_ds.training.classes import with_classes
from d2v_ds.training.examiner import Examiner, open_examiner, where, write_best
from d2v_ds.training.init import check_task, drop_paths, with_network
from d2v_ds.training.schedule import learning_rate, scaled


def tuned(name: str, *overrides: str):
    recipe = with_network(load_recipe(name, overrides), None)
    with torch.device("meta"):
        return recipe, build_tuned(recipe.body, recipe.modalities, recipe.task)


def test_blocks_learn_slower_the_deeper_they_lie_and_all_else_at_full_rate() -> None:
    """Of n = 12 blocks, 2 of them prenet, block i has 0.65^(12 - i); a group's lowest rate is at most its highest."""
    recipe, model = tuned("finetune_image_base")
    scales = {name: model.lr_scale(name) for name, _ in model.named_parameters()}
    expected = {"encoders.image.context.blocks.0.": 12, "encoders.image.context.blocks.1.": 11}
    expected |= {f"blocks.{i}.": 10 - i for i in range(10)}
    for name, scale in scales.items():
        power = next((power for part, power in expected.items() if name.startswith(part)), 0)
        assert scale == pytest.approx(0.65**power), name
    groups = parameter_groups(model, 0.05, recipe.optim.decay)
    assert sum(len(g["params"]) for g in groups) == len(scales)
    assert {g["lr_scale"] for g in groups} == set(scales.values())
    deepest = scaled(recipe.optim, 0.65**12)
    assert deepest.lr == pytest.approx(1e-3 * 0.65**12) and deepest.min_lr == 1e-6
    assert scaled(recipe.optim, 1e-4).min_lr == pytest.approx(1e-7)
    assert learning_rate(deepest, 16_000, recipe.train.steps) == pytest.approx(deepest.lr)


def test_the_rates_at_which_paths_are_dropped_are_the_released_ones() -> None:
    """Base: 0 and 0.0111 in the prenet, 0.0222 to 0.1 in the body."""
    recipe, model = tuned("finetune_image_base")
    prenet = [block.drop_path.rate for block in model.encoders["image"].context.blocks]
    body = [block.drop_path.rate for block in model.blocks]
    assert drop_paths(0.1, 0, 12) == ((0.0, 0.0), (0.0, 0.1)), "a network without prenet"
    assert prenet == pytest.approx([0, 0.1 / 9]) and body == pytest.approx(
        list(np.linspace(0.2 / 9, 0.1, 10))
    )


def test_a_linear_probe_trains_the_head_alone() -> None:
    """Its encoder stays frozen, and nothing of the pre-training is left."""
    _, model = tuned("linear_image_base")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.norm.weight", "head.norm.bias", "head.proj.weight", "head.proj.bias",
    }  # fmt: skip
    assert not model.decoders and model.teacher is None


def test_crops_and_mixtures_are_functions_of_their_draws() -> None:
    """The same twice; other draws give others; shares of classes add up to one; no generator is disturbed."""
    recipe = load_recipe("finetune_image_base", ["modalities.image.size=32", "task.outputs=7"])
    samples = ImageSamples(recipe.modalities["image"], Path())
    pixels = np.random.default_rng(0).integers(0, 255, (4, 40, 50, 3), dtype=np.uint8)
    images = [Image.fromarray(p) for p in pixels]

    def batch(first: int):
        draws = [Draw(i, 0, first + i) for i in range(4)]
        return samples.collate_whole(images, draws, [0, 1, 2, 6], recipe.task)

    before = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()
    one, again, other = batch(5), batch(5), batch(6)
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.random.get_rng_state(), before[2])
    assert torch.equal(one.source, again.source) and torch.equal(one.labels, again.labels)
    assert not torch.equal(one.source, other.source)
    assert one.labels.shape == (4, 7) and torch.allclose(one.labels.sum(1), torch.ones(4))
    assert (one.labels.min(1).values > 0.01).all(), "labels are smoothed"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no label"),
        ("10", "'10' is no class: task.outputs=10"),
        ("-1", "'-1' is no class"),
        ("dog", "one of cat"),
    ],
)
def test_labels_that_cannot_be_said_are_named(text: str, said: str) -> None:
    task = Task(head="image_classification", outputs=10, labels=("cat", *map(str, range(100, 109))))
    assert task.parse("cat") == 0 and task.parse("108") == 9 and task.parse("7") == 7
    sorted_names = Task(head="image_classification", outputs=3, labels=("1", "10", "2"))
    assert [sorted_names.parse(text) for text in ("1", "10", "2")] == [1, 1, 2], (
        "numbers are numbers, not names"
    )
    with pytest.raises(ValueError, match=said):
        task.parse(text)


@pytest.mark.parametrize("text", ["nan", "-inf", "1e999", "high", "1,5", "1_0"])
def test_a_regression_takes_finite_numbers_alone(text: str) -> None:
    task = Task(head="image_classification", outputs=1)
    assert task.parse("-1.5e-3") == -1.5e-3
    recipe = load_recipe("finetune_text_stsb", ["task.factor=0"])
    with pytest.raises(ValueError, match="task.factor=0 must be above 0"):
        check_task(recipe.task, "text", recipe.modalities["text"].data)
    with pytest.raises(ValueError, match=f"label '{text}' is no number, task.outputs=1 needs one"):
        task.parse(text)


def test_wrong_tasks_are_errors() -> None:
    for overrides, said in (
        (["modalities.image.data.batch=7"], "batch=7 must be even"),
        (["task.encoder=audio_tiny"], "holds audio, the recipe finetune_image_base fine-tunes image"),
        (["task.test_every=5"], "needs labelled shards: set task.test"),
        (["probe.every=5", "probe.train=a.tar", "probe.test=b.tar"], "is for pre-training"),
    ):
        with pytest.raises(ValueError, match=said):
            with_network(load_recipe("finetune_image_base", overrides), None)
    letters = ["task.head=ctc", "task.labels=[a, b]", "task.outputs=2"]
    number = ["task.outputs=1", "task.smoothing=0"]
    for name, overrides, said in (
        ("finetune_image_tiny", letters, "task.head=ctc is of audio, the recipe fine-tunes image; set it to"),
        ("finetune_text_rte", ["task.head=image_classification"], "is of image, the recipe fine-tunes text"),
        ("finetune_audio_classes", ["task.head=sentence_classification"], "is of text, the recipe fine-tunes audio"),
        ("finetune_text_rte", ["task.frozen_extractor=true"], "task.frozen_extractor is of audio, the recipe fine"),
        ("finetune_image_tiny", ["task.mask.kind=span"], "task.mask is of audio"),
        ("finetune_audio_classes", ["task.vocabulary=a.model"], "task.vocabulary=a.model is of CTC, not of"),
        ("finetune_image_base", ["task.outputs=1"], "smoothing=0.1 is of classes, not of the numbers of task.o"),
        ("finetune_image_base", number, r"image.data.mixup=0.7 mixes classes, not the numbers of task.outputs=1"),
        ("finetune_audio_tiny", ["task.smoothing=0.1"], "is of classes, not of transcripts"),
        ("finetune_audio_tiny", ["task.metrics=[cer]"], "task.metrics=cer: transcripts are scored by wer and cer"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            with_network(load_recipe(name, overrides), None)
    recipe = load_recipe("finetune_image_base")
    recipe.task.encoder = None
    with pytest.raises(ValueError, match="set init=FILE, or task.encoder=RECIPE"):
        with_network(recipe, None)


def test_what_the_command_says_of_the_network_stands_over_what_its_recipe_says(tmp_path) -> None:
    """Body, modality and how its data are read; without it, all is the network's. A tokenizer that is beside no
    weights is the recipe's own."""
    given = ["modalities.image.data.mean=[0.1, 0.2, 0.3]", "body.norm_eps=1e-3", "task.outputs=7"]
    recipe = load_recipe("finetune_image_base", given)
    theirs = load_recipe("image_base")
    changed, plain = with_network(recipe, None, given), with_network(recipe, None)
    assert (changed.modalities["image"].data.mean, changed.body.norm_eps) == ((0.1, 0.2, 0.3), 1e-3)
    assert plain.modalities["image"].data.mean == theirs.modalities["image"].data.mean
    assert plain.body.norm_eps == theirs.body.norm_eps and changed.task == plain.task == recipe.task
    given = [f"modalities.text.data.tokenizer={tmp_path}/own.model"]
    for name in ("finetune_text_tiny", "finetune_text_rte"):
        text = load_recipe(name, given)
        assert with_network(text, None, given).modalities["text"].data.tokenizer == f"{tmp_path}/own.model"


def test_classes_are_named_by_the_file_that_is_about_them(tmp_path) -> None:
    """Not transcripts, not labels of another key, and not by a file of another tool's."""
    file, data = tmp_path / "classes.json", f"data={tmp_path}"
    two = load_recipe("finetune_image_base", [data, "task.outputs=2"])
    for content, names in (
        ('["cat", "dog"]', ("cat", "dog")), ('{"cat": 0, "dog": 1}', None), ("[1, 2]", None), ("3", None), ("{", None),
    ):  # fmt: skip
        file.write_text(content)
        assert with_classes(two, None).task.labels == names
    file.write_text('["anna", "ben", "cleo"]')
    with pytest.raises(
        ValueError, match=r"names 3 classes \(anna, ben, cleo\), task.outputs=2; set task.outputs=3"
    ):
        with_classes(two, None)
    for name, overrides in (
        ("finetune_audio_base_10h", []),
        ("finetune_audio_classes", ["task.label=json.digit", "task.outputs=2"]),
    ):
        recipe = load_recipe(name, [data, *overrides])
        assert with_classes(recipe, None) == recipe


def test_the_best_checkpoint_stays_where_a_better_one_could_not_be_saved(tmp_path, monkeypatch) -> None:
    """And best.json names it again; a disk that is full ends no run."""
    recipe = load_recipe("finetune_image_tiny", [f"out={tmp_path}"])
    scores = {1: 0.2, 2: 0.5, 3: 0.1, 4: 0.3}
    run = SimpleNamespace(
        recipe=recipe, folder=tmp_path, rank=0, log=None, saver=SimpleNamespace(lost=set()), step=0,
        watchdog=SimpleNamespace(wait_patiently=lambda what: None), say=lambda text: None,
        save=lambda: (tmp_path / f"step_{run.step:08d}").mkdir() if run.step != 2 else run.saver.lost.add(2),
    )  # fmt: skip
    monkeypatch.setattr("d2v_ds.training.examiner.build_encoder", lambda run, samples: None)
    monkeypatch.setattr(
        Examiner, "score_part", lambda self, run, *_: {"score": scores[run.step], "unreadable": 0}
    )
    examiner, best = Examiner(recipe, {"": ([], [])}), {}
    for run.step in scores:
        examiner.score(run)
        best[run.step] = (
            json.loads((tmp_path / "best.json").read_text())["step"],
            examiner.spared(tmp_path)().name,
        )
    assert best[2] == (2, "step_00000001") and best[3] == (1, "step_00000001")
    assert best[4] == (4, "step_00000004")
    write_best(tmp_path / "absent", {})


def test_a_test_is_never_the_shards_that_are_trained_on() -> None:
    """Where `data` is a pattern itself, there is no folder for the test to lie in."""
    recipe = load_recipe("finetune_image_tiny", [f"data={SAMPLE}"])
    assert where(recipe, recipe.task.test) == f"{SAMPLE}/images-test-*.tar"
    recipe = load_recipe("finetune_image_tiny", [f"data={SAMPLE}/images-train-*.tar"])
    assert where(recipe, f"{SAMPLE}/images-test-*.tar") == f"{SAMPLE}/images-test-*.tar"
    with pytest.raises(
        ValueError, match=r"task.test=images-test-\*.tar is a pattern inside the data folder, but"
    ):
        where(recipe, recipe.task.test)


def test_a_test_of_shards_that_are_trained_on_is_refused_whatever_they_are_called(tmp_path) -> None:
    (tmp_path / "held-out-000000.tar").symlink_to(SAMPLE / "multimodal-train-000000.tar")
    settings = [f"data={SAMPLE}", "modalities.image.data.shards=multimodal-train-*.tar"]
    for test in (f"{tmp_path}/held*.tar", "multimodal-*.tar", f"{{a: multimodal-val-*.tar, b: {tmp_path}}}"):
        recipe = load_recipe("finetune_image_tiny", [*settings, f"task.test={test}"])
        source = open_source("image", recipe.modalities["image"], recipe.data, recipe.task)
        with pytest.raises(ValueError, match=r"task.test=.* names .*000.tar, which the run learns from"):
            open_examiner(recipe, [source])
    recipe = load_recipe("finetune_image_tiny", [*settings, "task.test=multimodal-val-*.tar"])
    assert open_examiner(recipe, [source]).parts


SETTINGS = [
    "--recipe", "finetune_image_tiny", f"data={SAMPLE}", "train.steps=12", "train.save_every=4", "train.log_every=1",
    "train.workers=0", "train.keep_checkpoints=2", "modalities.image.data.shards=multimodal-train-*.tar",
    "modalities.image.data.batch=8", "modalities.image.data.micro_batches=2", "modalities.image.data.mixup=0.8",
    "task.test=multimodal-val-*.tar", "task.test_every=4",
]  # fmt: skip


@pytest.mark.slow
def test_two_ranks_at_zero3_learn_what_one_process_does_and_go_on_to_the_bit(
    tmp_path, tmp_path_factory
) -> None:
    """From the images of a joint model; the score is that of `d2v eval`, of the run and of its export."""
    settings = [*SETTINGS, f"init={two_rank_run(tmp_path_factory)}"]
    start(torchrun("train.py", "--deepspeed", "zero3", *settings, f"out={tmp_path / 'two'}"))
    start(python("train.py", "--deepspeed", "zero0", *settings, f"out={tmp_path / 'one'}"))
    rows, alone = read_rows(tmp_path / "two"), read_rows(tmp_path / "one")
    assert [row["image/loss"] for row in rows] == pytest.approx(
        [row["image/loss"] for row in alone], rel=1e-4
    )
    scores = read_rows(tmp_path / "two", "scores.jsonl")
    assert [row["step"] for row in scores] == [4, 8, 12] and "tau" not in rows[0]
    best = json.loads((tmp_path / "two" / "best.json").read_text())
    kept = {path.name for path in (tmp_path / "two").glob("step_*")}
    assert kept >= {f"step_{best['step']:08d}", "step_00000012"} and len(kept) <= 3

    for model in (tmp_path / "two", tmp_path / "export"):
        if model.name == "export":
            start(python("-m", "d2v_ds.cli", "export", tmp_path / "two", "--out", model))
        said = tmp_path / f"{model.name}.json"
        data = ["--label", "json.label", "--out", said]
        start(python("-m", "d2v_ds.cli", "eval", "classify", model, f"{SAMPLE}/multimodal-val-*.tar", *data))
        assert json.loads(said.read_text())["accuracy"] == pytest.approx(best["accuracy"])

    shutil.rmtree(tmp_path / "two" / "step_00000012")
    start(
        torchrun(
            "train.py", "--deepspeed", "zero3", *SETTINGS, "task.test_every=3", f"out={tmp_path / 'two'}"
        )
    )
    assert without_timings(read_rows(tmp_path / "two")) == without_timings(rows)


@pytest.mark.slow
def test_data_without_usable_labels_are_refused_before_training(tmp_path) -> None:
    for override, said in (
        ("task.label=json.nothing", "no label: 'json.nothing' is not in it"),
        ("task.outputs=3", "task.outputs=3 takes whole numbers 0 to 2"),
    ):
        done = start(
            python("train.py", "--deepspeed", "zero0", *SETTINGS, override, f"out={tmp_path}"), code=2
        )
        assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())

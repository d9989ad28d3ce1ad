"""Fine-tuning on speech: whole sounds with transcripts, masks from their draws, what is frozen; word errors fall."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import SAMPLE
from runs import python, read_rows, start, torchrun, two_rank_run, without_timings

from d2v_ds.data import Draw
from d2v_ds.modalities.audio.samples import AudioSamples, frames_needed
from d2v_ds.modalities.build import build_tuned
from d2v_ds.modalities.labelled import Labelled
from d2v_ds.model.batch import Batch
from d2v_ds.model.masking import Mask
from d2v_ds.model.tuned import ctc_loss
from d2v_ds.recipe import load_recipe
from d2v_ds.training.init import with_network
from d2v_ds.training.run import check_same_data


@pytest.fixture(scope="module")
def recipe():
    overrides = ["task.mask.ratio=0.5", "task.frozen_extractor=true", "task.frozen_alibi=true"]
    return with_network(load_recipe("finetune_audio_tiny", overrides), None)


@pytest.fixture(scope="module")
def batch(recipe):
    return collate(recipe, 5)


def collate(recipe, seed: int):
    samples = AudioSamples(recipe.modalities["audio"], Path())
    generator = torch.Generator().manual_seed(0)
    sounds = [torch.randn(n, generator=generator) for n in (9000, 16000)]
    parse = samples.parser(recipe.task)
    draws = [Draw(i, 0, seed + i) for i in range(2)]
    return samples.collate_whole(sounds, draws, [parse("five"), parse("number  two")], recipe.task)


def test_whole_sounds_are_padded_and_masks_are_functions_of_their_draws(recipe, batch) -> None:
    frames = [27, 49]
    assert batch.source.shape == (2, 16000) and (~batch.padding_BT).sum(1).tolist() == frames
    assert batch.labels.tolist()[0] == [20, 10, 25, 5] + [-1] * 6 and (batch.labels[1] >= 0).all()
    assert not (batch.mask_NT & batch.padding_BT).any() and batch.mask_NT.any(1).all()
    assert torch.equal(batch.mask_NT, collate(recipe, 5).mask_NT)
    assert not torch.equal(batch.mask_NT, collate(recipe, 6).mask_NT)


def test_the_loss_is_a_sum_over_sentences_and_padding_changes_nothing() -> None:
    logits = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    labels, padding = torch.tensor([[1, 2, -1], [3, 3, 4]]), torch.zeros(2, 9, dtype=torch.bool)
    padding[0, 6:] = True
    each = [ctc_loss(logits[:1, :6], labels[:1], None), ctc_loss(logits[1:], labels[1:], None)]
    assert torch.allclose(ctc_loss(logits, labels, padding), sum(each))
    short = ctc_loss(logits[1:, :3], labels[1:], None)  # 3 3 4 needs 4 frames
    assert frames_needed([3, 3, 4]) == 4 and short == 0


def test_frozen_steps_train_the_head_alone_and_the_extractor_never_learns(recipe, batch) -> None:
    torch.manual_seed(0)
    model = build_tuned(recipe.body, recipe.modalities, recipe.task).train()

    def learned(is_frozen: bool) -> set[str]:
        batch.is_frozen = is_frozen
        model.zero_grad()
        torch.manual_seed(1)
        model(batch).loss.backward()
        return {name for name, p in model.named_parameters() if p.grad is not None}

    everything = {name for name, _ in model.named_parameters()}
    fixed = {n for n in everything if ".local.convs." in n or ".local.norms." in n or "alibi_scale" in n}
    assert fixed and learned(True) == {"head.proj.weight", "head.proj.bias"}
    assert learned(False) == everything - fixed


def test_masked_frames_become_noise_and_channels_zero(recipe, batch) -> None:
    model = build_tuned(recipe.body, recipe.modalities, recipe.task).train()
    ones = torch.ones(2, 49, recipe.body.dim)
    torch.manual_seed(0)
    hidden = model.hide(ones, batch)
    channels = (hidden[:, :, :] == 0).all(1)
    assert channels.any(1).all() and not channels.all(1).any()
    noise = hidden[batch.mask_NT][:, ~channels.any(0)]
    assert 0.005 < noise.std() < 0.015 and (hidden[~batch.mask_NT] * (1 - hidden[~batch.mask_NT]) == 0).all()
    assert torch.equal(model.eval().hide(ones, collate(recipe, 5)).eq(1).all(-1), ~batch.mask_NT)


def test_so_many_channels_are_hidden_as_their_share_says(recipe) -> None:
    """Less than one span a sample: most samples keep all channels, as in the original."""
    model = build_tuned(recipe.body, recipe.modalities, recipe.task).train()
    model.task = recipe.task.model_copy(update={"channel_mask": Mask(kind="span", ratio=0.02, length=8)})
    hidden = model.hide(torch.ones(4000, 1, recipe.body.dim), Batch("audio", torch.zeros(0))) == 0
    assert hidden.float().mean() == pytest.approx(0.02, rel=0.2)


def test_a_sound_too_short_for_its_transcript_is_named(recipe) -> None:
    samples = AudioSamples(recipe.modalities["audio"], Path())
    with pytest.raises(
        ValueError, match="1 frames are too few for the 3 symbols of the transcript, which need 4"
    ):
        samples.check_pair(torch.zeros(500), [3, 3, 4], recipe.task)
    with pytest.raises(ValueError, match="6.2 s is longer than data.max_seconds=4"):
        samples.check_pair(torch.zeros(100_000), [3], recipe.task)
    with pytest.raises(ValueError, match="sound of 600 samples gives 1 frames; .* the spans of task.mask 2"):
        samples.check_pair(torch.zeros(600), [3], recipe.task)
    classes = recipe.task.model_copy(update={"head": "utterance_classification", "mask": None})
    samples.check_pair(torch.zeros(400), 3, classes)
    with pytest.raises(ValueError, match="sound of 399 samples gives 0 frames; a head needs 1"):
        samples.check_pair(torch.zeros(399), 3, classes)


def test_a_run_goes_on_with_its_own_copy_of_a_vocabulary(tmp_path) -> None:
    """When the file is gone, or named by another path; another vocabulary is refused."""
    given, copy = tmp_path / "pieces.model", tmp_path / "run" / "pieces.model"
    shutil.copyfile(SAMPLE / "sentencepiece.model", given)
    recipe = load_recipe("finetune_audio_tiny", [f"task.vocabulary={given}", f"out={tmp_path / 'run'}"])
    began = with_network(recipe, None)
    samples = Labelled(AudioSamples(began.modalities["audio"], Path()), began.task)
    assert samples.files == (given,)  # what a run copies
    copy.parent.mkdir()
    given.rename(copy)
    goes_on = with_network(recipe, began)
    assert goes_on.task.vocabulary == str(copy) and goes_on.hash() == began.hash()
    source = SimpleNamespace(name="audio", samples=samples, fingerprint="")
    loop = {"recipe": began.model_dump(mode="json"), "files": {"audio": "0" * 64}, "data": {"audio": ""}}
    copy.rename(given)
    with pytest.raises(ValueError, match="task.vocabulary is not the one that .* was trained with"):
        check_same_data([source], SimpleNamespace(loop=loop, folder=tmp_path / "run" / "step_00000004"))


TINY = ["--recipe", "finetune_audio_tiny", f"data={SAMPLE}", "train.workers=0", "train.log_every=1"]


@pytest.mark.slow
def test_word_errors_fall_and_are_those_of_eval(tmp_path) -> None:
    """From random weights, on the spoken phrases: a letter in two is right after 240 steps."""
    settings = [*TINY, "train.steps=240", "task.test_every=40", f"out={tmp_path / 'run'}"]
    start(python("train.py", "--deepspeed", "zero0", *settings))
    scores = read_rows(tmp_path / "run", "scores.jsonl")
    assert scores[0]["wer"] >= 0.95 and scores[-1]["wer"] < 0.9 and scores[-1]["cer"] < 0.5
    said = tmp_path / "said.json"
    command = ["eval", "ctc", tmp_path / "run", f"{SAMPLE}/multimodal-val-*.tar", "--out", said]
    start(python("-m", "d2v_ds.cli", *command))
    assert json.loads(said.read_text())["wer"] == pytest.approx(scores[-1]["wer"])


@pytest.mark.slow
def test_frozen_steps_resume_to_the_bit_at_zero3(tmp_path, tmp_path_factory) -> None:
    """Six frozen steps of ten at two ranks; stopped after four of them, and equal to one process."""
    settings = [
        *TINY, "train.steps=10", "train.save_every=4", "task.freeze_steps=6", "modalities.audio.data.micro_batches=2",
        "modalities.audio.data.batch=4", f"init={two_rank_run(tmp_path_factory)}", "task.test_every=0",
        "train.keep_checkpoints=9",
    ]  # fmt: skip
    two = torchrun("train.py", "--deepspeed", "zero3", *settings, f"out={tmp_path / 'two'}")
    start(two)
    start(python("train.py", "--deepspeed", "zero0", *settings, f"out={tmp_path / 'one'}"))
    rows, alone = read_rows(tmp_path / "two"), read_rows(tmp_path / "one")
    losses = [row["audio/loss"] for row in rows]
    assert losses == pytest.approx([row["audio/loss"] for row in alone], rel=1e-3)
    for step in (8, 10):
        shutil.rmtree(tmp_path / "two" / f"step_{step:08d}")
    start(two)
    assert without_timings(read_rows(tmp_path / "two")) == without_timings(rows)


@pytest.mark.slow
def test_unknown_symbols_missing_transcripts_and_other_encoders_are_refused_first(tmp_path) -> None:
    for override, said in (
        ("task.case=keep", "case=upper"),
        ("task.label=json.nothing", "no transcript: 'json.nothing' is not in it"),
        ("task.encoder=image_tiny", "holds image, the recipe finetune_audio_tiny fine-tunes audio"),
    ):
        done = start(python("train.py", "--deepspeed", "zero0", *TINY, override, f"out={tmp_path}"), code=2)
        assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_whole_sound_is_classified_and_measured_alike_in_the_loop_and_after(tmp_path) -> None:
    """Which digit voices say that were not heard in training: one in ten by chance, 12 of the 120 then +- 3."""
    settings = ["train.steps=60", "task.test_every=60", "train.workers=0", f"out={tmp_path / 'run'}"]
    start(python("train.py", "--deepspeed", "zero0", "--recipe", "finetune_audio_classes", *settings))
    (row,) = read_rows(tmp_path / "run", "scores.jsonl")
    assert row["accuracy"] > 0.2
    command = ["-m", "d2v_ds.cli", "eval", "classify", tmp_path / "run", f"{SAMPLE}/multimodal-val-*.tar"]
    start(python(*command, "--label", "json.digit;cls", "--out", tmp_path / "found.json"))
    assert json.loads((tmp_path / "found.json").read_text())["accuracy"] == pytest.approx(row["accuracy"])

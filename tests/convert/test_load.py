"""`d2v_ds.load` finds out what lies at a path and gives its features; whatever it is, they are the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from ranks import SAMPLE
from stores import MODALITIES, store, store_joint

import d2v_ds
from d2v_ds.convert.consolidate import write_export
from d2v_ds.convert.fairseq_write import write_fairseq
from d2v_ds.convert.huggingface import write_huggingface
from d2v_ds.convert.load import build_encoder, read
from d2v_ds.convert.stored import Stored

MEMORY = Path("memory")
GREY = Image.new("RGB", (40, 30), (90, 130, 200))
PIXELS = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))  # a file of fairseq knows no mean
ITEM = {"image": PIXELS, "audio": torch.linspace(-1, 1, 9000).sin(), "text": [0, 8, 15, 4, 2]}


@pytest.fixture(scope="module")
def stored() -> dict[str, Stored]:
    return {name: store(name) for name in MODALITIES}


@pytest.fixture(scope="module")
def exports(stored, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {name: write_export(stored[name], folder / name) for name in MODALITIES}


def features(stored: Stored, name: str, **options) -> torch.Tensor:
    return build_encoder(stored, name, MEMORY, **options).extract(ITEM[name])


# ---- what lies there ----


@pytest.mark.parametrize("name", MODALITIES)
def test_an_export_and_a_fairseq_file_of_one_model_give_equal_features(name, stored, exports, tmp_path):
    """To the bit; fairseq's file holds both networks."""
    expected = features(stored[name], name)
    assert torch.equal(d2v_ds.load(exports[name]).extract(ITEM[name]), expected)
    file = write_fairseq(stored[name], tmp_path)
    assert torch.equal(d2v_ds.load(file).extract(ITEM[name]), expected)
    teacher = d2v_ds.load(file, weights="teacher").extract(ITEM[name])
    assert torch.equal(teacher, d2v_ds.load(exports[name], weights="teacher").extract(ITEM[name]))
    assert not torch.allclose(teacher, expected, atol=1e-3)


@pytest.mark.parametrize("name", MODALITIES)
def test_a_hugging_face_folder_gives_the_features_of_what_was_written(name, stored, tmp_path):
    """With its tokenizer, which is read without ours."""
    pytest.importorskip("transformers")
    student = replace(stored[name], tensors=student_of(stored[name]), weights="student")
    write_huggingface(student, tmp_path / "hf")
    encoder = d2v_ds.load(tmp_path / "hf")
    torch.testing.assert_close(
        encoder.extract(ITEM[name]), features(stored[name], name), rtol=1e-6, atol=1e-6
    )
    if name == "text":
        ours = build_encoder(stored[name], name, MEMORY).prepare("The digit seven, and then some.")
        (tmp_path / "hf" / "sentencepiece.model").unlink(missing_ok=True)
        again = d2v_ds.load(tmp_path / "hf").prepare("The digit seven, and then some.")
        assert again[0].tolist() == ours[0].tolist()


def student_of(stored: Stored) -> dict[str, torch.Tensor]:
    return {k: t for k, t in stored.tensors.items() if not k.startswith("teacher.")}


def test_the_encoder_says_what_it_took(exports, stored, tmp_path, caplog):
    """Where from, whose weights, how large, in one line; the log has it too."""
    with caplog.at_level("INFO", logger="d2v_ds"):
        encoder = d2v_ds.load(exports["audio"])
    for word in (
        str(exports["audio"]),
        "export of run, step_00000120",
        "the student's weights",
        "audio",
        "3 x 48",
        "cpu",
    ):
        assert word in repr(encoder) and word in caplog.text
    assert "\n" not in repr(encoder)
    teacher = d2v_ds.load(write_fairseq(stored["audio"], tmp_path), weights="teacher")
    assert "fairseq data2vec_multi" in teacher.origin and "the teacher's weights" in teacher.origin


def test_an_export_of_an_export_is_named_once(exports, tmp_path):
    again = write_export(read(exports["image"]), tmp_path)
    assert d2v_ds.load(again).origin == f"{again} (export of run, step_00000120; the student's weights)"


def test_a_path_with_a_tilde_or_as_text_is_one(exports, monkeypatch):
    monkeypatch.setenv("HOME", str(exports["image"].parent))
    assert torch.equal(d2v_ds.load("~/image").extract(GREY), d2v_ds.load(str(exports["image"])).extract(GREY))


def test_an_encoder_holds_one_modality_and_nothing_that_only_training_needs(tmp_path):
    """No teacher, no decoder, no mask embedding, not the other modalities."""
    for stored, name in ((store_joint(), "audio"), (store("audio_v1_tiny"), "audio")):
        write_export(stored, tmp_path)
        encoder = d2v_ds.load(tmp_path, modality=name)
        names = [key for key, _ in encoder.named_parameters()]
        assert names and all(key.startswith(("model.encoders.audio.", "model.blocks.")) for key in names)
        assert not any("mask_token" in key for key in names)


def test_loading_leaves_random_numbers_alone(exports):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    d2v_ds.load(exports["image"])
    assert torch.equal(torch.rand(3), expected)


# ---- what does not ----


def say(path: Path, **options) -> str:
    with pytest.raises(ValueError) as error:
        d2v_ds.load(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_unknown_is_told_with_what_can_be_read(tmp_path, exports):
    accepted = "a run folder (checkpoints/NAME), a step_* folder in one, an export"
    assert accepted in say(tmp_path / "absent") and "does not exist" in say(tmp_path / "absent")
    assert "it is empty" in say(tmp_path) and accepted in say(tmp_path)
    for i in range(7):
        (tmp_path / f"photo{i}.jpg").write_bytes(b"")
    assert "but photo0.jpg, photo1.jpg, photo2.jpg, photo3.jpg, photo4.jpg and 2 more" in say(tmp_path)
    assert f"give the folder it lies in, {exports['image']}" in say(exports["image"] / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden": 3}')
    assert "neither format 'd2v_ds' nor a model_type, but hidden" in say(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "config.json holds a list" in say(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "model_type 'bert'" in say(tmp_path)
    (tmp_path / "notes.txt").write_text("no weights at all")
    assert "notes.txt" in say(tmp_path / "notes.txt")


def test_a_damaged_export_is_told(exports, tmp_path):
    """No JSON, no weights, cut weights, weights of another model."""
    shutil.copytree(exports["image"], tmp_path / "x")
    file, config = tmp_path / "x" / "model.safetensors", tmp_path / "x" / "config.json"
    whole, said = file.read_bytes(), config.read_text()
    file.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors is damaged" in say(tmp_path / "x")
    file.write_bytes((exports["audio"] / "model.safetensors").read_bytes())
    assert "do not fit the model" in say(tmp_path / "x") and "missing: " in say(tmp_path / "x")
    file.unlink()
    assert "no model.safetensors" in say(tmp_path / "x")
    file.write_bytes(whole)
    config.write_text(said[:-5])
    assert "config.json is no JSON" in say(tmp_path / "x")
    settings = json.loads(said)
    settings["recipe"]["body"]["dimm"] = 5
    config.write_text(json.dumps(settings))
    assert "unknown key" in say(tmp_path / "x") and "body.dim" in say(tmp_path / "x")


def test_weights_that_are_not_there_are_told(stored, tmp_path):
    """Of a file with one network; and of an unknown name."""
    student = replace(stored["image"], tensors=student_of(stored["image"]), weights="student")
    path = write_export(student, tmp_path)
    assert "holds the student's weights, not the teacher's" in say(path, weights="teacher")
    assert "weights='ema' must be student, teacher or both" in say(path, weights="ema")
    assert "holds the student's weights alone" in say(path, weights="both")
    assert read(path).weights == "student"


def test_a_device_that_is_not_there_is_told(exports):
    assert "device 'gpu' cannot be used" in say(exports["image"], device="gpu")
    assert d2v_ds.load(exports["image"], device="cpu").extract(GREY).device.type == "cpu"
    if not torch.cuda.is_available():
        assert "device 'cuda' cannot be used" in say(exports["image"], device="cuda")


def test_text_without_a_tokenizer_takes_ids_alone(stored, tmp_path):
    """As of a fairseq file, whose dictionary lies elsewhere; a sentencepiece model beside it is found."""
    file = write_fairseq(replace(stored["text"], files=None), tmp_path)
    encoder = d2v_ds.load(file)
    assert encoder.extract([0, 5, 9, 2]).shape == (1, 4, 48)
    with pytest.raises(ValueError, match="came without a tokenizer.*give token ids"):
        encoder.extract("seven")
    shutil.copyfile(SAMPLE / "sentencepiece.model", tmp_path / "sentencepiece.model")
    assert d2v_ds.load(file).extract("seven").shape[2] == 48


# ---- fairseq_compat ----


def test_fairseq_compat_is_off_unless_asked(stored, tmp_path):
    """It changes a padded batch of sound, and nothing that is not padded."""
    file = write_fairseq(stored["audio"], tmp_path)
    sounds = [
        torch.randn(9000, generator=torch.Generator().manual_seed(i))[: 9000 - 5000 * i] for i in range(2)
    ]
    plain, compat = d2v_ds.load(file), d2v_ds.load(file, fairseq_compat=True)
    alone = plain.extract(sounds[1])
    tokens = alone.shape[1]
    assert torch.equal(compat.extract(sounds[1]), alone)
    torch.testing.assert_close(plain.extract(sounds)[1, :tokens], alone[0], rtol=1e-5, atol=1e-5)
    assert (compat.extract(sounds)[1, :tokens] - alone[0]).abs().max() > 1e-3


def test_a_recipe_that_says_fairseq_compat_is_followed_unless_told_otherwise(stored, tmp_path):
    recipe = stored["audio"].recipe.model_copy(deep=True)
    recipe.fairseq_compat = True
    path = write_export(replace(stored["audio"], recipe=recipe), tmp_path)
    assert d2v_ds.load(path).model.encoders["audio"].context.pads_positions is False
    assert d2v_ds.load(path, fairseq_compat=False).model.encoders["audio"].context.pads_positions is True

"""An export is what the checkpoint holds, in one file, and gives the features that the run's weights give."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import SAMPLE
from runs import HALF, MODALITIES, STEPS, python, start, two_rank_run
from safetensors import safe_open
from safetensors.torch import load_file

import d2v_ds
from d2v_ds.cli import main
from d2v_ds.convert.consolidate import OWN_HEADS, check_head, export
from d2v_ds.convert.stored import Stored
from d2v_ds.modalities.build import build_model
from d2v_ds.model.heads import HeadConfig
from d2v_ds.recipe import Recipe, load_recipe

WEIGHTS = ("student", "teacher", "both")
LAST = f"step_{STEPS:08d}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two ranks at ZeRO-3."""
    return two_rank_run(tmp_path_factory)


@pytest.fixture(scope="module")
def exports(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("exports")
    return {weights: export(run, out / weights, weights) for weights in WEIGHTS}


@pytest.fixture(scope="module")
def tensors(exports: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    return {weights: load_file(path / "model.safetensors") for weights, path in exports.items()}


@pytest.fixture(scope="module")
def recipe(run: Path) -> Recipe:
    return load_recipe(str(run / "recipe.yaml"))


@pytest.fixture(scope="module")
def put_together(run: Path) -> dict[str, torch.Tensor]:
    """{kind|name: the whole parameter, flat}, from the ranks' files by their keys alone."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in sorted((run / LAST).glob("rank_*.safetensors")):
        for key, value in load_file(path).items():
            kind, name, first = key.split("|")
            pieces.setdefault(f"{kind}|{name}", []).append((int(first), value))
    whole = {}
    for key, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        ends = [first + len(value) for first, value in parts]
        assert [first for first, _ in parts] == [0, *ends[:-1]], f"{key} has a gap"
        whole[key] = torch.cat([value for _, value in parts])
    return whole


@pytest.fixture(scope="module")
def encoders(exports: dict[str, Path]) -> dict[str, torch.nn.Module]:
    return {name: d2v_ds.load(exports["student"], modality=name) for name in MODALITIES}


def noise(seconds: float, seed: int) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).standard_normal(round(16_000 * seconds)).astype(np.float32)
    )


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (37, 41, 3), dtype=np.uint8))


INPUTS = {
    "image": [picture(1), picture(2), picture(3)],
    "audio": [noise(0.5, 1), noise(1.13, 2), noise(0.71, 3)],
    "text": ["one", "the digit seven, and a longer line after it", "I see a two"],
}


# ---- the file ----


def test_an_export_has_every_parameter_of_the_model(tensors, recipe):
    """The student's names; the teacher under the same; both with the prefix `teacher.`; all fp32."""
    model = build_model(recipe.body, recipe.modalities)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    students = {name: shape for name, shape in shapes.items() if not name.startswith("teacher.")}
    assert len(students) < len(shapes)
    for weights, expected in (("student", students), ("teacher", students), ("both", shapes)):
        assert {name: t.shape for name, t in tensors[weights].items()} == expected
        assert {t.dtype for t in tensors[weights].values()} == {torch.float32}


def test_an_export_equals_the_stretches_in_the_checkpoint(tensors, put_together):
    """Bit by bit: masters for the student, averages for the teacher."""
    for name, value in tensors["both"].items():
        key = f"ema|{name.removeprefix('teacher.')}" if name.startswith("teacher.") else f"weight|{name}"
        key = key if key in put_together else f"frozen|{name}"
        assert torch.equal(value.flatten(), put_together[key]), name


def test_the_teachers_export_has_the_teachers_values(tensors):
    """The student's own only where the teacher has none: decoders, and what stays live."""
    both, teacher = tensors["both"], tensors["teacher"]
    owned = {name for name in teacher if f"teacher.{name}" in both}
    assert owned and any(not torch.equal(both[name], both[f"teacher.{name}"]) for name in owned)
    for name, value in teacher.items():
        assert torch.equal(value, both[f"teacher.{name}" if name in owned else name]), name
    assert {name.split(".")[0] for name in teacher.keys() - owned} == {"decoders", "encoders"}
    assert {name for name in teacher.keys() - owned if name.startswith("encoders")} == {
        name for name in teacher if name.startswith("encoders.text.")
    }  # its teacher has the blocks only


def test_the_students_export_is_the_student_of_both(tensors):
    assert all(torch.equal(value, tensors["both"][name]) for name, value in tensors["student"].items())


def test_the_config_says_what_the_weights_are(exports, recipe):
    for weights, path in exports.items():
        config = json.loads((path / "config.json").read_text())
        assert (config["format"], config["weights"], config["step"]) == ("d2v_ds", weights, STEPS)
        assert config["applied_steps"] == STEPS
        assert Recipe(**config["recipe"]) == recipe


def test_an_export_stands_alone_and_anyone_can_read_it(exports):
    """With the tokenizer and a README, for every user, and nothing half-written."""
    for path in exports.values():
        assert {p.name for p in path.iterdir()} == {
            "model.safetensors",
            "config.json",
            "README.md",
            "sentencepiece.model",
        }
        assert (path / "sentencepiece.model").read_bytes() == (SAMPLE / "sentencepiece.model").read_bytes()
        assert all(p.stat().st_mode & stat.S_IROTH for p in path.iterdir())
        assert "d2v_ds.load" in (path / "README.md").read_text()
        with safe_open(path / "model.safetensors", framework="pt") as file:
            assert file.metadata()["format"] == "pt"


def test_a_step_folder_exports_that_step(run, tmp_path, tensors):
    """Not the newest; an older export in the same place is replaced."""
    for step, expected in ((LAST, True), (f"step_{HALF:08d}", False)):
        out = export(run / step, tmp_path / "out")
        assert json.loads((out / "config.json").read_text())["step"] == int(step[-8:])
        ours = load_file(out / "model.safetensors")
        assert all(torch.equal(value, tensors["student"][name]) for name, value in ours.items()) == expected


def test_the_command_exports_what_the_function_does(run, tmp_path, exports, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--weights", "teacher"]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (exports["teacher"] / name).read_bytes()


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path, capsys):
    """Of the command too: exit code 2, one line."""
    with pytest.raises(ValueError, match="holds no checkpoint: it is empty; give a run folder"):
        export(tmp_path, tmp_path / "out")
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no checkpoint")
    assert not (tmp_path / "out").exists()


def test_unknown_weights_are_an_error(run, tmp_path):
    with pytest.raises(ValueError, match="weights='ema' must be student, teacher or both"):
        export(run, tmp_path / "out", "ema")


@pytest.mark.parametrize("kind", OWN_HEADS)
@pytest.mark.parametrize("format_", ["hf", "fairseq"])
def test_a_head_that_a_format_has_no_place_for_is_an_error(kind, format_):
    stored = Stored(load_recipe("image_tiny"), {}, "run", head=HeadConfig(kind=kind, outputs=3))
    with pytest.raises(ValueError, match=f"a head of kind {kind}, which {format_} cannot hold; use format"):
        check_head(stored, format_, Path("run"))
    check_head(stored, "safetensors", Path("run"))


def test_export_and_load_need_no_deepspeed(run, tmp_path):
    """Neither imports it: weights are used where it cannot be installed."""
    code = (
        "import sys, torch, d2v_ds; from d2v_ds.convert.consolidate import export; "
        f"export({str(run)!r}, {str(tmp_path / 'out')!r}); "
        f"encoder = d2v_ds.load({str(tmp_path / 'out')!r}, modality='audio'); "
        "assert encoder.extract(torch.randn(16000)).shape[2] == 48; "
        "assert 'deepspeed' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    start(python("-c", code))
    assert (tmp_path / "out" / "model.safetensors").is_file()


# ---- loading ----


@pytest.mark.parametrize("name", MODALITIES)
def test_run_step_and_export_give_equal_features(name, run, exports, encoders):
    """To the bit."""
    expected = encoders[name].extract(INPUTS[name])
    for path in (run, run / LAST, str(exports["both"])):
        assert torch.equal(d2v_ds.load(path, modality=name).extract(INPUTS[name]), expected)


def test_a_run_is_named_with_its_step(run):
    assert d2v_ds.load(run, "image").origin == f"{run} (run, {LAST}; the student's weights)"
    assert d2v_ds.load(run / LAST, "image", "teacher").origin.endswith(
        f"(run, {LAST}; the teacher's weights)"
    )


def test_the_teachers_features_differ_from_the_students(run, exports, encoders):
    """And are the same from the run as from its export."""
    student = encoders["image"].extract(INPUTS["image"])
    teacher = d2v_ds.load(exports["teacher"], modality="image").extract(INPUTS["image"])
    assert not torch.allclose(student, teacher, atol=1e-6)
    assert torch.equal(
        teacher, d2v_ds.load(run, modality="image", weights="teacher").extract(INPUTS["image"])
    )


def test_whose_weights_an_export_gives_can_be_said(exports, encoders):
    """Of one with both either; of one with the student's not the teacher's; unsaid, what it holds."""
    student = encoders["image"].extract(INPUTS["image"])
    teacher = d2v_ds.load(exports["teacher"], modality="image").extract(INPUTS["image"])
    for weights, expected in (("student", student), ("teacher", teacher)):
        both = d2v_ds.load(exports["both"], modality="image", weights=weights)
        assert torch.equal(both.extract(INPUTS["image"]), expected)
        alone = d2v_ds.load(exports[weights], modality="image", weights=weights)
        assert torch.equal(alone.extract(INPUTS["image"]), expected)
    with pytest.raises(ValueError, match="holds the student's weights, not the teacher's"):
        d2v_ds.load(exports["student"], modality="image", weights="teacher")


@pytest.mark.parametrize("name", ["audio", "text"])
def test_a_list_of_unequal_length_equals_each_alone(name, encoders):
    """Every layer and the pooled features, to 1e-5; the rest of a row is padding."""
    together = encoders[name].extract(INPUTS[name], all=True)
    lengths = set()
    for row, item in enumerate(INPUTS[name]):
        alone = encoders[name].extract(item, all=True)
        tokens = alone.x.shape[1]
        lengths.add(tokens)
        assert together.mask[row].tolist() == [False] * tokens + [True] * (together.mask.shape[1] - tokens)
        for ours, theirs in zip(together.layers, alone.layers, strict=True):
            assert (ours[row, :tokens] - theirs[0]).norm() < 1e-5 * theirs.norm()
        assert (together.pooled[row] - alone.pooled[0]).norm() < 1e-5 * alone.pooled.norm()
    assert len(lengths) == len(INPUTS[name])


@pytest.mark.parametrize("name", MODALITIES)
def test_all_gives_layers_pooled_and_mask(name, encoders, recipe):
    f = encoders[name].extract(INPUTS[name], all=True)
    assert f._fields == ("x", "layers", "pooled", "mask")
    batch, tokens, dim = f.x.shape
    assert (batch, dim) == (len(INPUTS[name]), recipe.body.dim)
    assert [layer.shape for layer in f.layers] == [f.x.shape] * recipe.body.depth
    assert torch.equal(f.x, f.layers[-1]) and torch.equal(f.x, encoders[name].extract(INPUTS[name]))
    assert f.mask.shape == (batch, tokens) and f.mask.dtype == torch.bool
    assert f.pooled.shape == (batch, dim) and not f.x.requires_grad
    expected = torch.stack([row[~mask].mean(0) for row, mask in zip(f.x, f.mask, strict=True)])
    assert torch.allclose(f.pooled, expected, atol=1e-6)


def test_features_have_a_token_for_each_patch_frame_and_piece(encoders):
    """Without extra tokens: 16 patches; 49 frames of a second; <s>, pieces, </s>."""
    assert encoders["image"].extract(picture(5)).shape[1] == 16
    assert encoders["audio"].extract(noise(1, 5)).shape[1] == 49
    ids = encoders["text"].samples.encode("the digit seven")
    assert encoders["text"].extract("the digit seven").shape[1] == 1 + len(ids)


def test_raw_input_may_be_a_batch_or_ids(encoders):
    """A tensor of waveforms, a tensor of pictures, a list of ids."""
    waves = torch.stack([noise(0.5, 7), noise(0.5, 8)])
    assert torch.equal(encoders["audio"].extract(waves), encoders["audio"].extract(list(waves)))
    pictures = torch.stack([encoders["image"].samples.prepare(p) for p in INPUTS["image"]])
    assert torch.equal(encoders["image"].extract(pictures), encoders["image"].extract(INPUTS["image"]))
    ids = [0, *encoders["text"].samples.encode("this is one")]
    assert torch.equal(encoders["text"].extract(ids), encoders["text"].extract("this is one"))


def test_loudness_and_offset_of_a_sound_do_not_matter(encoders):
    """It is normalised as it was in training."""
    wave = noise(0.6, 9)
    assert torch.allclose(
        encoders["audio"].extract(3 * wave + 0.5), encoders["audio"].extract(wave), atol=1e-4
    )


def test_extracting_draws_nothing_and_changes_nothing(encoders):
    """Twice the same, also when the model was left in training mode, and the random state stays."""
    state = torch.get_rng_state()
    expected = encoders["text"].extract("two")
    encoders["text"].train()
    assert torch.equal(encoders["text"].extract("two"), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_joint_model_needs_to_be_told_which_modality(run, exports):
    for path in (run, exports["student"]):
        with pytest.raises(
            ValueError, match="holds image, audio, text; say which: load\\(path, modality='image'\\)"
        ):
            d2v_ds.load(path)
    with pytest.raises(ValueError, match="holds image, audio, text, not 'video'"):
        d2v_ds.load(run, modality="video")


def test_a_path_that_holds_no_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="absent does not exist; give a run folder"):
        d2v_ds.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        d2v_ds.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "item"),
    [("audio", torch.zeros(2, 3, 4)), ("audio", torch.zeros(100)), ("image", torch.zeros(3, 5, 5))],
)
def test_input_of_a_wrong_shape_is_an_error_with_the_shape(name, item, encoders):
    with pytest.raises(ValueError, match=r"of shape \(.*must be"):
        encoders[name].extract(item)


def test_the_exported_tokenizer_is_used_not_the_datas(exports, tmp_path):
    """An export moved to a machine without the shards still reads text."""
    encoder = d2v_ds.load(exports["student"], modality="text")
    assert encoder.samples.files == (exports["student"] / "sentencepiece.model",)

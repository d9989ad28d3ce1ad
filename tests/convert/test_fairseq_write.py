"""What is written for fairseq has its names and layout, and comes back bit by bit; what it cannot hold is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    CASES,
    TUNED,
    beit,
    flat,
    pretrained,
    recorded,
    roberta,
    text_v1,
    tuned,
    vision_port,
)

import d2v_ds
from d2v_ds.cli import main
from d2v_ds.convert import consolidate, fairseq, fairseq_v1
from d2v_ds.convert.check import outputs
from d2v_ds.convert.consolidate import card, export, write_export
from d2v_ds.convert.fairseq_file import from_dict, read_fairseq, write_fairseq
from d2v_ds.convert.fairseq_settings import settings_v1, settings_v2, task_settings
from d2v_ds.convert.fairseq_training import our_training, their_training
from d2v_ds.convert.fairseq_write import to_dict
from d2v_ds.convert.load import read
from d2v_ds.convert.stored import Stored
from d2v_ds.modalities.build import build_model
from d2v_ds.model.data2vec import TEACHER
from d2v_ds.model.layers import Body
from d2v_ds.recipe import Recipe, load_recipe, recipes

UPDATES = {"text_v1_tuned": 99, "roberta": 99, "beit_tuned": None}
FILES: dict[str, Callable[[], dict[str, Any]]] = {
    **{case: lambda case=case: pretrained(case) for case in CASES},
    **{f"{case}_tuned": lambda case=case: tuned(case) for case in TUNED},
    "text_v1": text_v1,
    "text_v1_one_layer": lambda: text_v1(head_layers=1),
    "text_v1_tuned": lambda: text_v1(head=True),
    "roberta": roberta,
    "vision_port": vision_port,
    "vision_port_whole": lambda: vision_port(is_whole=True),
    "beit": lambda: {"model": beit(), "model_ema": {k: t + 1 for k, t in beit().items()}},
    "beit_tuned": lambda: {"module": beit(is_tuned=True, per_block=True)},
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    """Tensors, configuration, head and update count, also as plain containers only."""
    stored = from_dict(FILES[name]())
    path = write_fairseq(stored, tmp_path)
    torch.load(path, weights_only=True)
    again = read_fairseq(path)
    assert again.tensors.keys() == stored.tensors.keys()
    assert all(torch.equal(tensor, again.tensors[key]) for key, tensor in stored.tensors.items())
    assert again.recipe == stored.recipe
    assert (again.head, again.weights, again.step) == (stored.head, stored.weights, stored.step)
    if "tuned" in name or name == "roberta":
        assert stored.head.updates == UPDATES.get(name, 80)


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_the_recorded_ones(case: str) -> None:
    """Of every tensor, the teacher's copies of live parts and fixed positions included, with equal values."""
    written, reference = flat(to_dict(from_dict(pretrained(case)))["model"]), recorded(case)[1]
    assert written.keys() == reference.keys()
    for name, tensor in reference.items():
        assert written[name].shape == tensor.shape, name
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=0 if "positions" not in name else 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_settings_are_the_recorded_ones(case: str) -> None:
    """Every setting that the original resolved, but for those that nothing of ours depends on."""
    theirs, ours = recorded(case)[0], to_dict(from_dict(pretrained(case)))["cfg"]["model"]
    free = {"_name", "min_target_var", "min_pred_var", "feature_encoder_spec", "conv_feature_layers", "type"}

    def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        for key in set(ours) & set(theirs) - free:
            if isinstance(theirs[key], dict):
                compare(ours[key], theirs[key])
            else:
                assert ours[key] == theirs[key], key

    compare(ours, theirs)
    if "modalities" in theirs:
        assert set(theirs) <= set(ours)
        ((name, modality),) = theirs["modalities"].items()
        assert set(modality) <= set(ours["modalities"][name])


@pytest.mark.parametrize("case", TUNED)
def test_a_fine_tuned_model_has_the_names_of_fine_tuning(case: str) -> None:
    """Prefix, head, and where the configuration of pre-training lies."""
    checkpoint = tuned(case)
    written = to_dict(from_dict(checkpoint))
    assert written["model"].keys() == checkpoint["model"].keys()
    name, _, inner, _ = TUNED[case]
    assert written["cfg"]["model"]["_name"] == name
    assert written["cfg"]["model"][inner]["model"]["_name"] == pretrained(case)["cfg"]["model"]["_name"]


def fresh(recipe: Recipe) -> Stored:
    torch.manual_seed(0)
    model = build_model(recipe.body, recipe.modalities)
    tensors = {name: p.detach().clone() + 0.01 * torch.randn(p.shape) for name, p in model.named_parameters()}
    return Stored(recipe, tensors, "run, step_00000005", step=5, weights="both")


V1_TINY = ["audio_v1_tiny", "text_v1_tiny"]


@pytest.mark.parametrize("name", ["image_tiny", "audio_tiny", "text_tiny", *V1_TINY])
def test_a_model_of_ours_goes_out_and_comes_back(name: str, tmp_path: Path) -> None:
    """With targets, masks, schedule and sizes; `d2v_ds.load` reads the file."""
    stored = fresh(load_recipe(name))
    path = write_fairseq(stored, tmp_path)
    again = read_fairseq(path)
    assert all(torch.equal(tensor, again.tensors[key]) for key, tensor in stored.tensors.items())
    kept, ours = again.recipe.model_dump(), stored.recipe.model_dump()
    assert kept["body"] == ours["body"] and kept["ema"] == ours["ema"] and kept["optim"] == ours["optim"]
    (modality,) = ours["modalities"]
    unsaid = {"data", "loss", "mask"} | (
        {"decoder"} if name in V1_TINY else set()
    )  # without layers: unused keys
    for key in set(ours["modalities"][modality]) - unsaid:
        assert kept["modalities"][modality][key] == ours["modalities"][modality][key], key
    features = outputs(stored)
    assert all(torch.equal(x, features[key]) for key, x in outputs(again).items())
    assert d2v_ds.load(path).modality == modality
    assert d2v_ds.load(path.parent).origin.startswith(f"{path.parent} (fairseq ")  # the folder will do


@pytest.mark.parametrize("is_pre_norm", [False, True])
def test_positions_with_a_norm_before_them_are_nested_one_deeper(is_pre_norm: bool) -> None:
    recipe = load_recipe("audio_tiny", [f"modalities.audio.position_pre_norm={is_pre_norm}"])
    stored = fresh(recipe)
    checkpoint = to_dict(stored)
    name = "modality_encoders.AUDIO.relative_positional_encoder." + "1." * is_pre_norm + "2.0.weight"
    assert name in checkpoint["model"]
    again = from_dict(checkpoint)
    assert all(torch.equal(tensor, again.tensors[key]) for key, tensor in stored.tensors.items())


WRITABLE = sorted(name for name in recipes() if not name.startswith(("multimodal", "image_v1")))


@pytest.mark.parametrize("name", WRITABLE)
def test_every_shipped_recipe_can_be_said_in_fairseqs_settings(name: str) -> None:
    """And is the same when they are read; data and `cls_rows` have no place there."""
    recipe = load_recipe(name)
    ((modality, config),) = recipe.modalities.items()
    if config.view == "masked":
        settings = settings_v1(recipe)
        if modality == "text":
            settings["vocabulary"] = config.vocabulary
        body, configs = fairseq_v1.our_config(settings, task_settings(recipe))
    else:
        settings = settings_v2(recipe, has_teacher=True)
        if modality == "text":
            settings["modalities"]["text"]["vocabulary"] = config.vocabulary
        body, configs = fairseq.our_config(settings)
    assert body == recipe.body
    model = settings | {"ema_anneal_end_step": recipe.ema.anneal_steps}
    trained = our_training(their_training(recipe), model)
    assert trained["optim"].model_copy(update={"decay": recipe.optim.decay}) == recipe.optim
    assert (trained["ema"], trained["train"].steps) == (recipe.ema, recipe.train.steps)
    ours, theirs = config.model_dump(), configs[modality].model_dump()
    for part in ("data", "mask"):
        ours.pop(part), theirs.pop(part)
    ours["loss"].pop("cls_rows"), theirs["loss"].pop("cls_rows")
    ours["loss"].pop("weight"), theirs["loss"].pop("weight")
    if config.decoder.layers == 0:  # then nothing depends on them
        for key in ("kernel", "groups", "residual"):
            ours["decoder"].pop(key), theirs["decoder"].pop(key)
    assert theirs == ours
    mask, again = config.mask, configs[modality].mask
    assert (again.kind, again.ratio, again.length) == (mask.kind, mask.ratio, mask.length)


# ---- what fairseq cannot hold ----


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("multimodal_tiny", [], "differ between modalities"),
        ("image_tiny", ["body.layer_scale=0.1"], "layer scale"),
        ("image_tiny", ["modalities.image.target.final=[instance, layer]"], "order instance, layer"),
        ("text_tiny", ["modalities.text.embed_norm_eps=1e-12"], "embed_norm_eps=1e-12"),
    ],
)
def test_a_model_that_fairseq_cannot_hold_is_refused(
    name: str, changes: list[str], reason: str, tmp_path: Path
) -> None:
    """Before anything is written."""
    with pytest.raises(ValueError, match=f"fairseq's configuration cannot hold this model: .*{reason}"):
        write_fairseq(fresh(load_recipe(name, changes)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("text_v1", {"norm_eps": 1e-12}, "body.norm_eps=1e-12"),
        ("v1_audio", {"norm_eps": 1e-6}, "body.norm_eps=1e-06"),
        ("beit", {"norm_eps": 1e-12}, "body.norm_eps=1e-12"),
    ],
)
def test_norms_that_the_original_does_not_have_are_refused(name: str, change: dict, reason: str) -> None:
    """Their eps stands in its code: written down, it would silently change."""
    stored = from_dict(FILES[name]())
    stored.recipe.body = Body(**stored.recipe.body.model_dump() | change)
    with pytest.raises(ValueError, match=reason):
        to_dict(stored)


# ---- exports ----


@pytest.mark.parametrize("name", ["audio_cb4", "image_cb4_tuned", "text_v1", "beit", "beit_tuned"])
def test_an_import_keeps_everything(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Teacher, head, update count and what it was read from; the command says what it read."""
    path = tmp_path / "model.pt"
    torch.save(FILES[name](), path)
    stored = read_fairseq(path)
    assert main(["import", str(path), "--out", str(tmp_path / "out")]) == 0
    assert (
        f"{stored.origin}; weights: {stored.weights}, {len(stored.tensors)} tensors"
        in capsys.readouterr().out
    )
    again = read(tmp_path / "out")
    assert all(torch.equal(tensor, again.tensors[key]) for key, tensor in stored.tensors.items())
    assert (again.recipe, again.head, again.step) == (stored.recipe, stored.head, stored.step)
    assert (again.origin, again.weights) == (f"export of {stored.origin}", stored.weights)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Licence" in text and stored.origin in text and f"weights ({stored.weights})" in text
    assert ("encoder.predict(x)" in text) == (stored.head is not None)


def test_the_command_writes_what_fairseq_reads(tmp_path: Path) -> None:
    """From an import back to fairseq's format, both weights unless one is asked for."""
    path = tmp_path / "model.pt"
    torch.save(pretrained("audio_cb4"), path)
    stored = read_fairseq(path)
    write_export(stored, tmp_path / "ours")
    command = ["export", str(tmp_path / "ours"), "--format", "fairseq", "--out"]
    assert main([*command, str(tmp_path / "theirs")]) == 0
    assert {p.name for p in (tmp_path / "theirs").iterdir()} == {"checkpoint.pt", "README.md"}
    again = read_fairseq(tmp_path / "theirs" / "checkpoint.pt")
    assert all(torch.equal(tensor, again.tensors[key]) for key, tensor in stored.tensors.items())
    assert main([*command, str(tmp_path / "teacher"), "--weights", "teacher"]) == 0
    teacher = read_fairseq(tmp_path / "teacher" / "checkpoint.pt")
    assert teacher.weights == "student"  # fairseq's files cannot say whose they are
    key = "blocks.0.attn.qkv.weight"
    assert torch.equal(teacher.tensors[key], stored.tensors[TEACHER + key])


def test_a_student_alone_is_written_as_a_model_without_a_teacher() -> None:
    """fairseq would look for `_ema` otherwise."""
    checkpoint = pretrained("image_cb4")
    del checkpoint["model"]["_ema"]
    written = to_dict(from_dict(checkpoint))
    assert written["cfg"]["model"]["skip_ema"] is True and "_ema" not in written["model"]
    assert to_dict(from_dict(pretrained("image_cb4")))["cfg"]["model"]["skip_ema"] is False


def test_a_card_of_ones_own_run_has_data_and_steps_and_no_foreign_licence() -> None:
    text = card(fresh(load_recipe("text_tiny")), "load")
    assert "after 5 steps on `shards/sample`" in text and "Licence" not in text


def test_a_place_where_no_export_can_lie_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A file, a folder below one, a run: in one line, and nothing there is changed. A folder of an export will do."""
    path = tmp_path / "model.pt"
    torch.save(pretrained("text_cb4"), path)
    (tmp_path / "a.txt").write_text("mine")
    (tmp_path / "run" / "step_00000002").mkdir(parents=True)
    for out, reason in (("a.txt", "is a file"), ("a.txt/b/c", "is a file"), ("run", "is a run")):
        for command in (["import"], ["export", "--format", "fairseq"]):
            assert main([*command, str(path), "--out", str(tmp_path / out)]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"error: --out {tmp_path / out}") and reason in error
            assert error.count("\n") == 1
    assert (tmp_path / "a.txt").read_text() == "mine" and len(list((tmp_path / "run").iterdir())) == 1
    for _ in range(2):
        assert main(["export", str(path), "--out", str(tmp_path / "run" / "export")]) == 0


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        ("timm", "norms before attention and MLP, data2vec's blocks have them after"),
        ("torch", "unknown format 'torch', must be one of safetensors, hf, fairseq, onnx"),
    ],
)
def test_an_unknown_format_is_an_error_that_says_why(
    format: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ValueError, match=reason):
        export(tmp_path, tmp_path / "out", format=format)
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out"), "--format", format]) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["safetensors", "fairseq"])
def test_an_export_that_gives_other_outputs_is_not_kept(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight of what is written is moved: the check sees it, and the old export stays."""
    path = tmp_path / "model.pt"
    torch.save(pretrained("text_cb4"), path)
    out = tmp_path / "out"
    export(path, out, format=format)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    name, write_weights, save = "blocks.1.mlp.fc1.bias", consolidate.write_weights, torch.save

    def write_wrongly(folder: Path, shapes: Any, read: Any, dtype: torch.dtype) -> None:
        write_weights(folder, shapes, lambda n: read(n) + 1e-3 * (n == name), dtype)

    def save_wrongly(content: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        state = content["model"]
        save(content | {"model": state | {name: state[name] + 1e-3}}, *args, **kwargs)

    monkeypatch.setattr(consolidate, "write_weights", write_wrongly)
    monkeypatch.setattr(torch, "save", save_wrongly)
    with pytest.raises(RuntimeError, match="what was written gives"):
        export(path, out, format=format)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert {p.name for p in tmp_path.iterdir()} == {"model.pt", "out"}

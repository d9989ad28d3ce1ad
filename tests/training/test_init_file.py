"""A run starts from any weights that can be read: from exactly them, and it says what they lack."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from ranks import ROOT
from runs import (
    MODALITIES,
    STEPS,
    Command,
    read_rows,
    start_all,
    two_rank_run,
    without_timings,
    zero3_config,
)
from safetensors.torch import load_file, save_file

from d2v_ds.convert.consolidate import export
from d2v_ds.convert.fairseq_file import write_fairseq
from d2v_ds.convert.load import read
from d2v_ds.engine.checkpoint import Checkpoint
from d2v_ds.engine.ds_config import PRESETS
from d2v_ds.engine.ema import anneal
from d2v_ds.recipe import Recipe, load_recipe
from d2v_ds.training.init import Start, read_start

sys.path.insert(0, str(ROOT / "tests" / "convert"))
from checkpoints import pretrained  # noqa: E402

LAST = f"step_{STEPS:08d}"
STILL = ["train.steps=1", "ema.start=1", "ema.end=1"]
"""One step that moves nothing: the first learning rate is 0, and at tau 1 the teacher stays."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two ranks at ZeRO-3, whose teacher is not its student."""
    return two_rank_run(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("init")


@pytest.fixture(scope="module")
def exports(run: Path, folder: Path) -> dict[str, Path]:
    return {kind: export(run, folder / kind, kind) for kind in ("student", "teacher", "both")}


@pytest.fixture(scope="module")
def tensors(exports: dict[str, Path]) -> dict[str, torch.Tensor]:
    return load_file(exports["both"] / "model.safetensors")


@pytest.fixture(scope="module")
def results(run: Path, exports: dict[str, Path], folder: Path) -> dict[str, dict]:
    """Of two ranks."""
    bf16 = ["--deepspeed", zero3_config(folder), "precision=bf16"]
    begun = folder / "begun"
    return start_all(
        folder,
        {
            "zero3": Command(folder / "zero3", [*bf16, *STILL, f"init={exports['both']}"]),
            "zero2": Command(folder / "zero2", ["--deepspeed", "zero2", *STILL, f"init={run}"]),
            "begun": Command(begun, [*bf16, f"init={exports['both']}"]),
            "resumed": Command(folder / "resumed", bf16, after=begun),
            "other": Command(folder / "other", [*bf16, f"init={run}"], after=begun),
            "wider": Command(folder / "wider", ["body.dim=96", f"init={run}"]),
            "all done": Command(folder / "all_done", [f"init={run}", "init_updates=steps"]),
        },
        ranks=2,
    )


@pytest.fixture(scope="module")
def updates(run: Path, folder: Path) -> dict[str, dict]:
    """Of two ranks."""
    two = ["train.steps=2", "--deepspeed", "zero2"]
    return start_all(
        folder,
        {
            "tau": Command(folder / "tau", [*two, f"init={run}"]),
            "none": Command(folder / "none", [*two, f"init={run}", "init_updates=none"]),
            "steps": Command(folder / "steps", [*two, "train.steps=8", f"init={run}", "init_updates=steps"]),
            "chain": Command(folder / "chain", [*two, f"init={folder / 'tau'}"]),
        },
        ranks=2,
    )


def assert_starts_exactly(result: dict, out: Path, tensors: dict[str, torch.Tensor]) -> None:
    """After a step that moves nothing: masters and fp32 averages are the file's, to the bit."""
    assert result["code"] == 0, result["err"]
    checkpoint = Checkpoint(out / "step_00000001")
    assert set(checkpoint.names()) == set(tensors)
    different = [name for name, value in tensors.items() if not torch.equal(checkpoint.tensor(name), value)]
    assert different == []


def recipe_of(run: Path, *overrides: str) -> Recipe:
    return load_recipe(str(run / "recipe.yaml"), overrides)


def only(recipe: Recipe, *names: str) -> Recipe:
    return recipe.model_copy(update={"modalities": {name: recipe.modalities[name] for name in names}})


def refusal(recipe: Recipe) -> str:
    with pytest.raises(ValueError) as caught:
        read_start(recipe)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def text_of(start: Start) -> str:
    return "\n".join(start.notes)


# ---- runs ----


def test_a_bf16_run_at_zero3_starts_from_the_fp32_weights(results, tensors, folder):
    """On two ranks, from an export: neither master nor average is a rounded copy."""
    rounded = [name for name, value in tensors.items() if not torch.equal(value, value.bfloat16().float())]
    apart = [
        n
        for n in tensors
        if f"teacher.{n}" in tensors and not torch.equal(tensors[n], tensors[f"teacher.{n}"])
    ]
    assert len(rounded) > 20 and len(apart) > 20, "the test would see neither"
    assert_starts_exactly(results["zero3"], folder / "zero3", tensors)


def test_a_run_at_zero2_starts_from_a_run_folder(results, tensors, folder):
    assert_starts_exactly(results["zero2"], folder / "zero2", tensors)


CASES = [(p.stem, precision) for p in sorted(PRESETS.glob("*.json")) for precision in ("fp32", "bf16")]
CASES.remove(("zero3_autocast", "bf16"))


@pytest.fixture(scope="module")
def presets(exports: dict[str, Path], folder: Path) -> dict[str, dict]:
    settings = [*STILL, f"init={exports['both']}"]
    commands = {
        f"{name} {precision}": Command(
            folder / name / precision, ["--deepspeed", name, f"precision={precision}", *settings]
        )
        for name, precision in CASES
    }
    return start_all(folder, commands, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_every_preset_starts_from_the_fp32_weights(name, precision, presets, tensors, folder):
    """On two ranks."""
    assert_starts_exactly(presets[f"{name} {precision}"], folder / name / precision, tensors)


def test_rank_0_says_what_was_taken(results, exports, tensors):
    out = results["zero3"]["out"]
    students = sum(not name.startswith("teacher.") for name in tensors)
    assert out.count("starting from") == 1 and str(exports["both"]) in out
    assert (
        f"{students} of {students} tensors of the student found, {len(tensors) - students} of the teacher's"
        in out
    )
    assert "not found" not in out


def test_weights_of_another_size_are_an_error_of_the_run(results, run, folder):
    result = results["wider"]
    assert result["code"] == 2 and len(result["err"].strip().splitlines()) == 1
    assert "instead of (96" in result["err"] and "set body.dim=48, as the file has," in result["err"]
    assert not list((folder / "wider").glob("step_*"))


def test_a_run_that_was_started_from_weights_resumes_to_the_bit(results, exports, folder):
    """And need not be told from which, nor reads it again: it may be gone."""
    for name in ("begun", "resumed"):
        assert results[name]["code"] == 0, results[name]["err"]
    assert "resuming from" in results["resumed"]["out"] and "starting" not in results["resumed"]["out"]
    assert without_timings(read_rows(folder / "resumed")) == without_timings(read_rows(folder / "begun"))
    for path in (folder / "begun" / LAST).glob("*.safetensors"):
        ours, theirs = load_file(folder / "resumed" / LAST / path.name), load_file(path)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("begun", "resumed"):
        loop = json.loads((folder / name / LAST / "loop.json").read_text())
        assert loop["recipe"]["init"] == str(exports["both"])


def test_another_start_for_a_run_that_has_begun_is_an_error(results, exports):
    assert results["other"]["code"] == 2
    assert f"was started from {exports['both']}, and goes on from its own" in results["other"]["err"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "done"), [("tau", [1, 2], 6), ("none", [1, 2], 0), ("steps", [7, 8], 6)]
)
def test_what_goes_on_from_the_files_updates(name, steps, done, updates, folder):
    """The teacher's decay; nothing; the steps too, and with them the learning rate."""
    assert updates[name]["code"] == 0, updates[name]["err"]
    rows = read_rows(folder / name)
    ema = load_recipe("multimodal_tiny").ema
    assert [row["step"] for row in rows] == steps
    assert [row["applied_steps"] for row in rows] == [1, 2] and rows[-1]["skipped_steps"] == 0
    expected = [anneal(ema.start, ema.end, ema.anneal_steps, done + n) for n in (1, 2)]
    assert [row["tau"] for row in rows] == expected and len(set(expected)) == 2
    assert rows[0]["lr"] == pytest.approx(2e-3 * (steps[0] - 1) / 20)
    assert f"{STEPS} updates, " in updates[name]["out"]


@pytest.mark.slow
def test_updates_add_up_over_a_chain_of_runs(updates, folder):
    """6 of the first, 2 of the second."""
    assert updates["chain"]["code"] == 0, updates["chain"]["err"]
    assert read(folder / "tau").step == 8 and read(folder / "chain").step == 10
    assert "the teacher's decay goes on at 8" in updates["chain"]["out"]


def test_steps_that_are_all_done_are_an_error(results):
    assert results["all done"]["code"] == 2
    assert f"has {STEPS} updates and train.steps={STEPS}" in results["all done"]["err"]


# ---- what is found ----


def test_a_student_alone_is_its_own_teacher(run, exports, tensors):
    start = read_start(recipe_of(run, f"init={exports['student']}"))
    assert "not found: the teacher; it starts as a copy of the student" in text_of(start)
    assert set(start.teacher) == {n.removeprefix("teacher.") for n in tensors if n.startswith("teacher.")}
    assert all(torch.equal(value, tensors[name]) for name, value in start.teacher.items())


def test_a_teacher_alone_is_student_too(run, exports, tensors):
    start = read_start(recipe_of(run, f"init={exports['teacher']}"))
    assert "the teacher's weights alone, the student starts as their copy" in text_of(start)
    for name, value in start.teacher.items():
        assert torch.equal(value, tensors[f"teacher.{name}"]) and torch.equal(start.student[name], value)


def test_a_file_of_fewer_modalities_leaves_the_others_fresh(run, exports):
    """What is fresh is listed by part of the model."""
    small = only(recipe_of(run), "image", "text")
    stored = read(exports["both"])
    names = [n for n in stored.tensors if "audio" not in n]
    out = exports["both"].parent / "two_modalities"
    shutil.copytree(exports["both"], out)
    config = json.loads((out / "config.json").read_text()) | {"recipe": small.model_dump(mode="json")}
    (out / "config.json").write_text(json.dumps(config))
    save_file({n: stored.tensors[n] for n in names}, out / "model.safetensors")
    start = read_start(recipe_of(run, f"init={out}"))
    assert set(start.student) == {n for n in names if not n.startswith("teacher.")}
    assert "image, text of image, text, for a run of" in text_of(start)
    fresh = next(note for note in start.notes if "so fresh" in note)
    assert "encoders.audio (" in fresh and "decoders.audio (" in fresh
    assert "image" not in fresh and "text" not in fresh and "blocks" not in fresh


def test_a_recipe_of_fewer_modalities_takes_its_own(run, exports):
    recipe = only(recipe_of(run, f"init={exports['both']}"), "audio")
    start = read_start(recipe)
    names = {*start.student, *start.teacher}
    assert {"blocks.0.attn.qkv.weight", "encoders.audio.local.proj.weight"} <= names
    assert any(name.startswith("decoders.audio.") for name in names)
    assert not [name for name in names if ".image." in name or ".text." in name]
    unused = next(note for note in start.notes if "not used" in note)
    assert "encoders.image (" in unused and "decoders.text (" in unused and "audio" not in unused


def test_a_file_of_other_modalities_is_an_error(run, exports):
    out = exports["both"].parent / "text_alone"
    write_alone(exports["both"], out, "text")
    message = refusal(only(recipe_of(run, f"init={out}"), "image"))
    assert "holds text, the recipe trains image" in message


def write_alone(source: Path, out: Path, name: str) -> None:
    """An export of one modality of a joint one."""
    stored = read(source)
    recipe = only(stored.recipe, name)
    out.mkdir()
    others = [n for n in MODALITIES if n != name]
    kept = {k: v for k, v in stored.tensors.items() if not any(f".{n}." in k for n in others)}
    config = json.loads((source / "config.json").read_text()) | {"recipe": recipe.model_dump(mode="json")}
    (out / "config.json").write_text(json.dumps(config))
    save_file(kept, out / "model.safetensors")


# ---- what does not fit ----


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("body.dim=96", ["of another shape", "instead of", "set body.dim=48, as the file has"]),
        ("body.depth=1", ["no place for", "blocks.1.attn.qkv.weight", "body.depth=2"]),
        ("body.heads=2", ["other settings: body.heads=", "the recipe has 2"]),
        ("modalities.image.patch=4", ["encoders.image.local.proj.weight", "modalities.image.patch=8"]),
        (
            "modalities.text.vocabulary=99",
            ["encoders.text.local.tokens.weight", "modalities.text.vocabulary="],
        ),
        ("modalities.image.decoder.dim=32", ["decoders.image.", "modalities.image.decoder.dim="]),
        ("modalities.text.alibi=null", ["encoders.text.context.alibi_scale", "modalities.text.alibi."]),
    ],
)
def test_weights_that_do_not_fit_are_an_error_with_the_remedy(setting, words, run, exports):
    overrides = [setting, f"init={exports['both']}"]
    if setting == "body.depth=1":
        overrides += [f"modalities.{name}.target.top_k=1" for name in MODALITIES]
    message = refusal(recipe_of(run, *overrides))
    assert all(word in message for word in words), message


def test_a_deeper_recipe_leaves_the_new_blocks_fresh(run, exports):
    """Which is said, and not only in passing."""
    start = read_start(recipe_of(run, "body.depth=3", f"init={exports['both']}"))
    assert "not found, so fresh: blocks.2 (" in text_of(start)
    assert "body.depth=3 here, 2 in the file" in text_of(start)


def test_a_decoder_of_another_kind_starts_fresh_as_a_whole(run, exports):
    layers = read(exports["both"]).recipe.modalities["image"].decoder.layers
    recipe = recipe_of(run, f"modalities.image.decoder.layers={layers + 1}", f"init={exports['both']}")
    start = read_start(recipe)
    assert not [name for name in start.student if name.startswith("decoders.image.")]
    assert "so fresh: decoders.image (" in text_of(start) and "not used: decoders.image (" in text_of(start)


def test_how_it_is_trained_may_differ(run, exports):
    """Masks, targets, losses, clones and drops are the recipe's."""
    settings = ["modalities.image.mask.ratio=0.5", "modalities.audio.clones=3", "body.layerdrop=0.2"]
    start = read_start(recipe_of(run, *settings, "modalities.text.loss.beta=1", f"init={exports['both']}"))
    assert not [note for note in start.notes if "in the file" in note]


def test_a_schedule_that_ended_at_tau_1_is_warned_of(run, exports):
    start = read_start(recipe_of(run, "ema.end=1", "ema.anneal_steps=3", f"init={exports['both']}"))
    assert "warning: at tau 1 the teacher stays as it is; for it to move, set init_updates=none" in text_of(
        start
    )
    settings = ["ema.end=1", "ema.anneal_steps=3", "init_updates=none", f"init={exports['both']}"]
    assert "warning" not in text_of(read_start(recipe_of(run, *settings)))


def test_no_init_is_no_start(run):
    assert read_start(recipe_of(run)) == Start()


def test_a_path_that_holds_nothing_is_an_error(run, tmp_path):
    assert "absent does not exist; give a run folder" in refusal(
        recipe_of(run, f"init={tmp_path / 'absent'}")
    )


# ---- other kinds of files ----


def test_a_fairseq_file_starts_a_run(run, exports, tmp_path):
    """With its teacher and its count of updates."""
    alone = tmp_path / "audio"
    write_alone(exports["both"], alone, "audio")
    stored = read(alone)
    write_fairseq(stored, tmp_path / "fairseq")
    file = next((tmp_path / "fairseq").glob("*.pt"))
    start = read_start(only(recipe_of(run, f"init={file}"), "audio"))
    students = {n: t for n, t in stored.tensors.items() if not n.startswith("teacher.")}
    assert set(start.student) == set(students)
    assert all(torch.equal(start.student[name], value) for name, value in students.items())
    assert all(torch.equal(value, stored.tensors[f"teacher.{name}"]) for name, value in start.teacher.items())
    assert start.updates_before == stored.step == STEPS and "fairseq" in start.notes[0]


@pytest.mark.parametrize("case", ["audio_cb4", "image_cb4", "text_cb4", "v1_audio"])
def test_a_checkpoint_of_the_original_starts_a_run_of_its_own_recipe(case, tmp_path):
    """With nothing missing, left over or different."""
    torch.save(pretrained(case), tmp_path / "a.pt")
    recipe = read(tmp_path / "a.pt").recipe.model_copy(update={"init": str(tmp_path / "a.pt")})
    start = read_start(recipe)
    assert start.updates_before == 1234 and len(start.notes) == 3, text_of(start)
    assert any(not torch.equal(value, start.student[name]) for name, value in start.teacher.items())


@pytest.mark.parametrize(
    ("case", "updates"), [("image_cb4", "1234 updates"), ("v1_audio", "updates not said")]
)
def test_a_folder_of_hugging_face_starts_a_run(case, updates, tmp_path):
    """It holds an encoder alone: decoder fresh, teacher a copy of the student."""
    pytest.importorskip("transformers")
    from d2v_ds.convert.huggingface import write_huggingface

    torch.save(pretrained(case), tmp_path / "a.pt")
    stored = read(tmp_path / "a.pt")
    write_huggingface(stored, tmp_path / "folder")
    start = read_start(stored.recipe.model_copy(update={"init": str(tmp_path / "folder")}))
    modality = next(iter(stored.recipe.modalities))
    missing = {name for name in stored.tensors if not name.startswith("teacher.")} - set(start.student)
    assert missing == {name for name in stored.tensors if name.startswith("decoders.")}
    assert all(torch.equal(value, stored.tensors[name]) for name, value in start.student.items())
    assert all(torch.equal(value, start.student[name]) for name, value in start.teacher.items())
    for words in ("not found: the teacher", f"so fresh: decoders.{modality} (", updates):
        assert words in text_of(start)


def test_groups_of_convolutions_that_a_decoder_does_not_have_are_not_mentioned(tmp_path):
    torch.save(pretrained("v1_audio"), tmp_path / "a.pt")
    recipe = read(tmp_path / "a.pt").recipe.model_copy(update={"init": str(tmp_path / "a.pt")}, deep=True)
    recipe.modalities["audio"].decoder.groups = 16
    assert "decoder" not in text_of(read_start(recipe))


def test_a_fine_tuned_model_starts_a_run_without_its_head(run, exports, tmp_path):
    """And with a fresh decoder."""
    out = tmp_path / "image"
    write_alone(exports["student"], out, "image")
    tensors = load_file(out / "model.safetensors")
    dim = tensors["blocks.0.norm1.weight"].numel()
    kept = {name: t for name, t in tensors.items() if not name.startswith("decoders.")}
    kept |= {"head.norm.weight": torch.ones(dim), "head.norm.bias": torch.zeros(dim)}
    kept |= {"head.proj.weight": torch.zeros(7, dim), "head.proj.bias": torch.zeros(7)}
    save_file(kept, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    config["head"] = {"kind": "image_classification", "outputs": 7}
    (out / "config.json").write_text(json.dumps(config))
    start = read_start(only(recipe_of(run, f"init={out}"), "image"))
    assert "so fresh: decoders.image (" in text_of(start) and "not used: head" in text_of(start)
    assert not [name for name in start.student if name.startswith("head")]

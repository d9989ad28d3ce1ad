"""What a user gets wrong is one line with the remedy; what data get wrong is counted and told."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
from ranks import SAMPLE
from runs import MODALITIES, STEPS, TINY, Command, python, read_rows, start, start_all

from d2v_ds.data import Plan, StepLoader
from d2v_ds.data.remote import RemoteError
from d2v_ds.modalities.source import open_source
from d2v_ds.recipe import load_recipe
from d2v_ds.training.run import without_traceback

NUM_SAMPLES = 29
Change = Callable[[int, bytes], bytes]


def keep(_: int, content: bytes) -> bytes:
    return content


def write_multimodal(path: Path, image: Change = keep, sound: Change = keep) -> Path:
    """The first samples of a committed shard with their sounds as FLAC, some of them changed."""
    with tarfile.open(SAMPLE / "multimodal-train-000000.tar") as source, tarfile.open(path, "w") as target:
        for member in source:
            key, extension = member.name.split(".")
            number = int(key.removeprefix("train-"))
            if number >= NUM_SAMPLES:
                break
            content = source.extractfile(member).read()
            if extension == "png":
                content = image(number, content)
            if extension == "ogg":
                extension, content = "flac", sound(number, as_flac(content))
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(content)
            target.addfile(info, io.BytesIO(content))
    return path


def as_flac(content: bytes) -> bytes:
    samples, rate = soundfile.read(io.BytesIO(content))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC")
    return file.getvalue()


def folder_with(folder: Path, **changes: Change) -> Path:
    """Shards for multimodal_tiny: a changed multimodal one, and prose as committed."""
    folder.mkdir()
    write_multimodal(folder / "multimodal-train-000000.tar", **changes)
    for name in ("text-train-000000.tar", "sentencepiece.model"):
        (folder / name).symlink_to(SAMPLE / name)
    return folder


def break_images(*numbers: int) -> Change:
    return lambda number, content: b"no picture at all" if number in numbers else content


def break_sounds(*numbers: int) -> Change:
    """The header stays whole, so that its length can be measured; the frames after it do not."""

    def change(number: int, content: bytes) -> bytes:
        middle = len(content) // 2
        broken = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
        return content[:middle] + broken + content[middle + 64 :] if number in numbers else content

    return change


BAD_IMAGES, BAD_SOUNDS, ROTTEN = (2, 3, 11), (5, 7), 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad_input")


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    """Three pictures and two sounds that cannot be decoded, one sound whose bytes rot after the indexing."""
    shards = folder_with(folder / "shards", image=break_images(*BAD_IMAGES), sound=break_sounds(*BAD_SOUNDS))
    open_source("audio", load_recipe("multimodal_tiny").modalities["audio"], str(shards))
    tar = shards / "multimodal-train-000000.tar"
    with tarfile.open(tar) as opened:
        offset = opened.getmember(f"train-{ROTTEN:06d}.flac").offset_data
    with tar.open("r+b") as file:
        file.seek(offset + 2000)
        byte = file.read(1)
        file.seek(offset + 2000)
        file.write(bytes([byte[0] ^ 1]))
    return shards


@pytest.fixture(scope="module")
def results(folder: Path, shards: Path) -> dict[str, dict]:
    (folder / "empty").mkdir()
    (folder / "cut").mkdir()
    whole = write_multimodal(folder / "whole.tar").read_bytes()
    (folder / "cut" / "multimodal-train-000000.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "cut" / "sentencepiece.model").symlink_to(SAMPLE / "sentencepiece.model")
    (folder / "other").mkdir()
    with tarfile.open(folder / "other" / "multimodal-train-0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.bin"))
    (folder / "typo.json").write_text('{"zero_optimisation": {"stage": 3}}')
    (folder / "sched.json").write_text('{"scheduler": {"type": "WarmupLR"}}')
    many = folder_with(folder / "many", image=break_images(*range(9)))
    batches = [f"modalities.{name}.data.batch=8" for name in MODALITIES]
    mistakes = {
        "pattern": [f"data={folder}/absent-{{000..003}}.tar"],
        "absent folder": [f"data={folder}/absent"],
        "empty folder": [f"data={folder}/empty"],
        "truncated": [f"data={folder}/cut"],
        "no field": [f"data={folder}/other"],
        "tokenizer": ["modalities.text.data.tokenizer=absent.model"],
        "vocabulary": ["modalities.text.vocabulary=100"],
        "ds key": ["--deepspeed", folder / "typo.json"],
        "ds scheduler": ["--deepspeed", folder / "sched.json"],
        "preset": ["--deepspeed", "zero33"],
        "key": ["train.step=3"],
        "value": ["modalities.image.patch=big"],
        "recipe": ["--recipe", "multimodal_tin"],
        "ranks": ["modalities.audio.data.micro_batches=3"],
        "patch": ["modalities.image.patch=7"],
        "top_k": ["modalities.image.target.top_k=9"],
        "out": [f"out={folder / 'whole.tar'}"],
        "no steps between logs": ["train.log_every=0"],
    }
    commands = {name: Command(folder / "unused", settings) for name, settings in mistakes.items()}
    commands["ranks"].env = {"WORLD_SIZE": "2", "RANK": "0"}
    bad = [*batches, f"data={shards}", "train.workers=1", "train.max_bad_share=0.2"]
    commands["bad samples"] = Command(folder / "bad", bad)
    commands["many bad samples"] = Command(folder / "worse", [*batches, f"data={many}", "train.steps=40"])
    all_bad = folder_with(folder / "all_bad", image=break_images(*range(NUM_SAMPLES)))
    commands["all bad"] = Command(folder / "none", [*batches, f"data={all_bad}", "train.workers=1"])
    wild = ["optim.lr=1e38", "optim.warmup_steps=0", "train.skip_limit=2"]
    commands["diverged"] = Command(folder / "diverged", wild)
    return start_all(folder, commands)


# ---- a user's mistakes ----

MISTAKES = {
    "pattern": ("absent-{000..003}.tar", "absent-000.tar matches nothing", "name tars, a folder"),
    "absent folder": ("absent/multimodal-train-*.tar", "matches nothing", "name tars, a folder"),
    "empty folder": ("empty/multimodal-train-*.tar", "matches nothing", "name tars, a folder"),
    "truncated": ("cut/multimodal-train-000000.tar is truncated at byte", "after sample 'train-0000"),
    "no field": ("has {'image': 'png;jpg;jpeg;webp'}", "the extensions seen are: bin"),
    "tokenizer": ("'absent.model' is neither a file nor", "modalities.text.data.tokenizer=PATH"),
    "vocabulary": ("1000 pieces", "modalities.text.vocabulary=100", "at least the number of pieces"),
    "ds key": ("typo.json: unknown key 'zero_optimisation'", "did you mean 'zero_optimization'?"),
    "ds scheduler": ("sched.json: the learning-rate schedule belongs to the recipe", "delete 'scheduler'"),
    "preset": ("'zero33' is neither a file nor a preset", "did you mean 'zero3'?"),
    "key": ("unknown key 'train.step'", "did you mean 'train.steps'?"),
    "value": ("patch='big'", "valid integer"),
    "recipe": ("unknown recipe 'multimodal_tin'", "did you mean 'multimodal_tiny'?"),
    "ranks": ("modalities.audio.data.micro_batches=3 does not divide among 2 ranks", "one of [1, 3] ranks"),
    "patch": ("image size 32 must be a multiple of patch 7",),
    "top_k": ("modalities.image.target.top_k=9 must lie in 1..2",),
    "out": ("whole.tar",),
    "no steps between logs": ("train.log_every=0", "greater than 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_value_rule_and_remedy(name, results):
    """Exit code 2, the last line is the error, no traceback."""
    result = results[name]
    assert result["code"] == 2, result["err"]
    lines = result["err"].splitlines()
    assert "Traceback" not in result["err"] and len(lines) <= 2
    assert lines[-1].startswith("error: ") and len(lines[-1]) < 700
    assert all(part in lines[-1] for part in MISTAKES[name]), lines[-1]


def test_a_mistake_leaves_no_run_folder_behind(results, folder):
    assert len(results) > len(MISTAKES)
    assert not (folder / "unused").exists()


def test_a_real_process_ends_with_code_2(folder, tmp_path):
    """Before anything is started; stderr is the line alone."""
    (tmp_path / "mine.json").write_text('{"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}')
    done = start(
        python("train.py", *TINY, f"out={tmp_path / 'run'}", "--deepspeed", tmp_path / "mine.json"), code=2
    )
    errors = [line for line in done.stderr.splitlines() if "WARNING" not in line and "[INFO]" not in line]
    assert errors == [
        f"error: {tmp_path / 'mine.json'}: gradient_clipping=1.0 contradicts optim.clip=4.0 of the "
        'recipe; write "auto"'
    ]
    assert done.stdout == "" and not (tmp_path / "run").exists()


# ---- data's mistakes ----


def quarantined(folder: Path) -> dict[tuple[str, str], str]:
    return {(row["modality"], row["key"]): row["reason"] for row in read_rows(folder, "quarantine.jsonl")}


def keys_of(modality: str, numbers: tuple[int, ...]) -> set[tuple[str, str]]:
    return {(modality, f"multimodal-train-000000.tar:train-{number:06d}") for number in numbers}


def test_a_run_over_unreadable_samples_finishes(results, folder):
    assert results["bad samples"]["code"] == 0, results["bad samples"]["err"]
    assert read_rows(folder / "bad")[-1]["step"] == STEPS


def test_unreadable_samples_are_listed_with_key_and_reason(results, folder):
    """All that the plan came across, which in three epochs is all there are, and no other."""
    found = quarantined(folder / "bad")
    assert set(found) == keys_of("image", BAD_IMAGES) | keys_of("audio", (*BAD_SOUNDS, ROTTEN))
    for (modality, key), reason in found.items():
        if key.endswith(f"{ROTTEN:06d}"):
            assert "crc32" in reason
        else:
            assert reason.startswith(f"undecodable {'image' if modality == 'image' else 'sound'}")


def test_each_fault_is_told_with_its_step(results, folder):
    rows = read_rows(folder / "bad", "quarantine.jsonl")
    assert all(set(row) == {"modality", "key", "reason", "step"} for row in rows)
    assert {row["step"] for row in rows} <= set(range(STEPS)) and len({row["step"] for row in rows}) > 2


def test_batches_keep_their_size(shards):
    """An unreadable sample is replaced by a readable one, in every micro-batch of three epochs."""
    recipe = load_recipe(
        "multimodal_tiny", [*TINY, "modalities.image.data.batch=8", "modalities.audio.data.batch=8"]
    )
    sources = [open_source(name, recipe.modalities[name], str(shards)) for name in ("image", "audio")]
    loader = StepLoader(sources, Plan(recipe.seed, [s.stream for s in sources]), 0, 1, 0, STEPS)
    micro_batches = [micro for step in loader for micro in step]
    assert len(micro_batches) == 2 * 2 * STEPS
    assert {micro.batch.source.shape[0] for micro in micro_batches} == {8}
    assert sum(len(micro.faults) for micro in micro_batches) >= len(BAD_IMAGES) + len(BAD_SOUNDS) + 1
    assert all(micro.batch.source.isfinite().all() for micro in micro_batches)


def test_too_many_unreadable_samples_stop_the_run_with_their_counts(results, folder):
    """Which modality, shard and reason, how many of how many, and what to do."""
    result = results["many bad samples"]
    assert result["code"] == 1 and "Traceback" not in result["err"]
    assert "samples could not be used, more than 0.10%" in result["err"]
    assert " x image multimodal-train-000000.tar: undecodable image" in result["err"]
    assert "Repair or leave out these shards" in result["err"] and "quarantine.jsonl" in result["err"]
    assert "train.max_bad_share" in result["err"]
    steps = [row["step"] for row in read_rows(folder / "worse")]
    assert 1 <= steps[-1] < 40
    assert len(read_rows(folder / "worse", "quarantine.jsonl")) > 20


def test_nothing_but_unreadable_samples_is_one_line_from_a_data_worker_too(results):
    result = results["all bad"]
    assert result["code"] == 1 and "Traceback" not in result["err"]
    (line,) = [line for line in result["err"].splitlines() if line.startswith("error")]
    assert line.startswith("error: image: multimodal-train-000000.tar:train-") and "verify the shards" in line


def test_all_lines_of_a_message_come_from_a_data_worker():
    worker = (
        "Caught RemoteError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    )
    error = RemoteError(f'{worker}  File "a.py"\nd2v_ds.data.remote.RemoteError: it said: one\ntwo\n')
    assert without_traceback(error) == "it said: one\ntwo"


def test_gradients_that_stay_infinite_stop_the_run_with_a_remedy(results):
    """Weights of 1e38 overflow; each skipped step is told, the second one in a row ends the run."""
    result = results["diverged"]
    assert result["code"] == 1 and "Traceback" not in result["err"]
    error = result["err"].splitlines()[-1]
    assert error.startswith("error: 2 steps in a row had losses or gradients that are not finite")
    assert "lower optim.lr" in error and result["err"].count("was skipped") == 2


def test_sounds_without_a_readable_header_are_left_out_and_counted(folder, caplog):
    """Before the run, since their length is not known."""
    shards = folder_with(folder / "headless", sound=lambda n, content: b"noise" if n in (1, 4) else content)
    source = open_source("audio", load_recipe("multimodal_tiny").modalities["audio"], str(shards))
    assert len(source.corpus) == NUM_SAMPLES - 2
    assert f"2 of {NUM_SAMPLES} samples" in caplog.text and "2 empty or unreadable" in caplog.text


def test_the_index_tells_every_sample_it_holds(shards):
    """A sample that rots later is still counted: the plan must not change with the state of a disk."""
    source = open_source("audio", load_recipe("multimodal_tiny").modalities["audio"], str(shards))
    assert len(source.corpus) == NUM_SAMPLES
    assert json.loads((shards / "multimodal-train-000000.tar.json").read_text())

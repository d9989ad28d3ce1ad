"""`scripts/finetune_{image,speech}.sh`: from files and weights to a model with scores; run again, they go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpora import checksums, tar_of
from layouts import picture, sound
from runs import python, start
from test_pretrain import run
from trees import write_tree

from shards.sample import WORDS

PARTS = ("train-clean-5", "dev-clean-2")
SMALL = ["train.steps=2", "train.log_every=1", "train.workers=0", "task.test_every=1"]


def spoken_files(part: str) -> dict[str, bytes]:
    """Half a second of noise each, with a digit's name as its transcript."""
    names = [f"{speaker}-7000" for speaker in (100, 101)]
    folders = {name: f"LibriSpeech/{part}/{name.replace('-', '/')}" for name in names}
    files = {}
    for name, folder in folders.items():
        lines = [f"{name}-{i:04d} {WORDS[i].upper()}\n" for i in range(6)]
        files[f"{folder}/{name}.trans.txt"] = "".join(lines).encode()
        files |= {f"{folder}/{name}-{i:04d}.flac": sound(i) for i in range(6)}
    return files


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A run of one step, on what was prepared."""
    folder = tmp_path_factory.mktemp("speech")
    archives = {f"{part}.tar.gz": tar_of(spoken_files(part), "w:gz") for part in PARTS}
    for name, content in archives.items():
        (folder / name).write_bytes(content)
    (folder / "sums").write_text(checksums(archives))
    settings = ["modalities.audio.data.shards=*train*.tar", "modalities.audio.data.min_seconds=0.1"]
    settings += ["modalities.audio.data.batch=4", "modalities.audio.data.max_seconds=0.5", "train.steps=1"]
    done = run(
        "pretrain_speech.sh", *settings, cwd=folder, SPEECH=".", PARTS=" ".join(PARTS), CHECKSUMS="sums",
        DATA="shards", OUT="run", RECIPE="audio_tiny",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def scores(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "scores.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_speech_is_fine_tuned_from_a_run_and_scored(pretrained):
    variables = {"INIT": "run", "DATA": "shards", "OUT": "tuned", "RECIPE": "finetune_audio_tiny"}
    settings = [*SMALL, "modalities.audio.data.batch=4"]
    own = {"TRAIN": "*train-clean-5*.tar", "TEST": "*dev-clean-2*.tar"}
    first = run("finetune_speech.sh", *settings, cwd=pretrained, **variables, **own)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    rows = scores(pretrained / "tuned")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["wer"] > 0 and row["cer"] > 0 for row in rows)
    again = run("finetune_speech.sh", *settings, "train.steps=3", cwd=pretrained, **variables, **own)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert scores(pretrained / "tuned")[-1]["step"] == 3
    measured = start(
        python(
            "-m", "d2v_ds.cli", "eval", "ctc", pretrained / "tuned", f"{pretrained}/shards/*dev-clean-2*.tar"
        )
    )
    assert "wer" in measured.stdout


@pytest.mark.slow
def test_own_pictures_are_prepared_with_as_many_outputs_as_classes(tmp_path):
    for i in range(24):
        place = tmp_path / "my pictures" / ("cat", "dog", "an owl")[i % 3] / f"{i}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(i))
    settings = [*SMALL, "modalities.image.data.batch=4"]
    variables = {
        "DATASET": "pets",
        "IMAGES": "my pictures",
        "DATA": "my shards",
        "OUT": "tuned",
        "VAL": "0.25",
    }
    done = run("finetune_image.sh", *settings, cwd=tmp_path, **variables, RECIPE="finetune_image_tiny")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "outputs: 3" in (tmp_path / "tuned" / "recipe.yaml").read_text()
    rows = scores(tmp_path / "tuned")
    assert [row["step"] for row in rows] == [1, 2] and all(0 <= row["accuracy"] <= 1 for row in rows)


def test_speech_without_weights_is_refused_before_anything_is_prepared(tmp_path):
    done = run("finetune_speech.sh", cwd=tmp_path, DATA="shards", RECIPE="finetune_audio_tiny")
    assert done.returncode == 1 and "set INIT to" in done.stderr
    assert not (tmp_path / "shards").exists()


def test_pictures_of_one_class_are_refused(tmp_path):
    """One output would be a regression."""
    write_tree(tmp_path, {"s/a.tar": "", "s/classes.json": '["cat"]'})
    done = run("finetune_image.sh", cwd=tmp_path, DATASET="pets", DATA="s")
    assert done.returncode == 1 and "names one class alone; two or more are needed" in done.stderr

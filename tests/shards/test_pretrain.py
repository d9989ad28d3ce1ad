"""`scripts/pretrain_*.sh`: from archives on a server, or a folder, to a checkpoint; run again, they go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import checksums, speech_files, tar_of, web_archive
from layouts import picture, sound
from ranks import ROOT
from runs import environment
from server import Manners, serve

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("pretrain_*.sh"))
SMALL = [
    "train.steps=2",
    "train.log_every=1",
    "train.workers=0",
    "body.dim=48",
    "body.depth=4",
    "modalities.{}.data.batch=2",
    "modalities.{}.data.micro_batches=1",
    "modalities.{}.clones=2",
    "modalities.{}.data.shards=**/*{}*-train-*.tar",
]
NAMES = {"image": "images", "audio": "librispeech", "text": "openwebtext"}
PART = "train-clean-5"


@pytest.fixture(scope="module")
def archives() -> dict[str, bytes]:
    files = speech_files(PART)
    files |= {name: sound(i) for i, name in enumerate(files) if name.endswith(".flac")}
    return {f"31/{PART}.tar.gz": tar_of(files, "w:gz"), "openwebtext.tar.xz": web_archive()}


def settings(names: list[str]) -> list[str]:
    each = [text for text in SMALL if "{}" in text]
    return [text for text in SMALL if "{}" not in text] + [
        text.format(name, NAMES[name]) for name in names for text in each
    ]


def run(script: str, *arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = environment(D2V_VENV="none", NUM_GPUS="0", PATH=path, **variables)
    command = ["bash", str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_header_and_starts_nothing(script):
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert {"NUM_GPUS", "OUT", "DATA", "RECIPE"} <= set(done.stdout.split())
    assert "set -euo" not in done.stdout


def test_images_that_are_not_there_are_asked_for(tmp_path):
    done = run("pretrain_image.sh", DATA=str(tmp_path / "none"))
    assert done.returncode == 1 and "set IMAGES to" in done.stderr
    done = run("pretrain_image.sh", DATA=str(tmp_path / "none"), IMAGES="nowhere", cwd=tmp_path)
    assert done.returncode == 1 and f"IMAGES={tmp_path}/nowhere is not there" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "speech", "text", "multimodal"])
def test_it_prepares_trains_to_a_checkpoint_and_goes_on(kind, archives, tmp_path):
    """Folders with spaces, relative to where it is called; the second time there is no server any more."""
    pictures = tmp_path / "my pictures"
    pictures.mkdir()
    for i in range(12):
        (pictures / f"Bild {i}.JPG").write_bytes(picture(i))
    sums = tmp_path / "sums"
    sums.write_text(
        checksums({f"{PART}.tar.gz": archives[f"31/{PART}.tar.gz"]})
        if kind == "speech"
        else checksums({name.rpartition("/")[2]: content for name, content in archives.items()}, "sha256")
    )
    modality = {"image": "image", "speech": "audio", "text": "text", "multimodal": "multimodal"}[kind]
    names = list(NAMES) if kind == "multimodal" else [modality]
    with serve(Manners(archives)) as address:
        variables = {
            "RECIPE": f"{modality}_tiny", "DATA": "my shards", "OUT": "a run", "MIRROR": address,
            "CHECKSUMS": "sums", "PARTS": PART, "IMAGES": "my pictures", "VOCABULARY": "290", "VAL": "0.1",
        }  # fmt: skip
        arguments = [*settings(names), "modalities.audio.data.min_seconds=0.1"][
            : None if "audio" in names else -1
        ]
        first = run(f"pretrain_{kind}.sh", *arguments, cwd=tmp_path, **variables)
        assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
        assert (tmp_path / "a run/latest").read_text().strip() == "step_00000002"
    if kind in ("speech", "text"):  # what goes on is one function
        return
    again = run(f"pretrain_{kind}.sh", *arguments, "train.steps=3", cwd=tmp_path, **variables)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert (tmp_path / "a run/latest").read_text().strip() == "step_00000003"

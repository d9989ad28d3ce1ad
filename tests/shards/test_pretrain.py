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
from trees import write_tree

from d2v_ds.training.run import check

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
    env = environment(**{"D2V_VENV": "none", "NUM_GPUS": "0", "PATH": path} | variables)
    command = ["bash", str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_header_and_starts_nothing(script):
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert {"NUM_GPUS", "OUT", "DATA", "RECIPE"} <= set(done.stdout.split())
    assert "set -euo" not in done.stdout


def test_images_that_are_not_there_are_asked_for(tmp_path):
    said = commands(tmp_path, "pretrain_image.sh", DATA="none")
    assert "set IMAGES to" in said[1]
    said = commands(tmp_path, "pretrain_image.sh", DATA="none", IMAGES="nowhere")
    assert said[1:] == [f"error: IMAGES={tmp_path}/nowhere is not there"]


def test_settings_that_no_run_can_have_are_told_before_data_is_prepared(tmp_path, capsys, monkeypatch):
    """They are those that training would get."""
    done = run(
        "pretrain_speech.sh", "train.stepz=2", cwd=tmp_path, DATA="shards", MIRROR="http://127.0.0.1:9"
    )
    assert done.returncode == 2 and "unknown key 'train.stepz'" in done.stderr
    assert not any(tmp_path.iterdir())
    for script in SCRIPTS:
        first, *_, last = commands(tmp_path, script, "seed=3", DATA="shards", IMAGES=".", DEEPSPEED="zero1")
        checked, trained = (line.partition(" --deepspeed ") for line in (first, last))
        assert "import check" in checked[0] and checked[0].endswith(" 2") and checked[2] == trained[2]
    recipe = ["--recipe", "audio_tiny"]
    for ranks, more, message in (
        (5, [], "micro_batches=1 does not divide among 5 ranks"),
        (1, ["--deepspeed", "zero9"], "DeepSpeed config 'zero9' is neither"),
        (1, [f"out={tmp_path}/log"], "is a file, must be a folder"),
    ):
        assert check(ranks, [*recipe, *more]) == 2 and message in capsys.readouterr().err
    assert check(1, [*recipe, f"out={tmp_path}/run"]) == 0 and not (tmp_path / "run").exists()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert check(2, [*recipe, "modalities.audio.data.micro_batches=2", "precision=fp32"]) == 2
    assert "NUM_GPUS=2, but this machine has 1" in capsys.readouterr().err


def test_a_mirror_goes_with_what_is_downloaded(tmp_path):
    """Where archives are there, `d2v prepare` refuses one."""
    settings = {"DATA": "d", "MIRROR": "http://m", "SPEECH": str(tmp_path), "NUM_GPUS": "0"}
    said = commands(tmp_path, "pretrain_multimodal.sh", IMAGES=str(tmp_path), **settings)
    prepared = [line.partition("prepare ")[2].split() for line in said if "d2v prepare" in line]
    mirrored = {words[0]: "--mirror" in words for words in prepared}
    assert mirrored == {"folder": False, "librispeech": False, "openwebtext": True}


def test_a_number_of_gpus_that_is_none_is_told_before_all(tmp_path):
    said = commands(tmp_path, "pretrain_speech.sh", NUM_GPUS="two")
    assert said == ["error: NUM_GPUS=two must be a whole number, 0 for the CPU"]


def commands(tmp_path: Path, script: str, *arguments: str, **variables: str) -> list[str]:
    """What a script would run, as lines: each command writes itself down, and does nothing."""
    for place in ("bin", "v/bin"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        for name in ("python", "d2v", "deepspeed"):
            if place == "bin" or name == "python":
                file = tmp_path / place / name
                file.write_text(f'#!/bin/bash\necho "{place}/{name} $*" >> "{tmp_path}/log"\n')
                file.chmod(0o755)
    (tmp_path / "log").write_text("")
    path = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"D2V_VENV": "none", "NUM_GPUS": "2", "PATH": path} | variables
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *arguments],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    return (tmp_path / "log").read_text().splitlines() + done.stderr.splitlines()


def test_gpus_are_those_of_cuda_visible_devices(tmp_path):
    """deepspeed takes the first ones where it is told a number."""
    data = write_tree(tmp_path, {"s/a.tar": ""}) / "s"
    *_, said = commands(tmp_path, "pretrain_image.sh", DATA=str(data), CUDA_VISIBLE_DEVICES="3,5,7")
    assert said.startswith("bin/deepspeed --include localhost:3,5 train.py")
    *_, said = commands(tmp_path, "pretrain_image.sh", DATA=str(data), CUDA_VISIBLE_DEVICES="3")
    assert said == "error: NUM_GPUS=2, but CUDA_VISIBLE_DEVICES=3 names 1"


def test_gpus_are_named_by_their_ids_too(tmp_path):
    """Of which deepspeed takes none."""
    data = write_tree(tmp_path, {"s/a.tar": ""}) / "s"
    for ids in ("GPU-8a1b,GPU-9c2d", "MIG-3e4f,MIG-5a6b"):
        *_, said = commands(tmp_path, "pretrain_image.sh", DATA=str(data), CUDA_VISIBLE_DEVICES=ids)
        assert said.startswith(
            "bin/python -m torch.distributed.run --standalone --nproc_per_node 2 train.py --deepspeed zero2"
        )


def test_paths_among_the_arguments_are_those_of_the_caller_too(tmp_path):
    """Patterns and lists as well; what stands inside the data folder, what is absolute, URLs and other keys stay."""
    write_tree(tmp_path, {"my shards/a.tar": "", "run/latest": ""})
    arguments = [
        "data=./my shards",
        "init=run",
        "out=new",
        "task.test=b/*.tar",
        "task.label=a/b",
        "optim.lr=1e-3",
    ]
    *_, said = commands(tmp_path, "finetune_image.sh", *arguments, DATASET="own", NUM_GPUS="0")
    here = f"data={tmp_path}/./my shards init={tmp_path}/run out={tmp_path}/new"
    assert said.endswith(f"{here} task.test={tmp_path}/b/*.tar task.label=a/b optim.lr=1e-3")
    assert f" out={tmp_path}/new data={tmp_path}/./my shards " in said
    stays = ["init=null", "data=s3://b/c::/d", "task.test=*val*.tar", "modalities.image.data.shards=e/*.tar"]
    *_, said = commands(tmp_path, "finetune_image.sh", *stays, DATASET="own", NUM_GPUS="0", DATA="my shards")
    assert said.endswith(" ".join(stays)) and said.count("init=") == 1
    checked, *_ = commands(
        tmp_path, "finetune_image.sh", "task.labels=[a,b]", DATASET="own", DATA="my shards"
    )
    assert " task.test=*val*.tar " in checked and checked.endswith("task.labels=[a,b] task.labels=null")
    said = commands(tmp_path, "finetune_speech.sh", "data=my shards", "init=run", NUM_GPUS="0")
    assert f"init={tmp_path}/run" in said[-1]
    said = commands(tmp_path, "finetune_glue.sh", "out=new", INIT="run")
    assert said == [
        "error: out="
        + f"{tmp_path}/new would be that of every run; set INIT, GLUE, OUT, SEEDS or LRS in its place"
    ]


def test_paths_are_those_of_the_caller_whatever_they_are_called(tmp_path):
    """A folder with brackets is no pattern; the virtual environment and a DeepSpeed file may be relative, too."""
    write_tree(tmp_path, {"a[1] b/x-train-0.tar": "", "ds.json": "{}"})
    variables = {"DATA": "a[1] b", "DEEPSPEED": "ds.json", "CUDA_VISIBLE_DEVICES": ""}
    _, first, last = commands(tmp_path, "pretrain_text.sh", **variables)
    assert first.startswith(f"bin/d2v tokenizer train {tmp_path}/a[1] b/x-train-0.tar --out")
    assert last.startswith(f"bin/deepspeed --num_accelerators 2 train.py --deepspeed {tmp_path}/ds.json")
    said = commands(tmp_path, "pretrain_image.sh", D2V_VENV="v", NUM_GPUS="0", DATA="a[1] b")
    assert said[-1].startswith("v/bin/python train.py")


def test_shards_at_a_url_want_a_tokenizer_of_their_own(tmp_path):
    """It was written into a folder `s3:`."""
    said = commands(tmp_path, "pretrain_text.sh", DATA="s3://bucket/text")
    assert said == [
        "error: DATA=s3://bucket/text is a URL; set TOKENIZER to the file of its tokenizer, or to one that is to be "
        "written"
    ]


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

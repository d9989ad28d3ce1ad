"""Every block of docs/use.md and of the README's section Use runs as it stands, and does what it says."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image
from ranks import ROOT, SAMPLE

from d2v_ds import D2vModalitiesConfig, Data2VecMultiConfig, Data2VecMultiModel
from d2v_ds.cli import main
from d2v_ds.convert.consolidate import write_export
from d2v_ds.convert.fairseq_write import write_fairseq
from d2v_ds.convert.stored import Stored
from d2v_ds.modalities.build import build_model
from d2v_ds.model.heads import HEAD, HeadConfig, build_head
from d2v_ds.recipe import load_recipe

WIDTH = 96


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of each fenced block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def store(recipe_name: str, head: HeadConfig | None = None) -> Stored:
    recipe = load_recipe(recipe_name)
    torch.manual_seed(0)
    model = build_model(recipe.body, recipe.modalities)
    tensors = {name: p.detach() + 0.05 * torch.randn(p.shape) for name, p in model.named_parameters()}
    if head is not None:
        parameters = build_head(head, recipe.body.dim).state_dict()
        tensors |= {HEAD + name: tensor for name, tensor in parameters.items()}
    return Stored(recipe, tensors, "run, step_00000001", files=SAMPLE, head=head, step=1, weights="both")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the documents name: small models under the names of large ones, and a few files."""
    folder = tmp_path_factory.mktemp("use")
    for name in ("image", "audio", "text"):
        write_export(store(f"{name}_tiny"), folder / "checkpoints" / f"{name}_base")
    write_export(store("multimodal_tiny"), folder / "checkpoints" / "try")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    (folder / "photos" / "2024").mkdir(parents=True)
    for name in ("photo.jpg", "photo2.jpg", "photos/a.jpg", "photos/2024/b.png"):
        Image.fromarray(pixels).save(folder / name)
    (folder / "photos" / "broken.jpg").write_bytes(b"no picture")
    soundfile.write(folder / "speech.flac", np.sin(np.arange(30_000) / 20), 16_000)
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("The digit seven.")
    (folder / "shards").mkdir()
    shutil.copyfile(SAMPLE / "multimodal-val-000000.tar", folder / "shards" / "train-000000.tar")
    for part in ("train", "test"):
        shutil.copyfile(SAMPLE / "multimodal-val-000000.tar", folder / f"labelled-{part}-000000.tar")
    shutil.copyfile(write_fairseq(store("audio_tiny"), folder / "theirs_audio"), folder / "base_libri.pt")
    head = HeadConfig(kind="image_classification", outputs=10)
    tuned = store("image_tiny", head)
    student = {name: t for name, t in tuned.tensors.items() if not name.startswith(("teacher.", "decoders."))}
    file = write_fairseq(replace(tuned, tensors=student, weights="student"), folder / "theirs_tuned")
    shutil.copyfile(file, folder / "finetuned.pt")
    model = Data2VecMultiModel(Data2VecMultiConfig(), modalities=D2vModalitiesConfig.image, skip_ema=True)
    torch.save({"model": {name: t.half() for name, t in model.state_dict().items()}}, folder / "base.pt")
    return folder


def run_all(text: str, folder: Path, names: dict[str, Any], capsys: pytest.CaptureFixture) -> int:
    """Python blocks in one namespace, lines of shell blocks as commands; how many there were."""
    count = 0
    for language, content in blocks(text):
        assert language in ("python", "bash"), f"a block of {language!r} would not be run"
        if language == "python":
            exec(compile(content, "document", "exec"), names)
            count += 1
            continue
        for line in content.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "d2v", line
            assert main(arguments) == 0, f"{line}\n{capsys.readouterr().err}"
            count += 1
    return count


def test_the_documents_blocks_run(folder, monkeypatch, capsys):
    """docs/use.md, from top to bottom, and what its comments promise of shapes."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    assert run_all((ROOT / "docs" / "use.md").read_text(), folder, names, capsys) == 14
    f = names["f"]
    assert f.x.shape[0] == 2 and f.mask.any() and f.pooled.shape == (2, WIDTH)
    assert names["features"].shape == (1, 196, 768)
    assert names["names"] == ["2024/b.png", "a.jpg"] and names["embeddings"].shape == (2, WIDTH)
    assert "broken.jpg" in (folder / "photos.bad.jsonl").read_text()
    assert np.load("layers.npy").shape == (2, 4, WIDTH)
    assert len(np.load("train.npy")) == len((folder / "train.jsonl").read_text().splitlines()) == 120
    assert np.array(pq.read_table("tokens.parquet")["embedding"][0].as_py()).shape[1] == WIDTH
    assert names["encoder"].logits("photo.jpg").shape == (1, 10)


def test_the_readmes_blocks_run(folder, monkeypatch, capsys):
    """The section Use."""
    monkeypatch.chdir(folder)
    text = (ROOT / "README.md").read_text()
    section = text[text.index("\n## Use\n") : text.index("\n## What lies where")]
    names: dict[str, Any] = {"waveform": torch.randn(9000)}
    shutil.rmtree("theirs", ignore_errors=True)
    (folder / "photos.parquet").unlink(missing_ok=True)
    assert run_all(section, folder, names, capsys) == 6
    assert names["features"].shape[0] == 2 and names["f"].layers[0].shape == names["f"].x.shape
    assert (folder / "theirs" / "config.json").is_file() and (folder / "exported" / "README.md").is_file()

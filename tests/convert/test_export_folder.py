"""A folder holds one export: an older one of its format goes whole, one of another format is not mixed with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from stores import store

import d2v_ds
from d2v_ds.cli import main
from d2v_ds.convert.consolidate import export, write_export
from d2v_ds.convert.folder import format_of, staged


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(replace(store("image"), files=None), tmp_path_factory.mktemp("ours") / "image")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_of_another_format_is_refused_and_stays_as_it_is(ours, tmp_path, capsys):
    out = export(ours, tmp_path / "out", format="fairseq")
    before = {path: path.read_bytes() for path in out.iterdir()}
    for format in ("safetensors", "hf", "onnx"):
        code = main(["export", str(ours), "--out", str(out), "--format", format])
        assert (
            code == 2 and "holds an export of format fairseq, and a folder holds" in capsys.readouterr().err
        )
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(ValueError, match="holds an export of format safetensors"):
        export(ours, ours, format="fairseq")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"format": "d2v_ds"}, "safetensors"),
        ({"model_type": "data2vec-audio"}, "hf"),
        ({"anything": 1}, None),
        ([1], None),
    ],
)
def test_what_lies_in_a_folder_is_told_by_its_config(config, expected, tmp_path):
    assert format_of(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert format_of(tmp_path) == expected
    (tmp_path / "model.onnx").touch()
    assert format_of(tmp_path) == "onnx"


def test_an_older_export_of_the_format_leaves_nothing_behind(tmp_path):
    """Files of others stay."""
    out = tmp_path / "out"
    write_export(store("text"), out)
    assert "sentencepiece.model" in names(out)
    (out / "model-00001-of-00002.safetensors").touch()
    (out / "notes.txt").touch()
    write_export(replace(store("image"), files=None), out)
    assert names(out) == {"config.json", "model.safetensors", "README.md", "notes.txt", "sentencepiece.model"}
    assert d2v_ds.load(out).modality == "image"
    (out / "other.model").touch()
    write_export(store("text"), out)  # has its own tokenizer
    assert names(out) == {"config.json", "model.safetensors", "README.md", "notes.txt", "sentencepiece.model"}


def test_nothing_changes_if_writing_fails(ours):
    before = names(ours)
    with pytest.raises(RuntimeError), staged(ours, "safetensors") as folder:
        (folder / "model.safetensors").touch()
        raise RuntimeError
    assert names(ours) == before and d2v_ds.load(ours).modality == "image"
    assert not list(ours.parent.glob(".tmp-*"))

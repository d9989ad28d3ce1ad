"""What other tools wrote beside shards: read where it helps, compared with what is found, never changed."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from layouts import clap, energon, img2dataset, timm, wenet, write_tar

from d2v_ds.cli import main
from d2v_ds.data import Corpus, expand_shards
from d2v_ds.modalities.source import shard_pattern


def found(data: Path | str, fields: str, shards: str = "*.tar") -> Corpus:
    return Corpus.open(
        expand_shards(shard_pattern(str(data), shards)), {"field": fields}, workers=1, progress=None
    )


@pytest.mark.parametrize(
    ("write", "fields", "samples"),
    [
        (timm, "jpg", 16),
        (img2dataset, "jpg;txt", 16),
        (clap, "json.text", 8),
        (wenet, "wav", 16),
        (energon, "jpg", 12),
    ],
)
def test_each_layout_is_read_as_it_is_without_a_warning(write, fields, samples, tmp_path, caplog):
    """What failed to download is no sample; what Energon keeps for validation is not trained on."""
    root = write(tmp_path / "my data [v1.0] {x}")
    theirs = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    corpus = found(root, fields)
    assert len(corpus) == samples and all(corpus.read(i)["field"] for i in range(samples))
    assert not caplog.records
    assert {path: path.read_bytes() for path in theirs} == theirs
    folder = root / "shards" if write is energon else root
    assert main(["verify", str(folder)]) == 0


def test_several_texts_of_one_sound_are_lines(tmp_path):
    corpus = found(clap(tmp_path), "json.text")
    texts = [corpus.read(i)["field"].decode() for i in range(8)]
    assert [text.count("\n") for text in texts] == [1, 0] * 4 and "[" not in "".join(texts)


def test_counts_that_differ_are_named(tmp_path, caplog, capsys):
    """At the first look by a warning, by `d2v verify` as wrong."""
    roots = [timm(tmp_path / "timm"), img2dataset(tmp_path / "img2dataset"), energon(tmp_path / "energon")]
    info = json.loads((roots[0] / "_info.json").read_text())
    info["splits"]["train"]["shard_lengths"][1] = 9
    info["splits"]["train"]["filenames"].append("imagenet1k-train-0002.tar")
    (roots[0] / "_info.json").write_text(json.dumps(info))
    (roots[1] / "00001.parquet").write_bytes((roots[1] / "00000.parquet").read_bytes())
    (roots[1] / "00001_stats.json").write_text(json.dumps({"count": 10, "successes": 7}))
    text = (roots[2] / ".nv-meta/.info.yaml").read_text()
    (roots[2] / ".nv-meta/.info.yaml").write_text(text.replace("001.tar: 6", "001.tar: 5"))
    with caplog.at_level(logging.WARNING):
        for root in roots:
            Corpus.open(
                expand_shards(shard_pattern(str(root), "*.tar")), {"f": "jpg"}, workers=1, progress=None
            )
    said = caplog.text
    assert "imagenet1k-train-0001.tar: it has 8 samples, _info.json says 9" in said
    assert "_info.json lists 1 shards that are not there, imagenet1k-train-0002.tar" in said
    assert "00001.tar: it has 8 samples, 00001_stats.json says 7" in said and "00001.parquet" not in said
    assert "shard_001.tar: it has 6 samples, .nv-meta/.info.yaml says 5" in said
    assert main(["verify", *map(str, roots[:2]), str(roots[2] / "shards")]) == 1
    assert "3 shards are not in order" in capsys.readouterr().out


def test_an_index_of_another_tool_that_differs_stays_and_is_not_used(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("D2V_INDEX_DIR", str(tmp_path / "indexes"))
    root = energon(tmp_path / "data")
    first, second = sorted((root / "shards").glob("*0[01].tar.idx"))
    first.write_bytes(first.read_bytes()[:-16])
    ends = np.fromfile(second, dtype="<u8")
    ends[-1] = second.with_suffix("").stat().st_size  # as Lhotse ends it: no other samples, no warning
    ends.tofile(second)
    before = first.read_bytes(), second.read_bytes()
    for _ in range(2):
        assert len(found(root, "jpg")) == 12
    assert (first.read_bytes(), second.read_bytes()) == before
    assert [record.getMessage().partition(" names ")[0] for record in caplog.records] == [str(first)]


def test_what_lies_beside_shards_and_samples_is_passed_over(tmp_path):
    """README, hidden files of macOS, folders inside the tar, upper-case endings, samples of another kind."""
    root = wenet(tmp_path / "two kinds")
    write_tar(
        root / "pictures.tar",
        {
            "README.md": "of the tar", "./train/n.01/A b.JPG": b"one", "train/n.01/._A b.jpg": b"x",
            "train/c.jpeg": b"two", "__MACOSX/train/._c.jpeg": b"x", "LICENSE": "y",
        },
    )  # fmt: skip
    (root / "README.md").write_text("of the folder")
    (root / "._pictures.tar").write_bytes(b"\0\5\x16\7")
    corpus = found(root, "jpg;jpeg")
    assert [corpus.read(i)["field"] for i in range(len(corpus))] == [b"one", b"two"]


def test_an_error_says_where_the_tars_are(tmp_path):
    root = timm(tmp_path / "repo/data").parent
    with pytest.raises(ValueError, match="Below it there are tars in .*repo/data$"):
        found(root, "jpg")
    with pytest.raises(ValueError, match="holds 2 tars: imagenet1k-train-0000.tar"):
        found(root / "data", "jpg", "*-val-*.tar")
    assert len(found(f"{root}/**/*.tar", "jpg")) == 16

"""What other tools wrote beside shards: read where it helps, compared with what is found, never changed."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from bad_server import Site, serve
from layouts import clap, energon, img2dataset, timm, wenet, write_tar

from d2v_ds.cli import main
from d2v_ds.data import Corpus, expand_shards
from d2v_ds.data.remote import Remote, reading
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


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", '{"splits": {"train": {"shards": ["a.tar"]}}}'),
        (
            "manifest.json",
            '{"splits": {"train": {"shards": [{"file": ["a.tar"], "size": "x", "sha256": 5}]}}}',
        ),
        ("manifest.json", '{"splits": {"train": {"shards": 5}}}'),
        ("_info.json", '{"splits": {"train": {"filenames": 3, "shard_lengths": 5}}}'),
        ("_info.json", '{"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": ["many"]}}}'),
        ("_info.json", "[" * 5_000),
        ("a_stats.json", "day: 2024-13-45"),
    ],
)
def test_what_is_not_understood_is_left_alone(tmp_path, caplog, file, content):
    """Files of these names are of many tools."""
    write_tar(tmp_path / "a.tar", {"a.txt": "x"})
    (tmp_path / file).write_text(content)
    assert len(found(tmp_path, "txt")) == 1 and not caplog.records
    assert main(["verify", str(tmp_path)]) == 0


def test_a_shard_of_which_all_downloads_failed_is_left_out(tmp_path, caplog):
    """Here and at a URL; one that is said to hold something, or of which nothing is said, stays an error."""
    root = img2dataset(tmp_path / "laion", shards=3)
    tar, stats = root / "00001.tar", root / "00001_stats.json"
    (root / "00001.parquet").unlink()  # it says 8
    tar.write_bytes(bytes(10_240))
    failed = json.dumps({"count": 10, "successes": 0})
    for said, is_right in ((failed, True), ('{"successes": 8}', False), ("{}", False)):
        stats.write_text(said)
        assert [bool(main([command, str(root)])) for command in ("verify", "index")] == [not is_right] * 2
        with serve(Site({path.name: path.read_bytes() for path in root.iterdir()})) as url:
            for data in (root, url):
                caplog.clear()
                with reading(Remote(cache=str(tmp_path / f"cache{len(said)}"), retry_minutes=0.01)):
                    names = f"{data}/{{00000..00002}}.tar"
                    if is_right:
                        assert len(found(names, "jpg")) == 16
                        assert "1 of 3 shards are left out" in caplog.text and "00001.tar" in caplog.text
                    else:
                        with pytest.raises(ValueError, match="00001.tar holds no sample"):
                            found(names, "jpg")
    stats.write_text(failed)
    with pytest.raises(ValueError, match="00001.tar holds no sample"):
        found(tar, "jpg")


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


def exclude(root: Path, *entries: str) -> None:
    file = root / ".nv-meta/split.yaml"
    file.write_text(file.read_text().replace("exclude: []", f"exclude: {json.dumps(entries)}"))


def test_what_energon_excludes_is_left_out_of_training_and_of_explicit_shards(tmp_path, caplog):
    """Samples and whole shards, with braces, twice; by every name of the shards; told, and part of the fingerprint."""
    whole = found(energon(tmp_path / "whole"), "jpg")
    root = energon(tmp_path / "data", shards=4)
    exclude(
        root, "shards/shard_000.tar/00000{1,4}", "shards/shard_000.tar/000001", "shards/shard_00{1..1}.tar"
    )
    corpus = found(root, "jpg")
    kept = ["shard_000.tar:00000" + i for i in "0235"] + [f"shard_002.tar:{200 + i:06d}" for i in range(6)]
    assert [corpus.key(i) for i in range(len(corpus))] == kept
    assert [corpus.read(i)["field"] for i in range(4)] == [whole.read(i)["field"] for i in (0, 2, 3, 5)]
    assert "2 of 12 samples of" in caplog.text and "2 excluded by .nv-meta/split.yaml" in caplog.text
    for data in (root / "shards/shard_00[0-2].tar", f"{root}/shards/shard_{{000..002}}.tar"):
        named = found(data, "jpg")
        assert [named.key(i) for i in range(len(named))] == kept
        assert named.skipped == 8
    measured = Corpus.open(
        expand_shards(f"{root}/shards/shard_000.tar"),
        {"f": "txt"},
        lambda sample: len(sample["f"]),
        "n",
        workers=1,
    )
    texts = [len(measured.read(i)["f"]) for i in range(4)]
    assert measured.lengths.all().tolist() == texts == [measured.lengths.of_unit(i) for i in range(4)]
    assert measured.lengths.total(range(1)) == sum(texts)
    before = corpus.fingerprint
    exclude_none = (root / ".nv-meta/split.yaml").read_text().replace("00000{1,4}", "00000{1,3}")
    (root / ".nv-meta/split.yaml").write_text(exclude_none)
    assert found(root, "jpg").fingerprint != before


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("shards/shard_000.tar/000001.jpg", "'000001.jpg' for one; its first is '000000'"),
        ("shards/shard_000.tar/1", "excludes 1 samples that .*shard_000.tar does not have"),
        ("shard_000.tar/000001", "excludes 'shard_000.tar', or .* as 'shards/shard_000.tar'"),
        ("000001", "excludes '000001', which is neither a shard"),
        (1, "exclude is .*, no list of names"),
        ("shards/shard_00{0..1}.tar", "excludes all 2 shards of its part `train`"),
    ],
)
def test_an_exclude_list_that_is_not_understood_is_an_error_that_names_the_file(entry, message, tmp_path):
    root = energon(tmp_path)
    exclude(root, entry)
    with pytest.raises(ValueError, match=message) as error:
        found(root, "jpg")
    assert str(root / ".nv-meta/split.yaml") in str(error.value)


def test_a_split_that_cannot_be_read_is_an_error(tmp_path):
    """Else excluded samples would be trained on, and those for validation."""
    root = energon(tmp_path)
    (root / ".nv-meta/split.yaml").write_text("exclude: [unclosed\nsplit_parts: {")
    with pytest.raises(ValueError, match="split.yaml cannot be read, so what it excludes is not known"):
        found(root, "jpg")
    with pytest.raises(ValueError, match="split.yaml cannot be read"):
        found(root / "shards", "jpg")


def test_commands_take_an_energon_folder_whose_shards_lie_below_it(tmp_path, capsys, monkeypatch):
    """All parts of it; a shard that is excluded may be gone."""
    monkeypatch.chdir(tmp_path)  # where the preview goes
    root = energon(tmp_path / "a [set]")
    exclude(root, "shards/shard_000.tar")
    (root / "shards/shard_000.tar").unlink()
    for command in ("index", "verify", "preview"):
        assert main([command, str(root)]) == 0
        said = capsys.readouterr().out
        assert "12 samples" in said, said
    assert len(list(root.glob("shards/*.members.npy"))) == 2
    (root / ".nv-meta/split.yaml").write_text("split_parts: [broken")
    (root / "shards").rename(tmp_path / "flat")
    (root / ".nv-meta").rename(tmp_path / "flat/.nv-meta")
    assert main(["verify", str(tmp_path / "flat")]) == 0  # which needs none of it


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

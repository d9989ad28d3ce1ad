"""`d2v prepare folder`: every file of a tree or a table comes out byte for byte, or is listed with the reason."""

import csv
import json
import os
from pathlib import Path
from urllib.parse import unquote

import pytest
from trees import all_bytes, noise, prepare, read_shards, skipped, write_images, write_tree

from d2v_ds.data import Corpus, ensure_index, expand_shards
from shards.command import build_parser
from shards.folder import MODALITIES, make_name
from shards.listing import MAX_KEY, make_key


def fold(source: Path, out: Path, *more: object) -> dict[str, dict[str, bytes]]:
    status, said = prepare("folder", source, "--out", out, "--workers", 1, *more)
    assert status == 0, said
    return read_shards(out)


def refuse(*arguments: object) -> str:
    status, said = prepare("folder", *arguments)
    assert status == 2 and said.startswith("error: "), said
    return said


# ---- a tree ----


def test_every_file_comes_out_byte_for_byte_under_a_key_that_gives_its_name_again(tmp_path):
    """Names with dots, spaces and other scripts; capital endings become small."""
    source = write_images(tmp_path / "photos")
    samples = fold(source, tmp_path / "out", "--shard-mib", 0.05)
    files = {path.relative_to(source): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    assert len(samples) == len(files) == 60
    for path, content in files.items():
        stem, ending = os.path.splitext(path)
        assert samples[make_key(stem)] == {ending[1:].lower(): content}
        assert unquote(make_key(stem)) == stem and make_key(stem).isascii()
        assert not set(make_key(stem)) & set(". ")
    assert len(list((tmp_path / "out").glob("photos-train-*.tar"))) > 3


def test_shards_are_indexed_and_named_in_the_manifest_with_the_fingerprint_that_training_sees(tmp_path):
    out = tmp_path / "out"
    fold(write_images(tmp_path / "photos"), out, "--shard-mib", 0.05)
    manifest = json.loads((out / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    lines = []
    indexes = ensure_index(expand_shards(str(out)), progress=lines.append)
    assert lines == []  # nothing was left to index
    assert [row["file"] for row in train["shards"]] == [index.path.name for index in indexes]
    assert [row["samples"] for row in train["shards"]] == [index.num_samples for index in indexes]
    assert train["samples"] == 60 and not (out / ".prepare").exists()
    corpus = Corpus.open(expand_shards(str(out)), {"image": "jpg;jpeg;png;webp"})
    assert corpus.fingerprint == train["fingerprint"]
    info = json.loads((out / "_info.json").read_text())["splits"]["train"]
    assert info["num_samples"] == sum(info["shard_lengths"]) == 60


def test_shards_have_the_size_that_was_asked_for(tmp_path):
    """None is larger, but for the end of the archive; all but the last are nearly full."""
    fold(write_images(tmp_path / "photos"), tmp_path / "out", "--shard-mib", 0.05)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    limit = round(0.05 * (1 << 20))
    assert max(sizes) <= limit + 2 * 10240 and min(sizes[:-1]) > limit - 10240


def test_the_order_is_drawn_from_the_seed(tmp_path):
    """Another seed, another order; not the order of names."""
    source = write_images(tmp_path / "photos")
    keys = [list(fold(source, tmp_path / f"seed{seed}", "--seed", seed)) for seed in (0, 1)]
    assert sorted(keys[0]) == sorted(keys[1])
    assert keys[0] != keys[1] and keys[0] != sorted(keys[0])


def test_two_runs_write_the_same_bytes_whatever_the_number_of_workers(tmp_path):
    source = write_images(tmp_path / "photos")
    for workers in (1, 3):
        arguments = ("--shard-mib", 0.03, "--workers", workers, "--labels", "folder", "--val", 0.2)
        assert prepare("folder", source, "--out", tmp_path / f"{workers}", *arguments)[0] == 0
    first, second = all_bytes(tmp_path / "1"), all_bytes(tmp_path / "3")
    assert first == second and len(first) > 20


def test_folders_become_labels_and_class_names(tmp_path):
    """Sorted; a file in no folder is left out, and said."""
    source = write_images(tmp_path / "photos", 30)
    write_tree(source, {"loose.jpg": b"x", "loose.txt": b"y"})
    samples = fold(source, tmp_path / "out", "--labels", "folder")
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["a", "b", "c"]
    assert len(samples) == 30
    assert all(members["cls"] == b"%d" % "abc".index(key[0]) for key, members in samples.items())
    loose = [str(source / name) for name in ("loose.jpg", "loose.txt")]
    assert skipped(tmp_path / "out") == dict.fromkeys(loose, "lies in no folder, so it has no label")


def test_the_label_of_a_folder_is_not_that_of_a_file(tmp_path):
    """Numbers of a file were mixed with those of the folders, which classes.json names."""
    write_tree(tmp_path / "src", {"a/1.jpg": "x", "a/1.cls": "7", "b/2.jpg": "y"})
    samples = fold(tmp_path / "src", tmp_path / "out", "--labels", "folder")
    assert {key: members["cls"] for key, members in samples.items()} == {"a/1": b"0", "b/2": b"1"}
    assert list(skipped(tmp_path / "out")) == [str(tmp_path / "src/a/1.cls")]
    assert fold(tmp_path / "src", tmp_path / "none")["a/1"]["cls"] == b"7"


def test_files_of_one_name_make_one_sample(tmp_path):
    """An image, its caption and its data; a json alone makes none."""
    files = {"a/1.jpg": b"1", "a/1.txt": "one", "a/1.json": "{}", "a/2.jpg": b"2", "b/3.json": "{}"}
    samples = fold(write_tree(tmp_path / "src", files), tmp_path / "out")
    assert samples == {"a/1": {"jpg": b"1", "txt": b"one", "json": b"{}"}, "a/2": {"jpg": b"2"}}
    assert list(skipped(tmp_path / "out").values()) == [".json goes with no image, sound or text"]


def test_two_images_of_one_name_are_two_samples(tmp_path):
    """Neither hides the other; a json of that name could belong to either, so it is left out and said, in order."""
    files = {"1.jpg": b"1", "1.png": b"2", "1.cls": "3", "1.json": "{}", "2.JPG": b"3", "2.jpg": b"4"}
    samples = fold(write_tree(tmp_path / "src", files), tmp_path / "out")
    assert samples == {
        "1%2Ejpg": {"jpg": b"1"},
        "1%2Epng": {"png": b"2"},
        "2%2EJPG": {"jpg": b"3"},
        "2%2Ejpg": {"jpg": b"4"},
    }
    assert list(skipped(tmp_path / "out")) == [str(tmp_path / "src/1.cls"), str(tmp_path / "src/1.json")]


def test_a_modality_can_be_chosen(tmp_path):
    files = {"1.jpg": b"1", "1.txt": "one", "readme.txt": "no image"}
    source = write_tree(tmp_path / "src", files)
    assert fold(source, tmp_path / "out", "--modality", "image") == {"1": {"jpg": b"1"}}
    assert set(skipped(tmp_path / "out").values()) == {".txt is text, not taken"}


def test_a_share_of_samples_is_for_validation_and_stays_there_when_others_come(tmp_path):
    source = write_images(tmp_path / "photos", 200)
    fold(source, tmp_path / "out", "--val", 0.25)
    train, val = (set(read_shards(tmp_path / "out", f"*-{split}-*.tar")) for split in ("train", "val"))
    assert len(train) + len(val) == 200 and not train & val and 25 < len(val) < 75
    write_tree(source, {f"more/{i}.jpg": b"x" for i in range(100)})
    fold(source, tmp_path / "again", "--val", 0.25)
    assert {key for key in read_shards(tmp_path / "again", "*-val-*.tar") if key[:4] != "more"} == val


def test_whatever_cannot_be_read_is_listed_and_counted(tmp_path):
    """Empty files, dead links, pipes, folders that lead into themselves, hidden files, unknown kinds."""
    source = write_tree(
        tmp_path / "src", {"good.jpg": b"x", "empty.jpg": b"", ".hid.jpg": b"h", "x.xml": "x"}
    )
    (source / "dead.jpg").symlink_to("nowhere")
    (source / "itself.jpg").symlink_to("itself.jpg")
    (source / "sub").mkdir()
    (source / "sub/loop").symlink_to(source)
    os.mkfifo(source / "pipe.jpg")
    (source / "link.jpg").symlink_to(source / "good.jpg")
    samples = fold(source, tmp_path / "out")
    assert set(samples) == {"good", "link"}
    assert {Path(file).name: reason for file, reason in skipped(tmp_path / "out").items()} == {
        "empty.jpg": "is empty",
        ".hid.jpg": "is hidden",
        "x.xml": ".xml is of no known kind",
        "dead.jpg": "No such file or directory",
        "itself.jpg": "Too many levels of symbolic links",
        "loop": "is a link to a folder above it",
        "pipe.jpg": "is no plain file",
    }
    assert json.loads((tmp_path / "out/manifest.json").read_text())["skipped"] == 7
    assert b"7 left out" in prepare("folder", source, "--out", tmp_path / "two")[1].encode()


def test_names_that_are_no_utf8_and_names_that_are_too_long_are_taken(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    names = [b"latin\xe9.jpg", "\u6f22".encode() * 70 + b".jpg", "\u6f22".encode() * 70 + b"2.jpg"]
    for number, name in enumerate(names):
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_bytes(b"%d" % number)
    samples = fold(source, tmp_path / "out")
    assert sorted(members["jpg"] for members in samples.values()) == [b"0", b"1", b"2"]
    assert "latin%E9" in samples and max(map(len, samples)) <= MAX_KEY
    assert len(ensure_index(expand_shards(str(tmp_path / "out")))) == 1


def test_a_file_that_changes_or_goes_after_it_was_listed_is_left_out_and_said(tmp_path, monkeypatch):
    """The others are packed; with many gone the run stops, since the source may be away."""
    import shards.prepare as module

    source = write_images(tmp_path / "photos", 30)
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    plan = module.plan_shards
    gone = [paths[3]]

    def change(*arguments):
        for path in gone:
            path.unlink()
        return plan(*arguments)

    monkeypatch.setattr(module, "plan_shards", change)
    assert len(fold(source, tmp_path / "out")) == 29
    assert skipped(tmp_path / "out") == {str(paths[3]): "No such file or directory"}
    gone[:] = paths[5:20]
    said = refuse(source, "--out", tmp_path / "two", "--workers", 1)
    assert "cannot be read any more" in said and "bring it back" in said


def test_names_that_a_reader_of_tars_would_pass_over_are_written_so_that_it_does_not(tmp_path):
    """Members in `__x__/` are metadata to it, and those without a name before the dot no samples."""
    source = write_tree(tmp_path / "src", {"__a__/1.jpg": b"1", "b/__c__/2.jpg": b"2"})
    assert set(fold(source, tmp_path / "out")) == {"%5F_a__/1", "b/__c__/2"}
    assert len(Corpus.open(expand_shards(str(tmp_path / "out")), {"image": "jpg"})) == 2
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"key": k, "text": "a"}) + "\n" for k in ("a/", "/", 0))
    )
    fold(tmp_path / "t.jsonl", tmp_path / "table")
    corpus = Corpus.open(expand_shards(str(tmp_path / "table")), {"text": "txt"})
    assert {corpus.key(i).partition(":")[2] for i in range(len(corpus))} == {"a%2F", "%2F", "0"}


# ---- tables ----


def test_tables_of_all_kinds_give_the_same_samples(tmp_path):
    """csv, tsv and jsonl, with label, text, split and other columns."""
    source = write_tree(tmp_path / "src", {f"a b/{i}.flac": noise(i, 50 + i) for i in range(6)})
    rows = [
        {
            "path": f"a b/{i}.flac",
            "label": ["dog", "cat"][i % 2],
            "text": f'he said "{i}", twice',
            "split": ["train", "test"][i // 4],
            "speaker": f"s{i}",
        }
        for i in range(6)
    ]
    with (source / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    (source / "t.tsv").write_text("\n".join(lines) + "\n")
    (source / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = {
        f"a%20b/{i}": {
            "flac": noise(i, 50 + i),
            "txt": row["text"].encode(),
            "cls": b"%d" % (row["label"] == "dog"),
            "json": json.dumps({"speaker": row["speaker"]}).encode(),
        }
        for i, row in enumerate(rows)
    }
    for kind in ("csv", "tsv", "jsonl"):
        out = tmp_path / kind
        assert fold(source / f"t.{kind}", out) == expected
        assert json.loads((out / "classes.json").read_text()) == ["cat", "dog"]
        assert set(read_shards(out, "*-test-*.tar")) == {"a%20b/4", "a%20b/5"}


def test_a_manifest_of_fairseq_is_read_as_it_is(tmp_path):
    """First the root, then path and frames."""
    source = write_tree(tmp_path / "src", {f"{i}/x.flac": noise(i, 40) for i in range(3)})
    table = tmp_path / "train.tsv"
    table.write_text(f"{source}\n" + "".join(f"{i}/x.flac\t16000\n" for i in range(3)))
    assert fold(table, tmp_path / "out") == {f"{i}/x": {"flac": noise(i, 40)} for i in range(3)}


def test_a_table_of_texts_needs_no_files(tmp_path):
    table = tmp_path / "texts.jsonl"
    table.write_text(
        "".join(json.dumps({"text": f"text {i}\nof two lines", "id": i}) + "\n" for i in range(3))
    )
    samples = fold(table, tmp_path / "out")
    assert samples["000000002"] == {"txt": b"text 2\nof two lines", "json": b'{"id": 2}'}
    several = write_tree(tmp_path, {"several.jsonl": '{"text": ["one", "two"]}\n{"text": 3}\n'})
    samples = fold(several / "several.jsonl", tmp_path / "several")
    assert samples == {"000000000": {"txt": b"one\ntwo"}, "000000001": {"txt": b"3"}}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_row_ends_at_a_line_feed_and_nowhere_else(tmp_path, kind):
    """Captions of the web hold U+2028, U+0085 and form feeds, and may be long."""
    texts = ["a\u2028b", "c\u0085d", "e\x0cf\x0bg\x1ch", "i\rj", "x" * 200_000]
    write = {
        "csv": lambda: "text\n" + "\n".join(f'"{text}"' for text in texts) + "\n",
        "tsv": lambda: "text\tn\n" + "\n".join(f"{text}\t1" for text in texts),
        "jsonl": lambda: "\n \n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts),
    }
    write_tree(tmp_path, {f"t.{kind}": write[kind]()})
    samples = fold(tmp_path / f"t.{kind}", tmp_path / "out")
    assert [samples[key]["txt"].decode() for key in sorted(samples)] == texts


def test_labels_that_are_whole_numbers_stay_and_other_numbers_are_no_classes(tmp_path):
    source = write_tree(tmp_path / "src", {"1.jpg": b"1", "2.jpg": b"2"})
    (source / "whole.csv").write_text("path,label\n1.jpg,7\n2.jpg,-1\n")
    (source / "real.csv").write_text("path,label\n1.jpg,7\n2.jpg,0.5\n")
    whole = fold(source / "whole.csv", tmp_path / "whole")
    assert {key: members["cls"] for key, members in whole.items()} == {"1": b"7", "2": b"-1"}
    real = fold(source / "real.csv", tmp_path / "real")
    assert real["2"] == {"jpg": b"2", "json": b'{"label": "0.5"}'}
    assert not (tmp_path / "real/classes.json").exists()
    (source / "names.csv").write_text("path,label\n1.jpg,10\n2.jpg,1_0\n")
    names = fold(source / "names.csv", tmp_path / "names")
    assert {key: members["cls"] for key, members in names.items()} == {"1": b"0", "2": b"1"}


def test_a_label_of_nothing_but_space_is_none(tmp_path):
    source = write_tree(tmp_path, {"1.jpg": b"1", "2.jpg": b"2", "t.csv": "path,label\n1.jpg,7\n2.jpg,  \n"})
    samples = fold(source / "t.csv", tmp_path / "out")
    assert samples["1"] == {"jpg": b"1", "cls": b"7"} and samples["2"] == {"jpg": b"2"}
    assert not (tmp_path / "out" / "classes.json").exists()


def test_two_files_of_one_name_in_a_table_are_two_samples(tmp_path):
    files = {"a.jpg": b"1", "a.png": b"2", "b.jpg": b"3", "t.csv": "path\na.jpg\na.png\nb.jpg\nb.jpg\n"}
    samples = fold(write_tree(tmp_path, files) / "t.csv", tmp_path / "out")
    assert samples == {"a%2Ejpg": {"jpg": b"1"}, "a%2Epng": {"png": b"2"}, "b": {"jpg": b"3"}}
    assert list(skipped(tmp_path / "out").values()) == ["key b is there already"]


def test_rows_without_their_file_and_rows_that_come_twice_are_listed(tmp_path):
    source = write_tree(tmp_path / "src", {"1.jpg": b"1"})
    (source / "t.csv").write_text("path\n1.jpg\nnone.jpg\n1.jpg\nx.xml\n")
    assert set(fold(source / "t.csv", tmp_path / "out")) == {"1"}
    assert skipped(tmp_path / "out") == {
        str(source / "none.jpg"): "No such file or directory",
        str(source / "1.jpg"): "key 1 is there already",
        str(source / "x.xml"): "row 4: .xml is of no kind that is taken",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "a,b\n1,2\n", "none says where files are"),
        ("t.csv", "path,b\n1.jpg\n", "row 2 has more or fewer fields"),
        ("t.csv", b"path\n\xff\xfe\n", "is not UTF-8"),
        ("t.csv", 'path,text\n1.jpg,x\n2.jpg,"a"b\n', "t.csv, line 3: ',' expected after '\"'"),
        ("t.csv", 'path,text\n1.jpg,"a\n', "unexpected end of data; close each quote"),
        ("t.csv", "path,text,text\n1.jpg,a,b\n", "has the column text twice"),
        ("t.csv", "path,text\n", "t.csv holds no row"),
        ("t.csv", "path,text\na.txt,b\n", "row 1 names the file a.txt and has a text too"),
        ("t.jsonl", '{"path": "a.jpg"}\n{"path"\n', "line 2 is no JSON"),
        ("t.jsonl", "[1]\n", "line 1 is no JSON object"),
        ("t.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', "line 2 has half of a pair of surrogates"),
        ("t.jsonl", "[" * 100_000, "line 1 is no JSON (maximum recursion"),
        ("t.jsonl", '{"text": "a"}\n{"text": {"en": "b"}}\n', "row 2: text {'en': 'b'} is neither"),
        ("t.jsonl", '{"path": "1.jpg", "split": "a/b"}\n', "split 'a/b' becomes part of file names"),
        ("t.parquet", "", "neither a folder nor a table"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_its_place(tmp_path, name, content, message):
    source = write_tree(tmp_path, {name: content})
    assert message in refuse(source / name, "--out", tmp_path / "out")


# ---- what is refused ----


def test_an_empty_folder_and_one_without_samples_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no sample: it is empty" in refuse(tmp_path / "empty", "--out", tmp_path / "out")
    source = write_tree(tmp_path / "src", {"a.xml": "1", "b.xml": "2", "c.jpg": b""})
    assert "holds no sample: 2 .xml is of no known kind, 1 is empty" in refuse(
        source, "--out", tmp_path / "out"
    )
    assert "is not there" in refuse(tmp_path / "no", "--out", tmp_path / "out")


def test_after_a_refusal_the_right_command_works_in_the_same_folder(tmp_path):
    source = write_tree(tmp_path / "src", {"a.jpg": b"1"})
    refuse(source, "--out", tmp_path / "out", "--modality", "audio")
    assert set(fold(source, tmp_path / "out")) == {"a"}


def test_a_folder_that_holds_other_shards_is_refused(tmp_path):
    source = write_tree(tmp_path / "src", {"a.jpg": b"1"})
    write_tree(tmp_path / "out", {"other-000000.tar": b"x"})
    assert "holds 1 other tar files (other-000000.tar)" in refuse(source, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["other-000000.tar"]
    assert "lies inside" in refuse(source, "--out", source / "shards")


def test_a_finished_folder_says_so_and_refuses_other_settings(tmp_path):
    source = write_tree(tmp_path / "src", {"a.jpg": b"1"})
    fold(source, tmp_path / "out")
    before = all_bytes(tmp_path / "out")
    status, said = prepare("folder", source, "--out", tmp_path / "out")
    assert status == 0 and "is there already, complete" in said and all_bytes(tmp_path / "out") == before
    assert "was made with other settings: seed 0, now 5" in refuse(
        source, "--out", tmp_path / "out", "--seed", 5
    )
    (tmp_path / "out/src-train-000000.tar").unlink()
    assert "src-train-000000.tar is missing" in refuse(source, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--val", 1),
        ("--shard-mib", 0),
        ("--shard-mib", "inf"),
        ("--name", "a/b"),
        ("--seed", -1),
        ("--workers", -1),
        ("--workers", 0),
        ("--root", "x"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(tmp_path, arguments):
    source = write_tree(tmp_path / "src", {"a.csv": "path\na.jpg\n"})
    assert refuse(source / "a.csv", "--out", tmp_path / "out", *arguments).count("\n") == 1


def test_options_of_the_other_kind_of_source_are_refused(tmp_path):
    """They were ignored in silence."""
    source = write_tree(tmp_path / "src", {"a.jpg": b"x", "t.csv": "path,label\na.jpg,cat\n"})
    for name in ("--root", "--path-column", "--text-column", "--label-column"):
        assert f"{name} is for a table" in refuse(source, "--out", tmp_path / "out", name, "label")
    assert "--label-column" in refuse(source / "t.csv", "--out", tmp_path / "out", "--labels", "folder")


def test_a_modality_can_be_chosen_of_a_table(tmp_path):
    """The text of a row was taken with --modality image, and lost with its file with --modality text."""
    table = "path,text\na.jpg,one\nb.jpg,\nc.mp4,three\n"
    source = write_tree(tmp_path, {"a.jpg": b"A", "b.jpg": b"B", "t.csv": table}) / "t.csv"
    assert fold(source, tmp_path / "i", "--modality", "image") == {"a": {"jpg": b"A"}, "b": {"jpg": b"B"}}
    assert skipped(tmp_path / "i")[str(source)] == "row 3: its text is text, not taken"
    assert fold(source, tmp_path / "t", "--modality", "text") == {"a": {"txt": b"one"}}
    assert skipped(tmp_path / "t").keys() == {str(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.mp4")}


def test_a_split_that_is_a_number_is_one(tmp_path):
    """0 was taken for none, and became train."""
    source = write_tree(tmp_path, {"t.jsonl": '{"text": "a", "split": 0}\n{"text": "b", "split": 1}\n'})
    fold(source / "t.jsonl", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {"t-0-000000.tar", "t-1-000000.tar"}


def test_a_share_for_validation_of_rows_that_have_a_split_is_refused(tmp_path):
    source = write_tree(tmp_path, {"t.csv": "text,split\na,train\nb,\n", "u.csv": "text,split\na,train\n"})
    fold(source / "t.csv", tmp_path / "out", "--val", 0.5)
    assert "every row of" in refuse(source / "u.csv", "--out", tmp_path / "other", "--val", 0.5)


def test_a_list_given_in_pieces_is_all_of_it():
    """Of an option that came twice the last one counted alone."""

    def parse(line: str):
        return build_parser("x").parse_args(line.split())

    given = parse("folder x --out y --modality image --modality audio text")
    assert given.modality == ["image", "audio", "text"]
    given = parse("librispeech --out y --parts dev-clean --parts test-clean")
    assert given.parts == ["dev-clean", "test-clean"]
    given = parse("table x --out y --classes a b --classes c --columns text --columns label")
    assert given.classes == ["a", "b", "c"] and given.columns == ["text", "label"]


def test_the_endings_are_those_that_inputs_take():
    """One list for shards and for files given to an encoder."""
    from d2v_ds.modalities.audio import inputs as audio
    from d2v_ds.modalities.image import inputs as image

    assert MODALITIES["image"] == image.EXTENSIONS and MODALITIES["audio"] == audio.EXTENSIONS


def test_validation_is_never_found_as_training(tmp_path: Path) -> None:
    """Recipes read *train*.tar: a table or folder that is called so must not name the shards of all splits."""
    for name, expected in (
        ("train.csv", "data"),
        ("my-trainset", "data"),
        ("val", "data"),
        ("clips.tsv", "clips"),
    ):
        assert make_name(tmp_path / name) == expected

"""The index finds what webdataset finds; the corpus reads it, and says what it leaves out."""

import gc
import io
import json
import logging
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tars import payload, write_tar

from d2v_ds.cli import main
from d2v_ds.data import Corpus, CorruptSample, build_index, ensure_index, expand_shards, shard

Writer = Callable[..., list[Path]]

FIELDS = {"content": "bin", "label": "cls"}


def from_webdataset(path: Path) -> list[dict]:
    return list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))


def open_quietly(paths: list[Path], *args, **kwargs) -> Corpus:
    return Corpus.open(paths, *args, progress=None, workers=1, **kwargs)


def test_corpus_reads_what_webdataset_reads(write_shards: Writer) -> None:
    paths = write_shards()
    corpus = open_quietly(paths, FIELDS)
    expected = [sample for path in paths for sample in from_webdataset(path)]
    assert len(corpus) == len(expected) == 21
    for i, sample in enumerate(expected):
        assert corpus.read(i) == {"content": sample["bin"], "label": sample["cls"]}
        assert corpus.key(i) == f"{paths[i // 7].name}:{sample['__key__']}"


def test_offsets_are_energons(write_shards: Writer, tmp_path: Path) -> None:
    """N + 1 little-endian uint64; each slice is a tar of one sample; the last ends the last one."""
    path = write_shards(shards=1)[0]
    build_index(path)
    content = path.with_suffix(".tar.idx").read_bytes()
    offsets = struct.unpack(f"<{len(content) // 8}Q", content)
    tar = path.read_bytes()
    assert len(offsets) == 8 and offsets[0] == 0
    assert not any(tar[offsets[-1] :]) and len(tar) >= offsets[-1] + 1024
    for sample, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        (tmp_path / "piece.tar").write_bytes(tar[start:end] + bytes(1024))
        (piece,) = from_webdataset(tmp_path / "piece.tar")
        assert piece["__key__"] == f"part/0-{sample:05d}" and piece["bin"] == payload(0, sample)


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_work(tmp_path: Path, tar_format: int) -> None:
    keys = ["k" * 150, "dir.v1/" + "d" * 120 + "/a", "\u00e9t\u00e9" * 50, "short"]
    members = [(f"{key}.{ext}", f"{key}.{ext}".encode()) for key in keys for ext in ("TXT", "seg.json")]
    path = write_tar(tmp_path / "a.tar", members, tar_format)
    corpus = open_quietly([path], {"text": "txt", "segments": "seg.json"})
    for i, (key, sample) in enumerate(zip(keys, from_webdataset(path), strict=True)):
        assert corpus.key(i) == f"a.tar:{key}" and sample["__key__"] == key
        assert corpus.read(i) == {"text": f"{key}.TXT".encode(), "segments": f"{key}.seg.json".encode()}


def test_folders_metadata_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("part.0")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("__info__/a.txt", "part.0/README", "part.0/a.txt", "part.0/._a.txt", "part.0/a.cls"):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    corpus = open_quietly([path], {"text": "txt", "label": "cls"})
    assert len(corpus) == 1 and not corpus.skipped and corpus.key(0) == "a.tar:part.0/a"
    assert corpus.read(0) == {"text": b"part.0/a.txt", "label": b"part.0/a.cls"}


def test_alternatives_are_taken_in_order_and_json_keys_are_read(tmp_path: Path) -> None:
    members = [
        ("a.json", b'{"text": "from json", "label": 7}'),
        ("b.json", b'{"text": "unused", "label": 8}'),
        ("b.txt", b"from txt"),
        ("c.json", b'{"label": [1, 2]}'),
        ("d.json", b"[1]"),
        ("e.json", b"[" * 100_000),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    corpus = open_quietly([path], {"text": "txt;json.text", "label": "cls;json.label"})
    assert corpus.read(0) == {"text": b"from json", "label": b"7"}
    assert corpus.read(1) == {"text": b"from txt", "label": b"8"}
    with pytest.raises(CorruptSample, match="a.tar:c: its JSON has no 'text'"):
        corpus.read(2)
    for i, key in ((3, "d"), (4, "e")):
        with pytest.raises(CorruptSample, match=f"a.tar:{key}: its JSON is not an object"):
            corpus.read(i)


def test_a_json_key_that_a_sample_lacks_gives_way_to_the_next_alternative(tmp_path: Path) -> None:
    members = [
        ("a.json", b'{"caption": "a caption", "text": "unused"}'),
        ("a.txt", b"unused"),
        ("b.json", b'{"caption": null, "text": ["of", "the json"]}'),
        ("b.txt", b"unused"),
        ("c.json", b'{"caption": []}'),
        ("c.txt", b"from txt"),
        ("d.json", b'{"caption": [], "text": []}'),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    corpus = open_quietly([path], {"text": "json.caption;json.text;txt", "label": "json.label;"})
    assert [corpus.read(i)["text"] for i in range(3)] == [b"a caption", b"of\nthe json", b"from txt"]
    with pytest.raises(CorruptSample, match="a.tar:d: its JSON has no 'text'"):
        corpus.read(3)


@pytest.mark.parametrize("optional", [{}, {"split": "split;"}], ids=["all members", "one may be absent"])
def test_members_may_stand_in_any_order(optional: dict[str, str], tmp_path: Path) -> None:
    """All samples have the same ones, so their rows are looked up without a search."""
    names = ["a.jpg", "a.cls", "b.cls", "b.jpg", "c.jpg", "c.cls"]
    path = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    corpus = open_quietly([path], {"image": "png;jpg", "label": "cls"} | optional)
    for i, key in enumerate("abc"):
        found = {"image": b"%b.jpg", "label": b"%b.cls"} | dict.fromkeys(optional, b"")
        assert corpus.read(i) == {name: text.replace(b"%b", key.encode()) for name, text in found.items()}


def test_samples_without_a_field_are_left_out_and_counted(tmp_path: Path, caplog) -> None:
    names = ["a.jpg", "a.cls", "b.png", "b.cls", "c.cls", "d.png", "e.png", "e.cls"]
    path = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    with caplog.at_level(logging.WARNING):
        corpus = open_quietly([path], {"image": "jpg;png", "label": "cls"})
    assert [corpus.read(i)["image"] for i in range(len(corpus))] == [b"a.jpg", b"b.png", b"e.png"]
    assert corpus.key(2) == "a.tar:e" and corpus.skipped == 2
    (message,) = caplog.messages
    assert "2 of 5 samples" in message and "jpg;png" in message


def test_a_field_that_no_sample_has_is_an_error(write_shards: Writer) -> None:
    with pytest.raises(ValueError, match="extensions seen are: bin, cls"):
        open_quietly(write_shards(), {"image": "jpg;png"})


def test_lengths_are_measured_once_and_short_samples_left_out(write_shards: Writer, caplog) -> None:
    paths = write_shards()
    calls = []

    def measure(sample: dict[str, bytes]) -> int:
        calls.append(1)
        if sample["label"] == b"3":
            raise ValueError("cannot be decoded")
        return len(sample["content"])

    expected = [len(payload(s, i)) for s in range(3) for i in range(7) if i != 3]
    expected = [length for length in expected if length >= 300]
    for _ in range(2):
        corpus = open_quietly(paths, FIELDS, measure, "bytes", min_length=300)
        assert corpus.lengths.all().tolist() == expected
        assert [len(corpus.read(i)["content"]) for i in range(len(corpus))] == expected
        assert corpus.skipped == 21 - len(expected)
    assert len(calls) == 21
    assert "empty or unreadable" in caplog.text and "below 300 bytes" in caplog.text
    assert np.diff(corpus.shard_starts).sum() == len(corpus) and len(corpus.shard_starts) == 4


def test_lengths_of_another_tar_are_not_used(write_shards: Writer) -> None:
    """A shard rewritten with the same number of samples is measured again."""
    path = write_shards(shards=1)[0]
    open_quietly([path], FIELDS, lambda sample: 5, "size")
    write_tar(path, [(f"{i}.{ext}", b"new") for i in range(7) for ext in ("bin", "cls")])
    corpus = open_quietly([path], FIELDS, lambda sample: len(sample["content"]), "size")
    assert corpus.lengths.all().tolist() == [3] * 7


def test_indexing_and_measuring_in_processes_give_the_same(write_shards: Writer) -> None:
    lines = []
    one, two = write_shards(folder="one"), write_shards(folder="two")
    for paths, workers in ((one, 1), (two, 3)):
        corpus = Corpus.open(paths, FIELDS, lambda s: 1 + len(s["content"]), "n", 0, workers, lines.append)
        assert corpus.lengths.all().tolist() == [1 + len(payload(s, i)) for s in range(3) for i in range(7)]
    for a, b in zip(sorted(one[0].parent.iterdir()), sorted(two[0].parent.iterdir()), strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert len(lines) == 4  # one line for each job, however many shards


def test_an_error_in_a_process_reaches_the_caller(write_shards: Writer) -> None:
    paths = write_shards()
    paths[1].write_bytes(paths[1].read_bytes()[:1000])
    with pytest.raises(ValueError, match="train-000001.tar is truncated"):
        ensure_index(paths, workers=2, progress=None)


def test_all_broken_shards_are_named_and_the_others_indexed(write_shards: Writer, capsys) -> None:
    paths = write_shards(shards=25)
    for path in paths[1:23]:
        path.write_bytes(path.read_bytes()[:1000])
    paths[23].unlink()
    paths[23].symlink_to("nowhere")
    assert main(["index", str(paths[0].parent)]) != 0
    out, err = capsys.readouterr()
    assert "14 samples in 2 shards" in out and "Traceback" not in err
    assert "error: 23 of 25 shards cannot be indexed:" in err and "and 3 more" in err
    assert f"{paths[1]} is truncated" in err and f"{paths[20]} is truncated" in err
    assert shard.load_index(paths[0]) and shard.load_index(paths[24])
    with pytest.raises(ValueError, match=r"(?s)2 of 3 .*000001.tar is trunc.*000023.tar: No such file"):
        Corpus.open([paths[0], paths[1], paths[23]], FIELDS, progress=None)


def test_a_stale_or_broken_index_is_built_again(write_shards: Writer) -> None:
    path = write_shards(shards=1, samples=3)[0]
    assert ensure_index([path], progress=None)[0].num_samples == 3
    write_shards(shards=1, samples=40)
    assert ensure_index([path], progress=None)[0].num_samples == 40
    members = path.with_suffix(".tar.members.npy")
    members.write_bytes(members.read_bytes()[:-26])
    assert len(ensure_index([path], progress=None)[0].members()) == 80
    record = json.loads(path.with_suffix(".tar.json").read_bytes())
    for damaged in (record | {"version": 0}, record | {"samples": 41}, record | {"extensions": {"bio": 40}}):
        path.with_suffix(".tar.json").write_text(json.dumps(damaged))
        assert shard.load_index(path) is None
    del record["sha256"]  # as indexes were before
    path.with_suffix(".tar.json").write_text(json.dumps(record))
    assert shard.load_index(path)


def test_a_fresh_index_is_not_built_again(write_shards: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_shards()
    first = ensure_index(paths, progress=None)
    monkeypatch.setattr("d2v_ds.data.index.build_index", None)
    assert ensure_index(paths, progress=None) == first


@pytest.mark.parametrize("variable", ["D2V_INDEX_DIR", "HOME"])
def test_a_read_only_folder_has_its_index_in_the_cache(
    write_shards: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Two folders with shards of equal names do not mix; a later start finds the index."""
    one, two = write_shards(folder="one"), write_shards(samples=4, folder="two")
    monkeypatch.delenv("D2V_INDEX_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    monkeypatch.setattr(shard, "is_writable", lambda folder: False)
    for _ in range(2):
        corpora = [open_quietly(paths, FIELDS, lambda sample: 2, "two") for paths in (one, two)]
        assert [len(corpus) for corpus in corpora] == [21, 12]
        monkeypatch.setattr("d2v_ds.data.index.build_index", None)
    assert sorted(one[0].parent.iterdir()) == one
    assert len(list((tmp_path / "cache").rglob("*.tar.idx"))) == 6


def test_the_fingerprint_knows_content_and_not_folders(write_shards: Writer) -> None:
    one, two = write_shards(folder="one"), write_shards(folder="two")
    first = open_quietly(one, FIELDS).fingerprint
    assert open_quietly(two, {"content": "bin"}).fingerprint == first
    assert open_quietly(two[:2], FIELDS).fingerprint != first
    content = bytearray(two[0].read_bytes())
    content[content.index(payload(0, 1))] ^= 1
    two[0].write_bytes(content)
    build_index(two[0])
    assert open_quietly(two, FIELDS).fingerprint != first


def test_a_changed_byte_and_a_cut_tar_are_corrupt_samples(write_shards: Writer) -> None:
    path = write_shards(shards=1)[0]
    corpus = open_quietly([path], FIELDS)
    content = bytearray(path.read_bytes())
    content[content.index(payload(0, 2)) + 10] ^= 4
    path.write_bytes(content[: int(corpus.indexes[0].offsets()[5])])
    with pytest.raises(CorruptSample, match="train-000000.tar:part/0-00002: its bytes differ") as caught:
        corpus.read(2)
    assert caught.value.shard == "train-000000.tar" and caught.value.key == "part/0-00002"
    with pytest.raises(CorruptSample, match="train-000000.tar:sample 6: the tar ends inside it"):
        corpus.read(6)
    assert corpus.read(3)["content"] == payload(0, 3)


@pytest.mark.parametrize("column", ["sample", "field", "offset", "size"])
@pytest.mark.parametrize("mixed", [True, False])
def test_a_damaged_index_gives_corrupt_samples(tmp_path: Path, column: str, mixed: bool) -> None:
    """Bytes of `members.npy` that rot say nothing that the reader dies of."""
    names = ["a.bin", "a.cls", "b.bin", "b.cls", "c.bin", *(["c.txt"] if mixed else [])]
    path = write_tar(tmp_path / "a.tar", [(name, b"x" * 600) for name in names])
    members = build_index(path).members().copy()
    members[column] = np.iinfo(members[column].dtype).max
    file = tmp_path / "a.tar.members.npy"
    file.write_bytes(file.read_bytes()[: -members.nbytes] + members.tobytes())
    fields = {"content": "bin"} if not mixed or column != "field" else {"content": "bin;"}
    try:
        corpus = open_quietly([path], fields)
    except ValueError as error:
        assert "members.npy is damaged; delete its .tar.json" in str(error) or "has {" in str(error)
        return
    for i in range(len(corpus)):
        assert corpus.key(i).startswith("a.tar:")
        for read in (corpus.read, lambda i: corpus._open(0).members(i)):
            try:
                assert read(i) in ({"content": b""}, {})
            except CorruptSample as error:
                assert error.key
    (tmp_path / "a.tar.idx").write_bytes(b"\xff" * (tmp_path / "a.tar.idx").stat().st_size)
    assert open_quietly([path], fields).key(0) == "a.tar:sample 0"


@pytest.mark.parametrize("wild", [b"\x80" + b"\xff" * 11, b"-0000000001\0"])
def test_a_header_that_changes_names_its_sample_by_number(tmp_path: Path, wild: bytes) -> None:
    """Sizes of a PAX header that tarfile cannot compute with."""
    path = write_tar(tmp_path / "a.tar", [(f"{'long/' * 60}\u00e9.bin", b"x" * 9)])
    corpus = open_quietly([path], {"content": "bin"})
    content = bytearray(path.read_bytes())
    content[124:136] = wild
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    content[int(corpus.indexes[0].members()[0]["offset"])] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptSample, match="a.tar:sample 0: its bytes differ"):
        corpus.read(0)


def test_few_files_are_open_at_a_time(write_shards: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v_ds.data.index.MAX_OPEN_SHARDS", 2)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    corpus = open_quietly(write_shards(shards=9), FIELDS)
    assert len(os.listdir("/proc/self/fd")) == before
    for i in [*range(63), 0, 62, 5]:
        assert corpus.read(i)["content"] == payload(i // 7, i % 7)
    assert len(os.listdir("/proc/self/fd")) <= before + 4  # a tar and a map each


def test_a_forked_child_reads_on_where_its_parent_closes(write_shards: Writer) -> None:
    """It shares the open file, but no place in it."""
    corpus = open_quietly(write_shards(), FIELDS)
    corpus.read(0)
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        os.read(ready, 1)
        os._exit(int(corpus.read(3)["content"] != payload(0, 3)))
    corpus._readers.pop(0).close()
    os.write(told, b".")
    assert os.waitpid(child, 0)[1] == 0


def test_shard_patterns(write_shards: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = write_shards()
    folder = a.parent
    assert expand_shards(str(folder)) == [a, b, c]
    assert expand_shards(f"{folder}/train-{{000000..000001}}.tar") == [a, b]
    assert expand_shards(f"{folder}/*1.tar::{a}") == [b, a]
    assert expand_shards([str(c), f"{folder}/*-00000[01].tar"]) == [c, a, b]
    monkeypatch.setenv("HOME", str(folder.parent))
    assert expand_shards("~/shards") == [a, b, c]
    ensure_index([a, b, c], progress=None)
    assert expand_shards(f"{folder}/*") == expand_shards(f"{folder}/**") == [a, b, c]
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=f"the shard {a} 2 times"):
        expand_shards([a.name, str(a)])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "is empty"),
        ([], "is empty"),
        ("missing.tar", "missing.tar matches nothing"),
        ("{folder}/train-{{000002..000003}}.tar", "train-000003.tar matches nothing"),
        ("{folder}/*.zip", "matches nothing"),
        ("{folder}/train-000000.tar::{folder}", "2 times"),
        ("{folder}/a-{{000", "brace"),
    ],
)
def test_patterns_that_name_no_shards_are_errors(write_shards: Writer, pattern, message: str) -> None:
    folder = write_shards()[0].parent
    with pytest.raises(ValueError, match=message):
        expand_shards(pattern.format(folder=folder) if isinstance(pattern, str) else pattern)


def test_an_empty_folder_and_one_that_may_not_be_read_are_errors(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="matches nothing"):
        expand_shards(str(tmp_path))
    monkeypatch.setattr("os.access", lambda *_: False)  # the tests may run as root, who may read all
    for name in ("", "*.tar"):
        with pytest.raises(ValueError, match=f"{tmp_path} may not be read"):
            expand_shards(str(tmp_path / name))

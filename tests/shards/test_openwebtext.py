"""`d2v prepare openwebtext`: tars inside tars, or parquet, become one plain text a sample."""

import bz2
import lzma

import pyarrow
import pytest
from corpora import checksums, tar_of, text_files, web_archive
from pyarrow import parquet
from server import Manners, serve
from trees import all_bytes, prepare, read_shards, skipped, start_prepare, write_tree

from shards import download
from shards.openwebtext import ARCHIVE, SHA256

ARCHIVE_BYTES = web_archive()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT", 0.001)


def expected() -> dict[str, dict[str, bytes]]:
    return {
        f"urlsf_subset{n:02d}-{n}/{name[:-4]}": {"txt": content}
        for n in range(4)
        for name, content in text_files(n).items()
    }


def write_sums(tmp_path):
    return write_tree(tmp_path, {"sums": checksums({ARCHIVE: ARCHIVE_BYTES}, "sha256")}) / "sums"


def test_documents_are_those_inside_the_inner_archives_byte_for_byte(tmp_path):
    """Downloaded from a server that breaks connections; no header of a tar comes into the text."""
    with serve(Manners({ARCHIVE: ARCHIVE_BYTES}, drop_after=1000)) as address:
        settings = (
            "--mirror",
            address,
            "--checksums",
            write_sums(tmp_path),
            "--shard-mib",
            0.01,
            "--val",
            0.2,
        )
        status, said = prepare("openwebtext", "--out", tmp_path / "out", *settings)
    assert status == 0, said
    assert read_shards(tmp_path / "out") == expected()
    val = read_shards(tmp_path / "out", "openwebtext-val-*.tar")
    assert 1 <= len(val) <= 14 and len(list((tmp_path / "out").glob("openwebtext-train-*.tar"))) > 1


def test_the_archive_a_folder_with_it_and_one_with_inner_archives_give_the_same_samples(tmp_path):
    whole = write_tree(tmp_path / "whole", {ARCHIVE: ARCHIVE_BYTES})
    inner = {f"a/urlsf_subset{n:02d}-{n}_data.xz": lzma.compress(tar_of(text_files(n))) for n in range(3)}
    inner["a/urlsf_subset03-3_data.tar"] = tar_of(text_files(3))  # already decompressed
    parts = write_tree(tmp_path / "parts", inner)
    for name, source in (("1", whole / ARCHIVE), ("2", whole), ("3", parts)):
        status, said = prepare(
            "openwebtext", source, "--out", tmp_path / name, "--checksums", write_sums(tmp_path)
        )
        assert status == 0, said
        assert read_shards(tmp_path / name) == expected()


def test_parquet_files_are_taken(tmp_path):
    """A row a document; empty ones are left out."""
    texts = [f"Document {i}, \u6f22\u5b57.\n" * (i + 1) for i in range(30)] + ["", None]
    (tmp_path / "src/plain_text").mkdir(parents=True)
    parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "src/plain_text/train-00000-of-00001.parquet"
    )
    status, said = prepare("openwebtext", tmp_path / "src", "--out", tmp_path / "out")
    assert status == 0 and "2 left out" in said
    samples = read_shards(tmp_path / "out")
    assert samples == {f"train-00000-of-00001/{i:07d}": {"txt": texts[i].encode()} for i in range(30)}
    (tmp_path / "numbers").mkdir()
    parquet.write_table(pyarrow.table({"text": [5]}), tmp_path / "numbers/a.parquet")
    status, said = prepare("openwebtext", tmp_path / "numbers", "--out", tmp_path / "two")
    assert status == 2 and "its column text holds 5, which is no text" in said
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, *map(pyarrow.py_buffer, (bytes(4) + b"\2\0\0\0", b"\xff\x80"))]
    )
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "numbers/a.parquet")
    status, said = prepare("openwebtext", tmp_path / "numbers", "--out", tmp_path / "two")
    assert status == 2 and "numbers/a.parquet holds a text that is not UTF-8" in said


def test_parquet_files_of_one_name_in_two_folders_are_both_kept(tmp_path):
    """As Hugging Face's converted copies lie; keys begin with the folder."""
    for split in ("a", "b"):
        (tmp_path / "src" / split).mkdir(parents=True)
        parquet.write_table(pyarrow.table({"text": [split]}), tmp_path / "src" / split / "0000.parquet")
    assert prepare("openwebtext", tmp_path / "src", "--out", tmp_path / "out")[0] == 0
    samples = read_shards(tmp_path / "out")
    assert samples == {f"{split}/0000/0000000": {"txt": split.encode()} for split in ("a", "b")}


def test_a_single_parquet_file_or_inner_archive_is_taken(tmp_path):
    """The published checksum is that of the outer archive."""
    parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "0.parquet")
    status, said = prepare("openwebtext", tmp_path / "0.parquet", "--out", tmp_path / "1")
    assert status == 0 and read_shards(tmp_path / "1") == {"0/0000000": {"txt": b"x"}}, said
    write_tree(tmp_path, {"urlsf_subset00-1_data.xz": lzma.compress(tar_of(text_files(0)))})
    status, said = prepare(
        "openwebtext", tmp_path / "urlsf_subset00-1_data.xz", "--out", tmp_path / "2", "--val", 0
    )
    assert status == 0 and len(read_shards(tmp_path / "2")) == 8, said


def test_another_archive_than_the_published_one_is_refused(tmp_path):
    source = write_tree(tmp_path / "src", {ARCHIVE: ARCHIVE_BYTES})
    status, said = prepare("openwebtext", source, "--out", tmp_path / "out")
    assert status == 2 and SHA256 in said


def test_a_damaged_inner_archive_is_refused(tmp_path):
    """Cut, of wrong bytes in bzip2's own check, or of something else than a tar."""
    inner = tar_of(text_files(0))
    packed = bytearray(bz2.compress(inner))
    packed[len(packed) // 2] ^= 255
    for content in (lzma.compress(inner)[:-50], bytes(packed)):
        source = write_tree(tmp_path / "src", {"urlsf_subset00-1_data.xz": content})
        status, said = prepare("openwebtext", source, "--out", tmp_path / "out")
        assert status == 2 and "urlsf_subset00-1_data.xz is damaged or truncated" in said, said
    source = write_tree(tmp_path / "src", {"urlsf_subset00-1_data.xz": lzma.compress(b"no tar")})
    status, said = prepare("openwebtext", source, "--out", tmp_path / "out")
    assert status == 2 and f"{source}/urlsf_subset00-1_data.xz is no whole tar" in said, said


def test_a_document_that_comes_twice_is_listed_by_its_key(tmp_path):
    """The file that it was unpacked to is gone at the end."""
    files = {"1.txt": b"one", "again/1.txt": b"two"}
    source = write_tree(tmp_path / "src", {"a_data.xz": lzma.compress(tar_of(files))})
    assert prepare("openwebtext", source, "--out", tmp_path / "out")[0] == 0
    assert skipped(tmp_path / "out") == {"a/1": "key a/1 is there already"}


@pytest.mark.slow
def test_killed_at_several_moments_the_same_command_writes_the_same_bytes(tmp_path):
    """While it downloads, unpacks, lists and packs."""
    manners = Manners({ARCHIVE: ARCHIVE_BYTES})
    with serve(manners) as address:
        sums = write_sums(tmp_path)
        settings = ("--mirror", address, "--checksums", sums, "--shard-mib", 0.01, "--workers", 2)
        assert prepare("openwebtext", "--out", tmp_path / "whole", *settings)[0] == 0
        out = tmp_path / "out"
        for place in ("downloads/*.part", ".prepare/unpacked/*", ".prepare/*.npy", "*.tar*"):
            running = start_prepare("openwebtext", "--out", out, *settings)
            while not list(out.glob(place)) and running.poll() is None:
                pass
            running.kill()
            running.communicate()
        status, said = prepare("openwebtext", "--out", out, *settings)
    assert status == 0, said
    assert all_bytes(out) == all_bytes(tmp_path / "whole")

"""`d2v prepare librispeech`: archives of the published layout from a server of its manners become shards."""

import gzip
import json

import pytest
from corpora import checksums, limited_files, speech_files, tar_of
from server import Manners, serve
from trees import all_bytes, prepare, read_shards, skipped, start_prepare, write_tree

from shards import download
from shards.librispeech import LIMITED, MD5, MINI_MD5

PARTS = ("train-clean-5", "dev-clean-2")


@pytest.fixture(scope="module")
def archives() -> dict[str, bytes]:
    return {f"{part}.tar.gz": tar_of(speech_files(part), "w:gz") for part in PARTS}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT", 0.001)


def expected(part: str, speakers: int = 3) -> dict[str, dict[str, bytes]]:
    files = speech_files(part, speakers)
    texts = {}
    for name, content in files.items():
        if name.endswith(".trans.txt"):
            texts |= dict(line.split(" ", 1) for line in content.decode().splitlines())
    return {
        name.split("/")[-1][:-5]: {"flac": content, "txt": texts[name.split("/")[-1][:-5]].encode()}
        for name, content in files.items()
        if name.endswith(".flac")
    }


def arguments(address, archives, tmp_path, out="out"):
    sums = tmp_path / "md5sum.txt"
    sums.write_text(checksums(archives))
    settings = ("--mirror", address, "--checksums", sums, "--shard-mib", 0.02, "--workers", 2)
    return ("librispeech", "--out", tmp_path / out, "--parts", *PARTS, *settings)


def served(archives) -> Manners:
    return Manners({f"31/{name}": content for name, content in archives.items()})


def test_parts_are_downloaded_and_every_utterance_comes_with_its_transcript(archives, tmp_path):
    """From a server that breaks every connection; each part has shards of its own."""
    manners = served(archives)
    manners.drop_after = 20_000
    with serve(manners) as address:
        status, said = prepare(*arguments(address, archives, tmp_path))
    assert status == 0, said
    for part in PARTS:
        assert read_shards(tmp_path / "out", f"librispeech-{part}-*.tar") == expected(part)
    origin = json.loads((tmp_path / "out/manifest.json").read_text())["origin"]
    assert [row["checksum"][:4] for row in origin] == ["md5:", "md5:"]
    assert len(manners.asked) > 4


def test_killed_while_it_downloads_and_packs_the_same_command_goes_on(archives, tmp_path):
    """Nothing is downloaded twice, and the bytes are those of an uninterrupted run."""
    manners = served(archives)
    with serve(manners) as address:
        assert prepare(*arguments(address, archives, tmp_path, "whole"))[0] == 0
        manners.asked.clear()
        manners.seconds_per_piece = 0.05
        running = start_prepare(*arguments(address, archives, tmp_path))
        parts = tmp_path / "out/downloads"
        while not any(path.stat().st_size > 8192 for path in parts.glob("*.part")):
            assert running.poll() is None
        running.kill()
        running.communicate()
        manners.seconds_per_piece = 0
        status, said = prepare(*arguments(address, archives, tmp_path))
    assert status == 0, said
    assert any(asked for _, asked in manners.asked)
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")


def test_archives_with_another_checksum_are_refused(archives, tmp_path):
    """The published ones are built in, so small archives of a wrong mirror do not pass for the corpus."""
    with serve(served(archives)) as address:
        known = [
            download.Remote("dev-clean-2.tar.gz", (f"{address}/31/dev-clean-2.tar.gz",), f"md5:{'0' * 32}")
        ]
        with pytest.raises(ValueError, match="but md5:0000.* is published"):
            download.fetch_all(known, tmp_path / "d", tmp_path / "r", print)
    source = write_tree(tmp_path / "src", archives)
    status, said = prepare("librispeech", source, "--out", tmp_path / "out", "--parts", *PARTS)
    assert status == 2 and MINI_MD5["dev-clean-2"] in said and "damaged, incomplete or another file" in said


def test_archives_and_folders_that_are_there_give_the_same_shards(archives, tmp_path):
    packed = write_tree(tmp_path / "packed", archives)
    unpacked = write_tree(tmp_path / "unpacked", speech_files(PARTS[0]) | speech_files(PARTS[1]))
    sums = write_tree(tmp_path, {"md5sum.txt": checksums(archives)}) / "md5sum.txt"
    for name, source in (("a", packed), ("b", unpacked)):
        settings = ("--parts", *PARTS, "--checksums", sums, "--shard-mib", 0.02)
        status, said = prepare("librispeech", source, "--out", tmp_path / name, *settings)
        assert status == 0, said
    tars = [{k: v for k, v in all_bytes(tmp_path / name).items() if ".tar" in k} for name in "ab"]
    assert tars[0] == tars[1] and len(tars[0]) > 8


def test_what_has_no_checksum_is_said_and_a_gunzipped_archive_is_none_of_the_published(archives, tmp_path):
    """One was checked in words alone, the other was refused for the checksum of the .tar.gz."""
    name = f"{PARTS[0]}.tar.gz"
    sums = write_tree(tmp_path, {"sums": f"{'0' * 32}  other.tar.gz\n"}) / "sums"
    plain = {name[:-3]: gzip.decompress(archives[name])}
    for out, files, more in (("a", {name: archives[name]}, ("--checksums", sums)), ("b", plain, ())):
        source = write_tree(tmp_path / f"src-{out}", files)
        status, said = prepare("librispeech", source, "--out", tmp_path / out, "--parts", PARTS[0], *more)
        assert status == 0 and f"no checksum is known of {source / next(iter(files))}" in said, said
        assert read_shards(tmp_path / out) == expected(PARTS[0])
    sums.write_text(f"{'0' * 32}  {name[:-3]}\n")
    status, said = prepare(
        "librispeech", source, "--out", tmp_path / "c", "--parts", PARTS[0], "--checksums", sums
    )
    assert status == 2 and "but md5:0000" in said


def test_limited_parts_are_taken_from_one_archive_or_folder(tmp_path):
    """10 minutes of the 1 hour of the 10 hours; the archive is downloaded once."""
    archive = {"librispeech_finetuning.tgz": tar_of(limited_files(), "w:gz")}
    sums = write_tree(tmp_path, {"sums": checksums(archive, "sha256")}) / "sums"
    unpacked = write_tree(tmp_path / "unpacked", limited_files())
    settings = ("--parts", *LIMITED, "--checksums", sums, "--workers", 2)
    manners = Manners(archive)
    with serve(manners) as address:
        downloaded = prepare("librispeech", "--out", tmp_path / "a", "--mirror", address, *settings)
    assert downloaded[0] == 0, downloaded[1]
    assert [name for name, _ in manners.asked].count("librispeech_finetuning.tgz") == 1
    status, said = prepare("librispeech", unpacked, "--out", tmp_path / "b", *settings)
    assert status == 0, said
    for out in (tmp_path / "a", tmp_path / "b"):
        found = {part: read_shards(out, f"librispeech-{part}-*.tar") for part in LIMITED}
        assert [len(samples) for samples in found.values()] == [2, 12, 14]
        assert found["limited-10m"].keys() < found["limited-1h"].keys() < found["limited-10h"].keys()
        assert found["limited-10m"]["300-99-0000"]["txt"] == b"SAID IN 1h/0 clean"


def test_utterances_without_transcript_and_transcripts_without_utterance_are_listed(tmp_path):
    files = speech_files("dev-clean", 1)
    del files["LibriSpeech/dev-clean/100/7000/100-7000-0001.flac"]
    files["LibriSpeech/dev-clean/100/7000/100-7000-0099.flac"] = b"x"
    source = write_tree(tmp_path / "src", files)
    status, said = prepare("librispeech", source, "--out", tmp_path / "out", "--parts", "dev-clean")
    assert status == 0, said
    assert skipped(tmp_path / "out") == {
        "100-7000-0099.flac": "has no transcript",
        "100-7000-0001.flac": "is named in the transcripts, but not there",
    }
    assert len(read_shards(tmp_path / "out")) == 4
    (text,) = [name for name in files if name.endswith("7000.trans.txt")][:1]
    (source / text).write_bytes(b"100-7000-0000 \xff\n")
    status, said = prepare("librispeech", source, "--out", tmp_path / "two", "--parts", "dev-clean")
    assert status == 2 and "7000.trans.txt is not UTF-8" in said


@pytest.mark.parametrize("is_packed", [False, True])
def test_utterances_that_come_twice_or_are_empty_are_listed(tmp_path, is_packed):
    """The first stays: sounds were replaced by the last, and empty ones packed, in silence."""
    files = speech_files("dev-clean", 1)
    folder = "LibriSpeech/dev-clean/100/7000"
    files[f"{folder}/100-7000-0001.flac"] = b""
    files[f"{folder}9/100-7000-0002.flac"] = b"another"
    files[f"{folder}9/100-7000.trans.txt"] = b"100-7000-0003 ANOTHER\n"
    packed = {"dev-clean.tar": tar_of(files)}
    source = write_tree(tmp_path / "src", packed if is_packed else files)
    sums = write_tree(tmp_path, {"sums": checksums(packed)}) / "sums"
    settings = ("--parts", "dev-clean", "--checksums", sums)
    status, said = prepare("librispeech", source, "--out", tmp_path / "out", *settings)
    wanted = expected("dev-clean", 1)
    del wanted["100-7000-0001"]
    assert status == 0 and read_shards(tmp_path / "out") == wanted, said
    prefix = "" if is_packed else f"{source}/"
    assert skipped(tmp_path / "out") == {
        f"{prefix}{folder}/100-7000-0001.flac": "is empty",
        f"{prefix}{folder}9/100-7000-0002.flac": "key 100-7000-0002 is there already",
        f"{prefix}{folder}9/100-7000.trans.txt, 100-7000-0003": "has another transcript already",
        "100-7000-0001.flac": "is named in the transcripts, but not there",
    }


def test_a_line_of_transcripts_that_is_none_is_named(tmp_path):
    """A line ends at a line feed alone."""
    files = speech_files("dev-clean", 1)
    (texts,) = [name for name in files if name.endswith(".trans.txt")]
    source = write_tree(tmp_path / "src", files | {texts: "100-7000-0000 A\u2028B\r\n100-7000-0001 \n"})
    status, said = prepare("librispeech", source, "--out", tmp_path / "out", "--parts", "dev-clean")
    assert status == 2 and "trans.txt, line 2: '100-7000-0001 ' is not" in said


@pytest.mark.parametrize("cut", ["gz", "tar"])
def test_a_truncated_archive_is_refused(tmp_path, cut):
    """gzip notices by its own checksum; a plain tar by its missing end."""
    whole = tar_of(speech_files("dev-clean"))
    part = gzip.compress(whole)[:-3000] if cut == "gz" else whole[: len(whole) // 3 * 2]
    source = write_tree(tmp_path / "src", {f"dev-clean.tar{'.gz' if cut == 'gz' else ''}": part})
    sums = write_tree(tmp_path, {"sums": ""}) / "sums"
    settings = ("--parts", "dev-clean", "--checksums", sums)
    status, said = prepare("librispeech", source, "--out", tmp_path / "out", *settings)
    assert status == 2 and "get it again" in said, said


@pytest.mark.parametrize("corpus", ["librispeech", "openwebtext"])
def test_how_to_download_beside_a_source_is_refused(tmp_path, corpus):
    """It was ignored."""
    for more in (("--mirror", "http://127.0.0.1:9"), ("--downloads", tmp_path)):
        status, said = prepare(corpus, tmp_path, "--out", tmp_path / "out", *more)
        assert status == 2 and f"{more[0]} {more[1]} has no meaning beside {tmp_path}" in said


def test_a_part_that_is_not_there_is_named(tmp_path):
    status, said = prepare("librispeech", tmp_path, "--out", tmp_path / "out", "--parts", "test-other")
    assert status == 2 and "does not hold test-other" in said


def test_the_checksums_are_those_of_md5():
    assert all(len(value) == 32 and int(value, 16) for value in (MD5 | MINI_MD5).values())
    assert len(set((MD5 | MINI_MD5).values())) == 9

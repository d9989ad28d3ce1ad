"""`d2v verify` names every shard and sample that is not as it was indexed, and nothing else."""

import json
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tars import payload, write_tar

from d2v_ds.cli import main
from d2v_ds.data import build_index, ensure_index
from d2v_ds.data.parallel import map_shards

Writer = Callable[..., list[Path]]
END = 1024


@pytest.fixture
def shards(write_shards: Writer) -> list[Path]:
    paths = write_shards()
    ensure_index(paths, progress=None)
    return paths


def verify(capsys: pytest.CaptureFixture, *shards: Path) -> tuple[int, dict]:
    code = main(["verify", "--json", "--workers", "1", *map(str, shards)])
    return code, json.loads(capsys.readouterr().out)


def only_problem(found: dict, shard: Path) -> str:
    """Of the one shard that has one."""
    (report,) = [report for report in found["reports"] if report["problems"]]
    assert report["shard"] == str(shard) and found["bad_shards"] == 1
    return "\n".join(report["problems"])


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_whole_shards_are_in_order_and_nothing_is_written(shards, capsys):
    before = {file: file.read_bytes() for file in shards[0].parent.iterdir()}
    assert main(["verify", str(shards[0].parent)]) == 0
    out = capsys.readouterr().out
    assert "21 samples in 3 shards" in out and "all in order" in out
    assert {file: file.read_bytes() for file in shards[0].parent.iterdir()} == before


def test_what_is_wrong_is_listed_and_the_exit_code_is_1(shards, capsys):
    flip(shards[1], shards[1].read_bytes().index(payload(1, 2)) + 3)
    assert main(["verify", str(shards[0].parent)]) == 1
    out = capsys.readouterr().out
    assert f"{shards[1]}: 1 of 7 samples differ from the index" in out and "part/1-00002" in out
    assert "1 shards are not in order" in out


def test_a_flipped_bit_names_its_sample(shards, capsys):
    flip(shards[1], shards[1].read_bytes().index(payload(1, 2)) + 3)
    code, found = verify(capsys, *shards)
    assert code == 1 and only_problem(found, shards[1]).endswith("(crc32, size or place): part/1-00002")
    assert found["samples"] == 21


def test_a_cut_shard_names_where_and_what_is_lost(shards, capsys):
    offset = int(build_index(shards[2]).offsets()[5])
    shards[2].write_bytes(shards[2].read_bytes()[:offset])
    code, found = verify(capsys, *shards)
    problems = only_problem(found, shards[2])
    assert code == 1 and f"is truncated at byte {offset} after sample 'part/2-00004' (5 read)" in problems
    assert "2 of 7 samples cannot be read as they were indexed" in problems
    assert found["samples"] == 19


@pytest.mark.parametrize("zeroed", [slice(0, 512), slice(1024, 1536)])
def test_zeroed_blocks_are_found(shards, capsys, zeroed):
    content = bytearray(shards[0].read_bytes())
    content[zeroed] = bytes(512)
    shards[0].write_bytes(content)
    code, found = verify(capsys, *shards)
    assert code == 1 and only_problem(found, shards[0])


def test_a_missing_end_of_archive_is_found(shards, capsys):
    end = int(build_index(shards[0]).offsets()[-1])
    shards[0].write_bytes(shards[0].read_bytes()[: end + END - 512])
    code, found = verify(capsys, *shards)
    assert code == 1 and "is truncated" in only_problem(found, shards[0]) and found["samples"] == 21


def test_another_number_of_samples_is_found(shards, write_shards, capsys):
    write_shards(shards=1, samples=8)
    code, found = verify(capsys, *shards)
    assert code == 1 and "it has 8 samples, when it was indexed 7" in only_problem(found, shards[0])


@pytest.mark.parametrize("name", ["idx", "members.npy", "json"])
def test_a_damaged_index_is_found(shards, capsys, name):
    file = shards[0].with_name(f"{shards[0].name}.{name}")
    flip(file, file.stat().st_size // 2 if name != "json" else 0)
    code, found = verify(capsys, *shards)
    assert code == 1 and only_problem(found, shards[0])


def test_shards_without_an_index_are_checked_alone(write_shards, capsys):
    paths = write_shards()
    code, found = verify(capsys, *paths)
    assert code == 0 and found["samples"] == 21
    assert all("no index" in report["notes"][0] for report in found["reports"])
    paths[1].write_bytes(paths[1].read_bytes()[:3000])
    code, found = verify(capsys, *paths)
    assert code == 1 and "truncated at byte 3000" in only_problem(found, paths[1])


@pytest.mark.parametrize("file", ["manifest.json", "_info.json"])
def test_what_was_published_is_compared(shards, capsys, file):
    name = shards[1].name
    rows = {
        "manifest.json": {"shards": [{"file": name, "size": 1, "samples": 7, "sha256": "ab" * 32}]},
        "_info.json": {"filenames": [name], "shard_lengths": [9]},
    }
    (shards[0].parent / file).write_text(json.dumps({"splits": {"train": rows[file]}}))
    code, found = verify(capsys, *shards)
    expected = "manifest.json says 1" if file == "manifest.json" else "7 samples, _info.json says 9"
    assert code == 1 and expected in only_problem(found, shards[1])
    if file == "manifest.json":
        assert "sha256" in only_problem(found, shards[1])


@pytest.mark.parametrize("file", ["manifest.json", "_info.json"])
def test_a_shard_that_is_listed_and_not_there_is_a_problem(shards, capsys, file):
    """Unless only some of those that are there are verified."""
    names = [path.name for path in shards]
    rows = {
        "manifest.json": {"shards": [{"file": name} for name in names]},
        "_info.json": {"filenames": names, "shard_lengths": [7] * 3},
    }
    (shards[0].parent / file).write_text(json.dumps({"splits": {"train": rows[file]}}))
    assert verify(capsys, *shards)[0] == 0
    shards[1].unlink()
    code, found = verify(capsys, shards[0].parent)
    assert (code, found["shards"], found["bad_shards"], found["missing_shards"]) == (1, 2, 0, 1)
    assert found["reports"][2]["shard"] == str(shards[1])
    assert found["reports"][2]["problems"] == [f"it is not there, but {file} lists it"]
    assert verify(capsys, shards[0])[0] == 0


def test_a_split_of_the_manifest_that_is_not_there_is_a_problem(shards, capsys):
    """Of which no shard is there; where the folder is named, not where a pattern names some of its shards."""
    folder = shards[0].parent
    splits = {"train": {"shards": [{"file": path.name} for path in shards]}}
    splits["val"] = {"shards": [{"file": "val-000000.tar"}]}
    (folder / "manifest.json").write_text(json.dumps({"splits": splits}))
    code, found = verify(capsys, folder)
    assert (code, found["shards"], found["bad_shards"], found["missing_shards"]) == (1, 3, 0, 1)
    assert found["reports"][3]["shard"] == str(folder / "val-000000.tar")
    assert verify(capsys, folder / "*.tar")[0] == 0


@pytest.mark.parametrize("file", ["manifest.json", "_info.json"])
def test_a_broken_file_of_what_shards_hold_is_named(shards, capsys, file):
    """It was taken for another tool's, and the shards for all in order. Lists of sounds as NeMo's are left alone."""
    path = shards[0].parent / file
    whole = json.dumps({"settings": {}, "splits": {"train": {}}}, indent=1).encode()
    for content in (b"", bytes(len(whole)), whole[:-1], whole[:1], whole[:10] + bytes(20), b"\xff\xfeno"):
        path.write_bytes(content)
        code, found = verify(capsys, shards[0].parent)
        assert (code, found["shards"], found["bad_shards"], found["broken_files"]) == (1, 3, 0, 1)
        assert found["reports"][3]["shard"] == str(path), content
    assert main(["verify", str(shards[0].parent)]) == 1
    out = capsys.readouterr().out
    assert f"{path}: it is cut or damaged" in out and "1 files beside them are broken" in out
    for content in (whole, b'{"audio_filepath": "a.wav"}\n{"audio_filepath": "b.wav"}\n'):
        path.write_bytes(content)
        assert verify(capsys, shards[0].parent)[0] == 0


def test_keys_with_dots_are_told(tmp_path, capsys):
    path = write_tar(tmp_path / "a.tar", [(f"a.{i}.jpg", b"x") for i in range(3)])
    code, found = verify(capsys, path)
    assert code == 0 and "3 members have a dot before .jpg" in found["reports"][0]["notes"][1]


def test_a_key_that_comes_twice_is_a_problem(tmp_path, capsys):
    path = write_tar(tmp_path / "a.tar", [(name, b"x") for name in ("a.txt", "b.txt", "a.txt")])
    code, found = verify(capsys, path)
    assert code == 1 and "key 'a' comes a second time" in only_problem(found, path)


def test_many_processes_find_the_same(shards, capsys):
    flip(shards[1], shards[1].read_bytes().index(payload(1, 2)) + 3)
    _, one = verify(capsys, *shards)
    main(["verify", "--json", "--workers", "3", *map(str, shards)])
    assert json.loads(capsys.readouterr().out) == one


def test_a_pattern_without_shards_is_exit_code_2(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "absent.tar")]) == 2
    assert "matches nothing" in capsys.readouterr().err


def test_a_file_that_is_no_tar_is_a_problem(tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 1000)
    with tarfile.open(tmp_path / "b.tar", "w"):
        pass
    code, found = verify(capsys, tmp_path)
    assert code == 1 and found["bad_shards"] == 2


def test_a_process_that_is_killed_and_ctrl_c_end_in_one_line(shards, capfd, monkeypatch):
    def die(_: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ChildProcessError, match="a process of 2 was killed, for want of memory perhaps"):
        map_shards(die, [1, 2], 2, None, "killed")

    def interrupt(*_: object) -> None:
        os.kill(os.getppid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("d2v_ds.data.verify._verify_file", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever ran in this process before
    try:
        assert main(["verify", "--workers", "2", *map(str, shards)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Traceback" not in (said := capfd.readouterr().err) and said.endswith("stopped\n")

"""A download ends with the published bytes under the file's own name, or with a message that says why not."""

import hashlib
import os
import subprocess
import sys
import threading

import pytest
from ranks import ROOT
from server import Manners, serve
from trees import noise

from shards import download as module
from shards.download import Remote, Traffic, fetch, fetch_all, read_checksums, verify

CONTENT = noise(7, 300_007)
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.01)


def get(address, tmp_path, checksum=MD5, *more):
    remote = Remote("a.bin", tuple(f"{place}/x/a.bin" for place in (address, *more)), checksum)
    path = fetch(remote, tmp_path, tmp_path / "records")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "records"]
    return path.read_bytes()


def test_a_connection_that_breaks_is_gone_on_with_where_it_broke(tmp_path):
    """Every byte is asked for once."""
    manners = Manners({"x/a.bin": CONTENT}, drop_after=40_000)
    with serve(manners) as address:
        assert get(address, tmp_path) == CONTENT
    assert [asked for _, asked in manners.asked] == [None, *(f"bytes={n * 40_000}-" for n in range(1, 8))]


def test_a_server_without_ranges_is_asked_for_all_again(tmp_path):
    manners = Manners({"x/a.bin": CONTENT}, drop_after=40_000, drops=3, ranges=False)
    with serve(manners) as address:
        assert get(address, tmp_path) == CONTENT
    assert len(manners.asked) == 4


def test_a_server_that_does_not_say_the_whole_length_is_gone_on_with(tmp_path):
    manners = Manners({"x/a.bin": CONTENT}, drop_after=100_000, total="*")
    with serve(manners) as address:
        assert get(address, tmp_path, None) == CONTENT
    assert len(manners.asked) == 4


def test_a_server_that_says_another_length_each_time_is_given_up(tmp_path):
    manners = Manners({"x/a.bin": CONTENT}, drop_after=100_000, total="300000")
    with serve(manners) as address, pytest.raises(ValueError, match="had to be begun again 8 times, at last"):
        get(address, tmp_path)


def test_what_arrived_before_a_kill_is_kept(tmp_path):
    """kill -9 in the middle; the next process asks for the rest alone."""
    manners = Manners({"x/a.bin": CONTENT}, seconds_per_piece=0.02)
    with serve(manners) as address:
        code = (
            "from pathlib import Path; from shards.download import *; "
            f"fetch(Remote('a.bin', ('{address}/x/a.bin',), '{MD5}'), Path({str(tmp_path)!r}), Path({str(tmp_path)!r}))"
        )
        running = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        while not (tmp_path / "a.bin.part").exists() or (tmp_path / "a.bin.part").stat().st_size < 50_000:
            assert running.poll() is None
        running.kill()
        running.wait()
        there = (tmp_path / "a.bin.part").stat().st_size
        (tmp_path / "a.bin.part.lock").unlink()
        manners.seconds_per_piece = 0
        assert get(address, tmp_path) == CONTENT
    assert 50_000 <= there < len(CONTENT) and manners.asked[-1] == ("x/a.bin", f"bytes={there}-")


def test_a_file_that_changed_meanwhile_is_fetched_anew(tmp_path):
    """By its ETag, or by its length where there is none."""
    for etag in (True, False):
        folder = tmp_path / f"{etag}"
        folder.mkdir()
        manners = Manners({"x/a.bin": noise(1, 250_000)}, drop_after=50_000, drops=1, etag=etag)
        with serve(manners) as address:
            url = f"{address}/x/a.bin"
            with pytest.raises(module.Again, match="ended after 50000 of 250000"):
                module.receive(url, folder / "a.bin.part", Traffic())
            manners.files["x/a.bin"] = CONTENT
            assert get(address, folder) == CONTENT


def test_a_lying_server_is_given_one_more_chance(tmp_path):
    with serve(Manners({"x/a.bin": CONTENT}, lies={"x/a.bin": 1})) as address:
        assert get(address, tmp_path) == CONTENT


def test_a_server_that_lies_on_is_refused_with_both_checksums(tmp_path):
    """Nothing is left that could be taken for the file."""
    manners = Manners({"x/a.bin": CONTENT}, lies={"x/a.bin": 9})
    with serve(manners) as address, pytest.raises(ValueError) as error:
        get(address, tmp_path)
    wrong = hashlib.md5(bytes(len(CONTENT))).hexdigest()
    assert MD5 in str(error.value) and wrong in str(error.value)
    assert not (tmp_path / "a.bin").exists() and not (tmp_path / "a.bin.part").exists()


def test_a_mirror_stands_in(tmp_path):
    """For a server that has no such file, that is away, and whose file is another."""
    good = Manners({"x/a.bin": CONTENT})
    with serve(good) as address:
        for number, manners in enumerate([Manners({}), Manners({"x/a.bin": noise(1, 1000)})]):
            (tmp_path / f"{number}").mkdir()
            with serve(manners) as bad:
                assert get(bad, tmp_path / f"{number}", MD5, address) == CONTENT
        (tmp_path / "away").mkdir()
        assert get("http://127.0.0.1:9", tmp_path / "away", MD5, address) == CONTENT


def test_a_length_that_is_no_number_is_none():
    assert [module.length_of({"Content-Length": text}) for text in ("12", "abc", "-1")] == [12, None, None]
    assert module.length_of({}) is None


def test_answers_that_pass_are_waited_for(tmp_path):
    manners = Manners({"x/a.bin": CONTENT}, errors=[503, 500, 429])
    with serve(manners) as address:
        assert get(address, tmp_path) == CONTENT
    assert len(manners.asked) == 4


def test_answers_that_do_not_pass_are_told_at_once(tmp_path):
    manners = Manners({})
    with (
        serve(manners) as address,
        pytest.raises(ValueError, match=r"a\.bin cannot be downloaded: .*HTTP 404"),
    ):
        get(address, tmp_path)
    assert len(manners.asked) == 1


def test_a_server_that_gives_nothing_is_given_up(tmp_path):
    manners = Manners({"x/a.bin": CONTENT}, drop_after=0)
    with serve(manners) as address, pytest.raises(ValueError, match="8 tries in a row brought nothing"):
        get(address, tmp_path)
    assert len(manners.asked) == 8


def test_a_whole_part_is_taken_and_one_too_long_is_begun_again(tmp_path):
    """A kill may come between the last byte and the rename."""
    for name, content in (("whole", CONTENT), ("long", CONTENT + b"more")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.bin.part").write_bytes(content)
        with serve(Manners({"x/a.bin": CONTENT})) as address:
            assert get(address, folder) == CONTENT


def test_a_checked_file_is_not_read_again_until_it_changes(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(CONTENT)
    verify(path, MD5, tmp_path / "records")
    before = path.stat()
    path.write_bytes(bytes(len(CONTENT)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    verify(path, MD5, tmp_path / "records")  # by size and time the same file
    os.utime(path)
    with pytest.raises(ValueError, match="damaged, incomplete or another file"):
        verify(path, MD5, tmp_path / "records")
    assert path.exists()


def test_several_files_come_at_a_time_and_one_error_is_told(tmp_path, capsys):
    files = {f"x/{i}": noise(i, 50_000) for i in range(6)}
    said = []
    with serve(Manners(files)) as address:
        remotes = [Remote(f"{i}", (f"{address}/x/{i}",)) for i in range(6)]
        paths = fetch_all(remotes, tmp_path / "d", tmp_path / "r", said.append)
        assert [path.read_bytes() for path in paths] == list(files.values())
        assert "no checksum is known of 0, 1" in said[1]
        with pytest.raises(ValueError, match="HTTP 404"):
            fetch_all([*remotes, Remote("7", (f"{address}/7",))], tmp_path / "d", tmp_path / "r", said.append)


def test_one_process_downloads_a_file(tmp_path):
    manners = Manners({"x/a.bin": CONTENT}, seconds_per_piece=0.01)
    with serve(manners) as address:
        first = threading.Thread(target=get, args=(address, tmp_path))
        first.start()
        while not manners.asked:
            pass
        with pytest.raises(ValueError, match="being downloaded by another process"):
            get(address, tmp_path)
        first.join()
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_lists_of_checksums_are_read_as_md5sum_writes_them(tmp_path):
    file = tmp_path / "sums.txt"
    file.write_text(f"{'a' * 32}  x/one.tar.gz\n{'B' * 64} *two.tar\n\n")
    assert read_checksums(file) == {"one.tar.gz": f"md5:{'a' * 32}", "two.tar": f"sha256:{'b' * 64}"}
    file.write_text("0123  one\n")
    with pytest.raises(ValueError, match="line 1 is not as md5sum"):
        read_checksums(file)

"""`d2v preview` counts members, knows what they are by their bytes, and draws some."""

import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from layouts import write_tar
from PIL import Image
from ranks import ROOT, SAMPLE

from d2v_ds.cli import main
from d2v_ds.data import build_index
from d2v_ds.tasks import preview as sheet
from d2v_ds.tasks.preview import recognise, spread


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview")
    for name in ("multimodal-train-000000.tar", "text-train-000000.tar"):
        (folder / name).write_bytes((SAMPLE / name).read_bytes())
    return folder


def preview(folder: Path, out: Path, capsys, *options: str) -> dict:
    assert main(["preview", str(folder), "--out", str(out), "--json", "--workers", "1", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_members_counts_and_lengths_are_found(folder, tmp_path, capsys):
    found = preview(folder, tmp_path / "a.png", capsys, "--samples", "3", "--measured", "40")
    indexes = [build_index(path) for path in sorted(folder.glob("*.tar"))]
    assert found["samples"] == sum(index.num_samples for index in indexes) and found["shards"] == 2
    kinds = {extension: member["kind"] for extension, member in found["members"].items()}
    assert kinds == {"txt": "text", "json": "text", "png": "image", "ogg": "sound", "cls": "text"}
    assert found["members"]["png"]["samples"] == indexes[0].extension_counts["png"]
    assert found["members"]["png"]["example"] == "PNG L 32x32"
    assert found["members"]["ogg"]["lengths"]["unit"] == "seconds"
    assert 38 <= found["looked_at"] <= 40 and found["faults"] == []
    lengths = found["members"]["txt"]["lengths"]
    assert (
        sum(lengths["counts"]) == found["looked_at"] and lengths["min"] <= lengths["median"] <= lengths["max"]
    )


def test_the_sheet_is_a_picture_that_shows_more_of_more_samples(folder, tmp_path, capsys):
    for number in (1, 5):
        preview(folder, tmp_path / f"{number}.png", capsys, "--samples", str(number), "--measured", "9")
    small, large = (Image.open(tmp_path / f"{number}.png") for number in (1, 5))
    assert small.format == "PNG" and large.height > small.height and np.asarray(large).std() > 10


def test_as_many_are_drawn_as_were_asked_for_however_few_are_measured(folder, tmp_path, capsys):
    found = preview(folder, tmp_path / "a.png", capsys, "--samples", "5", "--measured", "1")
    assert found["looked_at"] == 5


def test_a_member_is_known_by_its_bytes():
    assert recognise(b"caf\xc3\xa9", False) == {"kind": "text", "length": 4, "what": "4 characters"}
    assert recognise(b'{"a": 1}', False)["what"] == "json: a"
    assert recognise(b"\x80\x04\x95cos\nsystem", False)["kind"] == "bytes"  # a pickle is never opened
    assert recognise(b"", False)["kind"] == "text"
    assert recognise(b"[" * 100_000, False)["what"] == "100000 characters"


def test_what_rotted_is_told_in_text_and_picture(folder, tmp_path, capsys):
    path = tmp_path / "a.tar"
    path.write_bytes((folder / "multimodal-train-000000.tar").read_bytes())
    offset = int(build_index(path).members()[0]["offset"])
    with path.open("r+b") as file:
        file.seek(offset + 20)
        file.write(b"rot")
    assert (
        main(["preview", str(path), "--out", str(tmp_path / "a.png"), "--measured", "5", "--workers", "1"])
        == 0
    )
    assert "fault: train-000000: its bytes differ from the index (crc32)" in capsys.readouterr().out
    assert (tmp_path / "a.png").is_file()


def test_what_is_not_what_its_name_says_and_a_bomb_are_told(tmp_path, capsys):
    """A picture that is cut in its header, a page of the web, other encodings; they had neither a line nor a tile."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "PNG")
    head = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + file.getvalue()[24:29]
    bomb = file.getvalue()[:12] + head + zlib.crc32(head).to_bytes(4, "big") + file.getvalue()[33:]
    members = {
        "a.jpg": b"\xff\xd8\xff\xe0" + bytes(200),
        "b.jpg": b"<html>gone</html>",
        "c.txt": "caf\u00e9".encode("utf-16"),
        "d.png": bomb,
        "e.jpg": file.getvalue(),
        "f.pth": bytes(range(256)),
        "g.txt": b"a\x0bb",  # odd, but a text
    }
    write_tar(tmp_path / "a.tar", members)
    found = preview(tmp_path, tmp_path / "a.png", capsys)
    assert {fault["key"]: fault["reason"] for fault in found["faults"]} == {
        "a": ".jpg that is no image: 204 bytes",
        "b": ".jpg that is no image: 17 characters",
        "c": ".txt that is no text: 10 bytes",
        "d": "above the limit of 100000000 pixels",
    }


def test_a_long_text_has_all_its_characters():
    assert recognise("\u00e9\U0001f600a".encode() * 600_000, False)["length"] == 1_800_000


def test_names_that_are_no_utf8_are_said_and_drawn(tmp_path):
    """By a command of its own, for pytest's standard output takes any name."""
    members = {"\udcff$1.txt": "x", "b.t\udcffxt": "yy", "c.t\udcffxt": "z"}
    path = write_tar(tmp_path / "a.tar", members)
    offset = int(build_index(path).members()[0]["offset"])
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    command = [sys.executable, "-m", "d2v_ds.cli"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"}
    for arguments, code in ((["verify"], 1), (["preview", "--out", str(tmp_path / "a.png")], 0)):
        done = subprocess.run([*command, *arguments, str(path)], env=env, capture_output=True, text=True)
        assert done.returncode == code and "\\udcff$1" in done.stdout, done.stderr


def test_samples_are_spread_evenly():
    assert spread(10, 4).tolist() == [0, 3, 6, 9] and spread(3, 10).tolist() == [0, 1, 2]


def test_a_sheet_has_bounds_and_letters_that_no_font_has_are_boxes(tmp_path, capsys, monkeypatch, recwarn):
    """The layout engine took 20 minutes for 1,400 samples; a warning came for each letter."""
    path = write_tar(
        tmp_path / "a.tar", {f"{i:02d}.txt": "\u6f22 \u05e9\u05dc\u05d5\u05dd" for i in range(20)}
    )
    assert main(["preview", str(path), "--out", str(tmp_path / "a.png"), "--samples", "301"]) == 2
    assert "--samples 301 must be at most 300" in capsys.readouterr().err
    monkeypatch.setattr(sheet, "MAX_ROWS", 2)
    monkeypatch.setattr(sheet, "_draw_tile", lambda axis, title, member: titles.append(title))
    titles: list[str] = []
    preview(path, tmp_path / "a.png", capsys, "--samples", "20")
    assert len(titles) == 8 and titles[-1] == "13 more have no room"
    monkeypatch.undo()
    preview(path, tmp_path / "a.png", capsys, "--samples", "1")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_other_endings_are_refused(folder, tmp_path, capsys):
    assert main(["preview", str(folder), "--out", str(tmp_path / "a.jpg")]) == 2
    assert "must end in .png" in capsys.readouterr().err
    (tmp_path / "b.png").mkdir()
    assert main(["preview", str(folder), "--out", str(tmp_path / "b.png")]) == 2
    assert "is a folder, or may not be written" in capsys.readouterr().err

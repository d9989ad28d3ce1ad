"""`d2v embed`: one embedding for each item, as `extract` gives it; interrupted anywhere, the file is the same."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image
from ranks import ROOT, SAMPLE
from runs import environment

import d2v_ds
from d2v_ds.cli import main
from d2v_ds.convert.consolidate import write_export
from d2v_ds.convert.features import Encoder
from d2v_ds.convert.stored import Stored
from d2v_ds.data.progress import ProgressLine, duration
from d2v_ds.modalities.build import build_model
from d2v_ds.recipe import load_recipe
from d2v_ds.tasks import embed as embed_module
from d2v_ds.tasks import groups
from d2v_ds.tasks.embed import embed
from d2v_ds.tasks.groups import cut_batch

MODALITIES = ("image", "audio", "text")
VALIDATION = str(SAMPLE / "multimodal-val-*.tar")


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """A joint model with random weights."""
    recipe = load_recipe("multimodal_tiny", ["body.dim=48", "body.heads=6", "body.depth=2"])
    for config in recipe.modalities.values():
        config.target.top_k = 2
    torch.manual_seed(0)
    model = build_model(recipe.body, recipe.modalities, has_teacher=False)
    tensors = {name: p.detach() + 0.1 * torch.randn(p.shape) for name, p in model.named_parameters()}
    stored = Stored(recipe, tensors, "run, step_00000001", files=SAMPLE, step=1)
    return write_export(stored, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoders(export) -> dict[str, Encoder]:
    return {name: d2v_ds.load(export, name) for name in MODALITIES}


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(samples).astype(np.float32)


def picture(seed: int) -> Image.Image:
    side = 8 + seed % 40
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, 9, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """Files of 25 ms to 3 s in folders, some of which are no sound."""
    folder = tmp_path_factory.mktemp("sounds")
    (folder / "b" / "deep").mkdir(parents=True)
    for i, seconds in enumerate((3.0, 0.025, 1.1, 0.4, 2.2, 0.7)):
        name = ("c.wav", "b/deep/x.flac", "b/a.WAV", "a.ogg", "b/Z.wav", "d.wav")[i]
        soundfile.write(
            folder / name, noise(int(seconds * 16_000), i), 16_000, format=None if i != 2 else "WAV"
        )
    (folder / "bad.wav").write_bytes(b"RIFF and no more")
    soundfile.write(folder / "short.wav", noise(100), 16_000)
    (folder / "notes.md").write_text("no sound")
    (folder / "._c.wav").write_bytes(b"hidden")
    return folder


def read(path: Path) -> dict[str, list]:
    return pq.read_table(path).to_pydict()


# ---- what is in the file ----


@pytest.mark.parametrize("name", MODALITIES)
def test_the_file_has_what_extract_gives_for_each_sample(name, encoders, tmp_path):
    """Of shards, in stored order, with key, shard and label; text too, whose samples here are labelled digits."""
    encoder = encoders[name]
    embed(encoder, VALIDATION, tmp_path / "e.parquet", batch=16)
    rows = read(tmp_path / "e.parquet")
    assert list(rows) == ["key", "shard", "label", "tokens", "embedding"]
    assert rows["key"] == [f"val-{i:06d}" for i in range(120)] and set(rows["shard"]) == {
        "multimodal-val-000000.tar"
    }
    assert set(rows["label"]) == set(range(10))
    with tarfile.open(SAMPLE / "multimodal-val-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    extension = {"image": "png", "audio": "ogg", "text": "txt"}[name]
    for i in (0, 7, 119):
        key = f"val-{i:06d}"
        content = next(c for n, c in members.items() if n.startswith(key) and n.endswith(extension))
        f = encoder.extract(content, all=True)
        np.testing.assert_allclose(rows["embedding"][i], f.pooled[0], rtol=1e-5, atol=1e-5)
        assert rows["tokens"][i] == f.x.shape[1]
        assert rows["label"][i] == int(members[f"{key}.cls"])


def test_a_folder_is_embedded_with_its_folders_and_bad_files_are_listed(encoders, sounds, tmp_path):
    """By paths in order; hidden files and files of another kind are left out."""
    summary = embed(encoders["audio"], sounds, tmp_path / "e.parquet")
    rows = read(tmp_path / "e.parquet")
    assert list(rows) == ["key", "tokens", "embedding"]
    assert rows["key"] == ["a.ogg", "b/Z.wav", "b/a.WAV", "b/deep/x.flac", "c.wav", "d.wav"]
    for key, embedding in zip(rows["key"], rows["embedding"], strict=True):
        expected = encoders["audio"].extract(sounds / key, all=True).pooled[0]
        np.testing.assert_allclose(embedding, expected, rtol=1e-5, atol=1e-5)
    bad = [json.loads(line) for line in (tmp_path / "e.bad.jsonl").read_text().splitlines()]
    assert [b["key"] for b in bad] == ["bad.wav", "short.wav"]
    assert "undecodable sound" in bad[0]["reason"] and "25 ms" in bad[1]["reason"]
    assert (summary.rows, summary.bad) == (6, 2) and "2 could not be embedded" in str(summary)


def test_files_of_values_out_of_range_are_listed_and_the_others_embedded(encoders, tmp_path):
    """Sound of 1e38, NaN, rates that no filter reaches, deep and floating pixels: not one row that is not finite."""
    (tmp_path / "sounds").mkdir()
    values = {"a": noise(8000), "loud": noise(8000) * 5e37, "nan": np.full(8000, np.nan), "odd": noise(8000)}
    for name, wave in values.items():
        rate = 44_099 if name == "odd" else 16_000
        soundfile.write(tmp_path / "sounds" / f"{name}.wav", wave.astype(np.float32), rate, subtype="FLOAT")
    embed(encoders["audio"], tmp_path / "sounds", tmp_path / "s.parquet")
    rows, bad = read(tmp_path / "s.parquet"), (tmp_path / "s.bad.jsonl").read_text().splitlines()
    assert rows["key"] == ["a.wav"] and np.isfinite(rows["embedding"][0]).all()
    reasons = {json.loads(line)["key"]: json.loads(line)["reason"] for line in bad}
    assert list(reasons) == ["loud.wav", "nan.wav", "odd.wav"]
    assert "divide it by its largest" in reasons["loud.wav"] and "not finite" in reasons["nan.wav"]
    assert "no common measure" in reasons["odd.wav"]
    (tmp_path / "pictures").mkdir()
    picture(1).save(tmp_path / "pictures" / "a.png")
    for name, kind, value in (("deep", np.int32, 70_000), ("float", np.float32, 0.5)):
        Image.fromarray(np.full((9, 9), value, kind)).save(tmp_path / "pictures" / f"{name}.tif")
    embed(encoders["image"], tmp_path / "pictures", tmp_path / "p.npy")
    assert np.load(tmp_path / "p.npy").shape[0] == 1
    assert (tmp_path / "p.bad.jsonl").read_text().count("\n") == 2


def test_npy_holds_the_same_numbers_and_names_lie_beside_it(encoders, tmp_path):
    for name in ("e.parquet", "e.npy"):
        embed(encoders["image"], VALIDATION, tmp_path / name)
    array, rows = np.load(tmp_path / "e.npy"), read(tmp_path / "e.parquet")
    assert array.shape == (120, 48) and array.dtype == np.float32
    assert np.array_equal(array, np.array(rows["embedding"], dtype=np.float32))
    names = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert names == [{k: rows[k][i] for k in ("key", "shard", "label", "tokens")} for i in range(120)]
    assert json.loads((tmp_path / "e.json").read_text())["pool"] == "mean"


@pytest.mark.parametrize("out", ["e.parquet", "e.npy"])
def test_layers_and_pools_are_those_of_extract(out, encoders, sounds, tmp_path):
    """One layer by its number from either end, all of them, every token, the class token."""
    encoder = encoders["audio"]
    keys = ["a.ogg", "b/Z.wav", "b/a.WAV", "b/deep/x.flac", "c.wav", "d.wav"]
    exact = [encoder.extract(sounds / key, all=True) for key in keys]

    def embedded(encoder: Encoder = encoder, data: Path | str = sounds, **options) -> list[np.ndarray]:
        path = tmp_path / ("-".join(map(str, options.values())) + out)
        embed(encoder, data, path, **options)
        if path.suffix == ".parquet":
            return [np.array(e, dtype=np.float32) for e in read(path)["embedding"]]
        array = np.load(path)
        if options.get("pool") != "none":
            return list(array)
        names = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
        return [array[n["first"] : n["first"] + n["tokens"]] for n in names]

    def same(ours: list[np.ndarray], theirs: list[torch.Tensor]) -> None:
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    for layer, i in ((0, 0), (-1, 1), (-2, 0)):
        same(embedded(layer=layer), [f.layers[i][0].mean(0) for f in exact])
    same(embedded(layer="all"), [torch.stack([layer[0].mean(0) for layer in f.layers]) for f in exact])
    same(embedded(pool="none"), [f.x[0] for f in exact])
    same(embedded(pool="none", layer=0), [f.layers[0][0] for f in exact])
    text = embedded(encoders["text"], VALIDATION, pool="cls", batch=7)
    keys = read_keys(tmp_path, out)
    assert len(text) == len(keys) == 120
    first = encoders["text"].extract("zero", all=True).x[0, 0].shape
    assert {t.shape for t in text} == {tuple(first)}
    pixels = embedded(encoders["image"], VALIDATION, pool="cls", layer=1)
    hidden = encoders["image"].run(encoders["image"].prepare(first_picture()), keep=True)
    np.testing.assert_allclose(pixels[0], hidden.kept[1].extra[0, 0], rtol=1e-5, atol=1e-5)


def read_keys(folder: Path, out: str) -> list[str]:
    if out.endswith("parquet"):
        return read(folder / f"cls-7{out}")["key"]
    return [
        json.loads(line)["key"]
        for line in (folder / f"cls-7{out}").with_suffix(".jsonl").read_text().splitlines()
    ]


def first_picture() -> bytes:
    with tarfile.open(SAMPLE / "multimodal-val-000000.tar") as tar:
        return next(tar.extractfile(member).read() for member in tar if member.name == "val-000000.png")


def test_labels_are_numbers_only_if_all_are_and_may_be_absent(encoders, tmp_path):
    """From a member or a json key; samples without one have none."""
    labels = {"a": b"3", "b": b"12", "c": None, "d": b"-1"}
    members = {}
    for i, (key, label) in enumerate(labels.items()):
        members |= {f"{key}.png": png(i)} | ({f"{key}.cls": label} if label else {})
    write_tar(tmp_path / "numbers.tar", members)
    members |= {"e.png": png(9), "e.json": b'{"label": "cat", "n": 1}', "f.png": png(8), "f.json": b"{}"}
    write_tar(tmp_path / "words.tar", members)
    for name, expected in (("numbers", [3, 12, None, -1]), ("words", ["3", "12", None, "-1", "cat", None])):
        embed(encoders["image"], tmp_path / f"{name}.tar", tmp_path / f"{name}.parquet")
        assert read(tmp_path / f"{name}.parquet")["label"] == expected
        embed(encoders["image"], tmp_path / f"{name}.tar", tmp_path / f"{name}.npy")
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["label"] for line in lines] == expected
    embed(encoders["image"], tmp_path / "numbers.tar", tmp_path / "none.parquet", label="txt")
    assert "label" not in read(tmp_path / "none.parquet")


def test_a_corrupt_sample_of_a_shard_is_listed_and_one_without_an_image_is_told(encoders, tmp_path):
    said = []
    write_tar(
        tmp_path / "x.tar", {"a.png": png(1), "b.png": b"no picture", "c.txt": b"text alone", "d.png": png(2)}
    )
    embed(encoders["image"], tmp_path / "x.tar", tmp_path / "e.parquet", say=said.append)
    assert read(tmp_path / "e.parquet")["key"] == ["a", "d"]
    assert json.loads((tmp_path / "e.bad.jsonl").read_text())["key"] == "x.tar:b"
    assert any("3 samples in 1 shards (1 more have no " in line for line in said)


# ---- stopping and going on ----


def run_embed(export: Path, out: Path, kill_after_parts: int | None = None) -> int:
    """`d2v embed` in a process of its own that writes a part after each group of 8 images; killed at once when it
    has written so many."""
    code = (
        "import sys; from d2v_ds.tasks import embed; embed.PART_SECONDS = 0; from d2v_ds.cli import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["embed", str(export), VALIDATION, "--modality", "image", "--out", str(out), "--batch", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL
    )
    parts = out.with_name(out.name + ".parts")
    while kill_after_parts is not None and process.poll() is None:
        if len(list(parts.glob("part_*.parquet"))) >= kill_after_parts:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    return process.wait(timeout=120)


@pytest.mark.slow
def test_killed_it_writes_the_file_of_a_run_that_was_not(export, tmp_path):
    """To the byte."""
    assert run_embed(export, tmp_path / "whole.parquet") == 0
    assert run_embed(export, tmp_path / "e.parquet", kill_after_parts=6) == -signal.SIGKILL
    assert not (tmp_path / "e.parquet").exists()
    assert 6 <= len(list((tmp_path / "e.parquet.parts").glob("part_*.parquet"))) < 15
    assert run_embed(export, tmp_path / "e.parquet") == 0
    assert (tmp_path / "e.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.parquet", "whole.parquet"]


@pytest.mark.parametrize("out", ["e.npy", "e.parquet"])
def test_stopped_after_any_batch_it_goes_on(out, encoders, sounds, tmp_path, monkeypatch):
    """With bad files among the items, whose list is the same too; where parts were cut leaves no trace; nothing is
    left behind."""
    monkeypatch.setattr(groups, "GROUP_BATCHES", 1)
    embed(encoders["audio"], sounds, tmp_path / "whole" / out, batch=2)  # in one part
    monkeypatch.setattr(embed_module, "PART_SECONDS", 0.0)
    run, calls = Encoder.run, [0]

    def tiring(self, *arguments, **options):
        calls[0] += 1
        if calls[0] % 2 == 0:
            raise KeyboardInterrupt
        return run(self, *arguments, **options)

    monkeypatch.setattr(Encoder, "run", tiring)
    stops = 0
    while not (tmp_path / "torn" / out).exists():
        try:
            embed(encoders["audio"], sounds, tmp_path / "torn" / out, batch=2)
        except KeyboardInterrupt:
            stops += 1
    assert stops == 2
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "torn").iterdir()) and "e.bad.jsonl" in names
    for name in names:
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_part_that_is_broken_is_made_again(encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "GROUP_BATCHES", 1)
    monkeypatch.setattr(embed_module, "PART_SECONDS", 0.0)
    embed(encoders["image"], VALIDATION, tmp_path / "whole.parquet")
    monkeypatch.setattr(embed_module, "finish", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embed(encoders["image"], VALIDATION, tmp_path / "e.parquet")
    parts = sorted((tmp_path / "e.parquet.parts").glob("part_*"))
    assert len(parts) == 4
    parts[1].write_bytes(parts[1].read_bytes()[:100])
    monkeypatch.undo()
    embed(encoders["image"], VALIDATION, tmp_path / "e.parquet")
    assert read(tmp_path / "e.parquet") == read(tmp_path / "whole.parquet")


def test_what_is_done_is_not_done_again_and_nothing_is_overwritten(encoders, sounds, tmp_path):
    """Neither a result of other settings, data or weights, nor a file of someone else."""
    out, encoder = tmp_path / "e.parquet", encoders["audio"]
    embed(encoder, sounds, out)
    before = out.read_bytes(), out.stat().st_mtime_ns
    assert "there already" in str(embed(encoder, sounds, out))
    with pytest.raises(
        ValueError, match="is there with other settings .batch 32 instead of 8.; name another"
    ):
        embed(encoder, sounds, out, batch=8)
    with pytest.raises(ValueError, match="data .* instead of"):
        embed(encoder, sounds / "b", out)
    other = d2v_ds.load(encoder.origin.split(" (")[0], "audio")
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match="model .* instead of"):
        embed(other, sounds, out)
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before
    (tmp_path / "mine.npy").write_bytes(b"precious")
    with pytest.raises(ValueError, match="which d2v embed did not write"):
        embed(encoder, sounds, tmp_path / "mine.npy")
    assert (tmp_path / "mine.npy").read_bytes() == b"precious"


def test_two_at_once_do_not_mix(encoders, sounds, tmp_path):
    from d2v_ds.tasks.table import Parts

    with pytest.raises(ValueError, match="another process is writing"):
        held = Parts(tmp_path / "e.npy", {})
        try:
            embed(encoders["audio"], sounds, tmp_path / "e.npy")
        finally:
            held.remove()


# ---- how ----


def test_items_of_like_length_go_together(encoders, sounds, tmp_path, monkeypatch):
    """So little of a batch is padding; the order of the file is that of the data all the same."""
    seen, run = [], Encoder.run

    def watched(self, rows, keep):
        seen.append([len(row) for row in rows])
        return run(self, rows, keep)

    monkeypatch.setattr(Encoder, "run", watched)
    embed(encoders["audio"], sounds, tmp_path / "e.npy", batch=2)
    assert [len(rows) for rows in seen] == [2, 2, 2]
    assert sum(seen, []) == sorted(sum(seen, []))


def test_a_batch_has_room_in_attention():
    """Short items fill the batch, long ones go alone."""
    assert cut_batch([0, 1, 2], [50, 50, 50], 2) == [0, 1]
    assert cut_batch([0, 1, 2], [1000, 2999, 3000], 32) == [0]
    assert cut_batch([0, 1, 2], [100_000] * 3, 32) == [0]
    assert len(cut_batch(list(range(64)), [499] * 64, 64)) == 64


def test_a_group_is_no_larger_than_its_limit(encoders, sounds, monkeypatch):
    """In bytes of what goes in and comes out; wherever one starts, the groups after it are the same."""
    encoder = encoders["audio"]
    from d2v_ds.tasks.items import open_items

    items = open_items(sounds, "audio", encoder.samples, "")
    monkeypatch.setattr(groups, "GROUP_BYTES", 100_000)

    def made(start: int, per_token: int = 0) -> list[tuple[list[int], int]]:
        ready = groups.prepare(encoder, items, start, workers=2)
        return [
            ([r.number for r in g.ready], g.next_item)
            for g in groups.make_groups(ready, encoder, 32, per_token)
        ]

    whole = made(0)
    assert len(whole) > 2 and [n for numbers, _ in whole for n in numbers] == [0, 1, 2, 3, 5, 6]
    for i, (_, following) in enumerate(whole[:-1]):
        assert made(following) == whole[i + 1 :]
    assert len(made(0, per_token=4 * 48 * 100)) > len(whole)


def test_features_that_are_not_finite_are_bad(encoders, tmp_path):
    """Not a row of NaN."""
    encoder = d2v_ds.load(encoders["image"].origin.split(" (")[0], "image")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(1))
    with torch.no_grad():
        encoder.model.blocks[-1].norm2.bias[0] = torch.inf
    with pytest.raises(
        ValueError, match="none of the 1 items can be embedded: a.png: its features are not finite"
    ):
        embed(encoder, tmp_path / "pictures", tmp_path / "e.npy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures"]


def test_mistakes_are_told(encoders, sounds, tmp_path):
    def say(name: str = "audio", data: object = sounds, out: str = "e.npy", **options) -> str:
        with pytest.raises(ValueError) as error:
            embed(encoders[name], data, tmp_path / out, **options)
        assert not any(tmp_path.iterdir())
        return str(error.value)

    assert "must end in .parquet or .npy" in say(out="e.csv")
    assert "layer 2 must lie in -2..1: the model has 2 blocks" in say(layer=2)
    assert "layer 'first' must be last, all or a number" in say(layer="first")
    assert "pool 'max' must be mean, cls or none" in say(pool="max")
    assert "has no class token; use pool mean" in say(pool="cls")
    assert "pool none with layer all" in say(pool="none", layer="all")
    assert "batch 0 must be at least 1" in say(batch=0)
    assert "holds no image file" in say("image") and ".wav (6)" in say("image")
    assert "does not exist" in say(data="nowhere") and "matches nothing" in say(data="nowhere/*.tar")
    assert "is no audio file" in say(data=SAMPLE / "README.md")


# ---- the command ----


def test_the_command_says_what_it_took_and_what_came_of_it(export, sounds, tmp_path, capsys):
    """On lines of their own; nothing on stderr where nobody watches."""
    out = tmp_path / "e.parquet"
    assert (
        main(["embed", str(export), str(sounds), "--modality", "audio", "--out", str(out), "--layer", "-2"])
        == 0
    )
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].startswith(f"Encoder(audio from {export}") and lines[1] == f"8 files in {sounds}"
    assert lines[2].startswith(f"wrote {out}: 6 embeddings in ") and lines[3].startswith(
        "2 could not be embedded"
    )
    assert len(lines) == 4 and said.err == ""
    assert main(["embed", str(export), str(sounds), "--out", str(out)]) == 2
    assert "error: " in capsys.readouterr().err


def test_the_command_that_was_stopped_says_that_it_goes_on(export, sounds, tmp_path, capsys, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "run", stop)
    assert (
        main(["embed", str(export), str(sounds), "--modality", "audio", "--out", str(tmp_path / "e.npy")])
        == 130
    )
    assert "the same command goes on" in capsys.readouterr().err


def test_cut_texts_are_counted(encoders, tmp_path):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(("seven", "seven " * 99, "a " * 500)):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    summary = embed(encoders["text"], tmp_path / "texts", tmp_path / "e.npy")
    assert "2 were cut: they are longer than the model takes at once" in str(summary)


def test_one_file_or_a_pattern_of_files_is_data_too(encoders, sounds, tmp_path):
    embed(encoders["audio"], sounds / "b" / "Z.wav", tmp_path / "e.parquet")
    assert read(tmp_path / "e.parquet")["key"] == ["Z.wav"]
    embed(encoders["audio"], f"{sounds}/**/[a-d]*.*", tmp_path / "p.parquet")
    found = [str(sounds / name) for name in ("a.ogg", "b/a.WAV", "c.wav", "d.wav")]
    assert read(tmp_path / "p.parquet")["key"] == found


class Stream(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_one_line_on_a_terminal_and_a_seldom_one_elsewhere(is_terminal, monkeypatch):
    """With rate and time left, of what this run did; never more than a few."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = Stream(is_terminal)
    line = ProgressLine(1000, start=200, stream=stream)
    for done in range(200, 1000):
        now[0] += 0.1
        line.show(done, bad=3)
    line.close()
    said = stream.getvalue()
    if is_terminal:
        assert "\n" not in said and said.endswith("\r") and 130 < said.count("\r") < 170
    else:
        assert said.count("\n") == 2
        assert said.splitlines()[0] == "499 of 1000 (49 %), 10.0/s, 3 bad, 50 s left"
    assert duration(3 * 3600) == "3 h" and duration(150) == "2 min"


def test_embedding_needs_no_deepspeed(export, sounds, tmp_path):
    code = (
        "import sys; from d2v_ds.tasks.embed import embed; "
        f"embed({str(export)!r}, {str(sounds)!r}, {str(tmp_path / 'e.npy')!r}, 'audio'); "
        "assert 'deepspeed' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

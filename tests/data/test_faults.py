"""Whatever happens to the bytes of a shard: no crash, no hang, and each indexed sample is given or named.

A mutation flips bits, zeroes, cuts, repeats, swaps or overwrites some of a shard, headers included.
"""

import errno
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from multiprocessing import resource_sharer
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch
from ranks import SAMPLE
from tars import write_tar
from test_loader import ByteSamples, as_values, make_plan

from d2v_ds.data import Corpus, CorruptSample, DataError, Source, StepLoader, build_index, scan
from d2v_ds.data.verify import verify_shard
from d2v_ds.modalities.source import open_source
from d2v_ds.recipe import load_recipe

Writer = Callable[..., list[Path]]
FAST, ALL = 150, 1000


def flip(rng: random.Random, content: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 3, 50))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def zero(rng: random.Random, content: bytearray) -> None:
    start, length = rng.randrange(len(content)), rng.choice((1, 512, 5000))
    content[start : start + length] = bytes(len(content[start : start + length]))


def cut(rng: random.Random, content: bytearray) -> None:
    del content[rng.randrange(len(content)) :]


def drop(rng: random.Random, content: bytearray) -> None:
    start = rng.randrange(len(content))
    del content[start : start + rng.choice((1, 512, 3000))]


def repeat(rng: random.Random, content: bytearray) -> None:
    start, length = rng.randrange(len(content)), rng.choice((1, 512, 4096))
    content[start:start] = content[start : start + length]


def swap(rng: random.Random, content: bytearray) -> None:
    blocks = len(content) // 512
    a, b = rng.randrange(blocks) * 512, rng.randrange(blocks) * 512
    content[a : a + 512], content[b : b + 512] = content[b : b + 512], content[a : a + 512]


def overwrite(rng: random.Random, content: bytearray) -> None:
    start = rng.randrange(len(content))
    content[start : start + 600] = rng.randbytes(len(content[start : start + 600]))


def forge(rng: random.Random, content: bytearray) -> None:
    """A header whose fields are wild but whose checksum is right: sizes, types and names that lie."""
    headers = [at for at in range(0, len(content) - 511, 512) if content[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return
    at = rng.choice(headers)
    field = rng.choice(((124, 12), (156, 1), (0, 100), (257, 8), (345, 155), (148, 8)))
    wild = rng.choice((b"\xff", b"7", b"-", b"\x80", b"x", b"g", b"L", b"K", b"S", b"1", b"5", b"\0"))
    length = rng.randrange(1, field[1] + 1)
    content[at + field[0] : at + field[0] + length] = wild * length
    header = bytearray(content[at : at + 512])
    header[148:156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(header)


MUTATIONS = (flip, zero, cut, drop, repeat, swap, overwrite, forge)


def mutations(count: int, whole: bytes) -> Iterator[bytes]:
    rng = random.Random(count)
    for number in range(count):
        content = bytearray(whole)
        MUTATIONS[number % len(MUTATIONS)](rng, content)
        if rng.random() < 0.3 and len(content) > 512:
            MUTATIONS[rng.randrange(len(MUTATIONS))](rng, content)
        yield bytes(content)


def read_all(corpus: Corpus, read: Callable[[int], object]) -> tuple[int, int]:
    given = quarantined = 0
    for i in range(len(corpus)):
        try:
            read(i)
            given += 1
        except ValueError as error:
            assert str(error) and corpus.key(i)
            quarantined += 1
    return given, quarantined


def mutate_after_indexing(path: Path, whole: bytes, count: int) -> None:
    """What was indexed is given as it was, or is a CorruptSample."""
    build_index(path)
    fields = {"content": "bin", "label": "cls"}
    first = Corpus.open([path], fields, progress=None)
    expected = [first.read(i) for i in range(len(first))]
    total = 0
    for content in mutations(count, whole):
        path.write_bytes(content)
        corpus = Corpus(first.indexes, first.fields)
        for i, sample in enumerate(expected):
            try:
                assert corpus.read(i) == sample
            except CorruptSample as error:
                assert error.shard == path.name and error.key and error.reason
                total += 1
    assert total > count  # they do hit


def mutate_before_indexing(path: Path, whole: bytes, count: int) -> None:
    """The shard is refused with its name, or all that its index counts is given or quarantined."""
    refused = 0
    for content in mutations(count, whole):
        path.write_bytes(content)
        for file in path.parent.glob(f"{path.name}.*"):
            file.unlink()
        report = verify_shard(path, {})
        try:
            index = build_index(path)
        except ValueError as error:
            assert path.name in str(error) and report.problems
            refused += 1
            continue
        assert not report.problems and report.samples == index.num_samples
        if not {"bin", "cls"} <= set(index.extension_counts):
            continue
        corpus = Corpus.open([path], {"content": "bin", "label": "cls"}, progress=None)
        assert sum(read_all(corpus, corpus.read)) == len(corpus) <= index.num_samples
        assert corpus.skipped == index.num_samples - len(corpus)
    assert count / 3 < refused < count


@pytest.mark.parametrize("mutate", [mutate_after_indexing, mutate_before_indexing])
@pytest.mark.parametrize("count", [FAST, pytest.param(ALL, marks=pytest.mark.slow)])
def test_a_thousand_mutations_of_a_shard(write_shards: Writer, mutate, count: int) -> None:
    (path,) = write_shards(shards=1)
    mutate(path, path.read_bytes(), count)


@pytest.mark.parametrize("count", [24, pytest.param(400, marks=pytest.mark.slow)])
def test_mutated_images_and_sounds_are_decoded_or_named(tmp_path: Path, count: int) -> None:
    """Through the decoders: what is not refused at once is decoded, or a ValueError."""
    path = tmp_path / "a.tar"
    with tarfile.open(SAMPLE / "multimodal-train-000000.tar") as source:
        members = []
        for member in source:
            if member.name > "train-000004":
                break
            members.append((member.name, source.extractfile(member).read()))
    whole = write_tar(path, members).read_bytes()
    recipe = load_recipe("multimodal_tiny")
    rng, looked_at = random.Random(3), 0
    with tarfile.open(path) as tar:
        places = [(m.offset_data, m.size) for m in tar if m.name.endswith((".png", ".ogg"))]
    for _ in range(count):
        content = bytearray(whole)
        for at, size in places:
            for _ in range(rng.choice((1, 3, 20))):
                content[at + rng.randrange(size)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        for file in tmp_path.glob("a.tar.*"):
            file.unlink()
        for name in ("image", "audio"):
            try:
                source = open_source(name, recipe.modalities[name], str(path))
            except ValueError:
                continue  # none is left
            corpus = source.corpus
            assert sum(read_all(corpus, lambda i, s=source: s.samples.read(s.corpus, i))) == len(corpus)
            looked_at += len(corpus)
    assert looked_at > 2 * count


@pytest.mark.parametrize("fields", [{"content": "bin", "label": "cls"}, {"content": "bin", "label": "cls;"}])
def test_a_sector_that_the_disk_does_not_give_is_quarantined(
    write_shards: Writer, monkeypatch, fields
) -> None:
    (path,) = write_shards(shards=1)
    corpus = Corpus.open([path], fields, progress=None)
    start, end = corpus.indexes[0].offsets()[2:4].tolist()
    pread = os.pread

    def bad_sector(file: int, size: int, offset: int) -> bytes:
        if offset < end and start < offset + size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", bad_sector)
    corpus = Corpus(corpus.indexes, corpus.fields)
    assert read_all(corpus, corpus.read) == (6, 1)
    with pytest.raises(CorruptSample, match=r":sample 2: the disk does not give it \(Input/output error\)"):
        corpus.read(2)


def test_a_shard_that_the_disk_does_not_give_is_named(write_shards: Writer, monkeypatch) -> None:
    (path,) = write_shards(shards=1)
    monkeypatch.setattr(scan, "crc32_of", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(ValueError, match=f"{path.name} is truncated or corrupt .*Input/output error"):
        build_index(path)


def test_a_header_that_would_be_read_for_ever_is_refused(tmp_path: Path) -> None:
    """A size below zero sends plain tar reading back to where it was."""
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"x" * 600), ("b.txt", b"y")])
    content = bytearray(path.read_bytes())
    content[124:136] = b"\xff" * 10 + (-1024 & 0xFFFF).to_bytes(2, "big")
    header = bytearray(content[:512])
    header[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "d2v_ds.cli", "index", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 2 and "a.tar is truncated or corrupt" in done.stderr, done.stderr


def test_no_member_is_ever_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    evil = pickle.dumps(Evil())
    names = ("a.pyd", "a.pickle", "a.pth", "a.json", "a.npy", "a.txt", "a.cls", "a.jpg", "a.flac")
    path = write_tar(tmp_path / "a.tar", [(name, evil) for name in names])
    corpus = Corpus.open([path], {"x": "pyd", "y": "pth"}, progress=None)
    assert corpus.read(0) == {"x": evil, "y": evil}
    verify_shard(path, {})
    recipe = load_recipe("multimodal_tiny")
    source = open_source("image", recipe.modalities["image"], str(path))
    with pytest.raises(ValueError, match="undecodable image"):
        source.samples.read(source.corpus, 0)
    with pytest.raises(ValueError):
        open_source("audio", recipe.modalities["audio"], str(path))
    assert not (tmp_path / "owned").exists()


# ---- members that are too large to decode ----


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def test_a_bomb_of_an_image_is_refused_by_its_header(tmp_path: Path) -> None:
    """1 GB of pixels in a kilobyte."""
    path = write_tar(tmp_path / "a.tar", [("a.png", png_header(20_000, 18_000))])
    source = open_source("image", load_recipe("multimodal_tiny").modalities["image"], str(path))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="360000000 pixels"):
        source.samples.read(source.corpus, 0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def flac(seconds: int, told: int | None = None, rate: int = 16_000, channels: int = 1) -> bytes:
    """Silence; its header says `told` seconds."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros((rate * seconds, channels), dtype="int16"), rate, format="FLAC")
    content = bytearray(file.getvalue())
    if told:  # the last 36 bits of the 8 bytes with rate, channels and width
        (word,) = struct.unpack_from(">Q", content, 18)
        struct.pack_into(">Q", content, 18, word >> 36 << 36 | rate * told)
    return bytes(content)


def test_a_sound_of_ten_hours_is_left_out_and_named_with_its_shard_and_reason(tmp_path: Path, caplog) -> None:
    """Nobody decodes it."""
    bomb = flac(1, 3_500, rate=96_000, channels=8)  # an hour of it is 10 GB
    sounds = [
        ("long.flac", flac(1, 36_000)),
        ("noise.flac", b"noise"),
        ("good.flac", flac(1)),
        ("wide.flac", bomb),
    ]
    path = write_tar(tmp_path / "a.tar", sounds)
    config = load_recipe("multimodal_tiny", ["modalities.audio.data.fields=flac"]).modalities["audio"]
    source = open_source("audio", config, str(path))
    assert len(source.corpus) == 1 and source.corpus.key(0) == "a.tar:good"
    assert f"{path}: 1 samples without audio_samples" in caplog.text
    assert "as long: sound of 36000 s by its header is above the limit" in caplog.text
    assert "as noise: undecodable sound" in caplog.text and "3 of 4 samples" in caplog.text
    assert "as wide: sound of 3500 s at 96000 Hz in 8 channels by its header is above" in caplog.text
    (file,) = tmp_path.glob("a.tar.audio_samples*.faults.jsonl")
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["long", "noise", "wide"]


# ---- data workers ----


@pytest.fixture
def source(write_shards: Writer) -> Source:
    corpus = Corpus.open(write_shards(), ByteSamples.fields, progress=None)
    return Source("image", corpus, ByteSamples(corpus), 4, 6)


def kill_one() -> None:
    workers = [child for child in torch.multiprocessing.active_children()]
    os.kill(workers[-1].pid, signal.SIGKILL)
    workers[-1].join()


def test_a_worker_that_is_killed_is_replaced_and_the_batches_are_the_same(source, caplog) -> None:
    plan = make_plan([source])
    expected = [as_values(step) for step in StepLoader([source], plan, 0, 1, 0, 12)]
    read = []
    for number, step in enumerate(StepLoader([source], plan, 0, 1, 0, 12, workers=2)):
        read.append(as_values(step))
        if number == 3:
            kill_one()
    assert read == expected
    assert "was killed while step" in caplog.text and "(1 of 3)" in caplog.text


def test_a_worker_that_is_lost_while_it_hands_over_a_batch_is_replaced(source, caplog, monkeypatch) -> None:
    """The kernel closes what it had open before it counts as dead."""
    plan = make_plan([source])
    expected = [as_values(step) for step in StepLoader([source], plan, 0, 1, 0, 4)]
    sharer = resource_sharer._resource_sharer
    connect = sharer.get_connection
    lost = [EOFError(), ConnectionResetError(errno.ECONNRESET, "reset by peer")]

    def get_connection(ident: object) -> object:
        if lost:
            raise lost.pop()
        return connect(ident)

    monkeypatch.setattr(sharer, "get_connection", get_connection)
    assert [as_values(step) for step in StepLoader([source], plan, 0, 1, 0, 4, workers=2)] == expected
    assert "was killed while step 0" in caplog.text and "(2 of 3)" in caplog.text


@pytest.mark.slow
def test_workers_that_are_killed_again_and_again_stop_the_run(source) -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match="4 times in this run. The machine may have no memory left"):
        for _ in StepLoader([source], make_plan([source]), 0, 1, 0, 10**9, workers=1):
            kill_one()
    assert time.monotonic() - started < 90

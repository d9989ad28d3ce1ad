"""The committed sample shards hold what they promise, and the module that makes them repeats itself."""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import soundfile
import webdataset
from PIL import Image

from shards import sample
from shards.tokenizer import train_sentencepiece
from shards.writer import num_tar_bytes

FOLDER = Path(sample.__file__).with_name("sample")
REPOSITORY = FOLDER.parent.parent


def read_shards(pattern: str, folder: Path = FOLDER) -> list[dict]:
    paths = sorted(str(path) for path in folder.glob(pattern))
    return list(webdataset.WebDataset(paths, shardshuffle=False))


def read_labels(samples: list[dict]) -> list[dict]:
    return [json.loads(item["json"]) for item in samples]


@pytest.fixture(scope="module")
def multimodal() -> dict[str, list[dict]]:
    return {split: read_shards(f"multimodal-{split}-*.tar") for split in ("train", "val")}


@pytest.fixture(scope="module")
def texts() -> dict[str, list[dict]]:
    return {split: read_shards(f"text-{split}-*.tar") for split in ("train", "val")}


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "sentencepiece.model"))


def test_committed_tars_take_at_most_12_mb():
    """All tars beside the module together."""
    assert 0 < sum(path.stat().st_size for path in FOLDER.glob("*.tar")) <= 12_000_000


def test_every_multimodal_sample_has_all_members(multimodal):
    """png, ogg, txt, json and cls, in this order, under keys that are all different."""
    assert len(multimodal["train"]) >= 400 and len(multimodal["val"]) >= 100
    everything = multimodal["train"] + multimodal["val"]
    for item in everything:
        assert [name for name in item if not name.startswith("__")] == ["png", "ogg", "txt", "json", "cls"]
    assert len({item["__key__"] for item in everything}) == len(everything)


def test_images_are_32x32_grey_and_not_empty(multimodal):
    """Every picture decodes, and shows something."""
    for item in multimodal["train"] + multimodal["val"]:
        picture = Image.open(io.BytesIO(item["png"]))
        assert (picture.size, picture.mode) == ((32, 32), "L")
        assert np.asarray(picture).max() > 128


def test_sound_is_16_khz_and_as_long_as_stated(multimodal):
    """Every clip decodes to mono of the stated seconds, at least 0.6, and is neither silent nor clipped."""
    for item, labels in zip(multimodal["val"], read_labels(multimodal["val"]), strict=True):
        wave, rate = soundfile.read(io.BytesIO(item["ogg"]))
        assert rate == 16_000 and wave.ndim == 1
        assert len(wave) / rate == pytest.approx(labels["seconds"], abs=1e-4) and labels["seconds"] >= 0.6
        assert 0.6 < np.abs(wave).max() < 1


def test_the_modalities_say_the_same_digit(multimodal):
    """cls, both labels of the json, the word in the text, and the source image agree."""
    digits = sample.load_digits()[1]
    for item in multimodal["train"] + multimodal["val"]:
        labels = json.loads(item["json"])
        assert int(item["cls"]) == labels["digit"] == labels["label"] == digits[labels["source_index"]]
        spoken = set(item["txt"].decode().split()) & set(sample.WORDS)
        assert spoken == {sample.WORDS[labels["digit"]]}


def test_picture_is_composed_as_the_labels_say(multimodal):
    """Source, size and place in the json reproduce the picture."""
    images = sample.load_digits()[0]
    for item in multimodal["val"][:17]:
        labels = json.loads(item["json"])
        place = {name: labels[name] for name in ("size", "x", "y")}
        expected = sample.compose_digit(images[labels["source_index"]], **place)
        assert np.array_equal(expected, Image.open(io.BytesIO(item["png"])))


def test_train_and_val_share_no_digit_image_and_no_voice_rate(multimodal):
    """Neither an image nor a (voice, rate) of validation is in train; each split holds all ten classes."""
    train, val = read_labels(multimodal["train"]), read_labels(multimodal["val"])
    assert not {item["source_index"] for item in train} & {item["source_index"] for item in val}
    assert not {(item["voice"], item["rate"]) for item in train} & {
        (item["voice"], item["rate"]) for item in val
    }
    for labels, split in ((train, "train"), (val, "val")):
        assert {item["split"] for item in labels} == {split}
        assert {item["digit"] for item in labels} == set(range(10))


def test_text_splits_share_no_paragraph(texts):
    """What validation reads was not trained on."""
    train, val = (
        {line for item in texts[split] for line in item["txt"].decode().splitlines()}
        for split in ("train", "val")
    )
    assert len(train) > 1000 and len(val) > 100 and not train & val


def test_tokenizer_has_fairseq_ids_and_knows_the_text(tokenizer, texts, multimodal):
    """<s> <pad> </s> <unk> are 0..3; held-out prose round-trips, without unknowns, rarely in bytes."""
    special = (tokenizer.bos_id(), tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert special == (0, 1, 2, 3) and tokenizer.vocab_size() == sample.VOCAB_SIZE
    assert [tokenizer.id_to_piece(index) for index in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
    for item in texts["val"] + multimodal["val"]:
        text = item["txt"].decode()
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id() not in ids and " ".join(tokenizer.decode(ids).split()) == " ".join(
            text.split()
        )
        assert np.mean([tokenizer.is_byte(index) for index in ids]) < 0.2


def test_same_seed_writes_the_same_image_bytes(tmp_path):
    """Two runs agree to the byte, another seed does not, and a smaller run leaves no older shard behind."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    (two / "images-train-000001.tar").write_bytes(b"left by a larger run")
    names = [path.name for path in sample.write_images(one, 97, 53, seed=3)]
    sample.write_images(two, 97, 53, seed=3)
    assert sorted(path.name for path in two.iterdir()) == sorted(names)
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    sample.write_images(two, 97, 53, seed=4)
    assert all((one / name).read_bytes() != (two / name).read_bytes() for name in names)


def test_image_shards_hold_ten_classes_and_disjoint_digits(tmp_path):
    """More train samples than source digits: still no source of train in test."""
    sample.write_images(tmp_path, 1399, 101)
    train, test = (read_labels(read_shards(f"images-{split}-*.tar", tmp_path)) for split in ("train", "test"))
    assert (len(train), len(test)) == (1399, 101)
    assert {item["digit"] for item in train} == {item["digit"] for item in test} == set(range(10))
    assert not {item["source_index"] for item in train} & {item["source_index"] for item in test}


def test_shards_are_cut_by_size_and_keep_every_sample(tmp_path):
    """No shard passes the limit by more than tar's end, and order and members stay."""
    written = [{"__key__": f"k{i}", "b": bytes(700), "a": b"%d" % i} for i in range(11)]
    paths = sample.write_shards(written, f"{tmp_path}/x-%06d.tar", 3 * num_tar_bytes(written[0]))
    assert [path.name for path in paths] == [f"x-{number:06d}.tar" for number in range(4)]
    read = read_shards("x-*.tar", tmp_path)
    assert [int(item["a"]) for item in read] == list(range(11))
    assert [name for name in read[0] if name in "ab"] == ["b", "a"]


def test_ogg_bytes_depend_on_the_sound_only():
    """The serial number that the encoder draws is fixed, and the checksums still hold."""
    wave = np.sin(np.arange(16_001) / 7).astype(np.float32) / 2
    data = sample.encode_audio(wave, "ogg")
    assert data == sample.encode_audio(wave, "ogg") and data[14:18] == b"\1\0\0\0"
    decoded, _ = soundfile.read(io.BytesIO(data))  # a page with a wrong checksum would be dropped
    assert len(decoded) == len(wave) and np.abs(decoded - wave).max() < 0.1


def test_flac_keeps_the_sound_to_16_bits():
    """`--audio flac` loses nothing but the rounding to 16 bits."""
    wave = np.sin(np.arange(10_007) / 7).astype(np.float32) / 2
    decoded, rate = soundfile.read(io.BytesIO(sample.encode_audio(wave, "flac")))
    assert rate == 16_000 and np.abs(decoded - wave).max() <= 2**-15


def test_tokenizer_training_repeats_itself(texts):
    """Training twice on the same lines gives the same model."""
    lines = list(itertools.chain.from_iterable(item["txt"].decode().splitlines() for item in texts["val"]))
    models = [train_sentencepiece(lines, "bpe", sample.VOCAB_SIZE) for _ in range(2)]
    assert models[0] == models[1]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (
            "The :func:`open` function,\nsee ``io``, opens *path* and is used post-\nmortem as well::",
            "The open function, see io, opens path and is used post-mortem as well:",
        ),
        (">>> open(path) shows what the file holds and this is long enough to count.", None),
        ("   stmt ::= 'a statement that is long enough to count as a sentence or two'.", None),
        ("Too short to keep.", None),
    ],
)
def test_prose_keeps_sentences_and_drops_code(block, expected):
    """Markup goes, the words stay; what is not a sentence is left out."""
    assert sample.clean_paragraph(block) == expected


def test_folder_with_other_tars_is_refused(tmp_path, capsys):
    """The message names the folder, the file and the remedy; own shards may be replaced."""
    (tmp_path / "multimodal-train-000000.tar").touch()
    sample.check_out(tmp_path)
    (tmp_path / "imagenet-000.tar").touch()
    with pytest.raises(SystemExit):
        sample.main(["--out", str(tmp_path), "--images-only"])
    message = capsys.readouterr().err
    assert "imagenet-000.tar" in message and "new folder" in message
    assert len(list(tmp_path.iterdir())) == 2


def test_absent_espeak_is_named_with_its_remedy(monkeypatch, tmp_path):
    """Nothing is written, and the error says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="espeak-ng.*apt-get install espeak-ng"):
        sample.write_multimodal(tmp_path, 2, 1)
    assert not list(tmp_path.iterdir())


def test_images_only_needs_neither_torch_nor_espeak(tmp_path):
    """The command runs where torch, torchaudio and soundfile cannot be imported and the PATH is empty."""
    for name in ("torch", "torchaudio", "soundfile", "sentencepiece"):
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError('absent')")
    command = [sys.executable, "-m", "shards.sample", "--out", str(tmp_path / "new"), "--images-only"]
    command += ["--images-train", "7", "--images-test", "3"]
    environment = {**os.environ, "PATH": "", "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert len(read_shards("images-*.tar", tmp_path / "new")) == 10


@pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="espeak-ng speaks the digits and is not installed"
)
def test_regenerated_multimodal_samples_repeat_themselves(tmp_path):
    """Five train samples and one for validation, at any number of jobs, to the byte."""
    for folder, jobs in (("one", 1), ("two", 3)):
        (tmp_path / folder).mkdir()
        sample.write_multimodal(tmp_path / folder, 5, 1, seed=11, jobs=jobs)
    names = [f"multimodal-{split}-000000.tar" for split in ("train", "val")]
    assert all(
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names
    )
    items = read_shards("*.tar", tmp_path / "one")
    assert len(items) == 6
    for item in items:
        wave, rate = soundfile.read(io.BytesIO(item["ogg"]))
        assert rate == 16_000 and len(wave) >= 9600

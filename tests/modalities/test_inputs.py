"""What users give becomes the rows that training would have made, or an error that says what was given."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image
from ranks import SAMPLE

from d2v_ds.modalities import inputs, samples_class
from d2v_ds.modalities.audio.inputs import WINDOW_SECONDS, pieces
from d2v_ds.modalities.audio.samples import num_frames
from d2v_ds.modalities.text.samples import BOS, EOS, PAD
from d2v_ds.recipe import load_recipe

RATE = 16_000


def build_samples(name: str):
    return samples_class(name)(load_recipe(f"{name}_tiny").modalities[name], SAMPLE)


SAMPLES = {name: build_samples(name) for name in ("image", "audio", "text")}


def rows(name: str, x, rate: int | None = None) -> list[torch.Tensor]:
    module = inputs(name)
    return [module.prepare(SAMPLES[name], item, rate).row for item in module.listed(x)]


def row(name: str, x, rate: int | None = None) -> torch.Tensor:
    (one,) = rows(name, x, rate)
    return one


def say(name: str, x, rate: int | None = None) -> str:
    with pytest.raises(ValueError) as error:
        rows(name, x, rate)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- sound ----

WAVE = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
EXPECTED = F.layer_norm(torch.from_numpy(WAVE), (8000,))


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def test_a_waveform_may_be_a_tensor_an_array_a_list_a_file_or_its_bytes(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(WAVE))
    given = [
        torch.from_numpy(WAVE),
        WAVE,
        WAVE.tolist(),
        wav(WAVE),
        str(tmp_path / "a.wav"),
        tmp_path / "a.wav",
    ]
    for x in given:
        torch.testing.assert_close(row("audio", x), EXPECTED, rtol=1e-6, atol=1e-6)
    assert len(rows("audio", given)) == len(given)


def test_whole_numbers_are_pcm():
    """Of 16 bits, as `wave` and many loaders give them; of a view that is reversed or read-only too."""
    pcm = (WAVE * 3000).round().astype(np.int16)
    torch.testing.assert_close(row("audio", pcm), EXPECTED, rtol=1e-3, atol=2e-3)
    assert torch.equal(row("audio", pcm.tolist()), row("audio", pcm))
    fixed = pcm[::-1]
    fixed.flags.writeable = False
    torch.testing.assert_close(row("audio", fixed), row("audio", pcm).flip(0))


def test_two_dimensions_are_a_batch_of_sounds_of_one_channel():
    batch = np.stack([WAVE, 2 * WAVE])
    for x in (batch, torch.from_numpy(batch), list(batch), tuple(batch)):
        for one in rows("audio", x):
            torch.testing.assert_close(one, EXPECTED, rtol=1e-5, atol=1e-5)


def test_a_sound_of_another_rate_is_resampled():
    """A tone keeps its pitch: 440 Hz at 44.1 kHz, and from a file that says its rate."""
    tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100).astype(np.float32)
    for one in (row("audio", tone, 44_100), row("audio", wav(tone, 44_100))):
        assert len(one) == RATE
        assert int(torch.fft.rfft(one).abs().argmax()) == 440


def test_channels_of_a_file_are_averaged():
    stereo = np.stack([WAVE, np.zeros_like(WAVE)], axis=1)
    torch.testing.assert_close(row("audio", wav(stereo)), EXPECTED, rtol=1e-4, atol=1e-4)


def test_what_is_no_sound_of_one_channel_is_told(tmp_path):
    assert "its 2 channels last" in say("audio", np.zeros((8000, 2)))
    assert "must be one-dimensional" in say("audio", [np.zeros((2, 8000))])
    assert "must be one-dimensional" in say("audio", torch.zeros(2, 2, 8000))
    assert "at least 25 ms" in say("audio", torch.zeros(399)) and len(row("audio", torch.zeros(400))) == 400
    assert "1 values that are not finite" in say("audio", [0.0, float("nan"), *[0.5] * 900])
    assert "list of sounds is empty" in say("audio", []) and "empty" in say("audio", torch.zeros(0, 400))
    assert "torch.bool" in say("audio", torch.ones(900, dtype=torch.bool))
    assert "complex" in say("audio", torch.ones(900, dtype=torch.complex64))
    for x in (None, 5, {"wave": WAVE}, object(), [None], Image.new("L", (3, 3)), ["a", "b"]):
        assert say("audio", x)
    assert "nowhere.wav: nowhere.wav is not there" in say("audio", "nowhere.wav")
    assert "is a folder" in say("audio", tmp_path)
    (tmp_path / "x.wav").write_bytes(b"RIFF, but no more")
    assert "x.wav: undecodable sound" in say("audio", tmp_path / "x.wav")


def test_a_sound_too_loud_for_its_variance_is_told():
    """In fp32 its features would be NaN, or zero: in arrays of any precision, files, and at other rates."""
    for x in (WAVE * 1e19, (WAVE * 5e37).astype(np.float32), WAVE.astype(np.float64) * 1e300):
        assert "must lie within -1e+15..1e+15; divide it by its largest" in say("audio", x)
        assert "is no sound" in say("audio", x, 44_100)
    for rate in (RATE, 44_100):
        assert "values up to 1.5e+38 is no sound" in say(
            "audio", wav(np.full(8000, 1.5e38, np.float32), rate)
        )
    with pytest.raises(ValueError, match="is no sound"):  # as training reads it: a bad sample
        SAMPLES["audio"].prepare(torch.full((8000,), 1e30))
    loud = row("audio", WAVE.astype(np.float64) * 1e14)
    torch.testing.assert_close(
        loud, F.layer_norm(torch.from_numpy(WAVE * 1e3), (8000,)), rtol=1e-4, atol=1e-4
    )


def test_numbers_of_every_kind_are_read():
    """As numpy has them, bytes of other kinds too; tensors that are no plain rows of numbers are told."""
    pcm = (WAVE * 3000).round() + 20_000
    expected = row("audio", pcm)
    for kind in (">f4", "<f8", "f2", np.longdouble, np.uint16, ">i4", np.uint32, np.uint64):
        torch.testing.assert_close(row("audio", pcm.astype(kind)), expected, rtol=2e-2, atol=2e-2)
    for kind in (np.uint8, np.int8):
        assert row("text", np.array([BOS, 7, EOS], kind)).tolist() == [BOS, 7, EOS]
    for kind in (np.uint16, np.uint32, np.uint64, ">i8"):
        ids = np.array([BOS, 700, EOS], kind)
        assert row("text", ids).tolist() == [BOS, 700, EOS]
    assert row("text", torch.tensor([BOS, 700, EOS]).to(torch.uint16)).tolist() == [BOS, 700, EOS]
    assert "the model's vocabulary" in say("text", np.array([0, 2**63], np.uint64))
    for kind in (bytes, bytearray, memoryview):
        assert torch.equal(row("audio", kind(wav(WAVE))), row("audio", wav(WAVE)))
        assert torch.equal(row("image", kind(png(PICTURE))), row("image", PICTURE))
        assert torch.equal(row("text", kind(b"seven")), row("text", "seven"))
    quantized = torch.quantize_per_tensor(torch.from_numpy(WAVE), 0.1, 0, torch.qint8)
    for x in (torch.from_numpy(WAVE).to_sparse(), quantized):
        assert "sparse or quantized" in say("audio", x)


def test_a_rate_that_cannot_be_is_told():
    assert "44099 has no common measure with 16000" in say("audio", WAVE, 44_099)
    assert "999983 has no common measure" in say("audio", wav(WAVE, 999_983))
    for rate in (0, -1, 44.1, "44100", True, 999, 1_000_001, float("nan"), float("inf")):
        assert f"rate={rate!r} must be a whole number" in say("audio", WAVE, rate)
    assert "a file, which says its own rate" in say("audio", wav(WAVE), 44_100)
    assert "rate=16000 belongs to sound" in say("image", Image.new("L", (3, 3)), RATE)
    assert "rate=16000 belongs to sound" in say("text", "a", RATE)


@pytest.mark.parametrize("seconds", [WINDOW_SECONDS, WINDOW_SECONDS + 0.02, 2 * WINDOW_SECONDS, 200.0])
def test_windows_of_a_long_sound_have_the_frames_of_the_whole(seconds):
    """None longer than a window, none short, equal to a frame; each begins where the frames before it end."""
    samples = SAMPLES["audio"]
    layers, sound = samples.config.conv_layers, torch.arange(int(seconds * RATE), dtype=torch.float32)
    parts = pieces(samples, sound)
    counts = [num_frames(len(part), layers) for part in parts]
    assert sum(counts) == num_frames(len(sound), layers)
    assert max(counts) <= num_frames(int(WINDOW_SECONDS * RATE), layers) and max(counts) - min(counts) <= 1
    begin = 0
    for part, count in zip(parts, counts, strict=True):
        assert int(part[0]) == begin * 320
        begin += count
    assert (len(parts) == 1) == (seconds == WINDOW_SECONDS)


def test_a_notice_tells_of_windows_and_of_cut_texts():
    long = inputs("audio").prepare(SAMPLES["audio"], np.zeros(int(2.5 * WINDOW_SECONDS * RATE), np.float32))
    assert long.notice == "150 s, encoded in 3 windows"
    assert inputs("audio").prepare(SAMPLES["audio"], WAVE).notice is None
    text = inputs("text").prepare(SAMPLES["text"], "seven " * 200)
    assert len(text.row) == 64 and text.notice.endswith(" tokens, cut to 64")
    assert inputs("text").prepare(SAMPLES["text"], "seven").notice is None


# ---- images ----

PIXELS = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_an_image_may_be_pil_pixels_a_file_or_its_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(png(PICTURE))
    expected = SAMPLES["image"].prepare(PICTURE)
    chw = torch.from_numpy(PIXELS).permute(2, 0, 1)
    given = [
        PICTURE,
        PIXELS,
        chw,
        png(PICTURE),
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        PIXELS[:, ::-1][:, ::-1],
    ]
    for x in given:
        assert torch.equal(row("image", x), expected)
    assert len(rows("image", given)) == len(given)


def test_an_image_that_is_normalised_already_is_taken_as_it_is():
    normalised = torch.randn(3, 32, 32)
    assert torch.equal(row("image", normalised), normalised)
    assert torch.equal(row("image", normalised.numpy()), normalised)
    assert torch.equal(row("image", normalised.double()), normalised)


def test_an_image_of_grey_or_with_alpha_is_made_rgb():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    expected = SAMPLES["image"].prepare(Image.fromarray(grey))
    for x in (grey, grey[:, :, None], torch.from_numpy(grey)[None]):
        assert torch.equal(row("image", x), expected)
    alpha = np.concatenate([PIXELS, np.full((20, 30, 1), 255, np.uint8)], axis=2)
    assert torch.equal(row("image", alpha), row("image", PIXELS))


def test_four_dimensions_are_a_batch_of_images():
    batch = np.stack([PIXELS, PIXELS[::-1]])
    expected = rows("image", [PIXELS, np.ascontiguousarray(PIXELS[::-1])])
    for x in (batch, torch.from_numpy(batch).permute(0, 3, 1, 2)):
        assert all(torch.equal(a, b) for a, b in zip(rows("image", x), expected, strict=True))


def test_what_is_no_image_is_told(tmp_path, caplog):
    assert "of shape (3, 5, 5) must be (3, 32, 32)" in say("image", torch.zeros(3, 5, 5))
    assert "must be (H, W) or (H, W, 3)" in say("image", np.zeros((5, 5, 7), np.uint8))
    assert "must be (3, H, W)" in say("image", torch.zeros(5, 5, 3, dtype=torch.uint8).permute(1, 2, 0)[:2])
    assert "pixels are uint8" in say("image", torch.zeros(3, 32, 32, dtype=torch.int64))
    assert "not finite" in say("image", torch.full((3, 32, 32), float("inf")))
    assert "list of images is empty" in say("image", []) and "empty" in say(
        "image", torch.zeros(0, 3, 32, 32)
    )
    for x in (
        None,
        5,
        "nowhere.png",
        {"pixels": PIXELS},
        [None],
        b"no picture",
        np.zeros((0, 3, 3), np.uint8),
    ):
        assert say("image", x)
    (tmp_path / "x.png").write_bytes(png(PICTURE)[:60])
    assert "x.png: undecodable image" in say("image", tmp_path / "x.png")
    assert "values up to 255 is not normalised" in say("image", np.full((3, 32, 32), 255.0))
    for value in (1e38, 1e300):
        assert "give pixels of 0..255 as uint8" in say("image", np.full((3, 32, 32), value))
    assert "is empty" in say("image", Image.new("RGB", (0, 4)))
    deep = Image.fromarray(np.full((4, 4), 70_000, np.int32))
    assert "whole numbers 70000..70000 must lie in 0..65535" in say("image", deep)
    assert "32-bit floats" in say("image", Image.fromarray(np.full((4, 4), np.nan, np.float32)))
    rows("image", torch.rand(3, 32, 32))
    assert "within 0..1" in caplog.text


# ---- text ----


def test_a_str_is_a_text_and_a_path_a_file(tmp_path):
    """Also where a file of that name lies."""
    text = "The digit seven.\n"
    (tmp_path / "a.txt").write_text(text)
    expected = [BOS, *SAMPLES["text"].encode(text)]
    for x in (text, text.encode(), tmp_path / "a.txt", expected, torch.tensor(expected), np.array(expected)):
        assert row("text", x).tolist() == expected
    assert row("text", str(tmp_path / "a.txt")).tolist() != expected


def test_a_batch_of_ids_may_be_padded():
    """Padding at the end is cut off; inside it is an error."""
    padded = torch.tensor([[BOS, 7, 8, EOS], [BOS, 9, EOS, PAD]])
    for x in (padded, padded.numpy(), padded.int(), padded.tolist()):
        assert [r.tolist() for r in rows("text", x)] == [[BOS, 7, 8, EOS], [BOS, 9, EOS]]
    assert "at their end alone" in say("text", [BOS, PAD, 9, EOS])
    assert "at their end alone" in say("text", [PAD, PAD])


def test_what_is_no_text_is_told():
    assert "without any text" in say("text", "") and "without any text" in say("text", b"")
    assert "list of texts is empty" in say("text", [])
    assert "must lie in 0..999, the model's vocabulary; there are 0..1000" in say("text", [0, 1000])
    assert "there are -1..2" in say("text", torch.tensor([-1, 2]))
    assert "whole token ids" in say("text", [0.0, 1.5]) and "torch.bool" in say("text", torch.tensor([True]))
    assert "can't decode" in say("text", b"\xff\xfe\xfd")
    assert "surrogates not allowed" in say("text", "half \ud800 a pair")
    for x in (None, 5, {"text": "a"}, [None], Image.new("L", (3, 3)), torch.zeros(0, dtype=torch.long)):
        assert say("text", x)
    assert "nowhere.txt is not there" in say("text", Path("nowhere.txt"))
